"""The counts of a window: how they merge, travel and are saved."""

import pytest
import torch
from torch.nn import functional as F

from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.statistics import Rules, Totals, UnitHistory, UnitLiveness, judge


def joined(metrics: list[UnitLiveness]) -> Totals:
    """Merge counts as ranks do."""
    sums = sum(metric.totals().sums() for metric in metrics)
    return metrics[0].totals().merged(sums, torch.stack([metric.maxima for metric in metrics]).amax(0))


def frozen(*ranks: list[torch.Tensor], cap: float = torch.inf) -> list[bool]:
    """Judge what ranks saw in the observations of a window; None where a rank did not run."""
    site = Site("act", False, "relu", (), 2, cap=cap)
    metrics = [UnitLiveness(window=len(ranks[0])) for _ in ranks]
    for metric, batches in zip(metrics, ranks, strict=True):
        metric.add_site(site)
        for number, x in enumerate(batches):
            metric.observation = number
            if x is not None:
                metric.update(x, F.relu(x).clamp(max=cap), rectifier=Rectifier("relu", cap=cap, plain=True))
        metric.observation = len(batches)
    return judge(joined(metrics), UnitHistory.empty(), Layout([site]))[0].sites[0].frozen.tolist()


ONE, TWO = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 2.0]])


def test_a_unit_that_is_constant_on_each_rank_is_frozen_only_if_the_ranks_agree():
    pair = [ONE.expand(2, 2)], [TWO.expand(2, 2)]
    assert frozen(*pair) == frozen([torch.cat([*pair[0], *pair[1]])]) == [True, False]


def test_ranks_with_one_sample_each_see_together_that_a_unit_is_frozen():
    assert frozen([ONE], [TWO]) == frozen([torch.cat([ONE, TWO])]) == [True, False]
    assert frozen([ONE], [None]) == frozen([ONE]) == [False, False]


def test_a_rank_that_did_not_run_last_says_nothing_of_the_observation_before():
    assert frozen([TWO, ONE], [ONE, None], [3 * ONE, ONE]) == [True, True]
    assert frozen([TWO, TWO], [ONE, None], [3 * ONE, ONE]) == [True, False]
    assert frozen([ONE, None], [ONE, None]) == [False, False]


def test_a_unit_that_meets_its_cap_now_and_then_is_not_frozen():
    high, low = torch.tensor([[7.0, 7.0], [9.0, 9.0]]), torch.tensor([[7.0, 1.0], [9.0, 9.0]])
    assert frozen([high, high], [high, high], cap=6.0) == [True, True]
    assert frozen([low, high], [high, high], cap=6.0) == [True, False]


def test_inputs_at_the_end_of_the_floats_are_no_constant():
    far = torch.tensor([[3e38, 3e38], [-3e38, 3e38]])
    metric = UnitLiveness({"act": 2}, peak_dtype=torch.float32)
    metric.update(far)
    assert metric.report().sites[0].frozen.tolist() == [False, True]


def test_not_a_number_is_no_constant():
    nan = torch.tensor([[1.0, torch.nan]])
    assert frozen([nan], [ONE]) == frozen([ONE, ONE], [nan, ONE]) == [True, False]


@pytest.fixture
def counted() -> tuple[Totals, UnitHistory]:
    """What two windows of random inputs leave behind."""
    metric, history = UnitLiveness({"a": 40, "b": 24}, window=4), UnitHistory.empty()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        metric.reset()
        for number in range(4):
            metric.observation = number
            for site, units in enumerate((40, 24)):
                metric.update(torch.randn(50, units, generator=generator) - 2, site=site)
        history = judge(metric.totals(), history, metric.layout, Rules(60))[1]
    return metric.totals(), history


def test_counts_and_history_are_saved_small_and_come_back_whole(counted):
    for one in counted:
        again = decode(type(one), encode(one))
        for name, values in vars(one).items():
            found = getattr(again, name)
            assert found.dtype == values.dtype
            assert torch.equal(found, values), name
            assert found.data_ptr() != values.data_ptr() or not len(values)
    saved = [one["narrowed"] if isinstance(one, dict) else one for one in encode(counted[1]).values()]
    assert sum(one.untyped_storage().nbytes() for one in saved) / 64 < 12


def test_packed_totals_are_unpacked_bit_for_bit():
    metric = UnitLiveness({"a": 3, "b": 2}, window=4)
    metric.update(torch.randn(5, 3))
    packed = metric.totals().to_host()
    for name, value in vars(metric.totals()).items():
        assert torch.equal(getattr(packed, name), value)


def test_what_ranks_exchange_depends_on_the_layout_alone():
    metric = UnitLiveness({"a": 300, "b": 20}, window=10)
    before = [part.shape for part in (metric.totals().sums(), metric.maxima)]
    metric.update(torch.randn(500, 300))
    assert [part.shape for part in (metric.totals().sums(), metric.maxima)] == before
    assert before == [(2 * 320 + 3 * 2 * 10,), (7, 320)]


def test_weighted_sums_are_not_kept_where_nobody_asks_for_multiples():
    few = UnitLiveness({"a": 3}, rules=Rules(redundancy=False))
    few.update(torch.randn(5, 3))
    assert few.totals().projection.shape == (0,)
    assert few.report().sites[0].projection.tolist() == [0.0, 0.0, 0.0]


def test_a_death_told_within_a_window_is_not_told_again_at_its_end():
    metric, known = UnitLiveness({"relu": 2}, window=2, rules=Rules(4)), UnitHistory.empty()
    metric.update(torch.tensor([[-1.0, -1.0]] * 4))
    early, later = judge(metric.totals(), known, metric.layout, metric.rules)
    assert early["relu"].newly_dead.tolist() == [True, True]
    known = known.with_deaths_of(later)
    metric.observation = 1
    metric.update(torch.tensor([[-1.0, 1.0]] * 4))
    last, _ = judge(metric.totals(), known, metric.layout, metric.rules)
    assert last["relu"].dead.tolist() == [True, False]
    assert last["relu"].newly_dead.tolist() == [False, False]
    assert last["relu"].revived.tolist() == [False, True]
    assert last["relu"].age.tolist() == [8, 0]
