"""Watch and repair a network in a plain loop, with W&B offline: digits, at a learning rate that kills units.

python examples/04_plain_loop.py --remedy reset
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import wandb
from sklearn.datasets import load_digits
from torch import nn

from lightning_deadrelu import watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    parser.add_argument("--remedy", default=None)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels).long()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    run = wandb.init(project="dead-relu", mode="offline", dir=options.out)
    step = 0
    with watch(model, optimizer, every_n_steps=2, window=5, remedy=options.remedy, log=run.log) as monitor:
        for _ in range(options.epochs):
            for rows in torch.randperm(len(x)).split(64):
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.log({"loss": loss.item()}, step=step)
                monitor.step(loss)
                step += 1
    run.finish()
    for event in monitor.events:
        print(event)


if __name__ == "__main__":
    main()
