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
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _push_mode
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.model.rectifiers import Rectifier, is_rectifier_module, rectifier_of
from lightning_deadrelu.model.sites import Site, base_name, clean, count_units, guess_dims, matches
from lightning_deadrelu.observe.call_stack import ModuleCall, in_forward, may_be_fused
from lightning_deadrelu.observe.provenance import Call, Provenance, function_name, of_module, parameter, tensors_in
from lightning_deadrelu.observe.tensor_origins import TensorOrigins
from lightning_deadrelu.observe.torch_modes import EagerCompiler, no_caching_modes, remove_mode

# asked for all the time, and never a tensor that matters
_IGNORED = frozenset(
    {"shape", "dtype", "device", "dim", "size", "ndim", "is_cuda", "requires_grad", "grad_fn", "numel"}
)
_IGNORED |= {
    "is_leaf",
    "layout",
    "stride",
    "_set_grad_enabled",
    "is_floating_point",
    "data_ptr",
    "is_contiguous",
    "backward",
    "grad",
    "names",
    "_base",  # which FSDP2 asks for, and which is known by itself
}
_ARMS_PER_LOOK = 10
_MOST_WIDTHS = 4  # a site whose number of units differs between calls more often has no units


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


Taker = TypeVar("Taker")


def subscribed(takers: OrderedDict[int, Taker], taker: Taker) -> RemovableHandle:
    """Enter a subscriber, and return the handle that takes it out again."""
    handle = RemovableHandle(takers)
    takers[handle.id] = taker
    return handle


