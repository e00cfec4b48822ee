"""Promise 11: what is said while a progress bar is drawn has a line of its own; filters have it as ever."""

import io
import logging
import re
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console
from rich.progress import Progress
from toys import EVERYTHING, KEY, Log, Net, batches, fit, mlp, tensors
from tqdm import tqdm

from lightning_deadrelu import DeadReLUMonitor, watch
from lightning_deadrelu.progress import beside_bars

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
        sys.stderr.write(f"{message}\n")

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


def before(screen, ours="dead_relu: "):
    """What stands before each line of ours, but for what a terminal does not show."""
    found = re.findall(rf"([^\n\r]*?){ours}", screen.getvalue())
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", one) for one in found]


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar, None])
def test_each_line_beside_a_bar_starts_a_line(bar):
    monitor = DeadReLUMonitor(**EVERYTHING, threshold=0.0, remedy="reset")
    with terminal() as screen:
        fit(Net(), batches(12), monitor, *([bar()] if bar else []), enable_progress_bar=bar is not None)
    assert all(words in screen.getvalue() for words in SAYS)
    assert "Epoch" in screen.getvalue() or bar is None
    assert set(before(screen)) == {""}


class Unreachable(Log):
    def log_metrics(self, metrics, step=None):
        if KEY in metrics:
            raise ConnectionError("the server is gone")


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
@pytest.mark.parametrize("failure", ["the monitor failed", "took no metrics and is left out"])
def test_what_fails_is_told_beside_a_bar_on_a_line_of_its_own(failure, bar):
    masks = iter([None, None])  # for two batches, and a StopIteration at the third
    mask = (lambda batch: next(masks)) if failure == "the monitor failed" else None
    with terminal() as screen:
        fit(
            Net(),
            batches(12),
            DeadReLUMonitor(**EVERYTHING, mask=mask),
            bar(),
            logger=Unreachable(),
            enable_progress_bar=True,
        )
    assert failure in screen.getvalue()
    assert "Epoch" in screen.getvalue()
    assert set(before(screen)) == {""}


@pytest.mark.filterwarnings("always")
def test_a_plain_loop_under_a_bar_of_its_own_has_lines_as_well():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with terminal() as screen, watch(model, optimizer, **EVERYTHING) as monitor:
        for batch in tqdm(tensors(8), mininterval=0, file=sys.stderr):
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    assert "8/8" in screen.getvalue()
    assert "more than 10% dead" in screen.getvalue()
    assert set(before(screen)) == {""}


def rich_bar():
    progress = Progress(console=Console(file=sys.stdout, force_terminal=True))
    progress.add_task("training", total=3)
    return progress


BARS = {"tqdm": lambda: tqdm(range(3), file=sys.stdout, mininterval=0), "rich": rich_bar}


@pytest.mark.parametrize("bar", BARS)
@pytest.mark.parametrize("name", ["", *LOGGERS])
def test_what_listens_to_the_log_hears_it_beside_a_bar(name, bar):
    logger, file = logging.getLogger(name), io.StringIO()
    with terminal() as screen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "handlers", [*(one := logging.StreamHandler(screen),), logging.StreamHandler(file)])
        with BARS[bar]():
            with beside_bars():
                logger.error("3 units died")
            assert one.stream is screen
        logger.error("later")
    assert file.getvalue() == "3 units died\nlater\n"
    assert before(screen, "(?:3 units died|later)\n") == ["", ""]


@pytest.mark.parametrize("bar", BARS)
def test_a_warning_that_is_an_error_leaves_the_streams_as_they_were(bar):
    with terminal() as screen:
        with BARS[bar](), pytest.raises(UserWarning, match="3 units died"), beside_bars():
            raise UserWarning("3 units died")
        assert sys.stderr is screen
        assert logging.getLogger("lightning.pytorch").handlers[0].stream is screen
        with beside_bars():  # nor is tqdm's lock held
            pass
