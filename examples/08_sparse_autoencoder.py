"""Train a TopK autoencoder on a network's activations, kill a third of its latents, and bring them back; W&B offline.

A reset is refused where latents compete; `remedy="auto"` goes on to what works, and says why.

python examples/08_sparse_autoencoder.py     three runs, seven minutes on one core
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import wandb
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_deadrelu import watch
from lightning_deadrelu.report.latents import latent_metrics

LATENTS, K = 192, 8
KILLED = LATENTS // 3


class SparseAutoencoder(nn.Module):
    """After Gao et al. 2024, arXiv 2406.04093."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(width))
        self.encoder, self.decoder = nn.Linear(width, LATENTS), nn.Linear(LATENTS, width, bias=False)
        with torch.no_grad():
            self.decoder.weight /= self.decoder.weight.norm(dim=0)
            self.encoder.weight.copy_(self.decoder.weight.T)
            self.encoder.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        before = self.encoder(x - self.mean)
        values, places = before.topk(K)
        latents = torch.zeros_like(before).scatter(-1, places, values.relu())
        return self.decoder(latents) + self.mean  # type: ignore[no-any-return]


class Outcome(NamedTuple):
    """How an autoencoder stands after training."""

    dead: int
    l0: float
    log_density: float
    unexplained: float
    events: tuple[object, ...]


def activations() -> Tensor:
    """Train a classifier of digits, and take what its hidden layer puts out, ten times with other noise."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels).long()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(20):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return torch.cat([model[:2](x + 0.05 * torch.randn_like(x)) for _ in range(10)])


def train(data: Tensor, steps: int, kill: bool, remedy: str | None, out: Path) -> Outcome:
    """Train, with a third of the latents killed after a third of the steps."""
    torch.manual_seed(1)
    model = SparseAutoencoder(data.shape[1])
    with torch.no_grad():
        model.mean.copy_(data.mean(0))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    run = wandb.init(project="dead-latents", mode="offline", dir=out, config={"kill": kill, "remedy": remedy})
    monitor = watch(
        model,
        optimizer,
        every_n_steps=1,
        window=50,
        min_samples=10_000,
        threshold=0.05,
        remedy=remedy,
        preset="sae",
        log=run.log,
    )
    with monitor:
        for step in range(steps):
            batch = data[torch.randint(len(data), (256,))]
            loss = (model(batch) - batch).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if kill and step == steps // 3 + 25:
                with torch.no_grad():
                    model.encoder.bias[:KILLED] -= 10.0
            run.log({"loss": loss.item()}, step=step)
            monitor.step(loss)
    run.finish()
    report = monitor.report
    assert report is not None
    told = latent_metrics(report)
    dead, l0, density = (
        told[f"dead_relu_sae/topk/{key}"] for key in ("dead_features", "l0", "mean_log10_feature_sparsity")
    )
    with torch.no_grad():
        left = (model(data) - data).square().sum() / (data - data.mean(0)).square().sum()
    return Outcome(int(dead), l0, density, float(left), monitor.events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = activations()
    arms: dict[str, tuple[bool, str | None]] = {"unharmed": (False, None), "killed": (True, None)}
    arms["killed, auto"] = (True, "auto")
    found = {name: train(data, options.steps, *arm, options.out) for name, arm in arms.items()}
    for event in found["killed, auto"].events:
        print(event)
    print(f"{'':14}{'dead of ' + str(LATENTS):>13}{'L0':>6}{'log10 density':>15}{'unexplained':>13}")
    for name, one in found.items():
        print(f"{name:14}{one.dead:13}{one.l0:6.1f}{one.log_density:15.2f}{one.unexplained:13.2%}")


if __name__ == "__main__":
    main()
