"""The arguments of a monitor, whoever calls it, checked together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from os import PathLike
from typing import Any, ClassVar

from torch import Tensor

from lightning_deadrelu.remedies import Remedy, ladder_of
from lightning_deadrelu.statistics import Rules
from lightning_deadrelu.validation import Argument, check_fields, checked


def _check_mask(it: Argument) -> None:
    fits = it.value is None or callable(it.value)
    it.check(fits, "it is called with each batch", 'mask=lambda batch: batch["attention_mask"]')


def _check_unit_dims(it: Argument) -> None:
    pairs = it.value.items() if isinstance(it.value, Mapping) else [(it.value, it.value)]
    fits = it.value is None or all(isinstance(pattern, str) and type(dim) is int for pattern, dim in pairs)
    it.check(fits, "it maps patterns to dimensions", 'unit_dims={"encoder.*": 1}')


def _check_folder(it: Argument) -> None:
    fits = it.value is None or (isinstance(it.value, (str, PathLike)) and str(it.value) != "")
    it.check(fits, "it is the path of a folder", 'report_dir="reports"')


def _check_preset(it: Argument) -> None:
    it.check(it.value in (None, "sae"), "there is one, for sparse autoencoders", 'preset="sae"')


def _check_name(it: Argument) -> None:
    fits = isinstance(it.value, str) and it.value.isidentifier()
    why = "metric keys start with it, and after it comes a slash; it takes letters, digits and underscores"
    it.check(fits, why, 'name="dead_relu"')


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What :class:`~lightning_deadrelu.DeadReLUMonitor` was given; see there.

    Raises:
        ValueError: What was written, why it cannot work, and the smallest edit that mends it.

    Example:
        >>> Settings(window=0)
        Traceback (most recent call last):
        ValueError: `DeadReLUMonitor(window=0)`: it has to be a whole number of at least 1. Try `window=10`.
    """

    call: ClassVar[str] = "DeadReLUMonitor"
    """What was called with these arguments."""

    every_n_steps: int = checked(10, lambda it: it.check_count(10))
    window: int = checked(10, lambda it: it.check_count(10))
    min_samples: int = checked(299, lambda it: it.check_count(299))
    threshold: float = checked(0.1, lambda it: it.check_share(0.1))
    remedy: Remedy | str | Sequence[Remedy | str] | None = None
    include: Sequence[str] = checked((), Argument.check_patterns)
    exclude: Sequence[str] = checked((), Argument.check_patterns)
    tau: float = checked(0.025, lambda it: it.check_share(0.025))
    mask: Callable[[Any], Tensor] | None = checked(None, _check_mask)
    gradient_evidence: bool = checked(False, Argument.check_flag)
    unit_dims: Mapping[str, int] | None = checked(None, _check_unit_dims)
    checkup: bool = checked(False, Argument.check_flag)
    alerts: bool = checked(False, Argument.check_flag)
    report_dir: str | None = checked(None, _check_folder)
    preset: str | None = checked(None, _check_preset)
    name: str = checked("dead_relu", _check_name)
    all_rates: bool = checked(False, Argument.check_flag)

    def __post_init__(self) -> None:
        check_fields(self, self.call)
        self._check_together()

    def _argument(self, name: str) -> Argument:
        return Argument(self.call, name, getattr(self, name))

    def _check_together(self) -> None:
        if self.remedies and self.threshold == 1:
            why = "no site can have more than all of its units dead, so no remedy would ever act"
            self._argument("threshold").refuse(why, "threshold=0.1")
        if self.gradient_evidence and self.mask is not None:
            why = "with a `mask`, gradients of padding cannot be told from those of data"
            self._argument("gradient_evidence").refuse(why, "gradient_evidence=False")

    @property
    def changed(self) -> str:
        """What differs from the defaults, as it was written; empty if nothing does.

        Example:
            >>> from lightning_deadrelu.remedies import Reset
            >>> Settings(window=5, remedy=[Reset(patience=3), "leaky"]).changed
            "window=5, remedy=[Reset(patience=3), 'leaky']"
        """
        return _changed_fields(self)

    @cached_property
    def remedies(self) -> tuple[Remedy, ...]:
        """The remedies, in the order in which they are tried; none if the monitor only watches."""
        return ladder_of(self.remedy)

    @property
    def repairs(self) -> bool:
        """Whether a remedy may act, and does not only say what it would do."""
        return not all(remedy.dry_run for remedy in self.remedies)

    @property
    def rules(self) -> Rules:
        """What a verdict asks for; densities need all rates, and so does a remedy that goes by firing rates."""
        by_rate = self.preset is not None or any(remedy.significance is not None for remedy in self.remedies)
        redundancy = self.all_rates or any(remedy.treats_blind is not None for remedy in self.remedies)
        return Rules(self.min_samples, self.tau, self.all_rates or by_rate, redundancy)

    @property
    def selection(self) -> list[Any]:
        """What decides which sites are watched, and their numbers; plain values, as a checkpoint holds them."""
        dims = [[pattern, dim] for pattern, dim in (self.unit_dims or {}).items()]
        return [list(self.include), list(self.exclude), dims]

    def is_due(self, batch: int) -> bool:
        """Tell whether to observe a batch: the first of each ``every_n_steps``, or with a remedy any one of them.

        Tasks, optimizers and heads that take turns would else be met always in the same phase, and what rests in that
        phase be taken for dead.

        Args:
            batch: Its number; the first is always observed.

        Example:
            >>> [batch for batch in range(12) if Settings(every_n_steps=3).is_due(batch)]
            [0, 3, 6, 9]
        """
        block, place = divmod(batch, self.every_n_steps)
        return place == (_hashed(block) % self.every_n_steps if self.remedies else 0)


def _changed_fields(given: Settings | Remedy) -> str:
    values = {f.name: value for f in fields(given) if (value := getattr(given, f.name)) != f.default}
    return ", ".join(f"{name}={_as_written(value)}" for name, value in values.items())


def _as_written(value: Any) -> str:
    """Write a value as code; of a remedy, only what differs from its defaults."""
    if isinstance(value, Remedy):
        return f"{type(value).__name__}({_changed_fields(value)})"
    return f"[{', '.join(map(_as_written, value))}]" if isinstance(value, list) else repr(value)


def _hashed(number: int) -> int:
    """Hash a number (Knuth's multiplicative hash), 0 to 0."""
    return (number * 2_654_435_761 % 2**32) >> 16
