"""Every statistic against a slow, independent loop over single numbers."""

import copy
import json
import math
import pickle
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn import functional as F

from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.statistics import (
    LivenessReport,
    Rules,
    Totals,
    UnitHistory,
    UnitLiveness,
    count,
    dormancy_of,
    judge,
)
from lightning_deadrelu.statistics.judge import _least_usual
from lightning_deadrelu.statistics.totals import narrowed

RELU = Rectifier("relu", plain=True)
RECTIFIERS = {
    "relu": (RELU, torch.relu),
    "relu6": (Rectifier("relu6", cap=6.0, plain=True), F.relu6),
    "hardtanh": (Rectifier("hardtanh", cap=1.0, plain=True), lambda x: F.hardtanh(x, 0, 1)),
    "threshold": (Rectifier("threshold", hinge=0.5), lambda x: F.threshold(x, 0.5, -2.0)),
    "hardswish": (Rectifier("hardswish", hinge=-3.0), F.hardswish),
}


def slow_units(x, dims):
    """Yield, for each unit, the list of its inputs in order, by walking every index."""
    sizes = [x.shape[d] for d in dims]
    units = [[] for _ in range(math.prod(sizes))]
    for index in torch.cartesian_prod(*[torch.arange(n) for n in x.shape]).view(-1, x.ndim).tolist():
        number = 0
        for d, size in zip(dims, sizes, strict=True):
            number = number * size + index[d]
        units[number].append(x[tuple(index)].item())
    return units


