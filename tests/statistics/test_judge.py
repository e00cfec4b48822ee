"""Verdicts against slow, independent loops over single numbers."""

import math
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.statistics import Rules, Totals, UnitHistory, UnitLiveness, count, judge
from lightning_deadrelu.statistics.judge import _least_usual


def report_of(windows, min_samples, ranks=1, all_rates=False):
    """Run windows of observations; an observation is a list of calls, dealt out to ranks in turn."""
    rules = Rules(min_samples, all_rates=all_rates)
    history, reports = UnitHistory.empty(), []
    for window in windows:
        metrics = [UnitLiveness({"relu": _width(windows)}, window=len(window), rules=rules) for _ in range(ranks)]
        for number, observation in enumerate(window):
            for metric in metrics:
                metric.observation = number
            for place, x in enumerate(_calls(observation)):
                if len(x):
                    metric = metrics[place % ranks]
                    metric.add(0, count(x, x.relu(), rates=metric.wants_rates(0)))
        for metric in metrics:
            metric.observation = len(window)
        report, history = judge(merge(metrics), history, metrics[0].layout, rules)
        reports.append(report)
    return reports


def _width(windows):
    first = windows[0][0]
    return (first[0] if isinstance(first, list) else first).shape[-1]


def merge(metrics) -> Totals:
    sums = sum(metric.totals().sums() for metric in metrics)
    maxima = torch.stack([metric.maxima for metric in metrics]).amax(0)
    return metrics[0].totals().merged(sums, maxima).to_host()


def _calls(observation):
    return observation if isinstance(observation, list) else [observation]


def slow_verdicts(windows, min_samples, all_rates=False):
    """Walk over all numbers, unit by unit, with plain Python lists."""
    verdicts = []
    units = _width(windows)
    age, ever, was_dead, came_back = [0] * units, [False] * units, [False] * units, [False] * units
    hits_ever, so_far, seen = [0] * units, [0] * units, [0] * units
    for window in windows:
        rated = window if all_rates or len(window) == 1 else [window[0], window[-1]]
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
            "always_on": [],
            "rare": [],
        }
        for unit in range(units):
            fired = samples = 0
            for observation in window:
                numbers = _numbers(observation, unit)
                hits = sum(z > 0 for z in numbers)
                fired, samples = fired + hits, samples + len(numbers)
                age[unit] = 0 if hits else age[unit] + len(numbers)
            counted = [z for observation in rated for z in _numbers(observation, unit)]
            rated_hits = sum(z > 0 for z in counted)
            silent = samples > 0 and fired == 0
            dead = silent and age[unit] >= min_samples
            row["silent"].append(silent)
            stands = dead if samples else was_dead[unit]  # without data the last verdict stands
            row["dead"].append(stands)
            row["age"].append(age[unit])
            row["born_dead"].append(stands and not ever[unit])
            row["newly_dead"].append(dead and not was_dead[unit])
            row["revived"].append(fired > 0 and was_dead[unit])
            row["redied"].append(dead and not was_dead[unit] and came_back[unit])
            row["frozen"].append(fired > 0 and _is_constant(window[-1], unit))
            row["rate"].append(rated_hits / len(counted) if counted else 0.0)
            row["always_on"].append(rated_hits == len(counted) > 0)
            row["rare"].append(fired > 0 and max(rated_hits, 1) < 0.01 * len(counted))
            hits_ever[unit], so_far[unit] = hits_ever[unit] + rated_hits, so_far[unit] + len(counted)
            seen[unit] = so_far[unit] if fired else seen[unit]
            row["usual"].append(hits_ever[unit] / seen[unit] if seen[unit] else 0.0)
            came_back[unit] |= fired > 0 and was_dead[unit]
            was_dead[unit] = dead or (was_dead[unit] and not fired)
            ever[unit] |= fired > 0
        verdicts.append(row)
    return verdicts


def _numbers(observation, unit):
    return [z for x in _calls(observation) for z in x[:, unit].tolist()]


def _is_constant(observation, unit):
    """Whether all elements of an observation are equal, and there are two."""
    numbers = _numbers(observation, unit)
    return len(numbers) > 1 and len(set(numbers)) == 1


batches = arrays.arrays(
    "float32",
    st.tuples(st.integers(0, 5), st.just(3)),
    elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]),
    fill=st.just(-1.0),
).map(torch.from_numpy)
windows_strategy = st.lists(
    st.lists(st.lists(batches, min_size=1, max_size=3), min_size=1, max_size=3), min_size=1, max_size=4
)


NOTHING, SILENT = torch.empty(0, 3), torch.full((1, 3), -1.0)


