"""Promise 1: weights, optimizer state, random numbers and losses are the same bit for bit, watched or not."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch._higher_order_ops import map as mapped
from torch._higher_order_ops import scan, while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from toys import EVERYTHING, Net, assert_same, batches, fit, mlp

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.observe.watch import Watch


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


def stepped(carry, row, weight):
    new = torch.relu(carry @ weight + row)
    return new, new.clone()


def decayed(h):
    with torch.no_grad():
        return while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, torch.relu(h * 0.5)), (torch.tensor(0), h))[1]


def attended(h):
    q = h.detach().view(1, 2, -1, 4)  # on a CPU it has no backward
    return h + flex_attention(q, q, q).reshape(h.shape)


OPERATORS = {
    "cond": lambda h, layer: torch.cond(h.sum() > 0, lambda h: layer(h).relu(), lambda h: layer(h), (h,)),
    "scan": lambda h, layer: scan(lambda c, x: stepped(c, x, layer.weight), torch.zeros(8), h)[1],
    "map": lambda h, layer: mapped(lambda row: torch.relu(row @ layer.weight), h),
    "while_loop": lambda h, layer: layer(h) + decayed(h),
    "flex_attention": lambda h, layer: attended(layer(h)),
}


class WithOperator(nn.Module):
    """A model with an operator that takes functions, which use the model's parameters."""

    def __init__(self, operator):
        super().__init__()
        self.operator = OPERATORS[operator]
        self.inner, self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(torch.relu(self.operator(torch.relu(self.inner(x)), self.layer)))


def with_operator(operator, compiler):
    torch._dynamo.reset()
    model = WithOperator(operator)
    return Net(torch.compile(model, backend=compiler) if compiler else model)


@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("operator", "compiler"),
    [
        pytest.param(operator, compiler, marks=() if (operator, compiler) == ("cond", None) else pytest.mark.slow)
        for operator in OPERATORS
        for compiler in (None, "eager", "aot_eager")
    ],
)
def test_operators_that_take_functions_train_alike(operator, compiler):
    options = {"max_epochs": 1, "limit_val_batches": 0}

    def train(*callbacks):
        torch.manual_seed(3)
        net = with_operator(operator, compiler)
        fit(net, batches(4), *callbacks, **options)
        return net.state_dict(), net.losses

    monitors = DeadReLUMonitor(every_n_steps=1, window=2), DeadReLUMonitor(every_n_steps=2, window=1, name="other")
    assert_same(train(), train(*monitors))
    for monitor in monitors:
        assert len(monitor.report.sites) == 2
        assert [name for name in monitor.report.unwatched if operator in name] or operator == "flex_attention"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_unit_that_a_hidden_function_reads_is_not_said_to_be_read_by_layers_alone():
    model = WithOperator("map")
    watch = Watch(model)
    watch.trace()
    with watch:
        model(torch.randn(6, 4))
    assert "out of sight" in watch.attributions["relu"].no_outgoing
