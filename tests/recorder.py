"""The ground truth: every rectifier that ran, as the dispatcher saw it, below hooks, names and modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Rectified(NamedTuple):
    """One call: the operation, its input before the call, and the input from which on it fires."""

    op: str
    x: Tensor
    hinge: float


def _at_zero(x: Tensor, *rest: Any) -> float | None:
    return 0.0


def _if_from_zero(x: Tensor, low: Any = -1, *rest: Any) -> float | None:
    return 0.0 if low == 0 else None


def _if_only_from_below(x: Tensor, low: Any = None, high: Any = None) -> float | None:
    return 0.0 if not isinstance(low, Tensor) and low == 0 and high is None else None


def _if_zeros(x: Tensor, other: Tensor) -> float | None:
    return 0.0 if not other.any() or not x.any() else None


_HINGES: dict[str, Callable[..., float | None]] = {
    "relu": _at_zero,
    "relu6": _at_zero,
    "hardtanh": _if_from_zero,
    "threshold": lambda x, hinge, value: float(hinge),
    "clamp": _if_only_from_below,
    "clamp_min": _if_only_from_below,
    "maximum": _if_zeros,
    "fmax": _if_zeros,
    "hardswish": lambda x: -3.0,
    "leaky_relu": lambda x, slope=0.01: 0.0 if slope == 0 else None,
}


class Recorder(TorchDispatchMode):
    """Record the rectifiers of the forward passes under it; what backward recomputes is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Rectified] = []
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = func.overloadpacket.__name__
        self.ops.append(op)
        rule = _HINGES.get(op.removesuffix("_"))
        if rule is not None and torch._C._current_graph_task_id() == -1:
            self._record(op, rule, args)
        return func(*args, **kwargs)

    def _record(self, op: str, rule: Callable[..., float | None], args: tuple[Any, ...]) -> None:
        hinge, x = rule(*args), args[0]
        if op in ("maximum", "fmax") and not x.any():
            x = args[1]
        if hinge is not None and x.numel() and x.is_floating_point():
            self.calls.append(Rectified(op.removesuffix("_"), x.detach().clone(), hinge))


@contextmanager
def no_fast_path() -> Any:
    """Keep ``nn.TransformerEncoderLayer`` from fusing itself into one operation that hides its relu."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def fires(x: Tensor, hinge: float, dims: tuple[int, ...]) -> Tensor:
    """Tell by brute force which units have any input above the hinge."""
    over = [dim for dim in range(-x.ndim, 0) if dim not in dims]
    return (x > hinge).permute(*over, *dims).reshape(-1, *(x.shape[dim] for dim in dims)).any(0).flatten()
