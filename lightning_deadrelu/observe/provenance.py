"""Which parameters a tensor comes from, and which of its dimensions hold their units. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.model.contractions import contraction
from lightning_deadrelu.model.sites import plain_parameter
from lightning_deadrelu.model.torch_calls import (
    ANY_CONVOLUTION,
    CHANNEL_NORMS,
    CONTRACTIONS,
    CONVOLUTIONS,
    GATHERS,
    JOINS,
    LAST_NORMS,
    LAYERS,
    NEGATIONS,
    NORMS,
    PERMUTES,
    RESHAPES,
    TRANSPOSES,
    Call,
    dimension_runs,
    quietly,
)
from lightning_deadrelu.observe.torch_modes import shares_memory

Dims = tuple[int, ...] | None


class Provenance(NamedTuple):
    """What is known of a tensor's origin.

    Args:
        producers: Names of the parameters behind it, back to the last layer that mixes features.
        dims: The dimensions that hold the producers' units, counted from the end; empty where unknown, None
            where they are gone (attention scores).
        convolutional: True behind a convolution: where a dimension is lost, dimension 1 is meant.
        passed: Activations passed since the producers. Where tensors join, the nearest producers count.
        part: Which slice of the producers' output this is: ``chunk`` halves are different units.
        joined: True behind a sum or concatenation of branches, such as a residual stream.
        weight: True for a parameter, and for what is computed from parameters alone.
    """

    producers: frozenset[str] = frozenset()
    dims: Dims = ()
    convolutional: bool = False
    passed: int = 0
    part: str = ""
    joined: bool = False
    weight: bool = False


STEADY = ANY_CONVOLUTION | NORMS | {"linear"}
"""Functions for which the provenance of all operands, known or not, and the output's shape settle the output's."""
SHAPING = (CONTRACTIONS | PERMUTES | RESHAPES | GATHERS | JOINS) - STEADY
"""Functions that may move units about although the shape stays."""
_WEIGHTED = LAYERS | ANY_CONVOLUTION
_REGROUPINGS = RESHAPES | JOINS | {"pad"}


@lru_cache(maxsize=4096)
def parameter(name: str) -> Provenance:
    """Start a lineage at a parameter.

    Example:
        >>> sorted(parameter("fc.weight").producers)
        ['fc.weight']
    """
    return Provenance(frozenset({plain_parameter(name)}), weight=True)


@lru_cache(maxsize=4096)
def activated(known: Provenance) -> Provenance:
    """Pass an activation."""
    return known._replace(passed=known.passed + 1, weight=False)


Known = Sequence[tuple[Tensor, Provenance]]


def follow(call: Call, known: Known) -> Provenance:
    """Derive the lineage of a function's output from those of its inputs.

    Layers that mix features (linear, convolution, attention, recurrent) start anew at their weights; a
    norm adds its own; everything else hands on the nearest producers of its inputs.

    Args:
        call: What was called.
        known: The tensors among its arguments whose lineage is known, in order.

    Example:
        >>> x, weight = torch.zeros(5, 3), torch.zeros(4, 3)
        >>> call = Call("linear", (x, weight), {}, [torch.zeros(5, 4)])
        >>> follow(call, [(weight, parameter("fc.weight"))]).dims
        (-1,)
    """
    weights, activations = _sorted_out(call, known)
    operands = [tensor for tensor in call.operands if _holds_numbers(tensor) and tensor.ndim]  # a single number scales
    others = [tensor for tensor in operands if not _is_among(tensor, weights)]
    if weights and not others and not _is_layer(call):
        return _of_weights(call, weights)
    if call.name in CONTRACTIONS or call.name in ANY_CONVOLUTION:
        return _contract(call, weights) if weights else _mix(call, activations)
    return _pass_on(call, weights, activations)


def _sorted_out(call: Call, known: Known) -> tuple[Known, Known]:
    """Tell weights from activations; what a layer is applied to is one, even if it is learned (queries, prompts)."""
    applied_to = call.operands[0] if _is_layer(call) and len(call.operands) > 1 else None
    mine = call.operands[1:] if applied_to is not None else ()  # a layer's weights, whatever they are computed from
    weights = [
        (tensor, lineage)
        for tensor, lineage in known
        if tensor is not applied_to and (lineage.weight or any(tensor is other for other in mine))
    ]
    rest = [(tensor, lineage) for tensor, lineage in known if _holds_numbers(tensor)]
    return weights, [(tensor, lineage) for tensor, lineage in rest if not _is_among(tensor, weights)]


def _is_layer(call: Call) -> bool:
    return call.name in _WEIGHTED


def _is_among(tensor: Tensor, known: Known) -> bool:
    return any(tensor is other for other, _ in known)


def _holds_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is more than an index."""
    return tensor.is_floating_point() or tensor.is_complex()


