"""The batched study of the benchmark is the Trainer's run, edit by edit and bit by bit."""

from dataclasses import replace

import absolute
import causes
import healthy
import layouts
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from lightning_deadrelu import DeadReLUMonitor


def told(events):
    """Leave out who of the units matters to the loss, which the study does not measure."""
    return [event for event in events if event.action not in ("useful", "useless")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dead_relu")
@pytest.mark.parametrize(("seed", "blind"), [(2, None), (5, 0.05)])
def test_the_batched_study_does_what_the_trainer_does(seed, blind):
    steps, remedy = 120, replace(absolute.REMEDY, blind=blind)
    monitor = DeadReLUMonitor(remedy=replace(remedy, seed=seed), **absolute.SETTING)
    alone = absolute.train(seed, steps, monitor)
    study = absolute.Batched([seed], steps, remedy, **absolute.SETTING)
    for step in range(steps):
        study.step(step)
    events = study.ones[0].repair.events
    assert sum(event.action == "edited" for event in events) > 5
    assert any("no unit fires" in event.reason for event in events) == (blind is not None)
    assert told(events) == told(monitor.events)
    torch.testing.assert_close(study.weights[0], parameters_to_vector(alone.parameters()), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["outlier batch", "negative biases", "uncentred inputs"])
def test_a_planted_cause_kills_and_is_named_first(planted):
    row = causes.PLANTED[planted]
    found = causes.outcome(row.build(causes.Shape.of(1)))
    assert found.dead > 0.2
    assert found.first in row.causes


@pytest.mark.slow
def test_of_a_healthy_network_nothing_is_said():
    found = causes.outcome(healthy.SETUPS["MLP, SGD, warm-up, cosine"](0))
    assert found.findings == ()
    assert found.first == "nothing"


def test_each_part_that_is_timed_is_there():
    for owner, name in layouts.PARTS.values():
        assert callable(getattr(owner, name)), name
