"""Follow labels through calls that move elements about, or gather over dimensions that hold no units. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_deadrelu.attribution.labels import (
    NONE,
    Flow,
    NotFollowable,
    Stream,
    TracedCall,
    UnaccountedRead,
    filled,
    grown,
    shrunk,
    unaccounted_reads,
)
from lightning_deadrelu.model.torch_calls import (
    ALONG,
    DROPOUTS,
    EXPANDS,
    IDENTITIES,
    JOINS,
    PERMUTES,
    POOL,
    REDUCTIONS,
    RESHAPES,
    RESIZES,
    SHUFFLES,
    SPLITS,
    SPREADS,
    dimension_runs,
    quietly,
)

_KEEP_SUMS = IDENTITIES | RESHAPES | PERMUTES | SPLITS | EXPANDS | SHUFFLES | RESIZES | JOINS
_KEEP_SUMS |= {"mean", "amax", "max", "unbind", "narrow", "select", "getitem", "repeat", "tile", "flip", "roll"}
_KEEP_SUMS |= {"index_select", "gather"}


def keeps_sums(call: TracedCall) -> bool:
    """Whether a constant added before the call is the same constant behind it."""
    found = POOL.match(call.name)
    if call.name.startswith("avg_pool"):
        padding = call.argument(3, "padding", 0)
        widths = padding if isinstance(padding, (list, tuple)) else [padding]
        return not any(widths) and not call.argument(6, "divisor_override")
    return call.name in _KEEP_SUMS or (bool(found) and "lp" not in call.name)


def passing(call: TracedCall, flow: Flow) -> tuple[list[Stream], list[UnaccountedRead]]:
    """Give up the outlets where a constant added before the call is another one behind it."""
    if keeps_sums(call):
        return list(flow.streams), []
    lost = tuple(stream for stream in flow.streams if stream.is_outlet)
    kept = [stream for stream in flow.streams if not stream.is_outlet]
    return kept, list(unaccounted_reads(Flow(lost), f"`{call.name}`", ""))


def mover(name: str) -> Callable[[TracedCall, Tensor, Tensor], list[Tensor]] | None:
    """Find how a call moves labels: a function of the call, its tensor and that tensor's labels, if known."""
    if POOL.match(name):
        return _pooled
    return _MOVERS.get(name)


