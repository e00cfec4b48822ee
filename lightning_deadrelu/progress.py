"""Say something while a progress bar is drawn, without tearing it."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr, suppress
from typing import Any

_LOGGERS = ("", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
"""Whose handlers write to the terminal; where both packages were imported, Lightning logs by the later one."""
_TQDM = ("train_progress_bar", "val_progress_bar")
"""Where Lightning keeps the bars that its ``print`` writes above."""


def say_beside(bar: Any, say: Callable[[], None]) -> None:
    """Say something by way of the progress bar, which draws itself anew below it.

    What a warning or Lightning's loggers write to the terminal is caught and handed to the bar. Filters of warnings,
    and what else listens to the loggers, have it as ever.

    Args:
        bar: The Trainer's progress bar; None if it has none.
        say: Warns, or logs.

    Example:
        >>> say_beside(None, lambda: print("3 units died"))
        3 units died
    """
    if not _is_drawn(bar):
        say()
        return
    caught = io.StringIO()
    with ExitStack() as stack:
        for handler in _on_terminal():
            stack.callback(handler.setStream, handler.stream)
            handler.setStream(caught)
        stack.enter_context(redirect_stderr(caught))
        say()
    if text := caught.getvalue().rstrip("\n"):
        bar.print(text)


def _is_drawn(bar: Any) -> bool:
    """Tell whether a bar is on a terminal now; in a notebook Rich has a place of its own, and takes no print."""
    live = getattr(getattr(bar, "progress", None), "live", None)
    if live is not None:
        return bool(live.is_started) and not live.console.is_jupyter
    for name in _TQDM:
        with suppress(AttributeError, TypeError):  # another kind of bar, or not begun
            if not getattr(bar, name).disable:
                return True
    return False


def _on_terminal() -> Iterator[logging.StreamHandler[Any]]:
    """List the handlers through which Lightning writes to the terminal."""
    proxied = getattr(sys.stderr, "rich_proxied_file", None)  # while Rich draws, what was `sys.stderr` before
    streams = (sys.stderr, sys.__stderr__, sys.stdout, sys.__stdout__, proxied)
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and any(handler.stream is stream for stream in streams):
                yield handler