@settings(max_examples=150)
@given(windows_strategy, st.integers(1, 12), st.integers(1, 3), st.booleans())
@example([[[NOTHING], [SILENT], [NOTHING]], [[NOTHING]]], 1, 1, False)  # it ran where no rates are read
@example([[[SILENT]], [[NOTHING], [SILENT], [NOTHING]]], 1, 1, False)
def test_verdicts_equal_a_loop_over_all_activations_on_any_number_of_ranks(windows, min_samples, ranks, all_rates):
    expected = slow_verdicts(windows, min_samples, all_rates)
    for report, verdict in zip(report_of(windows, min_samples, ranks, all_rates), expected, strict=True):
        site = report.sites[0]
        masks = ("born_dead", "newly_dead", "revived", "redied", "frozen", "always_on", "rare")
        for name in ("silent", "dead", "age", *masks):
            assert getattr(site, name).tolist() == verdict[name], name
        assert site.firing_rate.tolist() == pytest.approx(verdict["rate"])
        assert site.usual_rate.tolist() == pytest.approx(verdict["usual"])


def test_dormancy_is_the_share_of_the_layers_mean_output():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(2)) - torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 9.0])
    means = [sum(max(z, 0.0) for z in column) / 200 for column in x.T.tolist()]
    site = report_of([[x]], 1)[0].sites[0]
    assert site.dormancy.tolist() == pytest.approx([mean / (sum(means) / 6) for mean in means], rel=1e-5)
    assert site.dormant.tolist() == [mean / (sum(means) / 6) <= 0.025 for mean in means]
    dead = report_of([[torch.full((3, 2), -1.0)]], 1)[0].sites[0]
    assert dead.dormancy.tolist() == [0, 0]  # a wholly dead layer is no division by zero


@pytest.mark.parametrize("size", [32, 100])
def test_silence_is_called_improbable_as_rarely_as_it_says(size):
    rate, units, windows, improbable = 0.001, 300, 120, []
    generator = torch.Generator().manual_seed(size)
    history, metric = UnitHistory.empty(), UnitLiveness({"relu": units})
    for window in range(windows):
        metric.reset()
        metric.update((torch.rand(10 * size, units, generator=generator) < rate).float() - 0.5)
        report, history = judge(metric.totals(), history, metric.layout)
        site = report.sites[0]
        if window >= windows // 2:
            improbable.append(site.silent & ((1 - site.usual_rate) ** site.age <= 0.05))
    assert site.usual_rate.mean().item() == pytest.approx(rate, rel=0.1)
    assert 0.02 < torch.stack(improbable).double().mean() < 0.08


@pytest.mark.parametrize(
    ("age", "bound"), [(10, 0.2589), (29, 0.0981), (299, 0.00997), (2995, 0.0009998), (10_000, 2.995e-4)]
)
def test_rate_bound_is_clopper_and_pearsons(age, bound):
    site = report_of([[torch.full((age, 1), -1.0)]], 1)[0].sites[0]
    assert site.rate_bound.item() == pytest.approx(bound, rel=1e-3)
    assert (1 - site.rate_bound.item()) ** age == pytest.approx(0.05)  # the definition, read backwards


def test_death_revival_and_second_death_are_told_apart():
    silent, alive = torch.full((4, 1), -1.0), torch.full((4, 1), 1.0)
    reports = report_of([[silent], [alive], [silent], [silent]], min_samples=4)
    names = ("dead", "born_dead", "newly_dead", "revived", "redied")
    seen = [{name for name in names if getattr(report.sites[0], name).item()} for report in reports]
    assert seen == [{"dead", "born_dead", "newly_dead"}, {"revived"}, {"dead", "newly_dead", "redied"}, {"dead"}]


def test_without_data_the_last_verdict_stands_and_nobody_dies_anew():
    units, nothing = torch.tensor([[-1.0, 1.0]]).expand(4, 2), torch.zeros(0, 2)
    first, idle, again = report_of([[units], [nothing], [units]], min_samples=4)
    assert first.dead_units == idle.dead_units == again.dead_units == 1
    assert idle.sites[0].judged.all()
    assert not idle.sites[0].silent.any()
    assert not again.sites[0].newly_dead.any()
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
    elements = samples * 3
    most = elements.sum(1).repeat_interleave(torch.tensor(units))
    fired = (drawn(len(most)) * 1.5 * most).long().clamp(max=most) * (drawn(len(most)) > 0.3)
    fired[drawn(len(most)) < 0.1] = 1
    magnitude = (drawn(len(most)) * fired).to(dtype)
    for value in (math.nan, math.inf):
        magnitude[drawn(len(most)) < 0.05] = value
    last = torch.where((fired > 0) | (drawn(len(most)) < 0.05), (drawn(len(most)) * window).floor(), -1)
    nonfinite = (drawn(len(most)) * 2.2).floor()
    latest = (drawn(2, len(most)) * 2 - 1).round()
    proved = torch.where(drawn(len(most)) < 0.1, (drawn(len(most)) * (window + 1)).floor(), -1)
    maxima = torch.stack([drawn(len(most)), last, nonfinite, *latest, proved, (proved >= 0).double()])
    blind = (drawn(*samples.shape) * (samples + 1)).long()
    projection = magnitude * (0.5 + drawn(len(most)))
    return Totals(fired, samples, elements, blind, magnitude, projection, maxima.to(dtype))


