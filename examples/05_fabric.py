"""Watch a network in a loop of Fabric, on one process or several that come to one verdict.

python examples/05_fabric.py --devices 2
"""

from __future__ import annotations

import argparse

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_deadrelu import watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels).long())
    fabric = Fabric(accelerator="cpu", devices=options.devices)
    fabric.launch()
    loader = fabric.setup_dataloaders(DataLoader(data, 64, shuffle=True))
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), 0.2, momentum=0.9))
    with watch(model, optimizer, every_n_steps=2, window=5, remedy="reset") as monitor:
        for _ in range(6):
            for x, y in loader:
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                fabric.backward(loss)
                optimizer.step()
                monitor.step(loss)
    if fabric.is_global_zero:
        print(*monitor.events, sep="\n")


if __name__ == "__main__":
    main()
