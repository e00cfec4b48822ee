"""Muon starves units of a wide layer
==================================

**What happens.** Muon makes the update of each matrix orthogonal. For a matrix of more units than inputs, as the
first of a transformer's two MLP layers, that leaves the size of the rows open: a unit with small gradients gets a
small update. Its weights stay small, weight decay shrinks them further, and with them its gradients.

**How it looks.** No unit is dead; all fire as before. But a growing share is dormant: their activations are less than
a fortieth of the layer's mean. The updates of some rows are a tenth of the median row's and less.

Decay is 1 here, ten times that of Muon's default, so that 400 steps show what takes thousands otherwise.

**The cure.** AdamW for these matrices, here; or Muon with its rows normalised (NorMuon), which is in some packages.

**Sources.** arXiv 2606.27715; NorMuon, arXiv 2510.05491.

Run it: ``python examples/causes/muon_rows.py [--picture FILE.png]``
"""

from typing import cast

import torch
from common import Learner, Setup, adam, digits, rows, run
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

LEAST = 400  # steps


class Residual(nn.Module):
    """Two MLPs of squared ReLUs beside an identity, each behind a norm."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(width, units, bias=False) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(units, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(up(norm(x)).relu().square())
        out: Tensor = self.head(x)
        return out


class TwoOptimizers(Learner):
    """Muon for the MLPs, AdamW for the rest; or AdamW for all."""

    def __init__(self, net: Residual, muon: bool, lr: float) -> None:
        super().__init__(net, adam(1e-3))
        self.matrices = [*net.ups.parameters(), *net.downs.parameters()]
        self.automatic_optimization = False
        self.muon, self.lr = muon, lr

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        others = [p for p in self.parameters() if not any(p is matrix for matrix in self.matrices)]
        first: torch.optim.Optimizer = torch.optim.AdamW(self.matrices, 1e-3)
        if self.muon:
            first = torch.optim.Muon(self.matrices, self.lr, weight_decay=1.0)
        return [first, torch.optim.AdamW(others, 1e-3)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        matrices, others = cast(list[LightningOptimizer], self.optimizers())
        for optimizer in (matrices, others):
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in (matrices, others):
            optimizer.step()
        return loss


def build(cured: bool, *, seed: int = 0, width: int = 32, lr: float = 0.05, steps: int = LEAST) -> Setup:
    torch.manual_seed(seed)
    learner = TwoOptimizers(Residual(width, 4 * width), not cured, lr)
    batches = rows(*digits(), steps=max(steps, LEAST), seed=seed)
    return Setup(learner, batches, share=lambda report: report.fraction("dormant"), label="dormant units")


if __name__ == "__main__":
    run(build, __doc__)
