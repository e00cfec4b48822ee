"""An error of the record ends the record, wherever it happens, and never the counts."""

import pytest
import torch
from toys import EVERYTHING, Loader, Net, fit, tensors

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.explain.postmortem.death_events import DeathEvent
from lightning_deadrelu.explain.postmortem.recorder import FlightRecorder, Readings, RecorderState
from lightning_deadrelu.observe.watch import Watch

PLACES = (
    "recorder.off_centre",
    "recorder.explain",
    "recorder.incoming_of",
    "recorder.merged",
    "incoming_weights.IncomingWeights.read",
    "incoming_weights.IncomingWeights.close",
    "incoming_weights.IncomingWeights.biases",
    "gradient_sample.GradientSample.read",
    "step_log.StepLog.read",
    "step_log._rows",
)


def broken(*args, **kwargs):
    raise RuntimeError("a bug of ours")


@pytest.mark.filterwarnings("ignore:.*more than 10% dead")
@pytest.mark.parametrize("place", PLACES)
def test_a_failure_costs_the_record_alone(place, monkeypatch):
    monkeypatch.setattr(f"lightning_deadrelu.explain.postmortem.{place}", broken)
    monitor = DeadReLUMonitor(**EVERYTHING)
    with pytest.warns(UserWarning, match="explained no longer.*a bug of ours") as record:
        fit(Net(), Loader(tensors(8)), monitor)
    assert sum("a bug of ours" in str(one.message) for one in record) == 1
    assert monitor.report["net.1"].dead.sum() == 3
    assert monitor.deaths == ()


def test_a_record_that_has_ended_saves_its_deaths_and_nothing_else():
    recorder = FlightRecorder(Watch(torch.nn.ReLU()))
    death = DeathEvent("shock", "unknown", ("fc",), (3,), 10, 20, "as seen")
    recorder.restore(RecorderState(deaths=[death], observed=[3]))
    assert encode(recorder.state)["observed"] == [3]
    with pytest.warns(UserWarning, match="explained no longer"):
        recorder.guard.fail(RuntimeError("a bug of ours"))
    state = decode(RecorderState, encode(recorder.state))
    assert state.deaths == [death]
    assert state.observed == []


def test_what_is_read_after_a_failure_has_the_form_of_what_is_known():
    watch = Watch(torch.nn.ReLU())
    with watch.probe:
        watch.probe.model(torch.randn(3, 2))
    recorder = FlightRecorder(watch)
    known = recorder.read(torch.device("cpu"))
    with pytest.warns(UserWarning, match="explained no longer"):
        recorder.guard.fail(RuntimeError("a bug of ours"))
    unknown = recorder.read(torch.device("cpu"))
    assert [x.shape for x in known] == [x.shape for x in unknown] == [x.shape for x in Readings.unknown(1)]