def _of_weights(call: Call, weights: Known) -> Provenance:
    """Keep what is computed from parameters alone a parameter, and tell slices of a stack apart."""
    gathered = call.name in GATHERS and not shares_memory(call.output, weights[0][0])
    lost = gathered or any(lineage.dims is None for _, lineage in weights)
    return Provenance(_union(weights), None if lost else (), part=_weight_part(call, weights), weight=True)


def _contract(call: Call, weights: Known) -> Provenance:
    convolutional = call.name in ANY_CONVOLUTION
    dims = _convolution_dims(call) if convolutional else _weight_dims(call, weights)
    return Provenance(_union(weights), dims, convolutional, part=_join_parts(weights))


def _mix(call: Call, activations: Known) -> Provenance:
    """Follow a product of activations: what is summed up is gone, and the other features stay (those of values)."""
    terms, result = contraction(call) or ([(call.operands[-1], "ij")], "ij")
    for tensor, letters in reversed(terms):
        own = next((lineage for other, lineage in activations if other is tensor), None)
        dims = _carried(own.dims, letters, result) if own and own.dims else None
        if own and dims:
            return own._replace(dims=dims, weight=False)
    return Provenance(_union(activations), None)


def _carried(dims: tuple[int, ...], letters: str, result: str) -> Dims:
    """Say where dimensions are in a result; None if some are summed up."""
    letters = letters.rjust(max(-dim for dim in dims), "?")
    own = [letters[dim] for dim in dims]
    places = tuple(result.index(letter) - len(result) for letter in own if letter in result)
    return places if len(places) == len(dims) else None


def of_module(parameters: Sequence[tuple[str, Tensor]], output: Tensor) -> Provenance | None:
    """Take a module's own parameters for the producers of an output that no seen function returned.

    Custom autograd functions and scripted modules compute out of sight.

    Args:
        parameters: The module's own parameters by name, the weight first.
        output: What the module returned.

    Example:
        >>> of_module([("fc.weight", torch.zeros(4, 3))], torch.zeros(5, 4)).dims
        (-1,)
    """
    if not parameters or output.ndim == 0:
        return None
    weight = parameters[0][1]
    wide, units = weight.ndim >= 3, weight.shape[0] if weight.ndim else 0
    fits = [
        dim
        for dim in ((1 - output.ndim, -1) if wide else (-1, 1 - output.ndim))
        if dim < 0 and output.shape[dim] == units
    ]
    return Provenance(frozenset(name for name, _ in parameters), tuple(fits[:1]), convolutional=wide)


def _union(known: Known) -> frozenset[str]:
    return frozenset[str]().union(*(lineage.producers for _, lineage in known))


def _join_parts(known: Known) -> str:
    return "".join(dict.fromkeys(lineage.part for _, lineage in known))


def _weight_part(call: Call, weights: Known) -> str:
    """Tell the slices of a stack of weights apart by where they start, which needs no look at an index tensor."""
    main, part = weights[0][0], _join_parts(weights)
    if len(weights) > 1 or call.output.numel() >= main.numel() or not shares_memory(call.output, main):
        return part
    return f"{part}/{call.output.storage_offset() - main.storage_offset()}"


def _convolution_dims(call: Call) -> Dims:
    positions = CONVOLUTIONS.get(call.name) or call.output.ndim - 2
    return (-positions - 1,)


def _weight_dims(call: Call, weights: Known) -> Dims:
    """Say where the dimensions of a weight are in a product; of a stack that an index picked, those of one alone."""
    terms, result = (contraction(call) if call.name not in LAYERS - {"linear"} else None) or ([], "")
    for weight, lineage in weights:
        own = next((letters for operand, letters in terms if operand is weight), "")
        if weight.ndim > 1 and own:
            stack = own[:-2] if call.name != "einsum" else ""
            alike = [x for x, size in zip(stack, weight.shape, strict=False) if lineage.dims is None or size == 1]
            places = enumerate(result, -len(result))
            return tuple(i for i, x in places if x in own and x not in alike and -i <= call.output.ndim) or (-1,)
    return (-1,)


def _pass_on(call: Call, weights: Known, activations: Known) -> Provenance:
    nearest = min((lineage.passed for _, lineage in activations), default=0)
    near = [(tensor, lineage) for tensor, lineage in activations if lineage.passed == nearest]
    main, lineage = next((pair for pair in near if pair[1].dims), near[0]) if near else (call.output, Provenance())
    joined = any(other.joined or other.producers != lineage.producers for _, other in near)
    dims = _norm_dims(call) or _travel(call, main, lineage)
    own_norm = bool(weights) and call.name in NORMS
    return Provenance(
        # what reaches a norm through a residual stream differs from call to call: its own weights do not
        _union(weights if own_norm and joined else [*near, *weights]),
        dims,
        lineage.convolutional or call.name in CHANNEL_NORMS,
        0 if own_norm else nearest,
        _part(call, main, lineage, dims),
        joined and not own_norm,
    )


