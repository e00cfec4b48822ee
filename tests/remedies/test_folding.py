"""Units of a layer that leaves samples out are freed with as little change as can be, and fire where it is silent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from toys import Loader, fit
from two_ranks import ddp_trainer, on_two_ranks
from views import seeded

from lightning_deadrelu import DeadReLUMonitor, find_dead_units
from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.remedies import LEVELS, InitDistribution, Reset, SiteView

EAGER = {"every_n_steps": 1, "window": 5, "min_samples": 100, "threshold": 0.0}


def net_of(weight, bias, readers, hidden=()):
    """A layer, what reads it, and in between nothing but a ReLU."""
    weight, bias, readers = (torch.as_tensor(one, dtype=torch.float32) for one in (weight, bias, readers))
    net = nn.Sequential(nn.Linear(*weight.T.shape), nn.ReLU(), nn.Linear(*readers.T.shape))
    with torch.no_grad():
        net[0].weight.copy_(weight), net[0].bias.copy_(bias), net[2].weight.copy_(readers)
    return net


def view_of(net, inputs):
    """What a remedy is shown of the layer, where its live units are asked about."""
    report = find_dead_units(net, [inputs]).sites[0]
    units = torch.arange(report.units)
    rows = {name: Slice(f"0.{name}", name, units, units[:, None], (0,)) for name in ("weight", "bias")}
    reader = Slice("2.weight", "reader", units, units[:, None], (1,))
    live = ~report.silent & ~report.frozen
    quantiles = torch.zeros(len(LEVELS), report.units, dtype=torch.float64)
    laws = {"0.weight": InitDistribution(0.0, 1.0, False), "0.bias": InitDistribution(0.0, 0.0, False)}
    attribution = Attribution((rows["weight"], rows["bias"]), (reader,))
    return SiteView(report, live, attribution, dict(net.state_dict()), laws, quantiles, inputs=inputs.double())


def treated(net, inputs, blind=0.05):
    """Carry out what a reset proposes; return which units were freed."""
    view, remedy = view_of(net, inputs), Reset(blind=blind)
    freed = remedy.to_free(view)
    if freed.any():
        state = net.state_dict()
        view = SiteView(view.report, freed, *(getattr(view, name) for name in ("attribution", "values", "laws")),
                        view.quantiles, inputs=view.inputs)  # fmt: skip
        for slice_, values in remedy.propose(view, seeded()).writes:
            slice_.write_(state[slice_.name], values)
    return freed


def silent_share(net, inputs):
    return float((net[0](inputs) <= 0).all(1).float().mean())


@given(st.integers(0, 2**16), st.integers(2, 6), st.integers(1, 4))
def test_multiples_of_other_units_are_freed_and_the_output_changes_by_nothing(seed, units, features):
    generator = torch.Generator().manual_seed(seed)
    weight, readers = torch.randn(units, features, generator=generator), torch.randn(3, units, generator=generator)
    twin = int(torch.randint(units - 1, (), generator=generator)) + 1
    weight[twin], bias = 3.0 * weight[0], torch.randn(units, generator=generator) * 0.1
    bias[twin] = 3.0 * bias[0]
    net, inputs = net_of(weight, bias, readers), torch.randn(256, features, generator=generator)
    if net[1](net[0](inputs)).sum(0).min() < 1:  # of what hardly fires, rounding is a large part
        return
    before = net(inputs).detach()
    freed = treated(net, inputs, blind=0.99)
    assert freed.nonzero().flatten().tolist() == [twin]
    assert torch.allclose(net(inputs), before, atol=1e-4 * float(before.abs().max() + 1))
    assert net[2].weight[:, twin].eq(0).all()
    assert not find_dead_units(net, [inputs]).sites[0].duplicate.any()


@given(st.integers(0, 2**16), st.integers(2, 5))
def test_the_unit_is_freed_without_which_the_output_changes_least(seed, units):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(200, 1, generator=generator) * 2 - 1
    knees = torch.rand(units, generator=generator) * 0.8
    weight = torch.rand(units, 1, generator=generator) + 0.5  # all fire on the right alone
    net = net_of(weight, -knees * weight[:, 0], torch.randn(2, units, generator=generator))
    out = net[1](net[0](inputs)).detach().double()
    if not (out > 0).any(0).all():
        return
    changes = {}
    for unit in range(units):
        for other in range(units):
            if other != unit:
                share = torch.linalg.lstsq(out[:, [other]], out[:, unit]).solution
                lost = out[:, unit] - share * out[:, other]
                if lost.square().sum() <= 0.3 * out[:, unit].square().sum():
                    change = float((lost[:, None] * net[2].weight[:, unit].detach().double()).square().sum())
                    changes[unit] = min(changes.get(unit, torch.inf), change)
    freed = treated(net, inputs)
    assert int(freed.sum()) == (len(changes) > 0)
    if changes:
        assert changes[int(freed.nonzero())] <= min(changes.values()) * (1 + 1e-6)
        assert silent_share(net, inputs) < 0.5


def test_no_unit_is_freed_that_is_like_no_other():
    inputs = torch.linspace(-1, 1, 200)[:, None]
    net = net_of([[1.0], [-1.0]], [-0.1, -0.1], [[1.0, 1.0]])  # |x|, but for a gap around 0
    assert silent_share(net, inputs) == pytest.approx(0.1, abs=0.02)
    assert not treated(net, inputs).any()


def test_the_new_unit_fires_where_the_layer_was_silent_and_is_not_read_yet():
    inputs = torch.linspace(-1, 1, 200)[:, None]
    net = net_of([[1.0], [2.0]], [0.0, -0.4], [[1.0, -0.5]])
    silent = (net[0](inputs) <= 0).all(1)
    assert float(silent.float().mean()) == pytest.approx(0.5, abs=0.01)
    freed = treated(net, inputs)
    assert freed.sum() == 1
    assert (net[0](inputs)[silent] > 0).any(1).float().mean() > 0.9
    assert net[2].weight[:, freed].eq(0).all()
    assert net(inputs)[silent].std() < 1e-6


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        (torch.cat([torch.full((150, 1), -1.0), torch.linspace(0.1, 1, 50)[:, None]]), "the input does not vary there"),
        (torch.linspace(0.5, 1, 200)[:, None], "a unit fires everywhere"),
        (torch.linspace(-1, -0.5, 200)[:, None], "the layer is dead"),
    ],
)
def test_nothing_is_freed_where_it_would_not_help(inputs, why):
    net = net_of([[1.0], [2.0]], [0.0, -0.1], [[1.0, -0.5]])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert not treated(net, inputs).any(), why
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Fitted(LightningModule):
    """Learns a function of one or two numbers with a narrow layer that starts blind."""

    def __init__(self, net, target):
        super().__init__()
        self.net, self.target = net, target

    def training_step(self, batch):
        return (self.net(batch)[:, 0] - self.target(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def blind_start(features):
    """All units of the layer fire on one half of the inputs."""
    torch.manual_seed(0)
    weight = torch.rand(2 * features, features) * 0.2 + 0.9
    return net_of(weight, torch.full((2 * features,), -0.3), torch.randn(1, 2 * features))


def target(x):
    return x.abs().sum(1)


def fitted(remedy, features, steps=200):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=remedy, **EAGER)
    monitor.all_rates = True  # blind samples too, which without `blind` nobody counts
    model = Fitted(blind_start(features), target)
    data = [torch.rand(64, features, generator=seeded(step)) * 2 - 1 for step in range(steps)]
    fit(model, Loader(data), monitor, max_epochs=-1, max_steps=steps)
    return monitor


@pytest.mark.slow
@pytest.mark.parametrize("features", [1, 2])
def test_a_layer_that_is_helped_leaves_few_samples_out(features):
    watched, monitor = fitted(Reset(), features), fitted(Reset(blind=0.05), features)
    assert [event.action for event in monitor.events if "no unit fires on" in event.reason] == ["edited"]
    assert monitor.report.sites[0].blind_fraction < 0.5 * watched.report.sites[0].blind_fraction


def test_a_layer_rests_and_a_site_that_cannot_be_helped_is_told_nothing_of():
    monitor = fitted(Reset(blind=0.05), 1, steps=60)
    assert [event.action for event in monitor.events if "no unit" in event.reason] == ["edited"]
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1))
    with torch.no_grad():
        conv[1].weight.fill_(1.0), conv[1].bias.fill_(-0.3)
    watcher = DeadReLUMonitor(remedy=Reset(blind=0.05), unit_dims={"net.2": 1}, **EAGER)
    model = Fitted(conv, target)
    fit(model, Loader([torch.rand(64, 2, generator=seeded(step)) * 2 - 1 for step in range(30)]), watcher)
    assert watcher.report.sites[0].blind_fraction > 0.1
    assert watcher.events == ()


def fit_on(rank):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=Reset(blind=0.05), **EAGER)
    model = Fitted(blind_start(1), target)
    rows = torch.rand(640, 1, generator=seeded(rank)) * 2 - 1
    ddp_trainer(callbacks=[monitor]).fit(model, DataLoader(rows, batch_size=32))
    return [(event.step, event.action, event.units) for event in monitor.events], model.net.state_dict()


@pytest.mark.ranks
def test_two_ranks_free_the_same_unit_and_end_bit_equal():
    (events, net), (others, other) = on_two_ranks(fit_on)
    assert events == others
    assert "edited" in {action for _, action, _ in events}
    assert all(torch.equal(value, other[name]) for name, value in net.items())
