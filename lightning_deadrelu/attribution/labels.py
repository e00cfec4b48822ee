"""What each element of a tensor depends on: the words in which attribution speaks. Pure.

Labels are int64 tensors on the CPU that broadcast to the tensor they speak of, with as many dimensions: where a
dimension has size 1, all along it is alike. They hold the number of a unit, or -1 for none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.model.torch_calls import LIKES, Call

NONE = -1
OUTLET = "outlet"
_MOST_LABELS = 2**24  # what would take more memory is not followed


class NotFollowable(Exception):
    """What cannot be followed, in words that end up in a refusal."""


class Origin(NamedTuple):
    """The entries of a parameter or buffer (or the channels of a module's output), numbered row by row.

    Args:
        name: Of the tensor, or the module's path.
        role: As in :class:`~lightning_deadrelu.model.slices.Slice`, or ``"outlet"``.
        dims: The dimensions that number the rows.
        sizes: Their sizes.
        shape: The view of the tensor that has these dimensions; empty for its own.
    """

    name: str
    role: str
    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return math.prod(self.sizes)

    def places(self, rows: Tensor) -> Tensor:
        """Tell where rows are along the dimensions, shape ``(rows, dims)``."""
        return torch.stack(torch.unravel_index(rows, self.sizes), 1)


class Stream(NamedTuple):
    """Which row of an origin, or which unit of a site, each element depends on."""

    origin: Origin | Site
    labels: Tensor

    @property
    def is_outlet(self) -> bool:
        """Whether a module's output is its origin, where a constant can be added."""
        return isinstance(self.origin, Origin) and self.origin.role == OUTLET


class Weight(NamedTuple):
    """A named parameter, as it is or with its dimensions in another order.

    Args:
        name: Of the parameter.
        shape: Its own shape.
        dims: For each dimension of the tensor, which of the parameter's it is.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def is_permuted(self) -> bool:
        """Whether the dimensions are in another order."""
        return self.dims != tuple(range(len(self.shape)))


@dataclass(frozen=True, eq=False)
class UnaccountedRead:
    """Rows of an origin, units of a site, or a whole parameter, read where it cannot be accounted for.

    Args:
        origin: What was read.
        labels: Which rows or units of it.
        reason: What read it.
        chooses: Whether it was read in order to choose, which a site that selects accounts for.
    """

    origin: Origin | Site | str
    labels: Tensor
    reason: str
    chooses: bool = False


class Flow(NamedTuple):
    """What is known of a tensor.

    Args:
        streams: What its elements depend on, in the order of execution.
        why: Why this is not all; empty if it is.
        indirect: Why a constant added to what it depends on is another one here, or none; empty if it is the same.
        pending: Leaks that count as soon as something trainable depends on the tensor: until then it is logging.
        constant: True for what depends on no input.
        derived: Parameters from which alone it was computed.
        weight: The parameter that it is.
        row: The parameter that it is but for dimensions of size 1.
        buffer: The name of the buffer that it is.
        zero: True for what holds nothing but zeros, so that reading it is reading nothing.
    """

    streams: tuple[Stream, ...] = ()
    why: str = ""
    indirect: str = ""
    pending: tuple[UnaccountedRead, ...] = ()
    constant: bool = False
    derived: frozenset[str] = frozenset()
    weight: Weight | None = None
    row: Weight | None = None
    buffer: str = ""
    zero: bool = False

    @property
    def before(self) -> list[Stream]:
        """What comes from layers, not through a site."""
        return [stream for stream in self.streams if isinstance(stream.origin, Origin)]

    @property
    def behind(self) -> list[Stream]:
        """What comes from sites."""
        return [stream for stream in self.streams if isinstance(stream.origin, Site)]

    @property
    def learned(self) -> frozenset[str]:
        """The parameters that it is or comes from."""
        return self.derived | ({self.weight.name} if self.weight else frozenset())


class Read(NamedTuple):
    """A layer's weight applied to an input: for each feature, which unit of which sites it is.

    Args:
        rows: The entries that each feature meets.
        sites: For each site, the unit of each feature, one tensor for each stream.
    """

    rows: Origin
    sites: Mapping[Site, tuple[Tensor, ...]]


@dataclass(slots=True)
class TracedCall(Call):
    """One call of a torch function, and what is known of the tensors in it.

    A tensor that is asked for its form alone, as by ``zeros.type_as(x)``, is no operand.

    Args:
        func: What was called.
        look: What is known of a tensor.
        path: Of the module whose forward is running.
        module: That module.
    """

    func: Callable[..., Any] | None = None
    look: Callable[[Any], Flow] = lambda value: Flow()
    path: str = ""
    module: nn.Module | None = None

    def __post_init__(self) -> None:
        Call.__post_init__(self)
        if self.name in LIKES:
            self.operands = self.operands[1:]
        elif self.name == "to" or self.name.endswith("_as"):
            self.operands = self.operands[:1]


class Outcome(NamedTuple):
    """What a call did: the flow of each output, and what it read."""

    flows: tuple[Flow, ...] = ()
    unaccounted: tuple[UnaccountedRead, ...] = ()
    reads: tuple[Read, ...] = ()
    uses: tuple[Origin, ...] = ()
    multiplied: tuple[Site, ...] = ()  # with other activations


def unaccounted_reads(flow: Flow, before: str, behind: str) -> tuple[UnaccountedRead, ...]:
    """Read all that a flow holds where it cannot be accounted for.

    Args:
        flow: Of the tensor read.
        before: Why, for what comes from layers.
        behind: Why, for what comes from sites.
    """
    names = [UnaccountedRead(name, torch.empty(0), before) for name in sorted(flow.learned)]
    rows = [
        UnaccountedRead(origin, labels, before if isinstance(origin, Origin) else behind)
        for origin, labels in flow.streams
    ]
    return (*names, *rows)


def first_reason(flows: Iterable[Flow]) -> str:
    """Say why not all is known of some flows; empty if it is."""
    return next((flow.why for flow in flows if flow.why), "")


def first_indirect(flows: Iterable[Flow]) -> str:
    """Say why a constant added to what some flows depend on is another one there; empty if it is the same."""
    return next((flow.indirect for flow in flows if flow.indirect), "")


def numbered(sizes: Sequence[int], dims: Sequence[int], ndim: int) -> Tensor:
    """Number the places along some dimensions, in order.

    Example:
        >>> numbered([2, 3], [-3, -1], 4).shape
        torch.Size([1, 2, 1, 3])
    """
    shape = [1] * ndim
    for dim, size in zip(dims, sizes, strict=True):
        shape[dim] = size
    return torch.arange(math.prod(sizes), device="cpu").view(shape)


def grown(labels: Tensor, ndim: int) -> Tensor:
    """Put dimensions of size 1 in front."""
    return labels.view((1,) * (ndim - labels.ndim) + tuple(labels.shape))


def shrunk(labels: Tensor, dims: Sequence[int]) -> Tensor | None:
    """Give dimensions size 1 along which nothing changes; None if something does.

    Example:
        >>> shrunk(torch.tensor([[1, 2], [1, 2]]), [0])
        tensor([[1, 2]])
        >>> shrunk(torch.tensor([[1, 2], [1, 2]]), [1]) is None
        True
    """
    for dim in dims:
        if labels.shape[dim] != 1:
            first = labels.narrow(dim, 0, 1)
            if not labels.shape[dim] or not (labels == first).all():
                return None
            labels = first
    return labels


def filled(labels: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """Give dimensions their full size."""
    sizes = list(labels.shape)
    for dim in dims:
        sizes[dim] = shape[dim]
    if math.prod(sizes) > _MOST_LABELS:
        raise NotFollowable("it is too large to be followed")
    return labels.expand(sizes)


def pairs(rows: Tensor, units: Tensor) -> Tensor:
    """List which row goes with which unit, each pair once, shape ``(pairs, 2)``.

    Example:
        >>> pairs(torch.tensor([[0, 1]]), torch.tensor([[1, 0]]))
        tensor([[0, 1],
                [1, 0]])
    """
    both = torch.stack(torch.broadcast_tensors(rows, units)).flatten(1)
    return distinct(both[:, (both >= 0).all(0)].T)


def distinct(found: Tensor) -> Tensor:
    """List each pair of numbers once, in order; many times faster than ``unique`` along a dimension.

    Example:
        >>> distinct(torch.tensor([[2, 0], [1, 5], [2, 0]]))
        tensor([[1, 5],
                [2, 0]])
    """
    rows, units = found.unbind(1)
    width = int(units.max()) + 1 if len(units) else 1
    codes = (rows * width + units).unique()
    return torch.stack([codes // width, codes % width], 1)
