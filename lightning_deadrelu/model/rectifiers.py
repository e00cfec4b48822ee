"""What counts as a rectifier. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

WATCHPOINT = "watchpoint"
"""The kind of what is no rectifier and is watched as one; nothing is known of what feeds it."""
COMPETITIONS = frozenset({"topk", "batch_topk"})
"""The kinds of selections in which a unit that is chosen takes the place of another."""
SELECTIONS = COMPETITIONS | {"jumprelu"}
"""The kinds of what keeps some activations and makes zeros of the others; a unit fires where it is not zero."""


class Rectifier(NamedTuple):
    """One kind of activation.

    Args:
        kind: Its name in lower case, such as ``"relu"``.
        hinge: Inputs at or below it do not fire. Between hinge and cap the unit passes gradient.
        cap: Inputs at or above it are clipped; infinity for none.
        smooth: True where no input is exactly dead (GELU, ELU, ...): only dormancy is judged.
        fused: True where the input is out of sight and the output has to stand in for it.
        plain: True where the output is ``max(input, 0)``, at most clipped: its sign tells who fired.
        indexed: True where the input holds numbers of units that fire, and no activations.
    """

    kind: str
    hinge: float = 0.0
    cap: float = math.inf
    smooth: bool = False
    fused: bool = False
    plain: bool = False
    indexed: bool = False


_RELU = Rectifier("relu", plain=True)
_MODULES: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardtanh, nn.Hardswish, nn.RReLU)
_MODULES += (nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus)

Arguments = Mapping[str, Any]


def _argument(args: Sequence[Any], kwargs: Arguments, place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _hardtanh(args: Sequence[Any], kwargs: Arguments) -> Rectifier | None:
    low, high = _argument(args, kwargs, 1, "min_val", -1.0), _argument(args, kwargs, 2, "max_val", 1.0)
    if low != 0:
        return None
    return Rectifier("relu6" if high == 6 else "hardtanh", cap=float(high), plain=True)


def _threshold(args: Sequence[Any], kwargs: Arguments) -> Rectifier:
    hinge, value = _argument(args, kwargs, 1, "threshold", 0.0), _argument(args, kwargs, 2, "value", 0.0)
    return Rectifier("threshold", hinge=float(hinge), plain=hinge == value == 0)


def _clamp(args: Sequence[Any], kwargs: Arguments) -> Rectifier | None:
    low, high = _argument(args, kwargs, 1, "min", None), _argument(args, kwargs, 2, "max", None)
    if isinstance(low, Tensor) or low != 0 or high is not None:  # with both bounds it limits a range
        return None
    return Rectifier("clamp", plain=True)


def _leaky_relu(args: Sequence[Any], kwargs: Arguments) -> Rectifier:
    slope = _argument(args, kwargs, 1, "negative_slope", 0.01)
    return _RELU if slope == 0 else Rectifier("leaky_relu", smooth=True)


def _maximum(args: Sequence[Any], kwargs: Arguments, is_zero: Callable[[Any], bool]) -> Rectifier | None:
    pair = _argument(args, kwargs, 0, "input", None), _argument(args, kwargs, 1, "other", None)
    both = all(isinstance(value, Tensor) for value in pair)  # one alone is reduced
    return Rectifier("maximum", plain=True) if both and any(map(is_zero, pair)) else None


_CONSTANT = {
    "relu": _RELU,
    "relu6": Rectifier("relu6", cap=6.0, plain=True),
    "hardswish": Rectifier("hardswish", hinge=-3.0),
    "rnn_relu": Rectifier("rnn_relu", fused=True, plain=True),
    "rnn_relu_cell": Rectifier("rnn_relu", fused=True, plain=True),
}
_SMOOTH = ("prelu", "rrelu", "gelu", "silu", "mish", "elu", "celu", "selu", "softplus")
_CONSTANT |= {name: Rectifier(name, smooth=True) for name in _SMOOTH}
_CONSTANT |= {f"{name}_": rectifier for name, rectifier in _CONSTANT.items()}  # in place
_RULES: dict[str, Callable[[Sequence[Any], Arguments], Rectifier | None]] = {
    "hardtanh": _hardtanh,
    "threshold": _threshold,
    "_threshold": _threshold,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "leaky_relu": _leaky_relu,
}
_RULES |= {f"{name}_": rule for name, rule in _RULES.items()}
SMOOTH_KINDS = frozenset({*_SMOOTH, "leaky_relu"})
"""Names of the activations of which no input is exactly dead."""
_MAXIMA = frozenset({"maximum", "max", "fmax"})


def rectifier_of(
    name: str, args: Sequence[Any], kwargs: Arguments, is_zero: Callable[[Any], bool] = lambda value: False
) -> Rectifier | None:
    """Tell which rectifier a call of a torch function is, if any.

    Args:
        name: The function's ``__name__``; a trailing underscore (in place) does not matter.
        args: Its positional arguments, the tensor first.
        kwargs: Its keyword arguments.
        is_zero: Tells whether a tensor is known to hold nothing but zeros, for ``maximum(x, zeros)``.

    Returns:
        The rectifier, or None for any other function.

    Example:
        >>> import torch
        >>> rectifier_of("relu_", (torch.zeros(3),), {}).kind
        'relu'
        >>> rectifier_of("clamp", (torch.zeros(3),), {"min": 0, "max": 1}) is None
        True
    """
    if name in _MAXIMA:
        return _maximum(args, kwargs, is_zero)
    rule = _RULES.get(name)
    return rule(args, kwargs) if rule else _CONSTANT.get(name)


def always_rectifies(name: str) -> Rectifier | None:
    """Tell which rectifier a torch function, by its ``__name__``, is whatever its arguments are; None if they tell.

    Example:
        >>> always_rectifies("relu_").kind, always_rectifies("clamp")
        ('relu', None)
    """
    return _CONSTANT.get(name)


def may_rectify(name: str) -> bool:
    """Tell whether a torch function, by its ``__name__``, is a rectifier for some arguments.

    Example:
        >>> may_rectify("relu"), may_rectify("clamp"), may_rectify("add")
        (True, True, False)
    """
    return name in _CONSTANT or name in _RULES or name in _MAXIMA


def is_rectifier_module(module: nn.Module) -> bool:
    """Tell whether a module stands for one activation, so that its path names the site.

    Example:
        >>> is_rectifier_module(nn.ReLU()), is_rectifier_module(nn.Linear(2, 2))
        (True, False)
    """
    return isinstance(module, _MODULES)