def _norm_dims(call: Call) -> Dims:
    if call.name in CHANNEL_NORMS and call.output.ndim >= 2:
        return (1 - call.output.ndim,)
    return (-1,) if call.name in LAST_NORMS else ()


def _part(call: Call, main: Tensor, lineage: Provenance, dims: Dims) -> str:
    if call.name in NEGATIONS:
        return lineage.part.removesuffix("-") if lineage.part.endswith("-") else lineage.part + "-"
    if not dims or not lineage.dims or call.name in _REGROUPINGS:
        return lineage.part
    if math.prod(call.output.shape[d] for d in dims) == math.prod(main.shape[d] for d in lineage.dims):
        return lineage.part
    which = str(call.place) if len(call.outputs) > 1 else _spell([*call.args[1:], *call.kwargs.values()])
    return f"{lineage.part}/{which}"


def _spell(value: Any) -> str:
    """Write arguments down without reading a tensor's values, which would wait for the device."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, (list, tuple)):
        return f"({','.join(_spell(item) for item in value)})"
    return str(value)


def _travel(call: Call, main: Tensor, lineage: Provenance) -> Dims:
    """Say where the unit dimensions of ``main`` are in the output."""
    output, dims = call.output, lineage.dims
    if not dims or output.ndim == 0:
        return dims and None
    if call.name in PERMUTES:
        return _permuted(call, main.ndim, dims)
    if call.name in RESHAPES:
        return _reshaped(tuple(main.shape), tuple(output.shape), dims)
    if output.ndim == main.ndim:
        return dims
    if _can_rehearse(call, main):
        with suppress(RuntimeError, TypeError, IndexError):  # some arguments fit the true sizes alone
            return _rehearsed(call, main, dims)
    return _refitted(call, main, lineage)


def _refitted(call: Call, main: Tensor, lineage: Provenance) -> Dims:
    """Guess where units are after a dimension came or went; None where sizes belie the guess."""
    output, dims = call.output, lineage.dims or ()
    place = 1 - output.ndim if lineage.convolutional and output.ndim >= 2 else -1
    guess = dims if output.ndim > main.ndim else (place,)
    fits = math.prod(output.shape[dim] for dim in guess) == math.prod(main.shape[dim] for dim in dims)
    return guess if fits else None


def _method(name: str) -> Callable[..., Any] | None:
    """Find a function of tensors by its plain name, if there is one that makes no use of anything else."""
    method: Callable[..., Any] | None = getattr(Tensor, name, None) or getattr(Tensor, f"__{name}__", None)
    return torch.stack if name == "stack" else method


def _can_rehearse(call: Call, main: Tensor) -> bool:
    """Whether nothing but ``main``, tensors like it and plain numbers are among the arguments."""
    return (
        _method(call.name) is not None
        and main.shape.numel() > 0
        and all(other.shape == main.shape for other in call.operands)
    )


@quietly()
def _rehearsed(call: Call, main: Tensor, dims: tuple[int, ...]) -> Dims:
    """Repeat the call on a stand-in without storage, whose sizes and strides number its dimensions."""
    stand_in = torch.empty([max(main.shape) + 1 + i for i in range(main.ndim)], device="meta")

    def swap(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            return [swap(item) for item in value]
        return stand_in if isinstance(value, Tensor) else value

    function = _method(call.name)
    assert function is not None
    result = function(*map(swap, call.args), **{name: swap(value) for name, value in call.kwargs.items()})
    result = result if isinstance(result, Tensor) else result[call.place]
    marks, numbers = (result.stride(), stand_in.stride()) if result._is_view() else (result.shape, stand_in.shape)
    own = [numbers[dim] for dim in dims]
    return tuple(place - result.ndim for place, mark in enumerate(marks) if mark in own) or None


@quietly()
def _permuted(call: Call, ndim: int, dims: tuple[int, ...]) -> Dims:
    """Permute a storage-free stand-in whose sizes number its dimensions, and read where they went."""
    stand_in = torch.empty((), device="cpu").expand(tuple(range(ndim)))
    if call.name in TRANSPOSES:
        moved = getattr(stand_in, call.name)
    else:
        moved = getattr(Tensor, call.name)(stand_in, *call.args[1:], **call.kwargs)
    return tuple(place - ndim for place, number in enumerate(moved.shape) if number - ndim in dims)


def _reshaped(old: tuple[int, ...], new: tuple[int, ...], dims: tuple[int, ...]) -> Dims:
    """Carry dimensions through a row-major reshape; one merged with others takes them along."""
    own = {dim + len(old) for dim in dims}
    found: list[int] = []
    for sources, targets in dimension_runs(old, new):
        wide = [i for i in sources if old[i] > 1] or sources
        if own.intersection(wide):
            found += [j - len(new) for j in targets if new[j] > 1] or [j - len(new) for j in targets[:1]]
    return tuple(found) or None  # a single unit's dimension may be squeezed away
