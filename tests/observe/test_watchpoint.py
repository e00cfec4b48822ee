"""Units made of what passes: latents and gates, and the numbers of experts and codes."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import resumed_and_whole
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import Loader, Log, Net, Verdicts, assert_same, fit, reports_of, tensors, watchers
from two_ranks import ddp_trainer, on_two_ranks

from lightning_deadrelu import DeadReLUMonitor, Watchpoint, find_dead_units, watch

OFTEN = {"every_n_steps": 1, "window": 4, "min_samples": 1}


class TopK(nn.Module):
    """A sparse autoencoder, of whose latents the last three can never be chosen."""

    def __init__(self, watched=True):
        super().__init__()
        self.up, self.down = nn.Linear(4, 10), nn.Linear(10, 4)
        self.latents = Watchpoint(10) if watched else nn.Identity()
        with torch.no_grad():
            self.up.bias[7:] = -100.0

    def forward(self, x):
        values, places = self.up(x).sort(-1, descending=True)  # with `topk` it would be a site of its own
        return self.down(self.latents(torch.zeros(*x.shape[:-1], 10).scatter(-1, places[..., :2], values[..., :2])))


class Routed(nn.Module):
    """A mixture of six experts, of which two are chosen; the last two never are."""

    def __init__(self, watched=True):
        super().__init__()
        self.router = nn.Linear(4, 6)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)) for _ in range(6))
        self.chosen = Watchpoint(6, indices=True) if watched else nn.Identity()
        with torch.no_grad():
            self.router.bias[4:] = -100.0

    def forward(self, x):
        weights, places = self.router(x).softmax(-1).topk(2)
        places = self.chosen(places)
        outputs = torch.cat([expert(x) for expert in self.experts], -1)
        return (outputs.gather(-1, places) * weights).sum(-1, keepdim=True)


BUILDS = {"activations": (TopK, "net.latents", 10), "indices": (Routed, "net.chosen", 6)}


def brute(build, batches):
    """Count by hand how often each unit was chosen: look at what passes, and add up."""
    module, name, units = BUILDS[build]
    counts, elements = [0] * units, 0
    torch.manual_seed(0)
    model = Net(module(), lr=0.0)
    point = model.get_submodule(name)

    def look(_, args):
        nonlocal elements
        for row in args[0].reshape(-1, units).tolist() if build == "activations" else args[0].reshape(-1, 1).tolist():
            elements += 1
            for unit, value in enumerate(row) if build == "activations" else [(int(row[0]), 1)]:
                counts[unit] += value != 0

    point.register_forward_pre_hook(look)
    for batch in batches:
        model(batch)
    return counts, elements


# -- verdicts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS)
def test_a_site_has_all_that_a_rectifier_has(build):
    module, name, units = BUILDS[build]
    batches, log = tensors(8), Log()
    torch.manual_seed(0)
    callback = Verdicts(**{**OFTEN, "window": 8})
    fit(Net(module(), lr=0.0), Loader(batches), callback, logger=log)
    counts, elements = brute(build, batches)
    site = callback.report[name]
    assert (site.kind, site.units, site.elements, site.samples) == ("watchpoint", units, elements, elements)
    assert site.fired.tolist() == counts
    assert site.dead.tolist() == [count == 0 for count in counts]
    assert site.born_dead.equal(site.dead)
    assert site.age[site.dead].unique().tolist() == [elements]
    assert site.firing_rate.tolist() == pytest.approx([count / elements for count in counts])
    assert site.rate_bound[-1] == pytest.approx(1 - 0.05 ** (1 / elements))
    assert log.verdicts()[-1][1][f"dead_relu_sites/{name}"] == site.dead_fraction
    assert callback.run_report.history.sites[name].states.shape[0] == units
    assert name in callback.summary()
    assert name in str(callback.report)


@pytest.mark.parametrize("build", BUILDS)
def test_an_audit_agrees(build):
    torch.manual_seed(0)
    model = Net(BUILDS[build][0]())
    report = find_dead_units(model, tensors(8), min_samples=1)
    assert report[BUILDS[build][1]].fired.tolist() == brute(build, tensors(8))[0]


@given(st.lists(st.lists(st.integers(-2, 8), min_size=1, max_size=9), min_size=1, max_size=4))
def test_what_is_told_of_a_codebook_equals_a_loop(batches):
    point = Watchpoint(7, indices=True)
    report = find_dead_units(nn.Sequential(point), [torch.tensor(batch) for batch in batches], min_samples=1)
    chosen = [code for batch in batches for code in batch]
    counts = [chosen.count(code) for code in range(7)]
    site, known = report["0"], sum(counts)
    assert site.fired.tolist() == counts
    assert site.elements == len(chosen)
    assert site.dead.tolist() == [count == 0 for count in counts]
    assert site.used_fraction == pytest.approx(len({code for code in chosen if 0 <= code < 7}) / 7)
    entropy = -sum(count / known * math.log(count / known) for count in counts if count)
    assert site.perplexity == pytest.approx(math.exp(entropy) if known else 0.0)
    if known:
        assert site.largest_violation == pytest.approx((max(counts) - known / 7) / (known / 7))
    else:
        assert math.isnan(site.largest_violation)


GATES = {
    "not zero": ({}, torch.tensor([[0.0, -0.1, 0.7], [0.0, 0.0, 0.2]]), [0, 1, 2]),
    "above": ({"threshold": 0.5}, torch.tensor([[0.0, -0.9, 0.7], [0.5, 0.6, 0.2]]), [0, 1, 1]),
    "booleans": ({}, torch.tensor([[True, False, True], [False, False, True]]), [1, 0, 2]),
    "numbers": ({}, torch.tensor([[3, 0, -1], [0, 0, 2]]), [1, 0, 2]),
    "half": ({"threshold": 0.25}, torch.tensor([[0.5, 0.25, 0.0]], dtype=torch.bfloat16), [1, 0, 0]),
}


@pytest.mark.parametrize("case", GATES)
def test_a_unit_fires_where_it_is_not_zero_or_above_the_threshold(case):
    options, x, fired = GATES[case]
    report = find_dead_units(nn.Sequential(Watchpoint(3, **options)), [x], min_samples=1)
    assert report["0"].fired.tolist() == fired


def test_nan_is_no_silence():
    x = torch.tensor([[0.0, math.nan], [0.0, 0.0]])
    site = find_dead_units(nn.Sequential(Watchpoint(2)), [x], min_samples=1)["0"]
    assert site.dead.tolist() == [True, False]
    assert site.nonfinite.tolist() == [False, True]


@pytest.mark.parametrize("indices", [True, False])
def test_padding_is_not_counted(indices):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.point = nn.Linear(4, 3), Watchpoint(3, indices=indices)

        def forward(self, x, mask):
            scores = self.inner(x)
            self.point(scores.argsort(-1)[..., :2] if indices else scores)
            return scores

    model = Tagger()
    valid = torch.arange(5).expand(2, 5) < torch.tensor([[5], [2]])
    with watch(model, optimizer := torch.optim.SGD(model.parameters(), 0.0), **OFTEN, mask=lambda b: b["mask"]) as one:
        for _ in range(4):
            model(torch.randn(2, 5, 4), mask=valid).sum().backward()
            optimizer.step()
            one.step()
    assert one.report["point"].samples == 4 * 7 * (2 if indices else 1)


# -- nothing changes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS)
def test_training_is_the_same_with_a_point_with_a_monitor_and_without(build):
    module = BUILDS[build][0]

    def everything_after(watched, *callbacks):
        torch.manual_seed(0)
        model = Net(module(watched))
        trainer = fit(model, Loader(tensors(12)), *callbacks)
        return model.state_dict(), trainer.optimizers[0].state_dict(), model.losses, torch.get_rng_state()

    monitor = DeadReLUMonitor(**OFTEN, remedy="reset", gradient_evidence=True, checkup=True)
    plain = everything_after(False)
    assert_same(everything_after(True), plain)
    assert_same(everything_after(True, monitor)[3], plain[3])
    assert_same(everything_after(True, DeadReLUMonitor(**OFTEN)), plain)
    assert watchers() == []


def test_rectifiers_around_a_point_are_named_and_traced_as_without_it():
    def report_of(*between):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 8), nn.ReLU(), *between, nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)]
        monitor = DeadReLUMonitor(**OFTEN, remedy="reset")
        fit(Net(nn.Sequential(*layers)), Loader(tensors(8)), monitor)
        return monitor

    monitor, without = report_of(Watchpoint(8)), report_of(nn.Identity())
    assert [site.name for site in monitor.report.sites] == ["net.1", "net.2", "net.4"]
    assert monitor.report["net.2"].age.equal(monitor.report["net.1"].age)
    assert str(monitor.attribution["net.1"]) == str(without.attribution["net.1"])
    assert monitor.attribution["net.2"].no_incoming == "it is a watchpoint, which is watched and never repaired"


def test_no_remedy_touches_it_and_its_deaths_are_explained_by_nobody():
    seen = []

    class Guard(DeadReLUMonitor):
        def on_verdict(self, trainer, pl_module, report):
            seen.append(report["net.latents"].dead_fraction)

    torch.manual_seed(0)
    monitor = Guard(**OFTEN, remedy=["reset", "gelu"])
    fit(Net(TopK()), Loader(tensors(12)), monitor)
    assert monitor.failure is None
    assert len(seen) == 3
    assert min(seen) >= 0.3
    assert monitor.events == ()
    assert monitor.deaths == ()
    assert monitor.report.dead_units >= 3


def test_a_recomputed_forward_is_not_counted_twice():
    class Checkpointed(TopK):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    monitor = DeadReLUMonitor(**OFTEN)
    fit(Net(Checkpointed()), Loader(tensors(4)), monitor)
    assert monitor.report["net.latents"].samples == 20


def test_a_compiled_model_is_observed_eagerly():
    torch.manual_seed(0)
    model = TopK()
    compiled = torch.compile(model, backend="aot_eager")
    with watch(compiled, optimizer := torch.optim.SGD(model.parameters(), 0.0), **OFTEN) as monitor:
        for batch in tensors(8):
            compiled(batch).sum().backward()
            optimizer.step()
            monitor.step()
    assert monitor.failure is None
    assert monitor.report["latents"].samples == 20
    assert monitor.report["latents"].fired.sum() == 2 * 20


# -- several ranks, resume, copies ---------------------------------------------------------------------------------


def halves(rank):
    return [batch[rank::2] for batch in tensors(10)]


def fit_on(rank, build):
    torch.manual_seed(0)
    monitor = Verdicts(**{**OFTEN, "min_samples": 5})
    ddp_trainer(callbacks=[monitor]).fit(Net(BUILDS[build][0](), lr=0.0), Loader(halves(rank)))
    return reports_of(monitor), monitor.report[BUILDS[build][1]].fired.tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("build", BUILDS)
def test_two_ranks_count_what_one_process_counts(build):
    first, second = on_two_ranks(fit_on, build)
    assert first == second
    assert first[1] == brute(build, tensors(10)[8:])[0]  # in the last window, which is open
    site = next(site for site in first[0][-1]["sites"] if site["name"] == BUILDS[build][1])
    assert set(site["dead"]) >= ({7, 8, 9} if build == "activations" else {4, 5})


@pytest.mark.parametrize("build", BUILDS)
def test_a_run_goes_on_as_if_it_had_not_ended(build):
    module, name, _ = BUILDS[build]
    torch.manual_seed(0)
    later, whole = resumed_and_whole(module(), tensors(12), **{**OFTEN, "min_samples": 30})
    assert_same(later.to_dict(), whole.to_dict())
    assert later[name.removeprefix("net.")].dead.any()


def test_it_is_copied_pickled_scripted_and_told():
    point = Watchpoint(5, threshold=0.5)
    for other in (copy.deepcopy(point), pickle.loads(pickle.dumps(point))):
        assert repr(other) == "Watchpoint(5, threshold=0.5)"
        x = torch.randn(3, 5)
        assert other(x) is x
    assert repr(Watchpoint(5, indices=True)) == "Watchpoint(5, indices=True)"
    assert point.state_dict() == {}


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"units": 0}, r"`Watchpoint\(units=0\)`.*Try `units=64`"),
        ({"units": 4, "threshold": "x"}, r"`Watchpoint\(threshold='x'\)`.*finite number"),
        ({"units": 4, "threshold": 0.1, "indices": True}, r"`Watchpoint\(threshold=0.1\)`.*indices have none"),
        ({"units": 4, "indices": 1}, r"`Watchpoint\(indices=1\)`"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Watchpoint(**arguments)


@pytest.mark.parametrize(
    ("point", "x", "reason"),
    [
        (Watchpoint(4), torch.ones(2, 3), "its last dimension holds 3 units, and `Watchpoint(4)` expects 4"),
        (Watchpoint(4, indices=True), torch.ones(2), "it is passed torch.float32, which is no type of indices"),
        (Watchpoint(4), {"x": 1}, "it is passed no plain tensor"),
    ],
)
def test_what_cannot_be_watched_is_listed_with_its_reason(point, x, reason):
    model = nn.ModuleDict({"point": point})
    report = find_dead_units(model, [x], forward=lambda model, batch: model["point"](batch))
    assert report.sites == ()
    assert report.unwatched["point"].startswith(reason)


def test_a_point_that_has_not_run_is_listed():
    model = nn.ModuleDict({"used": Watchpoint(2), "idle": Watchpoint(2)})
    report = find_dead_units(model, [torch.ones(1, 2)], forward=lambda model, batch: model["used"](batch))
    assert report.unwatched == {"idle": "it has not run while observed"}
    only = find_dead_units(
        model, [torch.ones(1, 2)], include=["watchpoint"], forward=lambda model, batch: model["used"](batch)
    )
    assert [site.name for site in only.sites] == ["used"]