def slowly_judged(totals, at, index, smooth, rules, known, steps):
    """Judge one unit with plain numbers; ``known`` is its history, changed in place."""
    samples, elements = totals.samples[index].tolist(), int(totals.elements[index].sum())
    fired = int(totals.fired[at])
    peak, last, nonfinite, high, depth, proved, _ = totals.maxima[:, at].tolist()
    last, proved, fires, proven, ran = int(last), int(proved), last >= 0, proved >= 0, sum(samples) > 0
    since = max(last + 1 if fires else -1, proved)
    age = sum(samples[max(since, 0) :]) + (known["age"] if since < 0 else 0)
    silent = ran and not fires and nonfinite != 2 and not smooth
    dead = silent and age >= rules.min_samples
    lives = fires or (proven and not dead)
    row = {"silent": silent, "dead": dead, "age": age, "judged": lives or dead, "nonfinite": nonfinite > 0}
    row |= {"rare": lives and max(fired, 1) / max(elements, 1) < 0.01, "always_on": ran and fired == elements}
    last_counted = [one for one in totals.elements[index].tolist() if one][-1:]
    enough = last_counted and last_counted[0] > 1
    row |= {
        "frozen": fires and nonfinite < 2 and bool(enough) and high == -depth,
        "firing_rate": fired / max(elements, 1),
    }
    row |= {"born_dead": dead and not known["ever"] and not proven, "newly_dead": dead and not known["dead"]}
    row |= {"revived": lives and known["dead"], "redied": row["newly_dead"] and known["revived"]}
    if fires:
        known["last_fired"] = steps[last]
    known |= {"age": age, "ever": known["ever"] or fires or proven, "revived": known["revived"] or row["revived"]}
    known |= {"dead": dead or (known["dead"] and not lives), "fired": known["fired"] + fired}
    known["so_far"] += elements
    known["seen"] = known["so_far"] if fires else known["seen"]
    usual = known["fired"] / max(known["seen"], 1)
    return row | {"last_fired": known["last_fired"], "usual_rate": usual, "peak": peak}


def slow_scores(magnitudes, elements):
    """Divide each unit's mean output by the layer's, with plain numbers; what is not finite counts as nothing."""
    finite = [value / max(elements, 1) if math.isfinite(value) else 0.0 for value in magnitudes]
    layer = math.fsum(finite) / len(finite)
    return [value / layer if layer > 0 else 0.0 for value in finite]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("units", [(3, 0, 17, 1, 64, 5, 40, 8, 30, 2, 9), (0,), (5,)])
def test_judging_all_sites_at_once_equals_a_loop_over_units(units, dtype):
    sites = [Site(f"act{n}", False, "relu", (), count, smooth=n % 5 == 4) for n, count in enumerate(units)]
    nothing = {"age": 0, "ever": False, "dead": False, "revived": False, "fired": 0, "seen": 0}
    nothing |= {"last_fired": -1, "so_far": 0}
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
                score = slow_scores(totals.magnitude[place].tolist(), int(totals.elements[index].sum()))
                ran, sane = bool(totals.samples[index].sum()), totals.nonfinite[place] < 2
                assert found[site.owner].dormancy.nan_to_num(0, 0).tolist() == pytest.approx(score, rel=1e-5)
                assert torch.equal(found[site.owner].dormant, ran & sane & (found[site.owner].dormancy <= rules.tau))
            at += site.units
        for name, values in vars(history).items():
            if name not in ("elements", "ran"):  # by site
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


@given(st.integers(1, 10**12))
def test_rare_is_told_from_counts_as_from_rates(elements):
    least = _least_usual(elements)
    rare = [number / elements < 0.01 for number in range(max(least - 2, 0), least + 2)]
    if elements <= 100:
        assert least == 0
    else:
        assert rare == [True] * min(least, 2) + [False, False]


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
