"""Promise 1: weights, optimizer state, random numbers and losses are the same bit for bit, watched or not."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import EVERYTHING, Net, assert_same, batches, fit, mlp

from lightning_deadrelu import DeadReLUMonitor

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*the Trainer has no logger", "ignore:.*get no gradient", "ignore:.*no rectifier ran"
)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.ReLU())
        self.head, self.reentrant = nn.Linear(8, 1), reentrant

    def forward(self, x):
        return self.head(checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant))


class GAN(Net):
    def __init__(self):
        super().__init__(nn.ModuleDict({"g": mlp(), "d": nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))}))
        self.automatic_optimization = False

    def forward(self, x):
        return self.net["g"](x)

    def training_step(self, batch, batch_idx):
        optimizer_g, optimizer_d = self.optimizers()
        g, d = self.net["g"], self.net["d"]
        for optimizer, sign, fake in ((optimizer_d, 1, g(batch).detach()), (optimizer_g, -1, g(batch))):
            loss = sign * (d(fake).sigmoid().mean() - d(batch[:, :1]).sigmoid().mean())
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.detach().clone())

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[name].parameters(), lr=0.01) for name in ("g", "d")]


def with_batch_norm():
    return Net(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 1)))


IDENTITY = {
    "plain": (Net, {}),
    "accumulated": (Net, {"accumulate_grad_batches": 3}),
    "autocast": (with_batch_norm, {"precision": "bf16-mixed"}),
    "dropout and batch norm": (with_batch_norm, {}),
    "checkpointed": (lambda: Net(Checkpointed(False)), {}),
    "checkpointed, reentrant": (lambda: Net(Checkpointed(True)), {}),
    "manual": (GAN, {}),
    "lbfgs": (lambda: Net(optimizer=torch.optim.LBFGS), {}),
    "clipped": (Net, {"gradient_clip_val": 0.1}),
}


def everything_after(build, options, *callbacks):
    """Train, and return all that watching must not change."""
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    model = build()
    loader = batches(11, shuffle=True)
    trainer = fit(model, loader, *callbacks, val=batches(2), max_epochs=2, **options)
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    rng = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    return model.state_dict(), optimizers, model.losses, rng


@pytest.mark.parametrize("settings", [EVERYTHING, {}], ids=["every step", "defaults"])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "lbfgs" else ()) for case in IDENTITY]
)
def test_watching_changes_no_bit(case, settings):
    build, options = IDENTITY[case]
    monitor = DeadReLUMonitor(**settings)
    assert_same(everything_after(build, options), everything_after(build, options, monitor))
    assert monitor.report.units
