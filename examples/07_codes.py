"""See the codes of a VQ autoencoder that no digit is nearest to, and draw them anew from what the encoder puts out.

python examples/07_codes.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_deadrelu import LivenessReport, Watchpoint, watch

CODES, WIDTH = 64, 8


class VQ(nn.Module):
    """A plain vector-quantised autoencoder (van den Oord et al. 2017, arXiv 1711.00937)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, WIDTH))
        self.decoder = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 64))
        self.codes = nn.Parameter(torch.randn(CODES, WIDTH))
        self.nearest = Watchpoint(CODES, indices=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encoder(x)
        codes = self.codes[self.nearest(torch.cdist(latents, self.codes).argmin(-1))]
        commitment = (codes - latents.detach()).square().mean() + 0.25 * (codes.detach() - latents).square().mean()
        return self.decoder(latents + (codes - latents).detach()), commitment


@torch.no_grad()
def draw_anew(model: VQ, report: LivenessReport, x: Tensor) -> None:
    """Put dead codes where latents are."""
    dead = report["nearest"].dead
    model.codes[dead] = model.encoder(x)[: int(dead.sum())]


def train(repairs: bool, x: Tensor) -> list[LivenessReport]:
    """Train, and return the verdicts."""
    torch.manual_seed(0)
    model = VQ()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    reports = []
    with watch(model, optimizer, every_n_steps=1, window=28, include=["watchpoint"]) as monitor:
        for _ in range(10):
            for rows in torch.randperm(len(x)).split(64):
                output, commitment = model(x[rows])
                loss = (output - x[rows]).square().mean() + commitment
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                report = monitor.step(loss)
                if report is not None:
                    reports.append(report)
                    if repairs:
                        draw_anew(model, report, x[rows])
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.parse_args()
    x = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    runs = {name: train(repairs, x) for name, repairs in {"left alone": False, "drawn anew": True}.items()}
    print(f"\n{'dead codes are':16}{'step':>6}{'dead':>6}{'used':>7}{'perplexity':>12}")
    for name, reports in runs.items():
        for report in reports[::3]:
            site = report["nearest"]
            print(f"{name:16}{report.step:6}{report.dead_units:6}{site.used_fraction:7.0%}{site.perplexity:12.1f}")


if __name__ == "__main__":
    main()