@pytest.mark.parametrize("kind", RECTIFIERS)
@pytest.mark.parametrize(
    ("shape", "dims", "samples"),
    [
        ((5, 4), (-1,), 5),
        ((4,), (-1,), 1),
        ((2, 3, 4), (-1,), 6),
        ((2, 4, 3), (-2,), 2),
        ((2, 4, 3, 3), (-3,), 2),
        ((4, 3, 3), (-3,), 1),
        ((2, 4, 2, 2, 2), (-4,), 2),
        ((2, 3, 5, 4), (-3, -1), 10),
        ((1, 4), (-1,), 1),
    ],
)
def test_count_equals_a_loop_over_single_numbers(kind, shape, dims, samples):
    rectifier, function = RECTIFIERS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4
    counts = count(x, function(x), dims, rectifier)
    inputs, outputs = slow_units(x, dims), slow_units(function(x), dims)
    assert counts.samples == samples
    assert counts.elements == len(inputs[0])
    assert counts.fired.tolist() == [sum(z > rectifier.hinge for z in zs) for zs in inputs]
    assert counts.peak.tolist() == pytest.approx([max(zs) - rectifier.hinge for zs in inputs], rel=1e-6)
    assert counts.magnitude.tolist() == pytest.approx([sum(map(abs, hs)) for hs in outputs], rel=1e-5)
    assert counts.trough.tolist() == pytest.approx([min(zs) - rectifier.hinge for zs in inputs], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_count_is_exact_in_every_precision(dtype):
    x = torch.randn(3000, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert count(x, x.relu()).fired.tolist() == [sum(z > 0 for z in column) for column in x.T.tolist()]


def test_the_smallest_positive_number_fires():
    x = torch.tensor([[5e-324, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    metric = UnitLiveness({"relu": 2}, rules=Rules(1))
    metric.update(x)
    assert metric.report().sites[0].silent.tolist() == [False, True]


def test_not_a_number_is_not_silence_and_infinity_is_noted():
    x = torch.tensor([[math.nan, -math.inf, math.inf, -1.0], [-1.0, -1.0, -1.0, -1.0]])
    metric = UnitLiveness({"relu": 4}, rules=Rules(1))
    metric.update(x)
    site = metric.report()["relu"]
    assert site.silent.tolist() == [False, True, False, True]
    assert site.nonfinite.tolist() == [True, True, True, False]
    assert site.dead.tolist() == [False, True, False, True]
    assert site.judged.tolist() == [False, True, True, True]
    assert site.dormancy.isfinite().all()


def test_not_a_number_does_not_stick():
    metric = UnitLiveness({"relu": 1}, rules=Rules(1))
    metric.update(torch.tensor([[math.nan]]))
    metric.update(torch.tensor([[2.0]]))
    site = metric.report()["relu"]
    assert (site.peak.item(), site.judged.item(), site.nonfinite.item()) == (2.0, True, True)


def test_a_unit_that_fires_beside_a_not_a_number_is_alive():
    metric = UnitLiveness({"relu": 2}, window=2, rules=Rules(99))
    for number in range(2):
        metric.observation = number
        x = torch.ones(50, 2)
        x[7, 0] = math.nan
        metric.update(x)
    site = metric.report()["relu"]
    assert site.age.tolist() == [0, 0]
    assert site.judged.all()
    assert not site.dormant.any()


def test_an_empty_batch_says_nothing():
    metric = UnitLiveness({"relu": 3}, rules=Rules(1))
    metric.update(torch.zeros(0, 3))
    site = metric.report()["relu"]
    assert site.samples == 0
    assert not (site.silent | site.dead | site.judged | site.always_on | site.dormant).any()


def test_one_sample_cannot_show_that_a_unit_is_frozen():
    metric = UnitLiveness({"relu": 2})
    metric.update(torch.tensor([[1.0, 2.0]]))
    assert not metric.report()["relu"].frozen.any()
    metric.update(torch.tensor([[1.0, 2.0], [1.0, 3.0]]))
    assert metric.report()["relu"].frozen.tolist() == [True, False]


def test_a_unit_that_always_hits_the_cap_is_frozen():
    metric = UnitLiveness()
    metric.add_site(Site("relu6", False, "relu6", (), 2, cap=6.0))
    x = torch.tensor([[7.0, 1.0], [9.0, 2.0]])
    metric.update(x, F.relu6(x), rectifier=RECTIFIERS["relu6"][0])
    assert metric.report()["relu6"].frozen.tolist() == [True, False]


def test_counts_do_not_stop_at_the_limits_of_float32_and_int32():
    metric = UnitLiveness({"relu": 1})
    for name, limit in (("fired", 2**31), ("elements", 2**31), ("samples", 2**31)):
        getattr(metric, name).fill_(limit)
    metric.update(torch.ones(1, 1))
    assert metric.fired.item() == metric.elements.item() == metric.samples.item() == 2**31 + 1
    sums = metric.totals().sums()
    assert metric.totals().merged(sums, metric.maxima).fired.item() == 2**31 + 1


@pytest.mark.parametrize(
    ("tensor", "dead"),
    [  # the published tests of keras-contrib's detector and of a sparse-autoencoder library
        (torch.ones(9, 3, 4) @ torch.cat([torch.zeros(4, 1), torch.ones(4, 10)], 1), [True] + 10 * [False]),
        (torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), [False, True, False]),
        (torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), [False, False, False]),
        (torch.tensor([[-1.0, 2.0], [-3.0, 4.0]]), [True, False]),
    ],
)
def test_published_cases(tensor, dead):
    metric = UnitLiveness({"relu": tensor.shape[-1]}, rules=Rules(1))
    metric.update(tensor)
    assert metric.compute()["relu"].tolist() == dead


def test_a_zero_fraction_is_not_deadness():
    x = torch.full((400, 5), -1.0)
    x[torch.arange(5) * 70, torch.arange(5)] = 1.0  # each unit fires once: 99.75 % zeros
    metric = UnitLiveness({"relu": 5})
    metric.update(x)
    site = metric.report()["relu"]
    assert site.dead_fraction == 0
    assert site.rare.all()


def test_padding_is_left_out():
    x = torch.tensor([[[1.0, -1.0], [-1.0, 5.0]], [[-1.0, -1.0], [9.0, 9.0]]])
    valid = torch.tensor([[True, False], [True, False]])
    counts, alone = count(x, x.relu(), valid=valid), count(x[valid], x[valid].relu())
    for one, other in zip(counts, alone, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    metric = UnitLiveness({"relu": 2}, rules=Rules(1))
    metric.update(x, valid=torch.zeros(2, 2, dtype=torch.bool))
    nothing = metric.report()["relu"]
    assert nothing.samples == nothing.elements == 0
    assert not (nothing.nonfinite | nothing.silent | nothing.frozen).any()


def test_dormancy_is_the_share_of_the_layers_mean():
    mean = torch.tensor([0.0, 0.02, 2.0, 1.98])
    assert dormancy_of(mean).tolist() == pytest.approx([0, 0.02, 2.0, 1.98])
    assert dormancy_of(torch.zeros(3)).tolist() == [0, 0, 0]  # a wholly dead layer is no division by zero


@pytest.mark.parametrize(
    ("age", "bound"), [(10, 0.2589), (29, 0.0981), (299, 0.00997), (2995, 0.0009998), (10_000, 2.995e-4)]
)
def test_rate_bound_is_clopper_and_pearsons(age, bound):
    site = report_of([[torch.full((age, 1), -1.0)]], 1)[0].sites[0]
    assert site.rate_bound.item() == pytest.approx(bound, rel=1e-3)
    assert (1 - site.rate_bound.item()) ** age == pytest.approx(0.05)  # the definition, read backwards


# -- several calls, observations, windows and ranks -------------------------------------------------------


def report_of(windows, min_samples, ranks=1):
    """Run windows of observations; an observation is a list of calls, dealt out to ranks in turn."""
    history, reports = UnitHistory.empty(), []
    for window in windows:
        metrics = [UnitLiveness({"relu": _width(windows)}, window=len(window)) for _ in range(ranks)]
        for number, observation in enumerate(window):
            calls = observation if isinstance(observation, list) else [observation]
            for place, x in enumerate(calls):
                metrics[place % ranks].observation = number
                if len(x):
                    metrics[place % ranks].add(0, count(x, x.relu()))
        report, history = judge(merge(metrics), history, metrics[0].layout, Rules(min_samples))
        reports.append(report)
    return reports


def _width(windows):
    first = windows[0][0]
    return (first[0] if isinstance(first, list) else first).shape[-1]


def merge(metrics) -> Totals:
    sums = sum(metric.totals().sums() for metric in metrics)
    maxima = torch.stack([metric.maxima for metric in metrics]).amax(0)
    return metrics[0].totals().merged(sums, maxima).to_host()


def slow_verdicts(windows, min_samples):
    """Walk over all numbers, unit by unit, with plain Python lists."""
    verdicts = []
    units = _width(windows)
    age, ever, was_dead, came_back = [0] * units, [False] * units, [False] * units, [False] * units
    hits_ever, seen = [0] * units, [0] * units
    for window in windows:
        row = {
            "silent": [],
            "dead": [],
            "age": [],
            "born_dead": [],
            "newly_dead": [],
            "revived": [],
            "redied": [],
            "frozen": [],
            "rate": [],
            "usual": [],
        }
        for unit in range(units):
            fired = elements = 0
            for observation in window:
                calls = observation if isinstance(observation, list) else [observation]
                numbers = [z for x in calls for z in x[:, unit].tolist()]
                hits = sum(z > 0 for z in numbers)
                fired, elements = fired + hits, elements + len(numbers)
                age[unit] = 0 if hits else age[unit] + len(numbers)
            silent = elements > 0 and fired == 0
            dead = silent and age[unit] >= min_samples
            row["silent"].append(silent)
            row["dead"].append(dead)
            row["age"].append(age[unit])
            row["born_dead"].append(dead and not ever[unit])
            row["newly_dead"].append(dead and not was_dead[unit])
            row["revived"].append(fired > 0 and was_dead[unit])
            row["redied"].append(dead and not was_dead[unit] and came_back[unit])
            row["frozen"].append(fired > 0 and _never_varies(window, unit))
            row["rate"].append(fired / elements if elements else 0.0)
            if fired:
                hits_ever[unit], seen[unit] = hits_ever[unit] + fired, seen[unit] + elements
            row["usual"].append(hits_ever[unit] / seen[unit] if seen[unit] else 0.0)
            came_back[unit] |= fired > 0 and was_dead[unit]
            was_dead[unit] = dead or (was_dead[unit] and not fired)
            ever[unit] |= fired > 0
        verdicts.append(row)
    return verdicts


def _never_varies(window, unit):
    """Whether all elements of each observation are equal, and some observation has two."""
    calls = [observation if isinstance(observation, list) else [observation] for observation in window]
    numbers = [[z for x in observation for z in x[:, unit].tolist()] for observation in calls]
    return any(len(zs) > 1 for zs in numbers) and all(len(set(zs)) <= 1 for zs in numbers)


batches = arrays.arrays(
    "float32",
    st.tuples(st.integers(0, 5), st.just(3)),
    elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]),
    fill=st.just(-1.0),
).map(torch.from_numpy)
windows_strategy = st.lists(
    st.lists(st.lists(batches, min_size=1, max_size=3), min_size=1, max_size=3), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None)
@given(windows_strategy, st.integers(1, 12), st.integers(1, 3))
def test_verdicts_equal_a_loop_over_all_activations_on_any_number_of_ranks(windows, min_samples, ranks):
    expected = slow_verdicts(windows, min_samples)
    for report, verdict in zip(report_of(windows, min_samples, ranks), expected, strict=True):
        site = report.sites[0]
        for name in ("silent", "dead", "age", "born_dead", "newly_dead", "revived", "redied"):
            assert getattr(site, name).tolist() == verdict[name], name
        assert site.firing_rate.tolist() == pytest.approx(verdict["rate"])
        assert site.usual_rate.tolist() == pytest.approx(verdict["usual"])
        if ranks == 1:  # an observation is compared within a rank, not between ranks
            assert site.frozen.tolist() == verdict["frozen"]


def test_death_revival_and_second_death_are_told_apart():
    silent, alive = torch.full((4, 1), -1.0), torch.full((4, 1), 1.0)
    reports = report_of([[silent], [alive], [silent], [silent]], min_samples=4)
    names = ("dead", "born_dead", "newly_dead", "revived", "redied")
    seen = [{name for name in names if getattr(report.sites[0], name).item()} for report in reports]
    assert seen == [{"dead", "born_dead", "newly_dead"}, {"revived"}, {"dead", "newly_dead", "redied"}, {"dead"}]


def test_without_data_a_dead_unit_is_neither_dead_nor_newly_dead_afterwards():
    silent, nothing = torch.full((4, 1), -1.0), torch.zeros(0, 1)
    _, idle, again = report_of([[silent], [nothing], [silent]], min_samples=4)
    assert not idle.sites[0].dead.any()
    assert not idle.sites[0].judged.any()
    assert again.sites[0].dead.all()
    assert not again.sites[0].newly_dead.any()


def test_a_site_met_late_starts_with_no_history():
    metric = UnitLiveness({"a": 2})
    metric.update(torch.full((9, 2), -1.0))
    _, history = judge(metric.totals().to_host(), UnitHistory.empty(), metric.layout, Rules(5))
    late = metric.add_site(Site("b", False, "relu", (), 1))
    metric.update(torch.full((3, 1), -1.0), site=late)
    report, _ = judge(metric.totals().to_host(), history, metric.layout, Rules(5))
    assert report["a"].age.tolist() == [18, 18]
    assert report["b"].age.tolist() == [3]


def random_totals(units, window, seed, dtype=torch.float64):
    """Make up counts: sites without data, units that are silent, always on, frozen, or met NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    samples = (drawn(len(units), window) * 50).long()
    samples[::4] = 0
    elements = samples.sum(1) * 3
    most = elements.repeat_interleave(torch.tensor(units))
    fired = (drawn(len(most)) * 1.5 * most).long().clamp(max=most) * (drawn(len(most)) > 0.3)
    fired[drawn(len(most)) < 0.1] = 1
    magnitude = (drawn(len(most)) * fired).to(dtype)
    for value in (math.nan, math.inf):
        magnitude[drawn(len(most)) < 0.05] = value
    last = torch.where((fired > 0) | (drawn(len(most)) < 0.05), (drawn(len(most)) * window).floor(), -1)
    codes = (drawn(2, len(most)) * torch.tensor([[3.0], [2.2]])).floor()
    proved = torch.where(drawn(len(most)) < 0.1, (drawn(len(most)) * (window + 1)).floor(), -1)
    maxima = torch.stack([drawn(len(most)), last, *codes, proved, (proved >= 0).double()])
    return Totals(fired, samples, elements, magnitude, maxima.to(dtype))


def slowly_judged(totals, at, index, smooth, rules, known, steps):
    """Judge one unit with plain numbers; ``known`` is its history, changed in place."""
    samples, elements = totals.samples[index].tolist(), int(totals.elements[index])
    fired = int(totals.fired[at])
    peak, last, varied, nonfinite, proved, _ = totals.maxima[:, at].tolist()
    last, proved, fires, proven, ran = int(last), int(proved), last >= 0, proved >= 0, sum(samples) > 0
    since = max(last + 1 if fires else -1, proved)
    age = sum(samples[max(since, 0) :]) + (known["age"] if since < 0 else 0)
    silent = ran and not fires and nonfinite != 2 and not smooth
    dead = silent and age >= rules.min_samples
    lives = fires or (proven and not dead)
    row = {"silent": silent, "dead": dead, "age": age, "judged": lives or dead, "nonfinite": nonfinite > 0}
    row |= {"rare": lives and max(fired, 1) / max(elements, 1) < 0.01, "always_on": ran and fired == elements}
    row |= {"frozen": fires and varied == 1, "firing_rate": fired / max(elements, 1)}
    row |= {"born_dead": dead and not known["ever"] and not proven, "newly_dead": dead and not known["dead"]}
    row |= {"revived": lives and known["dead"], "redied": row["newly_dead"] and known["revived"]}
    if fires:
        known["last_fired"] = steps[last]
    known |= {"age": age, "ever": known["ever"] or fires or proven, "revived": known["revived"] or row["revived"]}
    known |= {"dead": dead or (known["dead"] and not lives), "fired": known["fired"] + fired}
    known["seen"] += elements if fired else 0
    usual = torch.tensor(known["fired"], dtype=torch.float32) / max(known["seen"], 1)
    return row | {"last_fired": known["last_fired"], "usual_rate": usual.item(), "peak": peak}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("units", [(3, 0, 17, 1, 64, 5, 40, 8, 30, 2, 9), (0,), (5,)])
def test_judging_all_sites_at_once_equals_a_loop_over_units(units, dtype):
    sites = [Site(f"act{n}", False, "relu", (), count, smooth=n % 5 == 4) for n, count in enumerate(units)]
    nothing = {"age": 0, "ever": False, "dead": False, "revived": False, "fired": 0, "seen": 0, "last_fired": -1}
    known, history, rules = [dict(nothing) for _ in range(sum(units))], UnitHistory.empty(), Rules(60)
    for window, length in enumerate((4, 4, 1, 4, 4)):
        totals = random_totals(units, length, window, dtype)
        steps = [window * 100 + 7 * number for number in range(length)]
        report, history = judge(totals, history, Layout(sites), rules, steps=steps)
        at, found = 0, {site.name: site for site in report.sites}
        for index, site in enumerate(sites):
            rows = []
            for unit in range(at, at + site.units):
                rows.append(slowly_judged(totals, unit, index, site.smooth, rules, known[unit], steps))
            for name in rows[0] if rows else ():
                assert getattr(found[site.owner], name).tolist() == [row[name] for row in rows], name
            if rows:
                place = slice(at, at + site.units)
                mean = totals.magnitude[place].nan_to_num(0.0, 0.0) / max(int(totals.elements[index]), 1)
                ran, sane = bool(totals.samples[index].sum()), totals.maxima[3, place] < 2
                assert torch.equal(found[site.owner].dormancy, dormancy_of(mean))
                assert torch.equal(found[site.owner].dormant, ran & sane & (dormancy_of(mean) <= rules.tau))
            at += site.units
        for name, values in vars(history).items():
            assert values.tolist() == [one[name] for one in known], name


def test_a_report_shares_no_memory_with_the_counts():
    metric = UnitLiveness({"a": 3, "b": 2}, rules=Rules(1))
    metric.update(torch.randn(50, 3))
    report = metric.report()
    before = report.to_dict()
    for name in metric._defaults:
        getattr(metric, name).fill_(7)
    assert report.to_dict() == before


def test_an_observation_under_way_bears_the_step_of_the_report():
    metric = UnitLiveness({"a": 1}, window=4)
    for number in range(3):
        metric.observation = number
        metric.update(torch.ones(2, 1))
    report, _ = judge(metric.totals().to_host(), UnitHistory.empty(), metric.layout, step=9, steps=[3, 5])
    assert report["a"].last_fired.tolist() == [9]


# -- the report -------------------------------------------------------------------------------------------


def two_sites(trainable=(True, True)) -> LivenessReport:
    metric = UnitLiveness({"a": 2, "b": 3}, rules=Rules(1))
    metric.update(torch.tensor([[1.0, -1.0]]), site=0)
    metric.update(torch.tensor([[-1.0, -1.0, 2.0], [-1.0, -1.0, 1.0]]), site=1)
    return judge(metric.totals().to_host(), UnitHistory.empty(), metric.layout, Rules(1), trainable=trainable, step=7)[
        0
    ]


def test_report_counts_the_sites_that_are_trained():
    report = two_sites()
    assert (report.units, report.dead_units, report.dead_fraction, report.step) == (5, 3, 0.6, 7)
    frozen = two_sites(trainable=(True, False))
    assert (frozen.units, frozen.dead_units, frozen.dead_fraction) == (2, 1, 0.5)
    assert frozen["b"].dead_fraction == pytest.approx(2 / 3)


def test_report_names_its_sites_when_asked_for_another():
    with pytest.raises(KeyError, match=r"'c' is no site of this report. Sites: a, b"):
        two_sites()["c"]


def test_report_is_frozen_and_survives_json():
    report = two_sites()
    with pytest.raises(AttributeError):
        report.step = 3
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["dead_units"] == 3
    assert plain["sites"][1]["dead"] == [0, 1]
    assert plain["sites"][1]["age"] == [2, 2, 0]


def test_a_smooth_activation_is_never_dead():
    site = Site("gelu", False, "gelu", (), 2, smooth=True)
    metric = UnitLiveness(rules=Rules(1))
    metric.add_site(site)
    x = torch.tensor([[-9.0, 1.0]])
    metric.update(x, F.gelu(x), rectifier=Rectifier("gelu", smooth=True))
    report = metric.report()
    assert not report["gelu"].dead.any()
    assert report["gelu"].dormant.tolist() == [True, False]
    assert report.units == 0


def test_rates_are_worked_out_once_asked_for_and_go_along_with_copies():
    metric = UnitLiveness({"relu": 2})
    metric.update(torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, -1.0], [1.0, -1.0]]))
    site = metric.report()["relu"]
    metric.reset()
    assert not {"firing_rate", "usual_rate"} & vars(site).keys()
    for one in (pickle.loads(pickle.dumps(site)), copy.deepcopy(site), replace(site, name="other"), site):
        assert one.firing_rate.tolist() == one.usual_rate.tolist() == [0.75, 0.0]
        assert (one.firing_rate.dtype, one.usual_rate.dtype) == (torch.float64, torch.float32)
    assert site.firing_rate is site.firing_rate
    assert not hasattr(site, "rate")


@given(st.integers(1, 10**12))
def test_rare_is_told_from_counts_as_from_rates(elements):
    least = _least_usual(elements)
    rare = [number / elements < 0.01 for number in range(max(least - 2, 0), least + 2)]
    if elements <= 100:
        assert least == 0
    else:
        assert rare == [True] * min(least, 2) + [False, False]


def test_a_site_met_in_inference_counts_on_outside():
    with torch.inference_mode():
        metric = UnitLiveness({"relu": 1})
    metric.update(torch.ones(2, 1))
    assert metric.report().sites[0].samples == 2


# -- the metric -------------------------------------------------------------------------------------------


def test_merged_metrics_equal_one_that_saw_everything():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
    whole, left, right = (UnitLiveness({"relu": 4}) for _ in range(3))
    whole.update(x)
    left.update(x[:13])
    right.update(x[13:])
    left.merge_state(right)
    for name in ("fired", "samples", "elements", "maxima"):
        assert torch.equal(getattr(left, name), getattr(whole, name)), name
    assert torch.allclose(left.magnitude, whole.magnitude)


@pytest.mark.parametrize("copied", [lambda m: m.clone(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_their_own_way(copied):
    metric = UnitLiveness({"relu": 2}, rules=Rules(1))
    metric.update(torch.tensor([[1.0, -1.0]]))
    other = copied(metric)
    other.update(torch.tensor([[1.0, 1.0]]))
    assert metric.compute()["relu"].tolist() == [False, True]
    assert other.compute()["relu"].tolist() == [False, False]


def test_reset_keeps_the_sites_and_forward_answers_for_the_batch():
    metric = UnitLiveness({"relu": 2}, rules=Rules(1))
    assert metric(torch.tensor([[1.0, -1.0]]))["relu"].tolist() == [False, True]
    assert metric(torch.tensor([[-1.0, 1.0]]))["relu"].tolist() == [True, False]
    assert metric.compute()["relu"].tolist() == [False, False]
    metric.reset()
    assert metric.layout.units == 2
    assert metric.elements.item() == 0


def bytes_of(*tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_state_is_small():
    metric = UnitLiveness({"relu": 1000}, window=10, peak_dtype=torch.float32)
    x = torch.randn(5, 1000)
    metric.add(0, count(x, x.relu()))
    pending = [value for value in metric._pending[0] if isinstance(value, torch.Tensor)]
    states = [getattr(metric, name) for name in metric._defaults]
    assert bytes_of(*states, *metric._defaults.values(), *pending) / 1000 < 60
    assert bytes_of(*vars(UnitHistory.empty(1000)).values()) / 1000 < 40


def test_counts_and_history_are_saved_small_and_come_back_whole():
    units, history = (40, 24), UnitHistory.empty()
    for seed in range(3):
        totals = random_totals(units, 4, seed, torch.float32)
        sites = [Site(f"act{n}", False, "relu", (), count) for n, count in enumerate(units)]
        _, history = judge(totals, history, Layout(sites))
    for one in (totals, history):
        again = type(one).loaded(one.saved())
        for name, values in vars(one).items():
            found = getattr(again, name)
            assert found.dtype == values.dtype
            assert torch.equal(found.nan_to_num(9.0), values.nan_to_num(9.0)), name
            assert found.data_ptr() != values.data_ptr()
    parts = [*history.saved().values(), *totals.saved()["marks"]]
    assert bytes_of(*parts) / 64 < 20
    assert narrowed(torch.tensor([2**31])).dtype == torch.int64
    assert narrowed(torch.tensor([-(2**31)])).dtype == torch.int32


def test_what_ranks_exchange_depends_on_the_layout_alone():
    metric = UnitLiveness({"a": 300, "b": 20}, window=10)
    before = [part.shape for part in (metric.totals().sums(), metric.maxima)]
    metric.update(torch.randn(500, 300))
    assert [part.shape for part in (metric.totals().sums(), metric.maxima)] == before
    assert before == [(2 * 320 + 2 * 10 + 2,), (6, 320)]


@pytest.mark.timing
def test_a_large_layout_is_judged_fast():
    sites, units = 8, 294_912  # 2.4 million
    metric = UnitLiveness({f"ffn{number}": units for number in range(sites)}, window=10, peak_dtype=torch.float32)
    metric.samples.fill_(100), metric.elements.fill_(1000), metric.fired.fill_(500)
    totals, history, seconds = metric.totals(), UnitHistory.empty(), []
    for _ in range(3):
        start = time.thread_time()
        report, history = judge(totals, history, metric.layout)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.5
    assert report.units == sites * units


def test_packed_totals_are_unpacked_bit_for_bit():
    metric = UnitLiveness({"a": 3, "b": 2}, window=4)
    metric.update(torch.randn(5, 3))
    packed = metric.totals().to_host()
    for name, value in vars(metric.totals()).items():
        assert torch.equal(getattr(packed, name), value)


def test_layout_is_end_to_end():
    metric = UnitLiveness({"a": 3, "b": 2, "c": 4})
    places = [metric.layout.place(i) for i in range(3)]
    assert [p.stop - p.start for p in places] == [3, 2, 4]
    assert all(a.stop == b.start for a, b in pairwise(places))