def _same(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    return [labels]


def _reshaped(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    if any(isinstance(value, torch.dtype) for value in call.args[1:]):
        raise NotFollowable("its bits are read as another type")
    return [_reshape(labels, tuple(main.shape), tuple(call.output.shape))]


def _reshape(labels: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Reshape what is not alike along a run of dimensions, and leave size 1 where it is."""
    full: list[int] = []
    sizes = [1] * len(new)
    for sources, targets in dimension_runs(old, new):
        if any(labels.shape[dim] > 1 for dim in sources):
            full += sources
            for dim in targets:
                sizes[dim] = new[dim]
    return filled(labels, old, full).reshape(sizes)


@quietly()
def _replayed(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    """Make the same call with labels in the tensor's place."""

    def swap(value: Any) -> Any:
        return labels.detach() if value is main else value

    assert call.func is not None
    result = call.func(*map(swap, call.args), **{name: swap(value) for name, value in call.kwargs.items()})
    return [result] if isinstance(result, Tensor) else list(result)


def permuted(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    """Permute the dimensions of labels as the call does a tensor's."""
    return _replayed(call, main, labels)


def order(call: TracedCall) -> tuple[int, ...]:
    """Tell for each dimension that a permuting call returns which one of its tensor's it was."""
    main = call.operands[0]
    return tuple(permuted(call, main, torch.empty((), device="cpu").expand(tuple(range(main.ndim))))[0].shape)


def _cut(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    """Make the same call, with all places along the dimension that is cut."""
    dim = call.argument(_CUTS[call.name], "dim", 0)
    return [tidy(part) for part in _replayed(call, main, filled(labels, main.shape, [dim]))]


def is_plain_index(call: TracedCall) -> bool:
    """Whether no elements are picked by number one by one."""
    items = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    return all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items)


def _got(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    """Index, without a look at index tensors, which would wait for the device: what they pick has to be alike."""
    own: list[Any] = []
    place = 0
    for item in _spelt_out(call.args[1], main.ndim):
        dims = range(place, place + _width(item))
        place = dims.stop
        if isinstance(item, Tensor):
            labels = _constant_along(labels, dims, "its units are picked by an index tensor")
            first = torch.zeros([1] * (1 if item.dtype == torch.bool else item.ndim), dtype=torch.int64, device="cpu")
            own += [first] * len(dims)
        elif item is not None and labels.shape[dims[0]] == 1:
            own.append(slice(None) if isinstance(item, slice) else [0] if isinstance(item, list) else 0)
        else:
            own.append(item)
    return [labels[tuple(own)]]


def _spelt_out(index: Any, ndim: int) -> list[Any]:
    """List what stands for each dimension, and for each new one, without dots."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, bool) for item in items):
        raise NotFollowable("it is indexed by a truth")
    rest = [slice(None)] * (ndim - sum(map(_width, items)))
    dots = next((place for place, item in enumerate(items) if item is Ellipsis), len(items))
    return [*items[:dots], *rest, *items[dots + 1 :]]


def _width(item: Any) -> int:
    """Count the dimensions that an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _expanded(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    return [grown(labels, call.output.ndim)]


def _repeated(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    labels, old = grown(labels, call.output.ndim), (1,) * (call.output.ndim - main.ndim) + tuple(main.shape)
    times = [
        new // before if size > 1 else 1 for size, before, new in zip(labels.shape, old, call.output.shape, strict=True)
    ]
    return [labels.repeat(times)]


def _rolled(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    if call.name == "roll" and call.argument(2, "dims") in (None, ()):
        labels = filled(labels, main.shape, range(main.ndim))
    return _replayed(call, main, labels)


def _shuffled(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    kept = 1 if main.ndim == 4 else 0
    whole = filled(labels, main.shape, range(kept, main.ndim))
    return [tidy(moved) for moved in _replayed(call, main, whole)]


def tidy(labels: Tensor) -> Tensor:
    """Give size 1 to every dimension along which nothing changes."""
    for dim in range(labels.ndim):
        less = shrunk(labels, [dim])
        labels = labels if less is None else less
    return labels


def _constant_along(labels: Tensor, dims: Iterable[int], why: str = "it joins units") -> Tensor:
    less = shrunk(labels, list(dims))
    if less is None:
        raise NotFollowable(why)
    return less


def _pooled(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    found = POOL.match(call.name)
    positions = int(found[1]) if found else 0
    return [_constant_along(labels, range(-positions, 0))] * len(call.outputs)


def _resized(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    return [_constant_along(labels, range(2, main.ndim))]


def _reduced(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    if len(call.operands) > 1:
        raise NotFollowable("it compares tensors")
    dim = call.argument(1, "dim", call.kwargs.get("axis"))
    if dim is None or isinstance(dim, (bool, torch.dtype)) or dim == ():
        dim = range(main.ndim)
    dims = [one % main.ndim for one in ([dim] if isinstance(dim, int) else dim)]
    alike = _constant_along(labels, dims)
    if call.output.ndim == main.ndim:
        return [alike] * len(call.outputs)
    kept = [size for place, size in enumerate(alike.shape) if place not in dims]
    return [alike.reshape(kept)] * len(call.outputs)


def _taken_along(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    dim = call.argument(2 if call.name == "topk" else 1, "dim", -1)
    return [_constant_along(labels, [dim])] * len(call.outputs)


def _picked(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    """Take elements one by one along a dimension; each stays where it is along the others."""
    index = call.argument(2, "index")
    if call.name == "take_along_dim" or index is None or call.operands[0] is not main:
        raise NotFollowable("its units are picked by an index tensor")
    alike = _constant_along(labels, [call.argument(1, "dim")])
    for dim, size in enumerate(alike.shape):
        alike = alike.narrow(dim, 0, call.output.shape[dim]) if size > 1 else alike
    return [alike]


def _padded(call: TracedCall, main: Tensor, labels: Tensor) -> list[Tensor]:
    widths = call.argument(1, "pad")
    own = [width if labels.shape[-1 - place // 2] > 1 else 0 for place, width in enumerate(widths)]
    if any(own) and call.argument(2, "mode", "constant") != "constant":
        raise NotFollowable("it joins units")
    return [torch.nn.functional.pad(labels, own, value=NONE)]


def joined(call: TracedCall, starts: Sequence[int], held: Mapping[int, Tensor]) -> Tensor:
    """Put labels side by side as their tensors are; none where a tensor has none.

    Args:
        call: A call of ``cat`` or ``stack``.
        starts: Where each of its tensors begins in the output, and where the last one ends.
        held: The labels of some of the tensors, by number.
    """
    dim = _joined_along(call)
    parts = {number: labels.unsqueeze(dim) if call.name == "stack" else labels for number, labels in held.items()}
    sizes = [max(part) for part in zip(*(labels.shape for labels in parts.values()), strict=True)]
    sizes[dim] = starts[-1]
    if math.prod(sizes) > 2**24:
        raise NotFollowable("it is too large to be followed")
    whole = torch.full(sizes, NONE, device="cpu")
    for number, labels in parts.items():
        whole.narrow(dim, starts[number], starts[number + 1] - starts[number]).copy_(labels)
    return tidy_along(whole, dim)


def starts_of(call: TracedCall) -> list[int]:
    """Tell where each tensor of a ``cat`` or ``stack`` begins in the output, and where the last one ends."""
    dim, ndim = _joined_along(call), call.output.ndim
    widths = (one.shape[dim] if one.ndim == ndim else int(call.name == "stack") for one in call.operands)
    starts = [0, *accumulate(widths)]  # a vector without entries, an old way to begin with nothing, takes no place
    if starts[-1] != call.output.shape[dim]:
        raise NotFollowable("it is not made of what it is given")
    return starts


def _joined_along(call: TracedCall) -> int:
    return int(call.argument(1, "dim", call.kwargs.get("axis", 0))) % call.output.ndim


def tidy_along(labels: Tensor, dim: int) -> Tensor:
    """Give size 1 to one dimension if nothing changes along it."""
    less = shrunk(labels, [dim])
    return labels if less is None else less


_CUTS = {**dict.fromkeys(SPLITS, 2), "unbind": 1, "narrow": 1, "select": 1}
"""Calls that cut along one dimension, each with the place of that argument."""
_MOVERS: dict[str, Callable[[TracedCall, Tensor, Tensor], list[Tensor]]] = {
    **dict.fromkeys(IDENTITIES | DROPOUTS, _same),
    **dict.fromkeys(RESHAPES, _reshaped),
    **dict.fromkeys(PERMUTES, permuted),
    **dict.fromkeys(_CUTS, _cut),
    **dict.fromkeys(EXPANDS, _expanded),
    **dict.fromkeys(SHUFFLES, _shuffled),
    **dict.fromkeys(REDUCTIONS | SPREADS, _reduced),
    **dict.fromkeys(ALONG, _taken_along),
    **dict.fromkeys(RESIZES, _resized),
    "gather": _picked,
    "getitem": _got,
    "repeat": _repeated,
    "tile": _repeated,
    "flip": _rolled,
    "roll": _rolled,
    "pad": _padded,
}
