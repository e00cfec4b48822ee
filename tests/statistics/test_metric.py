"""Counting for all sites in one flat state."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.statistics import Rules, UnitHistory, UnitLiveness, count, judge


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


def test_an_empty_batch_says_nothing():
    metric = UnitLiveness({"relu": 3}, rules=Rules(1))
    metric.update(torch.zeros(0, 3))
    site = metric.report()["relu"]
    assert site.samples == 0
    assert not (site.silent | site.dead | site.judged | site.always_on | site.dormant).any()


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


def test_a_site_met_in_inference_counts_on_outside():
    with torch.inference_mode():
        metric = UnitLiveness({"relu": 1})
    metric.update(torch.ones(2, 1))
    assert metric.report().sites[0].samples == 2


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


def pending(metric):
    calls = [counts for one in metric._pending.values() for counts in one.values()]
    return [value for counts in calls for value in counts if isinstance(value, torch.Tensor)]


def test_state_is_small():
    metric = UnitLiveness({"relu": 1000}, window=10, peak_dtype=torch.float32)
    x = torch.randn(5, 1000)
    metric.add(0, count(x, x.relu()))
    states = [getattr(metric, name) for name in metric._defaults]
    assert bytes_of(*states, *metric._defaults.values(), *pending(metric)) / 1000 < 76
    assert bytes_of(*vars(UnitHistory.empty(1000)).values()) / 1000 < 40


@pytest.mark.parametrize("units", [3, 400_000])
def test_what_waits_to_be_added_up_is_little(units):
    metric, most = UnitLiveness({"relu": units}, window=100), 0
    for number in range(1, 40):
        metric.observation = number
        metric.add(0, count(torch.ones(1, units), torch.ones(1, units), rates=False))
        most = max(most, len(pending(metric)))
    assert most == {3: 16, 400_000: 3}[units]


INPUTS = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0, math.nan, math.inf])


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2), INPUTS, INPUTS), max_size=3), min_size=1, max_size=40), st.data())
def test_whenever_it_is_added_up_a_window_comes_to_the_same(observations, data):
    metric = UnitLiveness({"a": 1, "b": 1}, window=len(observations), peak_dtype=torch.float32)
    metric.add_site(Site("c", False, "relu", (), 1))  # there is room for it when it is first added up
    for number, calls in enumerate(observations):
        metric.observation = number
        for site, *column in calls:
            x = torch.tensor(column, dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])))[:, None]
            metric.add(site, count(x, x.relu(), rates=metric.wants_rates(site)))
        if data.draw(st.booleans()):
            metric.flush()
    metric.observation = len(observations)
    totals = metric.totals()
    for site in range(3):
        seen = [[x for one, *column in calls if one == site for x in column] for calls in observations]
        fired = [number for number, column in enumerate(seen) if any(x > 0 for x in column)]
        assert totals.last_fired[site] == max(fired, default=-1)
        calls = [column for calls in observations for one, *column in calls if one == site]
        clear = [x for column in calls if not any(map(math.isnan, column)) for x in column]
        assert totals.peak[site] == max(clear, default=-math.inf)  # what is not a number may hide those beside it
        assert (totals.nonfinite[site] == 2) == any(math.isnan(x) for column in seen for x in column)
        assert (totals.nonfinite[site] > 0) == any(not math.isfinite(x) for column in seen for x in column)
        assert totals.samples[site].tolist() == [len(column) for column in seen]
        rated = {0, len(observations) - 1}
        assert totals.elements[site].tolist() == [len(c) if n in rated else 0 for n, c in enumerate(seen)]
        assert totals.fired[site] == sum(x > 0 for n, column in enumerate(seen) if n in rated for x in column)


def test_forward_counts_into_the_present_observation():
    metric = UnitLiveness({"relu": 2}, window=3, rules=Rules(1))
    for number in range(2):
        metric.observation = number
        assert metric(torch.tensor([[1.0, -1.0]] * 4))["relu"].tolist() == [False, True]
    assert metric.samples.tolist() == [[4, 4, 0]]
    assert metric.report()["relu"].age.tolist() == [0, 8]
    assert metric.observation == 1


def test_windows_of_ten_million_samples_are_counted_exactly():
    batch = torch.full((10_000_001, 1), -1.0)
    metric = UnitLiveness({"relu": 1}, window=2)
    for number in range(2):
        metric.observation = number
        metric.update(batch)
    site = metric.report()["relu"]
    assert (site.age.tolist(), site.age.dtype) == ([20_000_002], torch.int64)
    assert site.samples == site.elements == 20_000_002


def test_rates_are_read_on_the_first_observation_and_on_the_last():
    metric = UnitLiveness({"a": 1, "b": 1}, window=6)
    for _ in range(2):
        for number in range(6):
            metric.observation = number
            for site in (0, 1) if number in (2, 3) else (0,):
                metric.update(torch.ones(4, 1), site=site)
                metric.update(-torch.ones(4, 1), site=site)
        metric.observation = 6
        assert metric.elements.tolist() == [[8, 0, 0, 0, 0, 8], [0] * 6]
        assert metric.samples.tolist() == [[8] * 6, [0, 0, 8, 8, 0, 0]]
        report = metric.report()
        assert report["a"].firing_rate.tolist() == [0.5]
        assert report["b"].age.tolist() == [0]
        for site in report.sites:  # where there are no rates, nothing is said that goes by them
            assert site.judged.all()
            assert not (site.always_on | site.frozen | site.rare | site.dormant).any()
        metric.reset()


def test_ages_are_exact_where_a_not_a_number_hides_the_peak():
    metric = UnitLiveness({"relu": 2}, window=9)
    for number in range(5):
        metric.observation = number
        x = torch.full((10, 2), -1.0)
        if number == 3:
            x[0] = math.nan
            x[1, 0] = 1.0
        metric.update(x)
    site = metric.report()["relu"]
    assert site.age.tolist() == [10, 50]
    assert site.silent.tolist() == [False, False]
    assert site.elements == 10


def test_ages_go_beyond_what_32_bits_hold():
    rules = Rules(min_samples=10_000_000)
    metric = UnitLiveness({"latents": 1}, rules=rules)
    metric.update(torch.full((5, 1), -1.0))
    old = UnitHistory.empty(1, 1)
    old.age.fill_(2**33)
    old.elements.fill_(2**33)
    report, history = judge(metric.totals().to_host(), old, metric.layout, rules)
    assert report["latents"].age.tolist() == [2**33 + 5]
    assert history.elements.tolist() == [2**33 + 5]
    assert report["latents"].rate_bound[0] == pytest.approx(1 - 0.05 ** (1 / 2**33), rel=1e-3)
