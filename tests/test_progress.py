"""Promise 11: what is said while a progress bar is drawn has a line of its own; filters have it as ever."""

import io
import logging
import re
import sys
import warnings
from contextlib import contextmanager

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from toys import EVERYTHING, Net, batches, fit

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.progress import say_beside

LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
SAYS = ["get no gradient", "Reset repaired `net.1`", "Reset revived `net.1`"]


class Screen(io.StringIO):
    """A terminal that keeps all that is written to it."""

    def isatty(self):
        return True


@contextmanager
def terminal():
    """Have the two streams of a program, its warnings and Lightning's log on one terminal."""

    def show(message, category, filename, lineno, file=None, line=None):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    screen = Screen()
    with pytest.MonkeyPatch.context() as patch:  # here and not in a fixture, behind which pytest takes the streams back
        for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
            patch.setattr(sys, name, screen)
        patch.setattr(warnings, "showwarning", show)
        for name in LOGGERS:
            patch.setattr(logging.getLogger(name), "handlers", [logging.StreamHandler(screen)])
            logging.getLogger(name).setLevel(logging.INFO)
        patch.setenv("COLUMNS", "400")
        patch.setenv("TERM", "xterm")
        yield screen
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar, None])
def test_each_line_beside_a_bar_starts_a_line(bar):
    monitor = DeadReLUMonitor(**EVERYTHING, threshold=0.0, remedy="reset")
    with terminal() as screen:
        fit(Net(), batches(12), monitor, *([bar()] if bar else []), enable_progress_bar=bar is not None)
    before = re.findall(r"([^\n\r]*?)dead_relu: ", screen.getvalue())
    assert all(words in screen.getvalue() for words in SAYS)
    assert "Epoch" in screen.getvalue() or bar is None
    plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|.*Warning: ", "", one) for one in before]
    assert plain == [""] * len(before)


class Drawn:
    """A bar that is on the terminal."""

    disable = False

    def __init__(self):
        self.train_progress_bar, self.lines = self, []

    def print(self, text):
        self.lines.append(text)


@pytest.mark.parametrize("name", LOGGERS)
def test_what_listens_to_the_log_hears_it_beside_a_bar(name):
    bar, logger, file = Drawn(), logging.getLogger(name), io.StringIO()
    with terminal() as screen:
        logger.addHandler(logging.StreamHandler(file))
        say_beside(bar, lambda: logger.warning("3 units died"))
        assert screen.getvalue() == ""
        logger.warning("later")
    assert bar.lines == ["3 units died"]
    assert file.getvalue() == "3 units died\nlater\n"
    assert screen.getvalue() == "later\n"


def test_a_warning_that_is_an_error_leaves_the_streams_as_they_were():
    def say():
        raise UserWarning("3 units died")

    with terminal() as screen:
        with pytest.raises(UserWarning, match="3 units died"):
            say_beside(Drawn(), say)
        assert sys.stderr is screen
        assert logging.getLogger("lightning.pytorch").handlers[0].stream is screen


def test_what_filters_leave_out_is_not_printed():
    bar = Drawn()
    with terminal(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        say_beside(bar, lambda: warnings.warn("3 units died", stacklevel=1))
    assert bar.lines == []
