"""See the experts of a mixture that get no more digits, with and without a loss that balances them.

python examples/06_experts.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_deadrelu import LivenessReport, Watchpoint, watch

EXPERTS = 16


class Mixture(nn.Module):
    """Send each digit to the expert that the router likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 64, 32) / 8)
        self.down = nn.Parameter(torch.randn(EXPERTS, 32, 10) / 6)
        self.experts = Watchpoint(EXPERTS, indices=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        best, places = scores.max(-1)
        places = self.experts(places)
        hidden = torch.einsum("bi,bij->bj", x, self.up[places]).relu()
        load = nn.functional.one_hot(places, EXPERTS).float().mean(0)
        balance = EXPERTS * (load * scores.mean(0)).sum()  # Fedus et al. 2021, arXiv 2101.03961
        return torch.einsum("bj,bjk->bk", hidden, self.down[places]) * best[:, None], balance


def train(weight: float, x: Tensor, y: Tensor) -> list[LivenessReport]:
    """Train with some weight of the balancing loss, and return the verdicts."""
    torch.manual_seed(0)
    model = Mixture()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    reports = []
    with watch(model, optimizer, every_n_steps=1, window=28, include=["watchpoint"]) as monitor:
        for _ in range(10):
            for rows in torch.randperm(len(x)).split(64):
                output, balance = model(x[rows])
                loss = nn.functional.cross_entropy(output, y[rows]) + weight * balance
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                reports.append(monitor.step(loss))
    return [report for report in reports if report is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels).long()
    found = {f"balance x {weight}": train(weight, x, y) for weight in (0.0, 0.1)}
    print(f"{'loss':14}{'step':>6}{'dead experts':>14}{'perplexity':>12}{'largest violation':>19}")
    for name, reports in found.items():
        for report in reports[::3]:
            site = report["experts"]
            numbers = f"{report.step:6}{report.dead_units:14}{site.perplexity:12.1f}{site.largest_violation:19.1f}"
            print(f"{name:14}{numbers}")


if __name__ == "__main__":
    main()