class InCompiled(Protocol):
    """Watches compiled code."""

    def begin(self) -> Callable[..., Any] | None:
        """Start to look, and tell with which backend; None to run eagerly what is compiled."""

    def displace(self) -> None:
        """Run eagerly what was begun compiled."""

    def end(self) -> None:
        """Stop to look."""


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
        self._keep_fused = keep_fused
        self._fused: nn.Module | None = None
        self._judged_as: dict[str, Rectifier] = {}
        self._standing_in: tuple[nn.Module, Tensor, Tensor] | None = None
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._sink = sink
        self.unit_dims = dict(unit_dims or {})
        """The dimension that holds the units, by pattern over site names."""
        self._trail = TensorOrigins(self._model)
        self._widths: dict[tuple[Any, ...], set[int]] = {}
        self._handles: list[RemovableHandle] = []
        self._compiler = EagerCompiler()
        self.compiled: InCompiled | None = None
        """Watches compiled code where it can; without, observed code runs eagerly."""
        self._in_compiled = False
        self._modules: dict[int, tuple[nn.Module, str]] = {}
        self._armed_before = 0
        self._thread = 0  # the module hooks are called on every thread, the mode on this one alone
        self.entered: set[str] = set()
        """Paths of the modules whose forward has run while the probe looked."""
        self._sources: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self._settled: dict[tuple[Any, ...], tuple[Site, Rectifier, tuple[int, ...]]] = {}
        self._frames: list[ModuleCall] = []
        self.unwatched: dict[str, str] = {}
        """Why, by name, a rectifier that ran is not watched."""
        self.failure: Exception | None = None
        """What went wrong inside the probe, which stopped it; the model's own errors pass through."""
        self._call_takers: OrderedDict[int, CallTaker] = OrderedDict()
        self._input_takers: dict[str, OrderedDict[int, Callable[[Tensor], None]]] = {}
        self._met: tuple[Site, Rectifier, tuple[int, ...]] | None = None

    @property
    def judged_as(self) -> Mapping[str, Rectifier]:
        """By path, what the modules stand for that took a rectifier's place: they are judged by their input, as it was.

        To set it makes the probe look at the model anew when next it is armed.
        """
        return self._judged_as

    @judged_as.setter
    def judged_as(self, rectifiers: Mapping[str, Rectifier]) -> None:
        plain = {path: rectifier._replace(plain=False, smooth=False) for path, rectifier in rectifiers.items()}
        self._judged_as, self._armed_before = plain, 0

    @property
    def model(self) -> nn.Module:
        """The model watched, without the wrapper of a compiler."""
        return self._model

    @property
    def tracing_error(self) -> Exception | None:
        """The first call whose producers could not be followed, which stopped nothing."""
        return self._trail.error

    def name(self, tensor: Any) -> str | None:
        """Name a parameter of the model; None for any other value."""
        return self._trail.name(tensor)

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
        return bool(self._call_takers) or any(self._input_takers.values())

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
            self._look_at_model()
        self._armed_before += 1
        self._thread = threading.get_ident()
        self._in_compiled = self._compiler.pause(self.compiled.begin() if self.compiled else None, self._displace)
        if not self._in_compiled:
            self._look()

    def _look(self) -> None:
        for taker in self._call_takers.values():
            taker.begin()
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        _push_mode(self)

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
            self._guard(self.compiled.end)
        self._in_compiled = False
        if not self._handles:
            return
        remove_mode(self)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()
        for taker in self._call_takers.values():
            taker.end()
        self._call_takers.clear()

    def _look_at_model(self) -> None:
        """List modules and parameters; what is exchanged later goes by its module until the next look."""
        self._trail.look_at(self._model)
        self._sources.clear()
        self._settled.clear()
        self._modules = {id(module): (module, clean(name)) for name, module in self._model.named_modules()}

    def _forget(self) -> None:
        self._fused = self._standing_in = self._met = None
        self._trail.forget()
        self._frames.clear()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        entry = self._modules.get(id(module))
        if entry is not None and threading.get_ident() == self._thread:
            self.entered.add(entry[1])
            takers = self._input_takers.get(entry[1])
            if takers and args and isinstance(args[0], Tensor) and not recomputes():
                for take in takers.values():
                    self._guard(take, args[0].detach())
            self._frames.append(ModuleCall(entry[1], module))
            if entry[1] in self._judged_as and self._standing_in is None:
                self._guard(self._enter_substitute, entry[1], module, args)
            if self._keep_fused and self._fused is None and may_be_fused(module):
                self._fused = module
                if not isinstance(module, nn.MultiheadAttention):  # which has no rectifier inside
                    self.unwatched[entry[1]] = "it runs without gradients as one fused kernel"
                remove_mode(self)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if self._standing_in is not None and self._standing_in[0] is module:
            self._guard(self._leave_substitute, output)
        if (path := self._path_left(module)) is None:
            return
        if self._fused is module:
            self._fused = None
            _push_mode(self)
        if isinstance(output, Tensor) and self._lineage(output) is None:
            prefix = f"{path}." if path else ""
            own = [(clean(prefix + name), tensor) for name, tensor in module.named_parameters(recurse=False)]
            self._trail.remember(output, of_module(own, output))

    def _enter_substitute(self, path: str, module: nn.Module, args: Any) -> None:
        if recomputes():
            return
        if not args or not isinstance(args[0], Tensor):
            self.unwatched[path] = "its substitute was not called with a tensor by position"
            return
        with torch.no_grad():
            values = args[0].detach().clone() if getattr(module, "inplace", False) else args[0]
        self._standing_in = module, args[0], values

    def _leave_substitute(self, output: Any) -> None:
        """Take the call of the whole module for the rectifier's."""
        assert self._standing_in is not None
        (module, x, values), self._standing_in = self._standing_in, None
        place = next((n for n in reversed(range(len(self._frames))) if self._frames[n].module is module), None)
        if place is None or not isinstance(output, Tensor):  # an error passed through
            return
        del self._frames[place + 1 :]
        rectifier = self._judged_as[self._frames[place].path]
        with torch._C.DisableTorchFunction():  # this is a hook: the mode would see what is done here
            self._rectified(rectifier, x, values, output)
            if self._call_takers:
                self._hand_on("substitute", None, (x,), {}, output, (rectifier, x, values))

    def _path_left(self, module: nn.Module) -> str | None:
        """Drop a module's frame, and those that an error left above it."""
        for place in reversed(range(len(self._frames))):
            if self._frames[place].module is module:
                path = self._frames[place].path
                del self._frames[place:]
                return path
        return None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name in _IGNORED or self.failure or self._standing_in or recomputes():
            return func(*args, **kwargs)
        found = self._guard(self._find, name, args, kwargs)
        output = func(*args, **kwargs)
        self._guard(self._note, name, args, kwargs, output, found)
        if self._call_takers:
            self._guard(self._hand_on, name, func, args, kwargs, output, found)
        return output

    def _guard(self, step: Callable[..., Any], *args: Any) -> Any:
        try:
            return step(*args)
        except Exception as error:
            self.failure = error
            return None

    def _find(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Rectifier, Tensor, Tensor] | None:
        """Tell the rectifier, its input, and that input's values before the call."""
        rectifier = rectifier_of(name, args, kwargs, self._trail.is_zero)
        if rectifier is None:
            return None
        operands = tensors_in((*args, *kwargs.values()))
        x = next((tensor for tensor in operands if not self._trail.is_zero(tensor)), operands[0])
        in_place = name.endswith("_") or kwargs.get("inplace") or kwargs.get("out") is not None
        return rectifier, x, x.detach().clone() if in_place else x

    def _note(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        found: tuple[Rectifier, Tensor, Tensor] | None,
    ) -> None:
        outputs = [output] if isinstance(output, Tensor) else _tensor_list(output)
        if not outputs or not (outputs[0].is_floating_point() or outputs[0].is_complex()):
            return
        self._trail.note_zeros(name, args, outputs[0])
        if found is not None and not found[0].fused:
            self._rectified(*found, outputs[0])
            return
        for place, tensor in enumerate(outputs):
            call = Call(name, args, kwargs, tensor, place if tensor is not output else -1)
            self._trail.remember(tensor, self._trail.follow(call, [self._lineage(x) for x in call.operands]))
        if found is not None:  # its input is out of sight
            self._rectified(found[0], outputs[0], outputs[0], outputs[0])

    def _hand_on(
        self,
        name: str,
        func: Callable[..., Any] | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        found: tuple[Rectifier, Tensor, Tensor] | None,
    ) -> None:
        """Hand a call on, as a site's if it was one."""
        met, self._met = self._met, None
        frame = (self._frames[-1].path, self._frames[-1].module) if self._frames else ("", None)
        with no_caching_modes():
            for taker in self._call_takers.values():
                taker.see(name, func, args, kwargs, output, frame, (*met, found[1]) if met and found else None)

    def _rectified(self, rectifier: Rectifier, x: Tensor, values: Tensor, output: Tensor) -> None:
        lineage = self._lineage(x) or Provenance()
        self._trail.remember(output, lineage._replace(passed=lineage.passed + 1, weight=False))
        if _holds_data(values):
            self._hand_over(rectifier, lineage, self._plain(values), self._plain(output))

    def _plain(self, x: Tensor) -> Tensor | None:
        """Detach a tensor that is what it seems to be; None for nested, sparse and otherwise wrapped ones."""
        if x.is_nested or x.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return None
        if type(x) not in (Tensor, nn.Parameter):
            if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                return None
            x = x.as_subclass(Tensor)
        return x.detach()

    def _hand_over(
        self, rectifier: Rectifier, lineage: Provenance, values: Tensor | None, output: Tensor | None
    ) -> None:
        key = (*[frame.path for frame in self._frames], lineage, rectifier, None if values is None else values.shape)
        known = None if output is None else self._settled.get(key)
        self._met = known or self._settle(key, rectifier, lineage, values, output)
        if self._met is not None and values is not None and output is not None:
            site, rectifier, dims = self._met
            with torch.no_grad(), no_caching_modes():
                self._sink(site, rectifier, values, output, dims)

    def _settle(
        self, key: Any, rectifier: Rectifier, lineage: Provenance, values: Tensor | None, output: Tensor | None
    ) -> tuple[Site, Rectifier, tuple[int, ...]] | None:
        """Tell the site of a call and its unit dimensions, once for all calls alike; None if it is not watched."""
        place = self._place(lineage)
        if place is None:
            return None
        owner, functional, source = place
        name = base_name(owner, functional, rectifier.kind)
        if values is None or output is None:
            self.unwatched.setdefault(name, "its input is not a plain tensor (nested, sparse, or under `vmap`)")
            return None
        dims = self._dims(name, lineage, values)
        if dims is None:
            self.unwatched.setdefault(name, "no dimension of its input holds units; name one with `unit_dims`")
            return None
        units = count_units(values, dims)
        widths = self._widths.setdefault((owner, functional, rectifier.kind, source), set())
        if len(widths) <= _MOST_WIDTHS:
            widths.add(units)
        if len(widths) > _MOST_WIDTHS:
            self._settled.clear()
            self.unwatched[name] = (
                "its number of units changes from call to call; name their dimension with `unit_dims`"
            )
            return None
        traced = not source[0].startswith("#")
        site = Site(owner, functional, rectifier.kind, source, units, rectifier.smooth, rectifier.cap, traced)
        if key[:-2] in self._sources:  # else the next call alike may be another site
            self._settled[key] = site, rectifier, dims
        return site, rectifier, dims

    def _dims(self, name: str, lineage: Provenance, x: Tensor) -> tuple[int, ...] | None:
        for pattern, dim in self.unit_dims.items():
            if matches(name, pattern):
                return (dim if dim < 0 else dim - x.ndim,)
        fits = lineage.dims is not None and all(-dim <= x.ndim for dim in lineage.dims)
        return (lineage.dims or guess_dims(x.ndim)) if fits else None

    def _place(self, lineage: Provenance) -> tuple[str, bool, tuple[str, ...]] | None:
        """Tell the owner of this call and what tells it from the owner's other calls; None if it is no site."""
        frames = self._frames
        owner = frames[-1].path if frames else ""
        functional = not (frames and (is_rectifier_module(frames[-1].module) or owner in self._judged_as))
        key = (*[frame.path for frame in frames], lineage)
        if key in self._sources:
            return owner, functional, self._sources[key]
        own = next(
            (names for frame in reversed(frames) if frame.path and (names := frame.owned(lineage.producers))), ()
        )
        if functional and not own and not (lineage.producers and self._in_forward()):
            return None
        home = next((frame for frame in reversed(frames) if frame.has_weights()), None)
        if not lineage.producers or (home and home.is_passed_by(lineage)):
            return owner, functional, (home.number(owner) if home else "#0",)
        source = (*(own or sorted(lineage.producers)), *_detail(lineage))
        if own:  # else it depends on which forward is running
            self._sources[key] = source
        return owner, functional, source

    def _in_forward(self) -> bool:
        return in_forward(self._model)

    def _lineage(self, tensor: Tensor) -> Provenance | None:
        known = self._trail.lineage(tensor)
        return self._gathered(tensor) if known is None else known

    def _gathered(self, tensor: Tensor) -> Provenance | None:
        """Recognise a weight that was put in the place of a module's own for this forward (sharding)."""
        if not self._frames:
            return None
        path, module = self._frames[-1].path, self._frames[-1].module
        name = next((name for name, weight in module._parameters.items() if weight is tensor), None)
        return None if name is None else parameter(clean(f"{path}.{name}" if path else name))


def recomputes() -> bool:
    """Tell whether this is a forward that is run again within backward."""
    return torch._C._current_graph_task_id() != -1


def _detail(lineage: Provenance) -> list[str]:
    """Tell apart what the same producers feed: slices of their output, and a rectifier behind a rectifier."""
    return [*([lineage.part] if lineage.part else []), *([f"+{lineage.passed}"] if lineage.passed else [])]


def _tensor_list(output: Any) -> list[Tensor]:
    if not isinstance(output, (list, tuple)) or isinstance(output, torch.Size):
        return []
    return [item for item in output if isinstance(item, Tensor)]


def _holds_data(x: Tensor) -> bool:
    return x.is_floating_point() and x.ndim > 0 and x.device.type != "meta" and (x.is_nested or x.numel() > 0)
