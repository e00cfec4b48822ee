"""A monitor for every Trainer of a machine or a cluster, by an environment variable and without a line of code."""

from __future__ import annotations

import ast
import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_deadrelu.callback import DeadReLUMonitor

VARIABLE = "DEAD_RELU_MONITOR"
_SUFFIX = "_of_environment"
_OFF, _ON = frozenset({"", "0", "off", "false", "no"}), frozenset({"1", "on", "true", "yes"})


def from_environment() -> list[Callback]:
    """Make a monitor if the environment variable ``DEAD_RELU_MONITOR`` asks for one.

    Lightning calls this for each Trainer, by its entry point for callbacks. The variable is ``1`` for the defaults, or
    holds arguments of :class:`~lightning_deadrelu.DeadReLUMonitor`, as ``remedy=auto; every_n_steps=50``.

    Returns:
        The monitor, or nothing where the variable is empty, ``0`` or ``off``.

    Raises:
        ValueError: If the variable cannot be read.

    Example:
        >>> os.environ["DEAD_RELU_MONITOR"] = "threshold=0.2; include=['encoder.*']"
        >>> from_environment()
        [MonitorFromEnvironment(threshold=0.2, include=['encoder.*'])]
        >>> del os.environ["DEAD_RELU_MONITOR"]
        >>> from_environment()
        []
    """
    written = os.environ.get(VARIABLE, "").strip()
    if written.lower() in _OFF:
        return []
    return [MonitorFromEnvironment(**({} if written.lower() in _ON else _arguments_in(written)))]


class MonitorFromEnvironment(DeadReLUMonitor):
    """A monitor that steps back where the Trainer has been given one in code."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._steps_back = any(isinstance(one, DeadReLUMonitor) and one is not self for one in trainer.callbacks)
        if self._steps_back:
            self.remedy, self.name = None, self.name.removesuffix(_SUFFIX) + _SUFFIX  # to be in nobody's way
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._steps_back:
            super().on_fit_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._steps_back:
            super().on_train_start(trainer, pl_module)


def _arguments_in(written: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in written.split(";") if part.strip()]
    if not all(equals and name.strip().isidentifier() for name, equals, _ in pairs):
        raise ValueError(
            f"`{VARIABLE}={written}`: it is 1, or arguments of DeadReLUMonitor with `;` between them."
            f" Try `{VARIABLE}='remedy=auto; every_n_steps=50'`."
        )
    return {name.strip(): _value_of(value.strip()) for name, _, value in pairs}


def _value_of(written: str) -> Any:
    try:
        return ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return written
