"""Refuse what a monitor cannot work with, when it is made. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

from lightning_deadrelu.remedies import ladder_of


def check(arguments: Mapping[str, Any]) -> None:
    """Check all arguments of the monitor.

    Args:
        arguments: What was given, by name.

    Raises:
        ValueError: What was written, why it cannot work, and the smallest edit that mends it.

    Example:
        >>> check({"window": 0})
        Traceback (most recent call last):
        ValueError: `DeadReLUMonitor(window=0)`: it has to be a whole number of at least 1. Try `window=10`.
    """
    if ladder_of(arguments.get("remedy")) and arguments.get("threshold") == 1:
        why = "no site can have more than all of its units dead, so no remedy would ever act"
        _refuse("threshold", arguments["threshold"], why, "threshold=0.1")
    if arguments.get("gradient_evidence") is True and arguments.get("mask") is not None:
        why = "with a `mask`, gradients of padding cannot be told from those of data"
        _refuse("gradient_evidence", True, why, "gradient_evidence=False")
    for argument, value in arguments.items():
        if argument in _COUNTS:
            _check_count(argument, value)
        elif argument in _SHARES:
            _check_share(argument, value)
        elif argument in ("include", "exclude"):
            _check_patterns(argument, value)
        elif argument in _OTHERS:
            fits, why, example = _OTHERS[argument]
            if not fits(value):
                _refuse(argument, value, why, example)


_COUNTS = {"every_n_steps": 10, "window": 10, "min_samples": 299}
_SHARES = {"threshold": 0.1, "tau": 0.025}
_OTHERS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "gradient_evidence": (lambda value: isinstance(value, bool), "it is a switch", "gradient_evidence=True"),
    "mask": (
        lambda value: value is None or callable(value),
        "it is called with each batch",
        'mask=lambda batch: batch["attention_mask"]',
    ),
    "unit_dims": (
        lambda value: _maps_to_dimensions(value),
        "it maps patterns to dimensions",
        'unit_dims={"encoder.*": 1}',
    ),
    "alerts": (lambda value: isinstance(value, bool), "it is a switch", "alerts=True"),
    "checkup": (lambda value: isinstance(value, bool), "it is a switch", "checkup=True"),
    "report_dir": (
        lambda value: value is None or (isinstance(value, (str, PathLike)) and str(value) != ""),
        "it is the path of a folder",
        'report_dir="reports"',
    ),
    "name": (
        lambda value: isinstance(value, str) and value.isidentifier(),
        "metric keys start with it",
        'name="dead_relu"',
    ),
}


def _refuse(argument: str, value: object, why: str, example: str) -> None:
    raise ValueError(f"`DeadReLUMonitor({argument}={value!r})`: {why}. Try `{example}`.")


def _check_count(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(argument, value, "it has to be a whole number of at least 1", f"{argument}={_COUNTS[argument]}")


def _check_share(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        _refuse(argument, value, "it is a share, from 0 to 1", f"{argument}={_SHARES[argument]}")


def _check_patterns(argument: str, value: object) -> None:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    if not listed or not all(isinstance(pattern, str) for pattern in value):
        example = [value] if isinstance(value, str) else ["encoder.*"]
        _refuse(argument, value, "it takes a list of patterns", f"{argument}={example}")


def _maps_to_dimensions(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and all(isinstance(k, str) and type(v) is int for k, v in value.items())
