"""Hand what a probe sees to whoever asked for it: calls of rectifiers, of all functions, and inputs of modules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site, plain_path
from lightning_deadrelu.observe.site_resolver import Rectified, SiteCall, SiteResolver, activations_in
from lightning_deadrelu.observe.subscribers import CallTaker, Sink, subscribed
from lightning_deadrelu.observe.torch_function import TorchFunction
from lightning_deadrelu.observe.torch_modes import (
    has_dispatch_modes,
    no_caching_modes,
    plain_tensor,
    set_grad_enabled,
)
from lightning_deadrelu.observe.watchpoint import Watchpoint


class CallRouter:
    """Hands calls on.

    Args:
        resolver: Tells which call is of which site.
        sink: Called once for each call of a rectifier, with detached tensors, under ``no_grad``.
        trains: Asked at each call whether it is of a forward that trains.
    """

    def __init__(self, resolver: SiteResolver, sink: Sink, trains: Callable[[], bool]) -> None:
        self.sink = sink
        self.is_training = False
        """Whether the call that is handed on is of a forward that trains."""
        self.observes: Callable[[], bool] = lambda: True
        """Asked whether the loop's own step is running: what a callback computes is handed to nobody."""
        self._resolver, self._trains, self._repeat = resolver, trains, resolver.origins.repeat
        self.call_takers: OrderedDict[int, CallTaker] = OrderedDict()
        """Who takes the calls of all functions."""
        self.input_takers: dict[str, OrderedDict[int, Callable[[Tensor], None]]] = {}
        """Who takes the inputs of modules, by path; to be changed by :meth:`subscribe_input`."""

    def subscribe_input(self, path: str, take: Callable[[Tensor], None]) -> RemovableHandle:
        """Have a module's input handed to a function at each call that trains, until the handle is removed.

        Args:
            path: Of the module.
            take: Called with the first positional argument, detached.

        Example:
            >>> from torch import nn
            >>> from lightning_deadrelu.observe.probe import Probe
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
            >>> probe = Probe(model, lambda *call: None)
            >>> handle = probe.router.subscribe_input("1", lambda x: print(tuple(x.shape)))
            >>> with probe:
            ...     _ = model(torch.zeros(5, 3))
            (5, 4)
            >>> handle.remove()
        """
        return subscribed(self.input_takers.setdefault(path, OrderedDict()), take)

    def subscribe_calls(self, taker: CallTaker) -> RemovableHandle:
        """Have every call of a torch function handed on, until the next pause or until the handle is removed.

        Args:
            taker: Is told of the batch's begin, of each call, and of the batch's end.
        """
        return subscribed(self.call_takers, taker)

    @property
    def wants_inputs(self) -> bool:
        """Whether somebody takes the inputs of a module."""
        return any(self.input_takers.values())

    def wants_input_of(self, path: str) -> bool:
        """Tell whether somebody has ever asked for the inputs of a module."""
        return path in self.input_takers

    def begin(self) -> None:
        """Tell those who take all calls that a batch begins."""
        for taker in self.call_takers.values():
            taker.begin()

    def end(self) -> None:
        """Tell those who take all calls that the batch has ended, and let them go."""
        for taker in self.call_takers.values():
            taker.end()
        self.call_takers.clear()

    def take_input(self, path: str, x: Tensor) -> None:
        """Hand a module's input on, if it is of a forward that trains, as the calls of rectifiers are."""
        for take in self.input_takers.get(path, {}).values() if self._trains() else ():
            take(x.detach())

    def take_rectified(self, call: Rectified, output: Tensor) -> SiteCall | None:
        """Hand a rectifier's call to the sink, and tell its site; None if it has none."""
        resolved = self._resolver.resolve(call, output, plain_tensor)
        if resolved is None:
            return None
        met, values, out = resolved
        self._hand_to_sink(met.site, met.rectifier, values, out, met.dims)
        return met

    def take_watchpoint(self, module: Watchpoint, path: str, output: Any) -> None:
        """Hand what passed through a watchpoint to the sink."""
        read = module.read(output, path)
        if isinstance(read, str):
            self._resolver.unwatched[plain_path(path)] = read
        elif read.values.numel():
            self._hand_to_sink(read.site, read.rectifier, read.values, read.values, (-1,))

    def _hand_to_sink(self, site: Site, rectifier: Rectifier, x: Tensor, out: Tensor, dims: tuple[int, ...]) -> None:
        self.is_training = self._trains()
        before = torch.is_grad_enabled()
        set_grad_enabled(False)  # `torch.no_grad()` does no more, in five times the time
        try:
            if not has_dispatch_modes():
                self.sink(site, rectifier, x, out, dims)
            else:
                with no_caching_modes():
                    self.sink(site, rectifier, x, out, dims)
        finally:
            set_grad_enabled(before)

    def take(
        self,
        function: TorchFunction,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        found: Rectified | None,
    ) -> None:
        """Take a call that has run; most are like one before.

        Args:
            function: What was called.
            func: The same, as Python calls it.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: All it returned.
            found: The call of a rectifier that it is; None for any other function.
        """
        if found is None and not self.call_takers and self._repeat(function, args, kwargs, output):
            return
        call = function.name, func, args, kwargs, output
        plain = found is not None and type(output) is Tensor and not found.rectifier.fused  # as a rule
        met = self.take_rectified(found, output) if found and plain else self._rectified(function, call, found)
        if self.call_takers:
            self.hand_on(call, (*met, found.x) if met and found else None)

    def _rectified(
        self, function: TorchFunction, call: tuple[str, Any, Any, Any, Any], found: Rectified | None
    ) -> SiteCall | None:
        *_, args, kwargs, output = call
        if found is not None and not found.rectifier.fused:
            outputs = activations_in(output)
            return self.take_rectified(found, outputs[0]) if outputs else None
        outputs = self._resolver.follow(function, args, kwargs, output)
        if found is None or not outputs:
            return None
        shown = Rectified(found.rectifier, outputs[0], outputs[0])  # its input is hidden
        return self.take_rectified(shown, outputs[0])

    def hand_on(
        self, call: tuple[str, Any, Any, Any, Any], met: tuple[Site, Rectifier, tuple[int, ...], Tensor] | None
    ) -> None:
        """Hand a call to all who take calls, as a site's if it was one; see :meth:`CallTaker.see`."""
        if not self.observes():
            return
        stack = self._resolver.stack
        frame = (stack[-1].path, stack[-1].module) if stack else ("", None)
        with no_caching_modes():
            for taker in self.call_takers.values():
                taker.see(*call, frame, met)
