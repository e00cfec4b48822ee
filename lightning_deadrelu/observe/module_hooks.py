"""See which modules' forwards run, by two hooks on all modules that are there only while a probe looks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.guarded import guarded
from lightning_deadrelu.model.sites import plain_path
from lightning_deadrelu.observe.call_router import CallRouter
from lightning_deadrelu.observe.call_stack import ModuleCall, may_be_fused
from lightning_deadrelu.observe.leaf_modules import Leaf, leaf_of
from lightning_deadrelu.observe.site_resolver import Rectified, SiteResolver
from lightning_deadrelu.observe.substitutes import Substitutes
from lightning_deadrelu.observe.torch_modes import backward_number, recomputes, tracing_state, unseen_by_modes
from lightning_deadrelu.observe.watchpoint import Watchpoint


class ModuleHooks:
    """Keeps the stack of running forwards, and takes the calls of modules that stand for a rectifier.

    Args:
        router: Takes what was seen.
        resolver: Has the model's modules by name, and the stack.
        keep_fused: Whether to look away where PyTorch fuses a whole encoder layer.
        passes_over: Asked whether a forward that starts is none to look at.
        look: Called with False when functions are not to be looked at for a while, and with True when they are again.
        pop: Does as with False if nobody else has to look first, and tells whether it did.
        fail: Called with an error of ours.
    """

    def __init__(
        self,
        router: CallRouter,
        resolver: SiteResolver,
        keep_fused: bool,
        passes_over: Callable[[], bool],
        look: Callable[[bool], None],
        pop: Callable[[], bool],
        fail: Callable[[Exception], None],
    ) -> None:
        self._router, self._resolver, self._keep_fused = router, resolver, keep_fused
        self._passes_over, self._look, self._pop, self._fail = passes_over, look, pop, fail
        self.substitutes = Substitutes({})
        """The modules that stand for a rectifier."""
        self.entered: set[str] = set()
        """Paths of the modules whose forward has run."""
        self.are_on = False
        """Whether the hooks are in place."""
        self._handles: list[RemovableHandle] = []
        self._thread = 0  # the hooks are called on every thread, a mode on its own alone
        self._ids: set[int] = set()  # of the model's modules in this batch, once a module was met that is not known
        self._passed: nn.Module | None = None  # running, and to be looked at neither by the mode nor by hooks
        self._leaf: Leaf | None = None  # what that one calls, if it is of those that call one function

    def add(self) -> None:
        """Put the hooks in place, for what runs on this thread."""
        self._thread, self.are_on = threading.get_ident(), True
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Take them out."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.are_on = [], False

    def forget(self) -> None:
        """Forget what was running."""
        self._passed = self._leaf = None
        self._ids.clear()
        self.substitutes.forget()

    def give_up(self) -> None:
        """Tell nothing from a module any more."""
        self._pop = lambda: False

    def _enter(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self._thread or tracing_state() is not None:
            return
        entry = self._resolver.modules.get(id(module)) or self._look_for(module)
        if entry is None:
            return
        path, stack = entry[1], self._resolver.stack
        self.entered.add(path)
        outermost = not stack
        stack.append(ModuleCall(path, module))
        if self._passed is not None:
            return
        if outermost and self._passes_over():
            self._pass(module)
            return
        asked = self._router.input_takers or self.substitutes.rectifiers
        if asked and (self._router.wants_input_of(path) or path in self.substitutes.rectifiers) and not recomputes():
            with guarded(self._fail), unseen_by_modes():
                self._take_input(path, module, args)
        if self._keep_fused and may_be_fused(module):
            if not isinstance(module, nn.MultiheadAttention):  # which has no rectifier inside
                self._resolver.unwatched[plain_path(path)] = "it runs without gradients as one fused kernel"
            self._pass(module)
        elif not (self._router.call_takers or self.substitutes.running) and backward_number() == -1:
            leaf = leaf_of(module, args)
            if leaf is not None and self._pop():
                self._passed, self._leaf = module, leaf

    def _look_for(self, module: nn.Module) -> tuple[nn.Module, str] | None:
        """Look at the model anew if a module is new in it, and return that with its path."""
        self._ids = self._ids or {id(one) for one in self._resolver.model.modules()}
        if id(module) in self._ids:
            self._resolver.look_at_model()
        return self._resolver.modules.get(id(module))

    def _pass(self, module: nn.Module) -> None:
        """Look away until a module's forward ends."""
        self._passed = module
        self._look(False)

    def _take_input(self, path: str, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and _is_taken(module, args[0]):
            self._router.take_input(path, args[0])
        if reason := self.substitutes.enter(path, module, args):
            self._resolver.unwatched[plain_path(path)] = reason

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if self.substitutes.running is not None and (substitute := self.substitutes.leave(module)) is not None:
            with guarded(self._fail), unseen_by_modes():
                self._leave_substitute(module, substitute, output)
        if self._leaf is not None and self._passed is module:
            self._leave_leaf(module, args, output)
        stack = self._resolver.stack
        call = stack.pop() if stack and stack[-1].module is module else stack.leave(module)
        if call is None:
            return
        if isinstance(module, Watchpoint) and self._passed is None and not recomputes():
            with guarded(self._fail), unseen_by_modes():
                self._router.take_watchpoint(module, call.path, output)
            return
        if self._passed is module:
            self._passed = None
            self._look(True)
        if not self._resolver.origins.is_of(output):
            self._resolver.follow_module(call.path, module, output)

    def _leave_leaf(self, module: nn.Module, args: Any, output: Any) -> None:
        """Take the one call that a module has made, unless it failed."""
        leaf, self._leaf, self._passed = self._leaf, None, None
        if leaf is not None and isinstance(output, Tensor) and self._resolver.stack[-1].module is module:
            func, function, operands = leaf.func, leaf.function, (*args, *module._parameters.values())
            try:  # not `guarded`, which would take longer than what it guards
                with unseen_by_modes():
                    found = self._resolver.find(function, operands, {}) if function.may_rectify else None
                    self._router.take(function, func, operands, {}, output, found)
            except Exception as error:
                self._fail(error)
        self._look(True)

    def _leave_substitute(self, module: nn.Module, call: Rectified, output: Any) -> None:
        """Take the call of the whole module for the rectifier's."""
        if self._resolver.stack.back_to(module) is None or not isinstance(output, Tensor):  # an error passed through
            return
        met = self._router.take_rectified(call, output)
        if self._router.call_takers:
            self._router.hand_on(("substitute", None, (call.x,), {}, output), (*met, call.x) if met else None)


def _is_taken(module: nn.Module, x: Tensor) -> bool:
    """Whether a layer takes an input of this width; if not, the call is going to fail, and a model may catch that."""
    return not isinstance(module, nn.Linear) or x.shape[-1:] == (module.in_features,)
