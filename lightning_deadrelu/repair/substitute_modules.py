"""What can take a rectifier module's place. Pure.

None of these modules carries parameters or buffers: keys of the ``state_dict`` stay, and whatever walks over
parameters and buffers (DDP, moving averages) finds what it found before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deadrelu.model.rectifiers import Rectifier

SUBSTITUTES: dict[str, Callable[[bool], nn.Module]] = {
    "leaky_relu": lambda inplace: nn.LeakyReLU(inplace=inplace),
    "rrelu": lambda inplace: nn.RReLU(inplace=inplace),
    "elu": lambda inplace: nn.ELU(inplace=inplace),
    "selu": lambda inplace: nn.SELU(inplace=inplace),
    "gelu": lambda inplace: Written(nn.GELU()) if inplace else nn.GELU(),
    "silu": lambda inplace: nn.SiLU(inplace=inplace),
}
"""What can take the place of a whole site, by kind; told whether it is to write into its input."""
MARK = "substitution"
"""The attribute of a substitute that says what it stands for."""


class Original(NamedTuple):
    """The rectifier that a module was, in plain types.

    Args:
        kind: As :class:`~lightning_deadrelu.model.rectifiers.Rectifier` names it.
        hinge: Inputs at or below it do not fire.
        cap: Inputs at or above it are clipped.
        low: The output for inputs that do not fire.
        inplace: Whether the output takes the input's place.
    """

    kind: str
    hinge: float = 0.0
    cap: float = math.inf
    low: float = 0.0
    inplace: bool = False

    @property
    def rectifier(self) -> Rectifier:
        """What a probe has to judge the substitute as."""
        return Rectifier(self.kind, self.hinge, self.cap)

    def module(self) -> nn.Module:
        """Make such a module again.

        Example:
            >>> Original("relu", inplace=True).module()
            ReLU(inplace=True)
        """
        if self.kind == "threshold":
            return nn.Threshold(self.hinge, self.low, self.inplace)
        if self.kind == "hardswish":
            return nn.Hardswish(self.inplace)
        if self.kind == "hardtanh":
            return nn.Hardtanh(0.0, self.cap, self.inplace)
        return nn.ReLU(self.inplace) if math.isinf(self.cap) else nn.ReLU6(self.inplace)

    def output(self, x: Tensor) -> Tensor:
        """Do what the module did, in a place of its own."""
        if self.kind == "threshold":
            return F.threshold(x, self.hinge, self.low)
        if self.kind == "hardswish":
            return F.hardswish(x)
        return F.relu(x) if math.isinf(self.cap) else F.hardtanh(x, 0.0, self.cap)


class LeakyUnits(nn.Module):
    """A rectifier with a slope of its own for each unit below the hinge.

    The slope is a plain tensor: it follows ``.to()``, is copied and pickled along, and is no entry of the
    ``state_dict``. Where it is 0, the output is the rectifier's to the last bit; its values may change in place at
    any time without a new compilation. Maas et al. (2013), "Rectifier nonlinearities improve neural network acoustic
    models", unit by unit.

    One module may serve several places, and a place with another number of units may come only later, or only in
    validation: an input whose size is not that of the slopes is rectified as before.

    Args:
        slope: Of each unit, shape ``(units,)``.
        dims: The dimensions of the input that hold the units, counted from the end; a unit's number runs over them in
            their order in the tensor.
        original: The rectifier it stands for.

    Example:
        >>> LeakyUnits(torch.tensor([0.0, 0.5]))(torch.tensor([[-2.0, -2.0], [3.0, 3.0]]))
        tensor([[ 0., -1.],
                [ 3.,  3.]])
    """

    slope: Tensor

    def __init__(self, slope: Tensor, dims: Sequence[int] = (-1,), original: Original = Original("relu")) -> None:
        super().__init__()
        self.slope = slope.detach().clone()
        self.dims = tuple(dims)
        self.original = original

    @property
    def inplace(self) -> bool:
        """Whether the output takes the input's place."""
        return self.original.inplace

    def forward(self, x: Tensor) -> Tensor:
        """Rectify, and let through below the hinge what the slope says."""
        return x.copy_(self._leak(x.clone())) if self.original.inplace else self._leak(x)

    def _leak(self, x: Tensor) -> Tensor:
        if not self._fits(x):
            return self.original.output(x)
        slope = self.slope.view(self._shape(x)).to(x.dtype)  # autocast would widen the output
        below = x - self.original.hinge if self.original.hinge else x
        # an infinite input times a slope of 0 would not be a number
        return torch.addcmul(self.original.output(x), slope, below.clamp(torch.finfo(x.dtype).min, 0))

    def _fits(self, x: Tensor) -> bool:
        """Whether the input has as many units as there are slopes."""
        return x.ndim >= -min(self.dims) and math.prod(self._shape(x)) == self.slope.numel()

    def _shape(self, x: Tensor) -> list[int]:
        return [x.shape[dim] if dim in self.dims else 1 for dim in range(min(self.dims), 0)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LeakyUnits:
        self.slope = fn(self.slope)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Name what the slope and the dimensions are."""
        return f"{self.original.kind}, units={self.slope.numel()}, dims={self.dims}"


class Written(nn.Module):
    """An activation that writes into its input, as the rectifier before it, and keeps the rectifier's cap."""

    def __init__(self, inner: nn.Module, cap: float = math.inf, inplace: bool = True) -> None:
        super().__init__()
        self.inner, self.cap, self.inplace = inner, cap, inplace

    def forward(self, x: Tensor) -> Tensor:
        """Activate, clip, and write."""
        out: Tensor = self.inner(x.clone() if self.inplace else x)
        out = out if math.isinf(self.cap) else out.clamp(max=self.cap)
        return x.copy_(out) if self.inplace else out


def original_of(module: nn.Module) -> Original | None:
    """Tell which rectifier a module is, or stands for; None if there is no exchanging it.

    Example:
        >>> original_of(nn.ReLU6())
        Original(kind='relu6', hinge=0.0, cap=6.0, low=0.0, inplace=False)
        >>> original_of(nn.GELU()) is None
        True
    """
    if (mark := vars(module).get(MARK)) is not None:
        return Original(**mark["original"])
    kind = type(module)  # a subclass may do something else
    inplace = bool(getattr(module, "inplace", False))
    if kind is nn.ReLU or (kind is nn.LeakyReLU and module.negative_slope == 0):
        return Original("relu", inplace=inplace)
    if kind is nn.ReLU6 or (kind is nn.Hardtanh and module.min_val == 0):
        cap = float(module.max_val)  # type: ignore[arg-type]
        return Original("relu6" if cap == 6 else "hardtanh", cap=cap, inplace=inplace)
    if kind is nn.Threshold:
        return Original("threshold", float(module.threshold), low=float(module.value), inplace=inplace)  # type: ignore[arg-type]
    return Original("hardswish", hinge=-3.0, inplace=inplace) if kind is nn.Hardswish else None


def build(kind: str, slopes: Tensor | None, dims: Sequence[int], original: Original) -> nn.Module:
    """Make what takes a rectifier's place; see :func:`~lightning_deadrelu.repair.activation_swap.substitute_`.

    Example:
        >>> build("leaky_relu", None, (-1,), Original("relu"))
        LeakyReLU(negative_slope=0.01)
    """
    if slopes is not None:
        return LeakyUnits(slopes, dims, original)
    if math.isinf(original.cap):
        return SUBSTITUTES[kind](original.inplace)
    return Written(SUBSTITUTES[kind](False), original.cap, original.inplace)
