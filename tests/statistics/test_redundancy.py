"""Samples on which a layer is silent, and multiples of other units, against loops over raw activations."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn
from toys import batches
from two_ranks import ddp_trainer, on_two_ranks

from lightning_deadrelu import DeadReLUMonitor, find_dead_units
from lightning_deadrelu.model.rectifiers import WATCHPOINT, Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.remedies import Reset
from lightning_deadrelu.statistics import Rules, UnitHistory, UnitLiveness, count, judge
from lightning_deadrelu.statistics.counts import count_indices


def samples_of(x, dims):
    """List the numbers of each sample: of an image, or of a row where the last dimension holds units."""
    units = {dim % x.ndim for dim in dims}
    within = units if -1 in dims else {dim for dim in range(x.ndim) if dim >= min(units)}
    found = {}
    for index in itertools.product(*map(range, x.shape)):
        key = tuple(place for dim, place in enumerate(index) if dim not in within)
        found.setdefault(key, []).append(x[index].item())
    return found


def slow_multiples(columns):
    """Tell for each unit whether its outputs are a constant times those of a unit before, element by element."""
    found = []
    for number, column in enumerate(columns):
        fires = sum(h > 0 for h in column) >= 2
        found.append(fires and any(is_multiple(column, other) for other in columns[:number]))
    return found


def is_multiple(column, other):
    if [h > 0 for h in column] != [h > 0 for h in other]:
        return False
    ratios = [h / g for h, g in zip(column, other, strict=True) if g > 0]
    return bool(ratios) and max(ratios) - min(ratios) <= 1e-4 * max(ratios)


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((6, 2), (-1,)),
        ((2, 3, 2), (-1,)),
        ((2,), (-1,)),
        ((5, 2, 2), (-2,)),
        ((5, 2, 1, 2), (-3,)),
        ((2, 1, 2), (-3,)),
        ((2, 2, 5, 2), (-3, -1)),
    ],
)
@pytest.mark.parametrize("hinge", [0.0, 0.5])
def test_silent_samples_equal_a_loop_over_samples(shape, dims, hinge):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rectifier = Rectifier("threshold", hinge=hinge) if hinge else Rectifier("relu")
    told = count(x, x.clamp(min=hinge), dims, rectifier, redundancy=True)
    assert int(told.blind) == sum(all(z <= hinge for z in zs) for zs in samples_of(x, dims).values())


def test_padding_is_no_silent_sample_and_no_output():
    x = torch.tensor([[[1.0, 2.0], [-1.0, -1.0], [9.0, -9.0]], [[-2.0, -3.0], [3.0, 6.0], [-9.0, -9.0]]])
    valid = torch.tensor([[True, True, False], [True, True, False]])
    told = count(x, x.relu(), valid=valid, redundancy=True)
    assert int(told.blind) == 2
    bare = count(x[valid], x[valid].relu(), redundancy=True)
    assert int(bare.blind) == 2
    assert told.projection[1] / told.projection[0] == pytest.approx(2.0)


def test_what_is_no_number_is_not_silent():
    x = torch.tensor([[math.nan, -1.0], [-1.0, -1.0], [-1.0, math.nan]])
    assert int(count(x, x.relu(), redundancy=True).blind) == 1


def test_neither_is_counted_unless_somebody_asks():
    liveness = UnitLiveness({"act": 2})
    liveness.update(torch.tensor([[1.0, 2.0], [-1.0, -2.0], [2.0, 4.0]]))
    site = liveness.report().sites[0]
    assert site.blind_fraction is None
    assert not site.duplicate.any()
    told = count(torch.ones(2, 2), torch.ones(2, 2))
    assert (told.blind, told.projection) == (None, None)


@st.composite
def layers(draw):
    """Inputs of a layer in which some units are multiples of others, in any of three layouts."""
    seed, rows, units = draw(st.tuples(st.integers(0, 2**16), st.integers(1, 12), st.integers(1, 6)))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows * 4, units, generator=generator) - draw(st.sampled_from([-0.5, 0.0, 1.0]))
    for unit in range(units):
        if draw(st.booleans()):
            z[:, unit] = z[:, draw(st.integers(0, units - 1))] * draw(st.sampled_from([0.25, 1.0, 3.0, 7.3]))
    layout = draw(st.sampled_from(["rows", "channels", "positions"]))
    if layout == "rows":
        return z, z, (-1,)
    x = z.view(rows, 2, 2, units).permute(0, 3, 1, 2)
    return z, x.contiguous() if layout == "channels" else x, (-3,)


@given(layers())
def test_duplicates_are_those_of_a_loop_over_all_pairs(drawn):
    z, x, dims = drawn
    liveness = UnitLiveness({"act": z.shape[1]}, rules=Rules(redundancy=True))
    liveness.update(x, x.relu(), dims=dims)
    site = liveness.report().sites[0]
    assert site.duplicate.tolist() == slow_multiples(z.relu().T.tolist())


def test_the_order_of_outputs_tells_units_apart_that_have_the_same_numbers():
    x = torch.eye(4).repeat(3, 1) - 0.5  # each unit fires on a class of its own, as often and as high as the others
    liveness = UnitLiveness({"act": 4}, rules=Rules(redundancy=True))
    liveness.update(x)
    assert not liveness.report().sites[0].duplicate.any()


@given(st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_windows_on_any_number_of_ranks_are_judged_as_a_loop_over_all_rated_activations_does(
    seed, ranks, length, all_rates
):
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.tensor([0.0, 0.5, 1.0])
    window = [[torch.randn(3, 3, generator=generator) - shifts for _ in range(ranks)] for _ in range(length)]
    for calls in window:
        for x in calls:
            x[:, 2] = 2 * x[:, 0]
    rules = Rules(all_rates=all_rates, redundancy=True)
    metrics = [UnitLiveness({"act": 3}, window=length, rules=rules) for _ in range(ranks)]
    for number, calls in enumerate(window):
        for metric, x in zip(metrics, calls, strict=True):
            metric.observation = number
            metric.add(0, count(x, x.relu(), rates=metric.wants_rates(0), redundancy=metric.wants_redundancy))
    sums = sum(metric.totals().sums() for metric in metrics)
    maxima = torch.stack([metric.maxima for metric in metrics]).amax(0)
    totals = metrics[0].totals().merged(sums, maxima).to_host()
    site = judge(totals, UnitHistory.empty(), metrics[0].layout, rules)[0].sites[0]
    rated = window if all_rates or length == 1 else [window[0], window[-1]]
    rows = [row for calls in rated for x in calls for row in x.tolist()]
    assert site.blind_fraction == pytest.approx(sum(max(row) <= 0 for row in rows) / len(rows))
    assert site.duplicate.tolist() == slow_multiples(
        [[max(z, 0.0) for z in column] for column in zip(*rows, strict=True)]
    )


def test_latents_which_are_counted_on_every_observation_are_silent_on_a_share_of_all():
    metric, rows = UnitLiveness(window=3, rules=Rules(redundancy=True)), []
    metric.add_site(Site("latents", False, WATCHPOINT, (), 3))
    for number, silent in enumerate((1, 4, 2)):
        x = torch.ones(5, 3)
        x[:silent] = -1.0
        metric.observation = number
        metric.update(x)
        rows += x.tolist()
    (site,) = metric.report().sites
    assert site.blind_fraction == pytest.approx(sum(max(row) <= 0 for row in rows) / len(rows))


@pytest.mark.parametrize("masked", [False, True])
def test_indices_that_choose_nobody_are_silent_samples_and_units_chosen_as_often_are_no_multiples(masked):
    metric, silent, samples = UnitLiveness(window=2, rules=Rules(redundancy=True)), 0, 0
    metric.add_site(Site("experts", False, WATCHPOINT, (), 5))
    for number in range(2):
        chosen = torch.tensor([0, 1, 2, 3, -1, 7, 3, 2, 1, 0, -2, 5])
        valid = (torch.arange(12) % 3 > 0) if masked else None
        metric.observation = number
        metric.add(0, count_indices(chosen, 5, valid, redundancy=True))
        for place, unit in enumerate(chosen.tolist()):
            if not masked or place % 3:
                silent, samples = silent + (not 0 <= unit < 5), samples + 1
    (site,) = metric.report().sites
    assert site.samples == samples
    assert site.blind_fraction == pytest.approx(silent / samples)
    assert not site.duplicate.any()
    without = UnitLiveness(window=2, rules=Rules(redundancy=True))
    without.add_site(Site("experts", False, WATCHPOINT, (), 5))
    assert without.report().sites[0].blind_fraction is None  # nothing was seen


def test_an_audit_shows_both_and_wide_layers_have_neither():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 64), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [2.0]])), net[0].bias.zero_()
    report = find_dead_units(net, [torch.linspace(-1, 3, 400)[:, None]])
    narrow, wide = report.sites
    assert narrow.blind_fraction == pytest.approx(0.25, abs=0.005)
    assert narrow.duplicate.tolist() == [False, True]
    assert (wide.blind_fraction, int(wide.duplicate.sum())) == (0.0, 0)
    header, row = (next(line for line in str(report).splitlines() if word in line) for word in ("duplicate", " 25."))
    assert "blind" in header
    assert row.split()[0] == "1"
    assert report.to_dict()["sites"][0]["duplicate"] == [1]


class Twins(LightningModule):
    """Two units of four are multiples of others, and all are silent on half of the inputs."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        with torch.no_grad():
            self.layer.bias.zero_()
            self.layer.weight.copy_(torch.tensor([1.0, 2.0, 0.5, 4.0])[:, None] * torch.tensor([[1.0, -1, 2, 0.3]]))
            self.head.weight.zero_()

    def training_step(self, batch, batch_idx):
        return self.head(self.layer(batch).relu()).mean() * 0 + self.layer.bias.sum() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit_twins(rank):
    # nobody else asks for them
    remedy = Reset(blind=0.05, dry_run=True)
    monitor = DeadReLUMonitor(every_n_steps=1, window=3, min_samples=1, remedy=remedy)
    ddp_trainer(callbacks=[monitor]).fit(Twins(), batches(6, 8, seed=rank))
    return monitor.report.to_dict()["sites"][0]


@pytest.mark.ranks
def test_two_ranks_count_the_silent_samples_and_duplicates_of_both():
    rows = [torch.cat(list(batches(6, 8, seed=rank))[k : k + 1]) for rank in (0, 1) for k in (3, 5)]
    silent = sum(float(row @ torch.tensor([1.0, -1, 2, 0.3])) <= 0 for x in rows for row in x)
    for told in on_two_ranks(fit_twins):
        assert told["blind_fraction"] == pytest.approx(silent / 32)
        assert told["duplicate"] == [1, 2, 3]
