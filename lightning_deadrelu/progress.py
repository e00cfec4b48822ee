"""Say something while a progress bar is drawn, without tearing it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_LOGGERS = ("", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
"""Whose handlers write to the terminal; where both packages were imported, Lightning logs by the later one."""


@contextmanager
def beside_bars() -> Iterator[None]:
    """Give what is written to the terminal meanwhile lines of its own, above all bars that are drawn there.

    Bars of tqdm are wiped, and drawn anew below. Rich does so with what comes to ``sys.stderr``, where it stands in;
    handlers of loggers have held on to the stream before.

    Example:
        >>> with beside_bars():
        ...     print("3 units died")
        3 units died
    """
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with ExitStack() as stack:
        if tqdm is not None:
            stack.enter_context(tqdm.external_write_mode())
        if (terminal := getattr(sys.stderr, "rich_proxied_file", None)) is not None:
            for handler in _writing_to(terminal):
                stack.callback(handler.setStream, handler.stream)
                handler.setStream(sys.stderr)
        yield


def _writing_to(terminal: Any) -> Iterator[logging.StreamHandler[Any]]:
    """List the handlers through which Lightning and the root logger write to a terminal."""
    streams = (terminal, sys.__stderr__, sys.__stdout__, getattr(sys.stdout, "rich_proxied_file", sys.stdout))
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and any(handler.stream is stream for stream in streams):
                yield handler
