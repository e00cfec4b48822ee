"""What ranks know together, on one process and on two."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_ranks import on_two_ranks

from lightning_deadrelu.guarded import RankFailure
from lightning_deadrelu.observe.ranks import Ranks, is_joint, place_in_group
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics.confirmation import LEVELS, SilenceSample

NETS = (("a", "b", "c"), ("b", "a"))  # the layers that each rank runs, in its own order


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleDict({name: nn.Sequential(nn.Linear(3, 4), nn.ReLU()) for name in "abc"})

    def forward(self, names, x):
        for name in names:
            self.towers[name](x)


def inputs(rank):
    return torch.randn(5 + rank, 3, generator=torch.Generator().manual_seed(rank))


def test_alone_every_exchange_returns_what_was_given():
    watch = Watch(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    with watch.probe:
        watch.probe.model(inputs(0))
    ranks, losses = Ranks(), torch.arange(3.0)
    assert (ranks.size, ranks.joint, ranks.holds_merged) == (1, False, True)
    assert ranks.gather(lambda: 7) == [7]
    assert ranks.attempt(lambda: 8) == 8
    totals, merged = ranks.merge(watch, losses)
    assert merged is losses
    assert totals.samples.sum() == 5
    assert place_in_group() == (0, 1)
    assert not is_joint(2)


def test_alone_an_error_passes_through():
    with pytest.raises(ZeroDivisionError):
        Ranks().attempt(lambda: 1 // 0)


def begin(rank):
    dist.init_process_group("gloo", rank=rank, world_size=2)
    assert is_joint(2)
    assert not is_joint(1)  # the group is there for other ends
    assert place_in_group() == (rank, 2)


def merge_on(rank):
    begin(rank)
    ranks = Ranks(is_joint=lambda: True)
    watch = Watch(Towers())
    with watch.probe:
        watch.probe.model(NETS[rank], inputs(rank))
    totals, losses = ranks.merge(watch, torch.tensor([1.0, 10.0 * rank, rank]).double())
    parts = totals.fired.split([site.units for site in watch.layout])
    fired = {name: part.tolist() for name, part in zip(watch.layout.names, parts, strict=True)}
    left = int(watch.liveness.totals().samples.sum())
    sample = SilenceSample.nothing(2, torch.device("cpu"))
    sample.fired[rank], sample.calls[:], sample.sums[:] = 1, 1, float(rank + 1)
    seen = ranks.merge_sample(lambda: sample)
    values = ranks.gather(lambda: (rank, seen.fired.tolist(), seen.quantiles[:, 0].tolist()))
    return fired, losses.tolist(), left, values


@pytest.mark.ranks
def test_counts_of_ranks_with_other_layers_come_together():
    (fired, losses, left, values), (theirs, other_losses, nothing, _) = on_two_ranks(merge_on)
    model = Towers()
    expected = {
        f"towers.{name}.1": sum(
            (model.towers[name](inputs(rank)) > 0).sum(0) for rank in range(2) if name in NETS[rank]
        ).tolist()
        for name in "abc"
    }
    assert fired == expected
    assert theirs == expected
    assert losses == other_losses == [2.0, 10.0, 1.0]
    assert left == 3 * 5 + 2 * 6  # the first rank holds what was merged
    assert nothing == 0
    assert [value[0] for value in values] == [0, 1]
    assert values[0][1:] == values[1][1:] == ([1.0, 1.0], [1.5] * len(LEVELS))


def fail_on(rank):
    begin(rank)
    failed = []
    ranks = Ranks(is_joint=lambda: True, has_failed=lambda: bool(failed))
    told = []
    for number, compute in enumerate([lambda: rank, lambda: 1 // (1 - rank), lambda: rank]):
        try:
            told.append(ranks.gather(compute))
        except RankFailure as error:
            told.append(type(error.__cause__).__name__)
            failed.append(number)
    return told


@pytest.mark.ranks
def test_a_failure_on_one_rank_is_told_to_all_and_hangs_none():
    first, second = on_two_ranks(fail_on)
    assert first == [[0, 1], "NoneType", "NoneType"]
    assert second == [[0, 1], "ZeroDivisionError", "NoneType"]  # the rank that failed stays failed
