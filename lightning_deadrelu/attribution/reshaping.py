"""Follow labels through calls that move elements about, or gather over dimensions that hold no units. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_deadrelu.attribution.labels import NONE, NotFollowable, Step, filled, grown, shrunk
from lightning_deadrelu.observe.provenance import _blocks as blocks

_SAME = frozenset({"clone", "contiguous", "detach", "data", "to", "type", "type_as", "float", "half", "double"})
_SAME |= frozenset({"bfloat16", "cpu", "cuda", "requires_grad", "alias", "positive", "real", "as_subclass"})
_DROPS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "native_dropout"})
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"})
_RESHAPES |= frozenset({"ravel", "unsafe_view"})
_PERMUTES = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint"})
_PERMUTES |= frozenset({"T", "mT", "H", "mH"})
_SPLITS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"})
_EXPANDS = frozenset({"expand", "expand_as", "broadcast_to"})
_SHUFFLES = frozenset({"pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"})
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "max", "min", "median", "nanmean", "nansum", "std", "var"})
_ALONG = frozenset({"index_select", "cumsum", "sort", "cummax", "topk"})
_JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
_POOL = re.compile(r"(?:adaptive_)?(?:avg|max|lp)_pool([123])d(?:_with_indices)?$")
_RESIZES = frozenset({"interpolate", "upsample", "upsample_nearest", "upsample_bilinear"})

_KEEP_SUMS = _SAME | _RESHAPES | _PERMUTES | _SPLITS | _EXPANDS | _SHUFFLES | _RESIZES | _JOINS
_KEEP_SUMS |= {"mean", "amax", "max", "unbind", "narrow", "select", "getitem", "repeat", "tile", "flip", "roll"}


def keeps_sums(step: Step) -> bool:
    """Whether a constant added before the call is the same constant behind it."""
    found = _POOL.match(step.name)
    if step.name.startswith("avg_pool"):
        padding = step.argument(3, "padding", 0)
        widths = padding if isinstance(padding, (list, tuple)) else [padding]
        return not any(widths) and not step.argument(6, "divisor_override")
    return step.name in _KEEP_SUMS or (bool(found) and "lp" not in step.name)


def is_join(name: str) -> bool:
    """Whether the call puts several tensors side by side."""
    return name in _JOINS


def mover(name: str) -> Callable[[Step, Tensor, Tensor], list[Tensor]] | None:
    """Find how a call moves labels: a function of the call, its tensor and that tensor's labels, if known."""
    if _POOL.match(name):
        return _pooled
    return _MOVERS.get(name)


