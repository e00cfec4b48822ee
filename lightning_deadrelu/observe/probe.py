"""See every rectifier call of a model while armed; leave nothing behind when not.

The probe is a :class:`~torch.overrides.TorchFunctionMode` plus two global module hooks, all of them in
place only between :meth:`Probe.arm` and :meth:`Probe.disarm`. Nothing is attached to the model, so it can
be copied, pickled, compiled and exported at any time.
Compiled code, which neither mode nor hooks could see, runs eagerly meanwhile, or in a version that counts by itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.guarded import guarded
from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site, base_name, plain_path
from lightning_deadrelu.model.torch_calls import IGNORED, function_name
from lightning_deadrelu.observe.attributed_call import call_for_caller
from lightning_deadrelu.observe.call_stack import ModuleCall, in_autograd_function, may_be_fused
from lightning_deadrelu.observe.compiled_operators import backends_around, call_compiled, why_unwatched
from lightning_deadrelu.observe.site_resolver import Rectified, SiteCall, SiteResolver, activations_in
from lightning_deadrelu.observe.subscribers import CallTaker, InCompiled, Sink, subscribed
from lightning_deadrelu.observe.substitutes import Substitutes
from lightning_deadrelu.observe.torch_modes import (
    EagerCompiler,
    holds_another,
    is_scripting,
    no_caching_modes,
    plain_tensor,
    push_mode,
    recomputes,
    remove_mode,
    unseen_by_modes,
)
from lightning_deadrelu.observe.watchpoint import Watchpoint

_ARMS_PER_LOOK = 10


class Probe(TorchFunctionMode):
    """Hand every rectifier call of a model to a sink, with the site it belongs to.

    Args:
        model: The model to watch. It is never changed.
        sink: Called once for each call of a rectifier, with detached tensors, under ``no_grad``.
        unit_dims: The dimension that holds the units, by pattern over site names, where the producers
            tell it wrongly or not at all.
        keep_fused: Look away where PyTorch fuses a whole encoder layer, which it would not do under a probe,
            and which rounds differently.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> probe = Probe(model, lambda site, rectifier, x, out, dims: print(site.owner, site.source, dims))
        >>> with probe:
        ...     _ = model(torch.zeros(5, 3))
        1 ('0.bias', '0.weight') (-1,)
    """

    def __init__(
        self, model: nn.Module, sink: Sink, unit_dims: Mapping[str, int] | None = None, keep_fused: bool = False
    ) -> None:
        super().__init__()
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._sink, self._keep_fused = sink, keep_fused
        self.needs_gradients = False
        """Whether forwards without gradients are passed over: a loop may evaluate while the probe looks."""
        self._rests = False
        self.on_backward: Callable[[], None] | None = None
        """Called before a backward that starts while the probe looks."""
        self.unit_dims = dict(unit_dims or {})
        """The dimension that holds the units, by pattern over site names."""
        self._resolver = SiteResolver(self._model, self.unit_dims)
        self._substitutes = Substitutes({})
        self._call_takers: OrderedDict[int, CallTaker] = OrderedDict()
        self._input_takers: dict[str, OrderedDict[int, Callable[[Tensor], None]]] = {}
        self._handles: list[RemovableHandle] = []
        self._compiler = EagerCompiler()
        self.compiled: InCompiled | None = None
        """Watches compiled code where it can; without, observed code runs eagerly."""
        self._in_compiled = False
        self._armed_before = 0
        self._thread = 0  # the module hooks are called on every thread, the mode on this one alone
        self._passed: nn.Module | None = None  # running, and to be looked at neither by the mode nor by hooks
        self._trained_when_armed = False
        self.is_training = False
        """Whether the call that is handed on is of a forward that trains; see :meth:`trains`."""
        self.ended: Callable[[], None] = lambda: None
        """Called when the probe stops to look."""
        self.entered: set[str] = set()
        """Paths of the modules whose forward has run while the probe looked."""
        self.failure: Exception | None = None
        """What went wrong inside the probe, which stopped it; the model's own errors pass through."""

    @property
    def substitutes(self) -> Mapping[str, Rectifier]:
        """By path, what the modules stand for that took a rectifier's place: they are judged by their input, as it was.

        To set it makes the probe look at the model anew when next it is armed.
        """
        return self._substitutes.rectifiers

    @substitutes.setter
    def substitutes(self, rectifiers: Mapping[str, Rectifier]) -> None:
        self._substitutes, self._armed_before = Substitutes(rectifiers), 0
        self._resolver.substituted = frozenset(rectifiers)

    @property
    def model(self) -> nn.Module:
        """The model watched, without the wrapper of a compiler."""
        return self._model

    @property
    def unwatched(self) -> dict[str, str]:
        """Why, by name, a rectifier that ran is not watched."""
        return self._resolver.unwatched

    @property
    def out_of_range(self) -> dict[str, str]:
        """By name of the site, which of ``unit_dims`` is a dimension that its input has not."""
        return self._resolver.out_of_range

    def name(self, tensor: Any) -> str | None:
        """Name a parameter of the model; None for any other value."""
        return self._resolver.origins.name(tensor)

    def subscribe_input(self, path: str, take: Callable[[Tensor], None]) -> RemovableHandle:
        """Have a module's input handed to a function at each call, until the handle is removed.

        Args:
            path: Of the module.
            take: Called with the first positional argument, detached.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
            >>> probe = Probe(model, lambda *call: None)
            >>> handle = probe.subscribe_input("1", lambda x: print(tuple(x.shape)))
            >>> with probe:
            ...     _ = model(torch.zeros(5, 3))
            (5, 4)
            >>> handle.remove()
        """
        return subscribed(self._input_takers.setdefault(path, OrderedDict()), take)

    def subscribe_calls(self, taker: CallTaker) -> RemovableHandle:
        """Have every call of a torch function handed on, until the next pause or until the handle is removed.

        Args:
            taker: Is told of the batch's begin, of each call, and of the batch's end.
        """
        return subscribed(self._call_takers, taker)

    @property
    def is_subscribed(self) -> bool:
        """Whether somebody wants more than calls of rectifiers."""
        return bool(self._call_takers or self.on_backward) or any(self._input_takers.values())

    def passes_over(self) -> bool:
        """Whether a forward that starts now is none that trains."""
        return self._rests or (self.needs_gradients and not torch.is_grad_enabled())

    @property
    def armed(self) -> bool:
        """Whether the probe is looking now."""
        return bool(self._handles) or self._in_compiled

    def __enter__(self) -> Probe:
        self.arm()
        return self

    def __exit__(self, *error: object) -> None:
        self.disarm()

    def arm(self) -> None:
        """Start to look. Compiled code runs eagerly meanwhile, or in a version that counts."""
        if self.armed or self.failure:
            return
        self._forget()
        if self._armed_before % _ARMS_PER_LOOK == 0:
            self._resolver.look_at_model()
        self._armed_before += 1
        self._thread = threading.get_ident()
        self._trained_when_armed = self._model.training
        self._in_compiled = self._compiler.pause(self.compiled.begin() if self.compiled else None, self._displace)
        if not self._in_compiled:
            self._look()

    def trains(self) -> bool:
        """Whether a forward that is running now may take part in a loss: with gradients, in the mode that was found."""
        in_mode = self._model.training or not self._trained_when_armed
        return in_mode and (torch.is_grad_enabled() or in_autograd_function())

    def _look(self) -> None:
        for taker in self._call_takers.values():
            taker.begin()
        self._add_hooks()
        push_mode(self)

    def _add_hooks(self) -> None:
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _displace(self) -> None:
        """Go on eagerly, because somebody else needs compiled code to run so."""
        if self._in_compiled and self.compiled:
            self._in_compiled = False
            self.compiled.displace()
            self._look()

    def disarm(self) -> None:
        """Stop to look and leave no trace, wherever other modes were entered meanwhile. Harmless when not armed."""
        self.pause()
        self._compiler.resume()

    def pause(self) -> None:
        """Stop to look, but leave compiled code as it is: what ran eagerly has to be recomputed so in backward."""
        if self.compiled and self.armed:
            with guarded(self._fail):
                self.compiled.end()
        with guarded(self._fail):
            self.ended()
        self._in_compiled = False
        if not self._handles:
            return
        remove_mode(self)
        self._remove_hooks()
        self._forget()
        for taker in self._call_takers.values():
            taker.end()
        self._call_takers.clear()
        self._resolver.origins.tell_unfollowed()

    def rest(self) -> None:
        """Look away until :meth:`resume`, or until armed anew."""
        self._rests = True
        remove_mode(self)

    def resume(self) -> None:
        """Look again, if armed."""
        if self._rests and self._handles:
            push_mode(self)
        self._rests = False

    def _forget(self) -> None:
        self._passed, self._rests = None, False
        self._substitutes.forget()
        self._resolver.forget()

    def _fail(self, error: Exception) -> None:
        self.failure = error

    # -- modules

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        entry = self._resolver.modules.get(id(module))
        if entry is None or threading.get_ident() != self._thread or is_scripting():
            return
        path = entry[1]
        self.entered.add(path)
        outermost = not self._resolver.stack
        self._resolver.stack.append(ModuleCall(path, module))
        if self._passed is not None:
            return
        if outermost and self.passes_over():
            self._pass(module)
            return
        if (path in self._input_takers or path in self._substitutes.rectifiers) and not recomputes():
            with guarded(self._fail):
                self._take_input(path, module, args)
        if self._keep_fused and may_be_fused(module):
            if not isinstance(module, nn.MultiheadAttention):  # which has no rectifier inside
                self.unwatched[plain_path(path)] = "it runs without gradients as one fused kernel"
            self._pass(module)

    def _pass(self, module: nn.Module) -> None:
        """Look away until a module's forward ends."""
        self._passed = module
        remove_mode(self)

    def _take_input(self, path: str, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and _is_taken(module, args[0]):
            for take in self._input_takers.get(path, {}).values():
                take(args[0].detach())
        if reason := self._substitutes.enter(path, module, args):
            self.unwatched[plain_path(path)] = reason

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread or is_scripting():
            return
        if (substitute := self._substitutes.leave(module)) is not None:
            with guarded(self._fail), unseen_by_modes():
                self._leave_substitute(module, substitute, output)
        if (call := self._resolver.stack.leave(module)) is None:
            return
        if isinstance(module, Watchpoint) and self._passed is None and not recomputes():
            with guarded(self._fail), unseen_by_modes():
                self._take_watchpoint(module, call.path, output)
            return
        if self._passed is module:
            self._passed = None
            if not self._rests:
                push_mode(self)
        self._resolver.follow_module(call.path, module, output)

    def _take_watchpoint(self, module: Watchpoint, path: str, output: Any) -> None:
        read = module.read(output, path)
        if isinstance(read, str):
            self.unwatched[plain_path(path)] = read
        elif read.values.numel():
            self.is_training = self.trains()
            with torch.no_grad(), no_caching_modes():
                self._sink(read.site, read.rectifier, read.values, read.values, (-1,))

    def _leave_substitute(self, module: nn.Module, call: Rectified, output: Any) -> None:
        """Take the call of the whole module for the rectifier's."""
        if self._resolver.stack.back_to(module) is None or not isinstance(output, Tensor):  # an error passed through
            return
        met = self._rectified(call, output)
        if self._call_takers:
            self._hand_on(("substitute", None, (call.x,), {}, output), (*met, call.x) if met else None)

    # -- functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name in IGNORED or self.failure or self._substitutes.is_running or recomputes() or is_scripting():
            if name == "backward" and self.on_backward and not recomputes():
                self.on_backward()
            return call_for_caller(func, args, kwargs)
        if backends := backends_around(func):
            return self._call_unwatched(name, func, args, kwargs, backends)
        found = None
        try:  # not `guarded`, which would take longer than what it guards
            found = self._resolver.find(name, args, kwargs)
        except Exception as error:
            self.failure = error
        output = call_for_caller(func, args, kwargs)
        try:
            if found is None and not self._call_takers:
                self._resolver.follow(name, args, kwargs, output)
                return output
            met = self._note(name, args, kwargs, output, found)
            if self._call_takers:
                self._hand_on((name, func, args, kwargs, output), (*met, found.x) if met and found else None)
        except Exception as error:
            self.failure = error
        return output

    def _call_unwatched(
        self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], backends: list[Any]
    ) -> Any:
        """Call an operator that takes functions as nobody looked: compiled, and without a hook for a compiler to meet.

        What it reads is found along the graph of the gradients, as for all that runs out of sight.
        """
        if reason := why_unwatched(name):
            self.unwatched[base_name(self._resolver.stack.path, True, name.removesuffix("_impl"))] = reason
        if len(backends) == 1 and self.compiled:
            self.compiled.refuse(f"`torch.{name}` is called outside of the regions")
        self._remove_hooks()
        try:
            alone = not holds_another(Probe)
            output = call_compiled(func, args, kwargs, backends[-1]) if alone else func(*args, **kwargs)
        finally:
            self._add_hooks()
        with guarded(self._fail):
            self._resolver.follow(name, args, kwargs, output)
        return output

    def _note(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any, found: Rectified | None
    ) -> SiteCall | None:
        """Take a call, and tell its site if it was a rectifier's."""
        if found is not None and not found.rectifier.fused:
            outputs = activations_in(output)
            return self._rectified(found, outputs[0]) if outputs else None
        outputs = self._resolver.follow(name, args, kwargs, output)
        if found is None or not outputs:
            return None
        return self._rectified(Rectified(found.rectifier, outputs[0], outputs[0]), outputs[0])  # its input is hidden

    def _rectified(self, call: Rectified, output: Tensor) -> SiteCall | None:
        resolved = self._resolver.resolve(call, output, plain_tensor)
        if resolved is None:
            return None
        met, values, out = resolved
        self.is_training = self.trains()
        with torch.no_grad(), no_caching_modes():
            self._sink(met.site, met.rectifier, values, out, met.dims)
        return met

    def _hand_on(
        self, call: tuple[str, Any, Any, Any, Any], met: tuple[Site, Rectifier, tuple[int, ...], Tensor] | None
    ) -> None:
        """Hand a call to all who take calls, as a site's if it was one; see :meth:`CallTaker.see`."""
        stack = self._resolver.stack
        frame = (stack[-1].path, stack[-1].module) if stack else ("", None)
        with no_caching_modes():
            for taker in self._call_takers.values():
                taker.see(*call, frame, met)


def _is_taken(module: nn.Module, x: Tensor) -> bool:
    """Whether a layer takes an input of this width; if not, the call is going to fail, and a model may catch that."""
    return not isinstance(module, nn.Linear) or x.shape[-1:] == (module.in_features,)
