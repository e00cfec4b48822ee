"""See every rectifier call of a model while armed; leave nothing behind when not.

The probe is a :class:`~torch.overrides.TorchFunctionMode` plus two global module hooks, all of them in
place only between :meth:`Probe.arm` and :meth:`Probe.disarm`. The mode is taken off while one of torch's own layers
runs: what that calls, the layer tells. Nothing is attached to the model, so it can
be copied, pickled, compiled and exported at any time.
Compiled code, which neither mode nor hooks could see, runs eagerly meanwhile, or in a version that counts by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_deadrelu.guarded import guarded
from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import base_name
from lightning_deadrelu.observe.attributed_call import call_for_caller
from lightning_deadrelu.observe.call_router import CallRouter
from lightning_deadrelu.observe.call_stack import in_autograd_function
from lightning_deadrelu.observe.compiled_operators import backends_around, call_compiled, why_unwatched
from lightning_deadrelu.observe.module_hooks import ModuleHooks
from lightning_deadrelu.observe.site_resolver import Rectified, SiteResolver, Wants, everything
from lightning_deadrelu.observe.subscribers import InCompiled, Sink
from lightning_deadrelu.observe.substitutes import Substitutes
from lightning_deadrelu.observe.torch_function import MetFunctions, TorchFunction, torch_function
from lightning_deadrelu.observe.torch_modes import (
    EagerCompiler,
    backward_number,
    holds_another,
    pop_mode,
    push_mode,
    recomputes,
    remove_mode,
    tracing_state,
    unseen_by_modes,
)

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
        wants: See :class:`~lightning_deadrelu.observe.site_resolver.SiteResolver`.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> probe = Probe(model, lambda site, rectifier, x, out, dims: print(site.owner, site.source, dims))
        >>> with probe:
        ...     _ = model(torch.zeros(5, 3))
        1 ('0.bias', '0.weight') (-1,)
    """

    def __init__(
        self,
        model: nn.Module,
        sink: Sink,
        unit_dims: Mapping[str, int] | None = None,
        keep_fused: bool = False,
        wants: Wants = everything,
    ) -> None:
        super().__init__()
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        """The model watched, without the wrapper of a compiler."""
        self.needs_gradients = False
        """Whether forwards without gradients are passed over: a loop may evaluate while the probe looks."""
        self._rests = False
        self.on_backward: Callable[[], None] | None = None
        """Called before a backward that starts while the probe looks."""
        self.unit_dims = dict(unit_dims or {})
        """The dimension that holds the units, by pattern over site names."""
        self.wants = wants
        """Tells by name whether a rectifier is to be watched."""
        self._resolver = SiteResolver(self.model, self.unit_dims, wants=wants)
        self.router = CallRouter(self._resolver, sink, self.trains)
        """Hands on what the probe sees, to whoever subscribes."""
        self._take = self.router.take
        self._functions = MetFunctions()
        look, pop = self._look_at_functions, partial(pop_mode, self)
        self._hooks = ModuleHooks(self.router, self._resolver, keep_fused, self.passes_over, look, pop, self._fail)
        self._compiler = EagerCompiler()
        self.compiled: InCompiled | None = None
        """Watches compiled code where it can; without, observed code runs eagerly."""
        self._in_compiled = False
        self._armed_before = 0
        self._trained_when_armed = False
        self.ended: Callable[[], None] = lambda: None
        """Called when the probe stops to look."""
        self.failure: Exception | None = None
        """What went wrong inside the probe, which stopped it; the model's own errors pass through."""

    @property
    def substitutes(self) -> Mapping[str, Rectifier]:
        """By path, what the modules stand for that took a rectifier's place: they are judged by their input, as it was.

        To set it makes the probe look at the model anew when next it is armed.
        """
        return self._hooks.substitutes.rectifiers

    @substitutes.setter
    def substitutes(self, rectifiers: Mapping[str, Rectifier]) -> None:
        self._hooks.substitutes, self._armed_before = Substitutes(rectifiers), 0
        self._resolver.substituted = frozenset(rectifiers)

    @property
    def entered(self) -> set[str]:
        """Paths of the modules whose forward has run while the probe looked."""
        return self._hooks.entered

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

    @property
    def is_subscribed(self) -> bool:
        """Whether somebody wants more than calls of rectifiers."""
        return bool(self.router.call_takers or self.router.wants_inputs or self.on_backward)

    def passes_over(self) -> bool:
        """Whether a forward that starts now is none that trains."""
        return self._rests or not self.router.observes() or (self.needs_gradients and not torch.is_grad_enabled())

    @property
    def armed(self) -> bool:
        """Whether the probe is looking now."""
        return self._hooks.are_on or self._in_compiled

    def __enter__(self) -> Probe:
        self.arm()
        return self

    def __exit__(self, *error: object) -> None:
        self.disarm()

    def arm(self) -> None:
        """Start to look. Compiled code runs eagerly meanwhile, or in a version that counts."""
        if self.armed or self.failure:
            return
        if self._armed_before % _ARMS_PER_LOOK == 0:
            self._resolver.look_at_model()
        self._armed_before += 1
        self._forget()
        self._trained_when_armed = self.model.training
        self._in_compiled = self._compiler.pause(self.compiled.begin() if self.compiled else None, self._displace)
        if not self._in_compiled:
            self._look()

    def trains(self) -> bool:
        """Whether a forward that is running now may take part in a loss: with gradients, in the mode that was found."""
        in_mode = self.model.training or not self._trained_when_armed
        return in_mode and (torch.is_grad_enabled() or in_autograd_function())

    def _look(self) -> None:
        self.router.begin()
        self._hooks.add()
        push_mode(self)

    def _look_at_functions(self, again: bool) -> None:
        """Look away from functions, or at them again unless resting."""
        if not again:
            remove_mode(self)
        elif not self._rests:
            push_mode(self)

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
        if not self.armed:  # as in most batches, at each of several hooks
            return
        if self.compiled:
            with guarded(self._fail):
                self.compiled.end()
        with guarded(self._fail):
            self.ended()
        self._in_compiled = False
        if not self._hooks.are_on:
            return
        remove_mode(self)
        self._hooks.remove()
        self._forget()
        self.router.end()
        self._resolver.origins.tell_unfollowed()

    def rest(self) -> None:
        """Look away until :meth:`resume`, or until armed anew."""
        self._rests = True
        remove_mode(self)

    def resume(self) -> None:
        """Look again, if armed."""
        if self._rests and self._hooks.are_on:
            push_mode(self)
        self._rests = False

    def _forget(self) -> None:
        self._rests = False
        self._functions.clear()
        self._hooks.forget()
        self._resolver.forget()

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._hooks.give_up()

    # -- functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            function = self._functions[func]
        except TypeError:  # nothing that a dictionary takes
            function = torch_function(func)
        blind = function.ignored or self.failure or self._hooks.substitutes.running is not None
        if blind or backward_number() != -1 or tracing_state() is not None:
            if function.name == "backward" and self.on_backward and not recomputes():
                self.on_backward()
            return call_for_caller(func, args, kwargs)
        if function.operator and (backends := backends_around(func)):
            return self._call_unwatched(function, backends, func, args, kwargs)
        found = self._find(function, args, kwargs) if function.may_rectify else None
        output = call_for_caller(func, args, kwargs)
        try:  # not `guarded`, which would take longer than what it guards
            with unseen_by_modes():  # another probe would take it for the model's
                if found is None and function.selects:
                    found = self._resolver.select(function, args, kwargs, output)
                self._take(function, func, args, kwargs, output, found)
        except Exception as error:
            self._fail(error)
        return output

    def _find(self, function: TorchFunction, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rectified | None:
        try:
            return self._resolver.find(function, args, kwargs)
        except Exception as error:
            self._fail(error)
            return None

    def _call_unwatched(self, function: TorchFunction, backends: list[Any], func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator that takes functions as nobody looked: compiled, and without a hook for a compiler to meet.

        What it reads is found along the graph of the gradients, as for all that runs out of sight.
        """
        if reason := why_unwatched(function.name):
            self.unwatched[base_name(self._resolver.stack.path, True, function.name.removesuffix("_impl"))] = reason
        if len(backends) == 1 and self.compiled:
            self.compiled.refuse(f"`torch.{function.name}` is called outside of the regions")
        self._hooks.remove()
        try:
            alone = not holds_another(Probe)
            output = call_compiled(func, args, kwargs, backends[-1]) if alone else func(*args, **kwargs)
        finally:
            self._hooks.add()
        with guarded(self._fail):
            self._resolver.follow(function, args, kwargs, output)
        return output
