"""What a probe has to know of a torch function before it looks at a call: told once for all its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_deadrelu.model.rectifiers import Rectifier, always_rectifies, may_rectify
from lightning_deadrelu.model.torch_calls import (
    CHOICES,
    IDENTITIES,
    IGNORED,
    RESHAPES,
    function_name,
    may_make_zeros,
    plain_name,
    writes_in_place,
)
from lightning_deadrelu.observe.compiled_operators import is_operator
from lightning_deadrelu.observe.provenance import SHAPING, STEADY

_SELECTING = frozenset({"scatter", "scatter_", "mul", "multiply", "where", "masked_fill", "masked_fill_"})
_SELECTING |= CHOICES | RESHAPES | IDENTITIES


class TorchFunction(NamedTuple):
    """A torch function, by what its name tells.

    Args:
        name: Its full name.
        plain: Its name without its forms; see :func:`~lightning_deadrelu.model.torch_calls.plain_name`.
        ignored: Whether it never gives a tensor that matters.
        may_rectify: Whether a call may be a rectifier's.
        rectifier: Which it is, whatever the arguments are; None where they tell.
        in_place: Whether it overwrites what it is given, by its name alone.
        steady: Whether what is known of all operands, and the output's shape, settle what is known of the output.
        shapes: Whether units may move about although the shape stays; of others, steady or not, the same holds where
            all operands and the output have one shape.
        repeats: Whether what is known of an output may be that of the call before; not where it may be all zeros.
        selects: Whether selections of activations are made of it, by its full name.
        operator: Whether it is an operator that takes functions (``torch.cond``).
    """

    name: str
    plain: str
    ignored: bool
    may_rectify: bool
    rectifier: Rectifier | None
    in_place: bool
    steady: bool
    shapes: bool
    repeats: bool
    selects: bool
    operator: bool


def torch_function(func: Callable[..., Any]) -> TorchFunction:
    """Tell what a function is.

    Example:
        >>> import torch
        >>> relu = torch_function(torch.relu_)
        >>> relu.plain, relu.may_rectify, relu.in_place
        ('relu', True, True)
    """
    name = function_name(func)
    plain = plain_name(name)
    return TorchFunction(
        name,
        plain,
        name in IGNORED,
        may_rectify(name),
        always_rectifies(name),
        writes_in_place(name, {}),
        plain in STEADY,
        plain in SHAPING,
        not may_make_zeros(plain),
        name in _SELECTING,
        is_operator(func),
    )


class MetFunctions(dict[Callable[..., Any], TorchFunction]):
    """What is known of the functions met, to be forgotten soon: they may be of the model, and hold tensors.

    Example:
        >>> import torch
        >>> MetFunctions()[torch.tanh].plain
        'tanh'
    """

    def __missing__(self, func: Callable[..., Any]) -> TorchFunction:
        self[func] = torch_function(func)
        return self[func]
