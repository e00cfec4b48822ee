"""Who may listen to a probe or a watch, and how each is entered and taken out again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site


class Sink(Protocol):
    """Takes what the probe sees: a site, its rectifier, input, output and unit dimensions."""

    def __call__(self, site: Site, rectifier: Rectifier, x: Tensor, out: Tensor, dims: tuple[int, ...]) -> None:
        """Take one call."""


class CallTaker(Protocol):
    """Takes all calls of torch functions in one batch."""

    def begin(self) -> None:
        """Start a batch."""

    def see(
        self,
        name: str,
        func: Callable[..., Any] | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        frame: tuple[str, nn.Module | None] = ("", None),
        met: tuple[Site, Rectifier, tuple[int, ...], Tensor] | None = None,
    ) -> None:
        """Take one call; see :meth:`~lightning_deadrelu.attribution.Tracer.see`."""

    def end(self) -> None:
        """End the batch."""


class RectifierCallTaker(ABC):
    """Takes, of all calls in one batch, those of rectifiers, with the autograd graph that they have made."""

    def begin(self) -> None:  # noqa: B027 - to do nothing is what most want
        """Do nothing at a batch's start."""

    def see(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: Any,
        output: Any,
        frame: tuple[str, nn.Module | None] = ("", None),
        met: tuple[Site, Rectifier, tuple[int, ...], Tensor] | None = None,
    ) -> None:
        """Take one call; see :meth:`CallTaker.see`."""
        if met is not None:
            self.take(*met, output if isinstance(output, Tensor) else output[0])

    @abstractmethod
    def take(self, site: Site, rectifier: Rectifier, dims: tuple[int, ...], x: Tensor, output: Tensor) -> None:
        """Take the call of a site's rectifier.

        Args:
            site: The site.
            rectifier: What it is.
            dims: The dimensions that hold the units, counted from the end.
            x: Its input.
            output: What it put out.
        """

    def end(self) -> None:  # noqa: B027
        """Do nothing at a batch's end."""


class InCompiled(Protocol):
    """Watches compiled code."""

    def begin(self) -> Callable[..., Any] | None:
        """Start to look, and tell with which backend; None to run eagerly what is compiled."""

    def displace(self) -> None:
        """Run eagerly what was begun compiled."""

    def end(self) -> None:
        """Stop to look."""

    def refuse(self, reason: str) -> None:
        """Run observed code eagerly from the next batch on."""


class RectifierTaker(Protocol):
    """Takes the calls of rectifiers that a watch counts."""

    def __call__(
        self, number: int, rectifier: Rectifier, x: Tensor, dims: tuple[int, ...], valid: Tensor | None = None
    ) -> None:
        """Take one call.

        Args:
            number: Of the site in the layout.
            rectifier: What it is.
            x: Its input, without what was added for a time.
            dims: The dimensions of the input that hold the units, counted from the end.
            valid: True for data and False for padding, of the shape of ``x`` without the units; None where all is data.
        """


Taker = TypeVar("Taker")


def subscribed(takers: OrderedDict[int, Taker], taker: Taker) -> RemovableHandle:
    """Enter a subscriber, and return the handle that takes it out again."""
    handle = RemovableHandle(takers)
    takers[handle.id] = taker
    return handle
