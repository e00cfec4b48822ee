"""A module that does nothing, so that any tensor can be watched where it passes."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from lightning_deadrelu.model.rectifiers import WATCHPOINT, Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.observe.torch_modes import plain_tensor
from lightning_deadrelu.validation import Argument


class Passed(NamedTuple):
    """What passes a watchpoint, as the call of a rectifier.

    Args:
        site: The site.
        rectifier: Says from where on a unit fires.
        values: What is held against that: the tensor, or its sizes.
    """

    site: Site
    rectifier: Rectifier
    values: Tensor


class Watchpoint(nn.Module):
    """Watch what a model selects rather than rectifies: latents, experts, codes, gates.

    It returns its argument unchanged, and costs nothing until a monitor or :func:`find_dead_units` looks. Its site has
    all that a rectifier's has, under the module's path and the kind ``"watchpoint"``. No remedy touches it;
    ``on_verdict`` sees it. Compiled models run eagerly in observed batches.

    Args:
        units: How many there are.
        threshold: A unit fires where it is above; by default where it is not zero.
        indices: Whether numbers of units pass, of any shape, and not activations of shape ``(..., units)``. Then each
            number is a sample; other numbers, such as -1 for a token that no expert takes, count for no unit.

    Raises:
        ValueError: If an argument makes no sense.

    Example:
        >>> import torch
        >>> from lightning_deadrelu import Watchpoint, find_dead_units
        >>> class Router(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.experts = Watchpoint(3, indices=True)
        ...     def forward(self, scores):
        ...         return self.experts(scores.argmax(-1))
        >>> report = find_dead_units(Router(), [torch.tensor([[1.0, 3.0, 2.0], [4.0, 3.0, 2.0]])], min_samples=2)
        >>> report["experts"].dead, report["experts"].used_fraction
        (tensor([False, False,  True]), 0.6666666666666666)
    """

    def __init__(self, units: int, *, threshold: float | None = None, indices: bool = False) -> None:
        super().__init__()
        Argument("Watchpoint", "units", units).check_count(64)
        fits = threshold is None or (not indices and isinstance(threshold, (int, float)) and math.isfinite(threshold))
        why = "it is a finite number, and indices have none"
        Argument("Watchpoint", "threshold", threshold).check(fits, why, "threshold=None")
        Argument("Watchpoint", "indices", indices).check_flag()
        self.units, self.threshold, self.indices = units, threshold, indices

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x

    @override
    def extra_repr(self) -> str:
        told = {"threshold": self.threshold, "indices": self.indices or None}
        return ", ".join([str(self.units), *(f"{name}={value}" for name, value in told.items() if value is not None)])

    def read(self, output: object, path: str) -> Passed | str:
        """Take what passes for a rectifier's input, or say why it cannot be.

        Args:
            output: What passes.
            path: Of this module.

        Example:
            >>> import torch
            >>> Watchpoint(4).read(torch.ones(2, 3), "codes")
            'its last dimension holds 3 units, and `Watchpoint(4)` expects 4'
        """
        x = plain_tensor(output) if isinstance(output, Tensor) else None
        if x is None:
            return "it is passed no plain tensor"
        site = Site(path, False, WATCHPOINT, (), self.units, traced=False)
        if self.indices:
            wrong = x.is_floating_point() or x.is_complex()
            reason = f"it is passed {x.dtype}, which is no type of indices; drop `indices=True`"
            return reason if wrong else Passed(site, Rectifier(WATCHPOINT, indexed=True), x)
        found = x.shape[-1] if x.ndim else 1
        if found != self.units:
            return f"its last dimension holds {found} units, and `Watchpoint({self.units})` expects {self.units}"
        if self.threshold is not None:
            return Passed(site, Rectifier(WATCHPOINT, hinge=float(self.threshold)), x if _is_real(x) else x.float())
        return Passed(site, Rectifier(WATCHPOINT, plain=True), x.abs() if _is_real(x) else (x != 0).float())


def _is_real(x: Tensor) -> bool:
    return x.is_floating_point()
