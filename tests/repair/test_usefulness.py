"""What a unit matters to the loss is the derivative of the loss with respect to a factor on its output."""

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import Log, Net, batches, fit, mlp

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.observe.probe import Probe
from lightning_deadrelu.remedies import BiasWarming
from lightning_deadrelu.repair.usefulness import TaylorShares, WindowSums, useful

RECTIFIERS = {"relu": F.relu, "in place": F.relu_, "module": nn.ReLU(), "clamp": lambda x: x.clamp(min=0)}


class Gated(nn.Module):
    """A layer whose outputs can be scaled unit by unit, once or for two calls."""

    def __init__(self, layer, head, rectifier, calls=1):
        super().__init__()
        self.layer, self.head, self.rectifier, self.calls = layer, head, rectifier, calls
        self.factor = None

    def forward(self, x):
        total = 0.0
        for call in range(self.calls):
            h = self.rectifier(self.layer(x + call))
            h = h if self.factor is None else h * self.factor
            total = total + self.head(h.flatten(1)).square().mean()
        return total


@pytest.mark.parametrize("rectifier", RECTIFIERS.values(), ids=RECTIFIERS)
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("convolution", [False, True])
def test_shares_are_derivatives_with_respect_to_a_factor(rectifier, calls, convolution):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3) if convolution else nn.Linear(4, 3)
    x = torch.randn(5, 2, 4, 4) if convolution else torch.randn(5, 4)
    model = Gated(layer, nn.Linear(12 if convolution else 3, 2), rectifier, calls).double()
    x, sites = x.double(), []
    with Probe(model, lambda site, *call: sites.append(site)):
        model(x)
    sums, probe = torch.zeros(3, dtype=torch.float64), Probe(model, lambda *call: None)
    probe.router.subscribe_calls(TaylorShares(sums, {sites[0]: slice(0, 3)}))
    with probe:
        loss = model(x)
    loss.backward()
    model.factor = torch.ones(3, dtype=torch.float64).view(-1, *[1] * 2 * convolution).requires_grad_()
    (wanted,) = torch.autograd.grad(model(x), model.factor)
    assert torch.allclose(sums, wanted.flatten())


def test_useful_is_what_reaches_a_tenth_of_the_median_live_unit():
    shares = torch.tensor([-10.0, 20.0, 30.0, 1.9, -2.1, 0.0])
    live = torch.tensor([True, True, True, False, False, False])
    assert useful(shares, live).tolist() == [True, True, True, False, True, False]
    assert useful(torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.bool)).tolist() == [False, True]


def test_units_that_came_back_are_judged_by_whether_they_matter_and_that_is_logged():
    torch.manual_seed(0)
    log, monitor = (
        Log(),
        DeadReLUMonitor(
            remedy=BiasWarming(steps=5), include=["net.1"], every_n_steps=1, window=4, min_samples=2, threshold=0.0
        ),
    )
    fit(Net(mlp(3)), batches(80, 8), monitor, logger=log)
    outcomes = [event for event in monitor.events if event.action in ("useful", "useless")]
    revived = next(event for event in monitor.events if event.action == "revived")
    assert outcomes[0].step - revived.step == 5 * 4
    assert outcomes[0].reason.endswith(" repaired units matter to the loss, 5 windows later")
    assert set(outcomes[0].useful) <= set(revived.units) == {0, 1, 2}
    logged = {step: metrics["dead_relu_details/useful_units"] for step, metrics in log.verdicts()}
    assert {step: number for step, number in logged.items() if number} == {
        event.step: len(event.useful) for event in outcomes if event.useful
    }
    assert sum(logged.values()) > 0


def test_sums_of_a_window_are_read_as_the_loss_and_each_sites_shares():
    sums, losses = WindowSums(), [1.0, 2.0, 6.0]
    sums.restart({"a": 2, "b": 3})
    for loss in losses:
        sums.note_loss(torch.tensor(loss))
    other_rank = torch.arange(8.0, dtype=torch.float64)
    loss, shares = sums.read(sums.values + torch.cat([torch.zeros(3), other_rank[3:]]))
    assert loss.mean == pytest.approx(statistics.fmean(losses))
    assert loss.std == pytest.approx(statistics.pstdev(losses))
    assert {name: one.tolist() for name, one in shares.items()} == {"a": [3.0, 4.0], "b": [5.0, 6.0, 7.0]}
    sums.restart({})
    assert sums.read(sums.values) == (None, {})
