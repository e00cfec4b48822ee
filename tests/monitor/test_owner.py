"""What may be read of a monitor: of one that has not run, of one that runs, and of one whose copy ran."""

import copy
import gc
import pickle

import pytest
from lightning.pytorch import Callback
from toys import EVERYTHING, Net, batches, fit

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.monitor import monitor as monitoring

COPIES = {
    "deep": copy.deepcopy,
    "shallow": copy.copy,
    "of a copy": lambda monitor: copy.deepcopy(copy.deepcopy(monitor)),  # of which the first is gone by then
    "in a list": lambda monitor: copy.deepcopy({"callbacks": [monitor]})["callbacks"][0],
}


@pytest.mark.parametrize("how", COPIES)
def test_what_a_copy_finds_is_shown_by_its_original(how):
    monitor = DeadReLUMonitor(**EVERYTHING, remedy="reset", checkup=True)
    fit(Net(), batches(12), COPIES[how](monitor))  # as libraries do, which let go of copy and Trainer
    gc.collect()
    assert monitor.report.units == 14
    assert monitor.report.step == 11
    assert "repaired" in monitor.summary()
    assert monitor.events
    assert monitor.attribution
    assert monitor.run_report.history.windows == 3
    assert monitor.state_dict() == {}


def test_the_copy_that_ran_last_is_shown_until_the_original_runs():
    monitor = DeadReLUMonitor(**EVERYTHING)
    first, second = copy.deepcopy(monitor), copy.deepcopy(monitor)
    fit(Net(), batches(12), first)
    fit(Net(), batches(8), second)
    assert monitor.report.step == 7
    assert first.report.step == 11
    fit(Net(), batches(4), monitor)
    fit(Net(), batches(12), copy.deepcopy(monitor))
    assert monitor.report.step == 3


def test_what_is_shown_goes_with_a_pickle():
    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(Net(), batches(12), copy.deepcopy(monitor))
    assert pickle.loads(pickle.dumps(monitor)).summary() == monitor.summary()


def test_copies_keep_what_a_subclass_has():
    class Pager(DeadReLUMonitor):
        def __init__(self):
            super().__init__(**EVERYTHING)
            self.pages = []

    monitor = Pager()
    assert copy.copy(monitor).pages is monitor.pages
    assert copy.deepcopy(monitor).pages is not monitor.pages


def test_a_summary_before_any_training_says_so():
    told = DeadReLUMonitor().summary()
    assert told.startswith("`monitor.summary()`: this monitor has seen no training yet, or a copy of it in another")
    assert "Call it after `fit`" in told


@pytest.mark.filterwarnings("ignore:dead_relu")
def test_a_monitor_that_could_not_start_says_why(monkeypatch):
    model, monitor = Net(), DeadReLUMonitor(**EVERYTHING)
    monkeypatch.setattr(monitoring, "Watch", lambda *args, **kwargs: [][0])
    fit(model, batches(4), monitor)
    assert len(model.losses) == 4
    assert isinstance(monitor.failure, IndexError)
    told = monitor.summary()
    assert told.startswith("`monitor.summary()`: there is no verdict, because the monitor failed and watches no longer")
    for copied in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert copied.failure is None
    monkeypatch.undo()
    fit(Net(), batches(4), monitor)
    assert monitor.failure is None
    assert monitor.report.units == 14


def test_a_summary_before_the_first_verdict_says_when_there_will_be_one():
    told = {}

    class Asks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            told[batch_idx] = trainer.callbacks[0].summary()

    fit(Net(), batches(12), DeadReLUMonitor(every_n_steps=3, window=3, min_samples=1), Asks())
    assert "the first comes after 7 training batches" in told[6]
    assert "3 of 14 units are dead" in told[7]
