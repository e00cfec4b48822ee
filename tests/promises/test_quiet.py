"""Promise 11: what is said is said once."""

import warnings

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import nn
from toys import EVERYTHING, Log, Net, batches, fit

from lightning_deadrelu import DeadReLUMonitor


def test_a_model_without_rectifiers_is_trained_and_told_once():
    log, model, monitor = (
        Log(),
        Net(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))),
        DeadReLUMonitor(**EVERYTHING),
    )
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fit(model, batches(9), monitor, logger=log)
    assert sum("no rectifier ran in the observed batches" in str(warning.message) for warning in record) == 1
    assert log.verdicts() == []
    assert len(model.losses) == 9
    assert monitor.report.dead_fraction == 0.0


def test_dead_sites_are_told_once():
    with pytest.warns(UserWarning, match="and get no gradient") as record:
        fit(Net(), batches(12), DeadReLUMonitor(**EVERYTHING))
    told = [str(warning.message) for warning in record if "get no gradient" in str(warning.message)]
    assert sum("`net.1`" in text for text in told) == 1
    assert "dead at step 3: `net.1` (3 of 8 units)" in told[0]


class Lives(Callback):
    """Notes whether a display lives when something is printed; listed before the bar, as all of a user's are."""

    def __init__(self, monkeypatch):
        self.when = []
        monkeypatch.setattr("builtins.print", self.note)

    def note(self, *words, **options):
        if words and str(words[0]).startswith("dead_relu:"):
            self.when.append(self.displays())

    def setup(self, trainer, pl_module, stage):
        self.bar = trainer.progress_bar_callback

    def displays(self):
        if isinstance(self.bar, RichProgressBar):
            return self.bar.progress.live.is_started
        return isinstance(self.bar, TQDMProgressBar) and not self.bar.train_progress_bar.disable


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar, None])
def test_the_outcome_is_printed_once_when_no_display_lives(bar, monkeypatch):
    lives = Lives(monkeypatch)
    callbacks = [DeadReLUMonitor(**EVERYTHING), lives, *([bar()] if bar else [])]
    fit(Net(), batches(12), *callbacks, enable_progress_bar=bar is not None, max_epochs=2)
    assert lives.when == [False]


def test_the_outcome_is_printed_whatever_the_level_of_logging(capsys):
    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(Net(), batches(12), monitor)
    assert capsys.readouterr().out == f"dead_relu: {monitor.summary()}\n"
    fit(Net(), batches(12), monitor, fast_dev_run=True)
    assert "dead" not in capsys.readouterr().out


def test_activations_that_stay_are_told_with_what_they_ask_for(capsys):
    monitor = DeadReLUMonitor(**EVERYTHING, remedy="gelu")
    fit(Net(), batches(12), monitor)
    line = "who loads weights without the monitor calls `restore_activations(model, path)` before"
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"Activations that were exchanged for good: `net.1` is `gelu`; {line}."
    assert [event.action for event in monitor.events if line in event.reason] == ["edited"]


@pytest.mark.parametrize("remedy", [None, "reset"])
def test_nothing_is_told_of_activations_that_stayed_as_they_were(remedy, capsys):
    fit(Net(), batches(12), monitor := DeadReLUMonitor(**EVERYTHING, remedy=remedy))
    assert "restore_activations" not in capsys.readouterr().out + str(monitor.events)
