"""What the table of costs says is what was measured: callbacks take turns, and trackers compute what they should."""

import io
import re
from functools import partial

import cost
import cost_gpu
import pytest
import torch
import trackers
import turns
from rich.console import Console
from torch import nn

from lightning_deadrelu import DeadReLUMonitor


def _small(scale: int = 1) -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
    return net, torch.randn(3 * scale, 4)


def test_in_the_table_of_costs_all_callbacks_take_turns_and_see_their_own_steps_alone():
    callbacks = cost.contestants()
    assert {turns.ALONE, cost.DEFAULTS, cost.EVERY_STEP, *trackers.TRACKERS} <= set(callbacks)
    blocks = turns.compare(_small, callbacks, rounds=2, block=10)
    assert {name: len(taken) for name, taken in blocks.items()} == dict.fromkeys(callbacks, 2)
    for name, taken in blocks.items():
        assert all((block.inside > 0) == (name != turns.ALONE) and block.inside < block.step for block in taken)
    samples = [callbacks[name].report.sites[0].samples for name in (cost.DEFAULTS, cost.EVERY_STEP)]
    assert samples == [3 * 3, 10 * 3]  # one step in ten of three turns; the last window of ten steps
    assert len(callbacks["zero share, .item() per layer"].told) == 2
    assert len(callbacks["fastai ActivationStats"].told) == 3
    assert len(callbacks["Composer ActivationMonitor"].told) == 2 * (5 + 1)  # layers, and all of them together


def test_the_table_of_costs_has_a_row_for_each_callback():
    rows = cost.rows(_small, rounds=1)
    assert [row[0] for row in rows] == list(cost.contestants())
    assert {len(row) for row in rows} == {5}
    assert [row[3] for row in rows][1:3] == ["0.5%", "3.0%"]


def test_trackers_compute_what_they_are_known_for():
    x = torch.tensor([[-1.0, 0.0, 0.04, 3.0], [2.0, 2.0, 5.0, -4.0]])
    told = {}
    for kind in trackers.TRACKERS.values():
        tracker = kind()
        tracker.see("layer", (), x)
        told[kind.__name__] = next(iter(tracker.told.values()))
    assert told["ZeroShare"] == pytest.approx([3 / 8])
    assert told["ActivationStats"] == pytest.approx([x.mean().item(), x.std().item(), 4 / 8])
    rows = x.double().tolist()
    centred = [[value - sum(row) / 4 for value in row] for row in rows]
    kurtosis = [4 * sum(v**4 for v in row) / sum(v**2 for v in row) ** 2 for row in centred]
    norms = [sum(v**2 for v in row) ** 0.5 for row in rows]
    expected = [sum(norms) / 2, sum(map(sum, rows)) / 8, sum(kurtosis) / 2, (3 + 5) / 2]
    assert told["ActivationMonitor"] == pytest.approx(expected, rel=1e-5)


def test_the_interval_of_the_median_holds_it_in_95_of_100_cases():
    generator = torch.Generator().manual_seed(0)
    alone, hits = [turns.Block(1.0, 0.0)] * 10, 0
    for _ in range(1000):
        noise = torch.rand(10, generator=generator).tolist()
        _, low, high = turns.slowdown([turns.Block(value, 0.0) for value in noise], alone)
        hits += low <= 0.5 - 1 <= high
    assert 950 <= hits < 1000  # 97.9 % by the binomial law


@pytest.mark.timing
def test_an_observation_costs_in_proportion_to_what_it_reads():
    def build(scale):
        return nn.Sequential(nn.Linear(8, 1024), nn.ReLU()), torch.randn(512 * scale, 8)

    def ratio():
        small, large = (cost.observation(partial(build, scale), 9) for scale in (1, 2))
        assert (small.size, large.size) == (2, 4)  # MiB
        return large.took / small.took

    assert any(ratio() < 2.5 for _ in range(5))  # other programs may disturb one of them


@pytest.mark.slow
@pytest.mark.parametrize("build", [cost_gpu.resnet50, cost_gpu.opt])
def test_the_table_for_gpus_runs_without_one(build):
    torch.manual_seed(0)
    console = Console(record=True, width=120, file=io.StringIO())
    callbacks = {turns.ALONE: None, cost.EVERY_STEP: DeadReLUMonitor(every_n_steps=1)}
    made = partial(cost_gpu.compiled, partial(build, False), "eager")
    cost_gpu.print_one("small", made, "cpu", 1, callbacks, console)
    text = console.export_text()
    assert cost.EVERY_STEP in text
    assert re.search(r"adds [1-9]\d* operations and moves \d+\.\d MiB, [3-9]\.\d times the rectifiers' inputs", text)
