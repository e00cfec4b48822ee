"""From what a user writes to remedies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial

from lightning_deadrelu.remedies.base import Remedy
from lightning_deadrelu.remedies.reviving import BiasWarming, LeakySlope, WakeUp
from lightning_deadrelu.remedies.site_remedies import KINDS, PRELU, SwapActivation
from lightning_deadrelu.remedies.unit_remedies import Reset, ThermalKick

_FLAGS: dict[str, Callable[[], Remedy]] = {
    "reset": Reset,
    "thermal_kick": ThermalKick,
    "bias_warming": BiasWarming,
    "wake_up": WakeUp,
    "leaky": LeakySlope,
    **{kind: partial(SwapActivation, activation=kind) for kind in KINDS},
}
_AUTO = ("reset", "bias_warming", "wake_up")
"""Each takes over where the one before cannot be applied, or did not help: less has to be known of the site."""


def remedy_of(flag: str) -> Remedy:
    """Make the remedy that a flag stands for, with its defaults.

    Args:
        flag: ``"reset"``, ``"bias_warming"``, ``"wake_up"``, ``"leaky"``, ``"thermal_kick"``, or an activation to swap
            to.

    Raises:
        ValueError: There is no such flag.

    Example:
        >>> remedy_of("silu").activation
        'silu'
        >>> remedy_of("rest")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: `remedy='rest'` is no remedy. Did you mean `remedy='reset'`? Known: auto, ...
    """
    if flag in _FLAGS:
        return _FLAGS[flag]()
    if flag == "prelu":
        raise ValueError(f"`remedy='prelu'`: {PRELU}.")
    known = ("auto", *_FLAGS)
    close = get_close_matches(flag, known, n=1)
    guess = f" Did you mean `remedy={close[0]!r}`?" if close else ""
    raise ValueError(f"`remedy={flag!r}` is no remedy.{guess} Known: {', '.join(known)}.")


def ladder_of(remedy: str | Remedy | Sequence[str | Remedy] | None) -> tuple[Remedy, ...]:
    """Turn whatever the ``remedy`` argument may be into the remedies, in the order in which they are tried.

    Args:
        remedy: None for none, a flag, a remedy, or several of these: each takes over where the one before failed.
            ``"auto"`` stands for ``["reset", "bias_warming", "wake_up"]``.

    Raises:
        ValueError: Something else was given, an unknown flag, or an empty sequence.

    Example:
        >>> [type(rung).__name__ for rung in ladder_of(["reset", LeakySlope(slope=0.1)])]
        ['Reset', 'LeakySlope']
        >>> ladder_of(None)
        ()
    """
    if remedy is None:
        return ()
    listed = [remedy] if isinstance(remedy, (str, Remedy)) or not isinstance(remedy, Sequence) else remedy
    if not listed:
        raise ValueError(f"`remedy={remedy!r}`: an empty list names no remedy. Try `remedy=None` to watch only.")
    return tuple(_remedy_from(each) for one in listed for each in (_AUTO if one == "auto" else (one,)))


def _remedy_from(remedy: object) -> Remedy:
    if isinstance(remedy, str):
        return remedy_of(remedy)
    if isinstance(remedy, Remedy):
        if type(remedy).propose is Remedy.propose:
            name = type(remedy).__name__
            raise ValueError(f"`remedy={name}()` has no `propose`, so it can do nothing. Try `remedy='reset'`.")
        return remedy
    if isinstance(remedy, type) and issubclass(remedy, Remedy):
        name = remedy.__name__
        raise ValueError(f"`remedy={name}` is a class, and a remedy is an object of it. Try `remedy={name}()`.")
    why = "it takes a flag, a remedy, or a list of these"
    raise ValueError(f"`remedy={remedy!r}`: {why}. Try `remedy='reset'`.")
