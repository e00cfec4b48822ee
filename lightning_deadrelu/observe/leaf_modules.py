"""Torch's own modules that call one function: what they do is told from the module, without a look at that call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from lightning_deadrelu.observe.torch_function import TorchFunction, torch_function
from lightning_deadrelu.observe.torch_modes import backward_hooks, backward_pre_hooks


class Leaf(NamedTuple):
    """What a module does to its input.

    Args:
        func: The function that it calls; what else it calls is of no concern.
        function: What is known of that.
        parameters: Names of all parameters, in the order in which the function takes them.
        default: An attribute and the value for which this holds; empty where there is none.
    """

    func: Callable[..., Any]
    function: TorchFunction
    parameters: tuple[str, ...] = ()
    default: tuple[str, Any] | None = None


def _leaf(func: Callable[..., Any], *parameters: str, default: tuple[str, Any] | None = None) -> Leaf:
    return Leaf(func, torch_function(func), parameters, default)


_BATCH_NORM = _leaf(functional.batch_norm, "weight", "bias")
_LEAVES: dict[type[nn.Module], Leaf] = {
    nn.Linear: _leaf(functional.linear, "weight", "bias"),
    nn.Conv1d: _leaf(torch.conv1d, "weight", "bias", default=("padding_mode", "zeros")),
    nn.Conv2d: _leaf(torch.conv2d, "weight", "bias", default=("padding_mode", "zeros")),
    nn.Conv3d: _leaf(torch.conv3d, "weight", "bias", default=("padding_mode", "zeros")),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _BATCH_NORM),
    nn.LayerNorm: _leaf(functional.layer_norm, "weight", "bias"),
    nn.Dropout: _leaf(functional.dropout, default=("inplace", False)),
    nn.ReLU: _leaf(functional.relu, default=("inplace", False)),
    nn.GELU: _leaf(functional.gelu),
}
_FORWARDS = {kind: kind.forward for kind in _LEAVES}  # for a class may be given another


def leaf_of(module: nn.Module, args: Any) -> Leaf | None:
    """Tell what a module will do to its input; None if only a look at the functions that it calls can tell.

    Args:
        module: The module.
        args: What it was called with, by position.

    Example:
        >>> leaf_of(nn.Linear(3, 4), (torch.ones(2, 3),)).function.plain
        'linear'
    """
    kind = type(module)
    leaf = _LEAVES.get(kind)
    if (
        leaf is None
        or kind.forward is not _FORWARDS[kind]
        or len(args) != 1
        or "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._backward_hooks  # for which torch wraps the input
        or module._backward_pre_hooks
        or backward_hooks
        or backward_pre_hooks
    ):
        return None
    if leaf.default is not None and module.__dict__.get(leaf.default[0]) != leaf.default[1]:
        return None
    return leaf if tuple(module._parameters) == leaf.parameters else None
