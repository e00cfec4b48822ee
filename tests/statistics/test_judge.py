"""Verdicts against slow, independent loops over single numbers."""

import math
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.statistics import Rules, Totals, UnitHistory, UnitLiveness, count, judge
from lightning_deadrelu.statistics.judge import _least_usual


def report_of(windows, min_samples, ranks=1, all_rates=False, proofs=()):
    """Run windows of observations; an observation is a list of calls, dealt out to ranks in turn.

    A smooth site sees what the rectifier does, and a site is left out between the two.

    Args:
        windows: The inputs.
        min_samples: The age from which on units are dead.
        ranks: How many there are.
        all_rates: Whether rates are read on all observations.
        proofs: By number of the observation in the run, the units that a gradient proves to have fired by its end,
            if the site ran.
    """
    rules = Rules(min_samples, all_rates=all_rates)
    history, reports, step = UnitHistory.empty(), [], 0
    for window in windows:
        metrics, steps = [UnitLiveness(window=len(window), rules=rules) for _ in range(ranks)], []
        for metric in metrics:
            for name, units in (("relu", _width(windows)), ("left out", 0), ("gelu", _width(windows))):
                metric.add_site(Site(name, False, name, (), units, smooth=name == "gelu"))
        for number, observation in enumerate(window):
            for metric in metrics:
                metric.observation = number
            for place, x in enumerate(_calls(observation)):
                if len(x):
                    metric = metrics[place % ranks]
                    metric.add(0, count(x, x.relu(), rates=metric.wants_rates(0)))
                    metric.add(2, count(x, x.relu(), rates=metric.wants_rates(0)))
            if step < len(proofs) and any(map(len, _calls(observation))):
                proved = torch.tensor([unit in proofs[step] for unit in range(_width(windows))] * 2)
                metrics[-1].record_gradient_proof(torch.stack([proved * (number + 2) - 1, proved]))
            steps, step = [*steps, step], step + 1
        for metric in metrics:
            metric.observation = len(window)
        report, history = judge(merge(metrics), history, metrics[0].layout, rules, steps=steps)
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


def slow_verdicts(windows, min_samples, all_rates=False, proofs=()):
    """Walk over all numbers, unit by unit, with plain Python lists."""
    verdicts, step = [], 0
    units = _width(windows)
    age, ever, was_dead, came_back = [0] * units, [False] * units, [False] * units, [False] * units
    hits_ever, so_far, seen, last_fired = [0] * units, [0] * units, [0] * units, [-1] * units
    for window in windows:
        rated = window if all_rates or len(window) == 1 else [window[0], window[-1]]
        rows = []
        for unit in range(units):
            fired = samples = 0
            proven = strange = False
            for place, observation in enumerate(window):
                numbers = _numbers(observation, unit)
                hits = sum(z > 0 for z in numbers)
                fired, samples = fired + hits, samples + len(numbers)
                strange |= any(map(math.isnan, numbers))
                age[unit] = 0 if hits else age[unit] + len(numbers)
                last_fired[unit] = step + place if hits else last_fired[unit]
                if numbers and step + place < len(proofs) and unit in proofs[step + place]:
                    proven, age[unit] = True, 0
            counted = [z for observation in rated for z in _numbers(observation, unit)]
            rated_hits = sum(z > 0 for z in counted)
            silent = samples > 0 and fired == 0 and not strange
            dead = silent and age[unit] >= min_samples
            lives = fired > 0 or (proven and not dead)
            stands = dead if samples else was_dead[unit]  # without data the last verdict stands
            row = {"silent": silent, "dead": stands, "age": age[unit], "last_fired": last_fired[unit]}
            row |= {"born_dead": stands and not ever[unit] and not proven, "newly_dead": dead and not was_dead[unit]}
            row |= {"revived": lives and was_dead[unit], "redied": row["newly_dead"] and came_back[unit]}
            row |= {"nonfinite": strange, "judged": lives or dead or (not samples and ever[unit]) or stands}
            row["frozen"] = fired > 0 and not strange and _is_constant(window[-1], unit)
            row["always_on"] = rated_hits == len(counted) > 0
            row["rare"] = lives and max(rated_hits, 1) < 0.01 * len(counted)
            row["firing_rate"] = rated_hits / len(counted) if counted else 0.0
            hits_ever[unit], so_far[unit] = hits_ever[unit] + rated_hits, so_far[unit] + len(counted)
            seen[unit] = so_far[unit] if fired else seen[unit]
            row["usual_rate"] = hits_ever[unit] / seen[unit] if seen[unit] else 0.0
            came_back[unit] |= row["revived"]
            was_dead[unit] = stands or (was_dead[unit] and not lives)
            ever[unit] |= fired > 0 or proven
            rows.append(row)
        verdicts.append({name: [row[name] for row in rows] for name in rows[0]})
        step += len(window)
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
    elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0, math.nan]),
    fill=st.just(-1.0),
).map(torch.from_numpy)
windows_strategy = st.lists(
    st.lists(st.lists(batches, min_size=1, max_size=3), min_size=1, max_size=3), min_size=1, max_size=4
)


NOTHING, SILENT = torch.empty(0, 3), torch.full((1, 3), -1.0)
proofs_strategy = st.lists(st.sets(st.integers(0, 2)), max_size=12)


@settings(max_examples=150)
@given(windows_strategy, st.integers(1, 12), st.integers(1, 3), st.booleans(), proofs_strategy)
@example([[[NOTHING], [SILENT], [NOTHING]], [[NOTHING]]], 1, 1, False, [])  # it ran where no rates are read
@example([[[SILENT]], [[NOTHING], [SILENT], [NOTHING]]], 1, 1, False, [])
def test_verdicts_equal_a_loop_over_all_activations_on_any_number_of_ranks(
    windows, min_samples, ranks, all_rates, proofs
):
    expected = slow_verdicts(windows, min_samples, all_rates, proofs)
    reports = report_of(windows, min_samples, ranks, all_rates, proofs)
    for report, verdict in zip(reports, expected, strict=True):
        rectifier, smooth = report.sites
        for name, values in verdict.items():
            assert getattr(rectifier, name).tolist() == pytest.approx(values), name
        assert not (smooth.dead | smooth.silent | smooth.newly_dead).any()
        for name in ("age", "frozen", "firing_rate", "usual_rate", "last_fired", "nonfinite"):
            assert getattr(smooth, name).tolist() == pytest.approx(verdict[name]), name


def test_dormancy_is_the_share_of_the_layers_mean_output():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(2)) - torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 9.0])
    means = [sum(max(z, 0.0) for z in column) / 200 for column in x.T.tolist()]
    site = report_of([[x]], 1)[0].sites[0]
    assert site.dormancy.tolist() == pytest.approx([mean / (sum(means) / 6) for mean in means], rel=1e-5)
    assert site.dormant.tolist() == [mean / (sum(means) / 6) <= 0.025 for mean in means]
    dead = report_of([[torch.full((3, 2), -1.0)]], 1)[0].sites[0]
    assert dead.dormancy.tolist() == [0, 0]  # a wholly dead layer is no division by zero
    odd = report_of([[torch.tensor([[math.nan, 1.0, math.inf, 4.0, 0.0]])]], 1)[0].sites[0]
    assert odd.dormancy.tolist() == [0.0, 1.0, 0.0, 4.0, 0.0]  # what is not finite counts as nothing
    assert odd.dormant.tolist() == [False, False, False, False, True]


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


def test_a_model_without_a_site_has_a_verdict_of_nothing():
    report = UnitLiveness().report()
    assert (report.sites, report.dead_fraction) == ((), 0.0)