def _same(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    return [labels]


def _reshaped(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    if any(isinstance(value, torch.dtype) for value in step.args[1:]):
        raise NotFollowable("its bits are read as another type")
    return [_reshape(labels, tuple(main.shape), tuple(step.output.shape))]


def _reshape(labels: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Reshape what is not alike along a run of dimensions, and leave size 1 where it is."""
    full: list[int] = []
    sizes = [1] * len(new)
    for sources, targets in blocks(old, new):
        if any(labels.shape[dim] > 1 for dim in sources):
            full += sources
            for dim in targets:
                sizes[dim] = new[dim]
    return filled(labels, old, full).reshape(sizes)


def _replayed(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    """Make the same call with labels in the tensor's place."""

    def swap(value: Any) -> Any:
        return labels.detach() if value is main else value

    assert step.func is not None
    result = step.func(*map(swap, step.args), **{name: swap(value) for name, value in step.kwargs.items()})
    return [result] if isinstance(result, Tensor) else list(result)


def _permuted(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    return _replayed(step, main, labels)


def _split(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    dim = step.argument(2, "dim", 0)
    return [labels] * len(step.outputs) if labels.shape[dim] == 1 else _replayed(step, main, labels)


def _unbound(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    dim = step.argument(1, "dim", 0)
    return [labels.squeeze(dim)] * len(step.outputs) if labels.shape[dim] == 1 else _replayed(step, main, labels)


def _narrowed(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    return [labels] if labels.shape[step.argument(1, "dim")] == 1 else _replayed(step, main, labels)


def _selected(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    dim = step.argument(1, "dim")
    return [labels.squeeze(dim)] if labels.shape[dim] == 1 else _replayed(step, main, labels)


def _got(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    """Index, without a look at index tensors, which would wait for the device."""
    index = step.args[1] if isinstance(step.args[1], tuple) else (step.args[1],)
    if any(isinstance(item, (Tensor, list)) for item in index):
        return [_gathered(step, index, labels)]
    taken = sum(item is not None and item is not Ellipsis for item in index)
    place, own = 0, []
    for item in index:
        if item is Ellipsis:
            place += main.ndim - taken
        elif item is not None:
            alike = labels.shape[place] == 1
            item = (slice(None) if isinstance(item, slice) else 0) if alike else item
            place += 1
        own.append(item)
    return [labels[tuple(own)]]


def _gathered(step: Step, index: tuple[Any, ...], labels: Tensor) -> Tensor:
    """Take rows by one index tensor in front: which ones, does not matter where all are alike."""
    first, *rest = index
    if not isinstance(first, Tensor) or not all(item is Ellipsis or _is_whole(item) for item in rest):
        raise NotFollowable("it is indexed by tensors")
    gone = first.ndim if first.dtype is torch.bool else 1
    alike = shrunk(labels, range(gone))
    if alike is None:
        raise NotFollowable("its units are picked by an index tensor")
    kept = alike.shape[gone:]
    return grown(alike.reshape(kept), step.output.ndim)


def _is_whole(item: Any) -> bool:
    return isinstance(item, slice) and item == slice(None)


def _expanded(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    return [grown(labels, step.output.ndim)]


def _repeated(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    labels, old = grown(labels, step.output.ndim), (1,) * (step.output.ndim - main.ndim) + tuple(main.shape)
    times = [
        new // before if size > 1 else 1 for size, before, new in zip(labels.shape, old, step.output.shape, strict=True)
    ]
    return [labels.repeat(times)]


def _turned(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    if step.name == "roll" and step.argument(2, "dims") in (None, ()):
        labels = filled(labels, main.shape, range(main.ndim))
    return _replayed(step, main, labels)


def _shuffled(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    kept = 1 if main.ndim == 4 else 0
    whole = filled(labels, main.shape, range(kept, main.ndim))
    return [tidy(moved) for moved in _replayed(step, main, whole)]


def tidy(labels: Tensor) -> Tensor:
    """Give size 1 to every dimension along which nothing changes."""
    for dim in range(labels.ndim):
        less = shrunk(labels, [dim])
        labels = labels if less is None else less
    return labels


def _alike(labels: Tensor, dims: Iterable[int]) -> Tensor:
    less = shrunk(labels, list(dims))
    if less is None:
        raise NotFollowable("it joins units")
    return less


def _pooled(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    found = _POOL.match(step.name)
    positions = int(found[1]) if found else 0
    return [_alike(labels, range(-positions, 0))] * len(step.outputs)


def _resized(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    return [_alike(labels, range(2, main.ndim))]


def _reduced(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    if len(step.operands) > 1:
        raise NotFollowable("it compares tensors")
    dim = step.argument(1, "dim", step.kwargs.get("axis"))
    if dim is None or isinstance(dim, (bool, torch.dtype)) or dim == ():
        dim = range(main.ndim)
    dims = [one % main.ndim for one in ([dim] if isinstance(dim, int) else dim)]
    alike = _alike(labels, dims)
    if step.output.ndim == main.ndim:
        return [alike] * len(step.outputs)
    kept = [size for place, size in enumerate(alike.shape) if place not in dims]
    return [alike.reshape(kept)] * len(step.outputs)


def _taken_along(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    dim = step.argument(2 if step.name == "topk" else 1, "dim", -1)
    return [_alike(labels, [dim])] * len(step.outputs)


def _padded(step: Step, main: Tensor, labels: Tensor) -> list[Tensor]:
    changed = [dim for dim in range(main.ndim) if main.shape[dim] != step.output.shape[dim]]
    if all(labels.shape[dim] == 1 for dim in changed):
        return [labels]
    if step.argument(2, "mode", "constant") != "constant":
        raise NotFollowable("it joins units")
    whole = filled(labels, main.shape, changed)
    return [torch.nn.functional.pad(whole, _fitting(step.argument(1, "pad"), whole, main), value=NONE)]


def _fitting(widths: Sequence[int], labels: Tensor, main: Tensor) -> list[int]:
    """Leave out what is padded where all is alike."""
    return [
        width if labels.shape[-1 - place // 2] == main.shape[-1 - place // 2] else 0
        for place, width in enumerate(widths)
    ]


def joined(step: Step, parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Put labels side by side as their tensors are; none where a tensor has none.

    Args:
        step: A call of ``cat`` or ``stack``.
        parts: Each tensor and its labels.
    """
    dim = step.argument(1, "dim", step.kwargs.get("axis", 0))
    dim %= step.output.ndim
    new = step.name == "stack"
    sizes = [1] * step.output.ndim
    whole = []
    for tensor, labels in parts:
        if tensor.shape == (0,) and step.output.ndim > 1:  # an old way to begin with nothing
            continue
        one = torch.full((1,) * tensor.ndim, NONE, device="cpu") if labels is None else labels
        one = one.unsqueeze(dim) if new else filled(one, tensor.shape, [dim])
        sizes = [max(a, b) for a, b in zip(sizes, one.shape, strict=True)]
        whole.append(one)
    wide = [one.expand([*sizes[:dim], one.shape[dim], *sizes[dim + 1 :]]) for one in whole]
    if sum(math.prod(one.shape) for one in wide) > 2**24:
        raise NotFollowable("it is too large to be followed")
    return tidy_along(torch.cat(wide, dim), dim)


def tidy_along(labels: Tensor, dim: int) -> Tensor:
    """Give size 1 to one dimension if nothing changes along it."""
    less = shrunk(labels, [dim])
    return labels if less is None else less


_MOVERS: dict[str, Callable[[Step, Tensor, Tensor], list[Tensor]]] = {
    **dict.fromkeys(_SAME | _DROPS, _same),
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(_PERMUTES, _permuted),
    **dict.fromkeys(_SPLITS, _split),
    **dict.fromkeys(_EXPANDS, _expanded),
    **dict.fromkeys(_SHUFFLES, _shuffled),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys(_ALONG, _taken_along),
    **dict.fromkeys(_RESIZES, _resized),
    "unbind": _unbound,
    "narrow": _narrowed,
    "select": _selected,
    "getitem": _got,
    "repeat": _repeated,
    "tile": _repeated,
    "flip": _turned,
    "roll": _turned,
    "pad": _padded,
}
