"""Tell which site a call of a rectifier belongs to, and which dimensions of its input hold the units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_deadrelu.model.rectifiers import SELECTIONS, Rectifier, is_rectifier_module, rectifier_of
from lightning_deadrelu.model.sites import Site, base_name, clean, count_units, guess_dims, matches, plain_parameter
from lightning_deadrelu.model.torch_calls import ANY_CONVOLUTION, LAYERS, Call, tensors_in
from lightning_deadrelu.observe.call_stack import CallStack, in_forward
from lightning_deadrelu.observe.provenance import Provenance, activated, of_module, parameter
from lightning_deadrelu.observe.selections import Selections
from lightning_deadrelu.observe.tensor_origins import TensorOrigins
from lightning_deadrelu.observe.torch_function import TorchFunction

_WEIGHTED = LAYERS | ANY_CONVOLUTION
_UNKNOWN = Provenance()
_MOST_WIDTHS = 4  # a site whose number of units differs between calls more often has no units


class Rectified(NamedTuple):
    """A call of a rectifier that is about to run, or has run.

    Args:
        rectifier: Which it is.
        x: Its input.
        values: The input as it was before the call: a copy where the call overwrites it.
    """

    rectifier: Rectifier
    x: Tensor
    values: Tensor


class SiteCall(NamedTuple):
    """A site that was called.

    Args:
        site: The site.
        rectifier: Its rectifier.
        dims: The dimensions of the input that hold the units, counted from the end.
    """

    site: Site
    rectifier: Rectifier
    dims: tuple[int, ...]


class _Place(NamedTuple):
    """Where a rectifier is called, and on what.

    Args:
        owner: Path of the innermost module.
        functional: Whether a function was called, and no module that is a rectifier.
        source: The parameters that feed it, or its number.
        inside: Whether it counts only while the model's own forward runs: outside it is a loss, and no layer.
    """

    owner: str
    functional: bool
    source: tuple[str, ...]
    inside: bool


Wants = Callable[[str, Rectifier], bool]


def everything(name: str, rectifier: Rectifier) -> bool:
    """Want every rectifier to be watched."""
    return True


class SiteResolver:
    """Follow tensors from parameters to rectifiers, and give equal calls the same site.

    Args:
        model: The model.
        unit_dims: The dimension that holds the units, by pattern over site names.
        runs: Tells whether the model's own forward is running; a hinge outside of it is a loss, not a layer.
        wants: Tells by name whether a rectifier is to be watched: of others it is not said why they are not.
    """

    def __init__(
        self,
        model: nn.Module,
        unit_dims: Mapping[str, int],
        runs: Callable[[nn.Module], bool] = in_forward,
        wants: Wants = everything,
    ) -> None:
        self._unit_dims, self._runs, self._wants = unit_dims, runs, wants
        self.model = model
        """The model."""
        self.origins = TensorOrigins(model)
        """Where tensors come from."""
        self._selections = Selections(self.origins)
        self.stack = CallStack()
        """The forwards that are running."""
        self.substituted: frozenset[str] = frozenset()
        """Paths of the modules that took a rectifier's place."""
        self.modules: dict[int, tuple[nn.Module, str]] = {}
        """The model's modules with their paths, by ``id``."""
        self.unwatched: dict[str, str] = {}
        """Why, by name, a rectifier that ran is not watched."""
        self.out_of_range: dict[str, str] = {}
        """By name, which of ``unit_dims`` is a dimension that the input has not."""
        self._is_bare = False  # of parameters, so that nothing tells a layer from a loss
        self._places: dict[tuple[Any, ...], _Place] = {}
        self._site_calls: dict[tuple[Any, ...], tuple[SiteCall, _Place]] = {}
        self._widths: dict[tuple[Any, ...], set[int]] = {}

    def look_at_model(self) -> None:
        """List modules and parameters; a parameter that is exchanged later goes by its module until the next look."""
        self.origins.look_at(self.model)
        self._is_bare = next(self.model.parameters(), None) is None
        self._places.clear()
        self._site_calls.clear()
        self.modules = {id(module): (module, clean(name)) for name, module in self.model.named_modules()}

    def forget(self) -> None:
        """Let go of the tensors of a batch."""
        self.origins.forget()
        self._selections.forget()
        self.stack.clear()

    # -- calls of torch functions

    def find(self, function: TorchFunction, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rectified | None:
        """Tell whether a call, before it runs, is a rectifier's.

        Args:
            function: What is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        if not function.may_rectify:
            return None
        rectifier = function.rectifier or rectifier_of(function.name, args, kwargs, self.origins.is_zero)
        if rectifier is None:
            return None
        x = args[0] if args else None
        if not isinstance(x, Tensor) or rectifier.kind == "maximum":
            operands = tensors_in((*args, *kwargs.values()))
            x = next((tensor for tensor in operands if not self.origins.is_zero(tensor)), operands[0])
        if self._selections.is_chosen(x):
            return None
        in_place = function.in_place or (kwargs and (kwargs.get("inplace") or kwargs.get("out") is not None))
        return Rectified(rectifier, x, x.detach().clone() if in_place else x)

    def select(
        self, function: TorchFunction, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> Rectified | None:
        """Tell whether a selection of activations ends with a call that has run, which counts as a rectifier's then.

        Args:
            function: What was called, one that selections are made of.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned.
        """
        found = self._selections.find(function.plain, args, kwargs, output)
        return Rectified(*found) if found else None

    def follow(
        self, function: TorchFunction, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> list[Tensor]:
        """Note where the outputs of a call come from, and return those that may hold activations."""
        outputs = activations_in(output)
        if outputs:
            call = Call(function.plain, args, kwargs, outputs)
            self.origins.note_zeros(call)
            known = [self.provenance(x) for x in call.operands]
            if call.name in _WEIGHTED and len(known) > 1 and known[1] is None:
                known[1] = self._weight_of_module()
            key = self.origins.key(function, args, kwargs, output)
            for call.place, tensor in enumerate(outputs):
                self.origins.remember(tensor, self.origins.follow(call, known, key))
        return outputs

    def follow_module(self, path: str, module: nn.Module, output: Any) -> None:
        """Take a module's parameters for the producers of its output, if no function that was seen returned it."""
        if isinstance(output, Tensor) and self.origins.of(output) is None and self.provenance(output) is None:
            prefix = f"{path}." if path else ""
            own = [(clean(prefix + name), tensor) for name, tensor in module.named_parameters(recurse=False)]
            self.origins.remember(output, of_module(own, output))

    def provenance(self, tensor: Tensor) -> Provenance | None:
        """Tell where a tensor comes from; a weight put in the place of a module's own (sharding) goes by its name."""
        known = self.origins.of(tensor)
        if known is not None or not self.stack:
            return known
        own = self.stack[-1].module.named_parameters(self.stack.path, recurse=False)
        name = next((name for name, weight in own if weight is tensor), None)
        return None if name is None else parameter(clean(name))

    def _weight_of_module(self) -> Provenance | None:
        """Take a layer's weight that was computed out of sight for one of its module's parameters."""
        if not self.stack:
            return None
        names = (clean(name) for name, _ in self.stack[-1].module.named_parameters(self.stack.path))
        own = frozenset(plain_parameter(name) for name in names if not name.endswith("bias"))
        return Provenance(own, weight=True) if own else None

    # -- sites

    def resolve(
        self, call: Rectified, output: Tensor, plain: Callable[[Tensor], Tensor | None]
    ) -> tuple[SiteCall, Tensor, Tensor] | None:
        """Tell the site of a rectifier's call, its input and its output; None if it is not watched.

        Args:
            call: What ran.
            output: What it returned.
            plain: Returns a tensor without autograd and wrappers; None where that cannot be done.
        """
        known = self.origins.of(call.x) or self.provenance(call.x) or _UNKNOWN
        self.origins.remember(output, activated(known))
        self._selections.note_rectified(call.x, output)
        values, out = plain(call.values), plain(output)
        if values is None or out is None:
            if _holds_data(call.values):
                self._settle(None, call.rectifier, known, None)
            return None
        selects = call.rectifier.kind in SELECTIONS
        key = (self.stack.paths, known, selects), call.rectifier, values.shape, values.dtype, values.is_meta
        found = self._site_calls.get(key)
        if found is not None:
            site_call = found[0] if not found[1].inside or self._holds(found[1]) else None
        elif _holds_data(values):
            site_call = self._settle(key, call.rectifier, known, values)
        else:
            return None
        return None if site_call is None else (site_call, values, out)

    def _holds(self, place: _Place) -> bool:
        """Whether a place counts now; that the model's forward runs, the stack tells sooner than the frames."""
        return not place.inside or bool(self.stack and self.stack[0].module is self.model) or self._runs(self.model)

    def _settle(self, key: Any, rectifier: Rectifier, known: Provenance, values: Tensor | None) -> SiteCall | None:
        """Tell the site of a call and its unit dimensions, once for all calls alike; None if it is not watched."""
        place = self._place(known, rectifier.kind in SELECTIONS)
        if place is None:
            if self.stack and known.producers:
                name = base_name(self.stack.path, True, rectifier.kind)
                self._pass_over(name, rectifier, "it runs outside the model's forward, as a loss does")
            return None
        owner, functional, source, _ = place
        name = base_name(owner, functional, rectifier.kind)
        if values is None:
            self._pass_over(name, rectifier, "its input is not a plain tensor (nested, sparse, or under `vmap`)")
            return None
        dims = self._dims(name, known, values)
        if dims is None:
            self._pass_over(name, rectifier, "no dimension of its input holds units; name one with `unit_dims`")
            return None
        units = count_units(values, dims)
        if not self._is_steady((owner, functional, rectifier.kind, source), units):
            self._site_calls.clear()
            self._pass_over(
                name, rectifier, "its number of units changes from call to call; name their dimension with `unit_dims`"
            )
            return None
        traced = not source[0].startswith("#")
        site = Site(owner, functional, rectifier.kind, source, units, rectifier.smooth, rectifier.cap, traced)
        found = SiteCall(site, rectifier, dims)
        if key[0] in self._places:  # else the next call alike may be another site
            self._site_calls[key] = found, place
        return found

    def _pass_over(self, name: str, rectifier: Rectifier, why: str) -> None:
        if self._wants(name, rectifier):
            self.unwatched.setdefault(name, why)

    def _is_steady(self, place: tuple[Any, ...], units: int) -> bool:
        """Note the number of units of a place, and tell whether it has not changed too often."""
        widths = self._widths.setdefault(place, set())
        if len(widths) <= _MOST_WIDTHS:
            widths.add(units)
        return len(widths) <= _MOST_WIDTHS

    def _dims(self, name: str, known: Provenance, x: Tensor) -> tuple[int, ...] | None:
        for pattern, dim in self._unit_dims.items():
            if matches(name, pattern):
                return self._named_dim(name, pattern, dim, x)
        fits = known.dims is not None and all(-dim <= x.ndim for dim in known.dims)
        return (known.dims or guess_dims(x.ndim)) if fits else None

    def _named_dim(self, name: str, pattern: str, dim: int, x: Tensor) -> tuple[int, ...] | None:
        if -x.ndim <= dim < x.ndim:
            return (dim if dim < 0 else dim - x.ndim,)
        self.out_of_range.setdefault(
            name,
            f"`unit_dims={{{pattern!r}: {dim}}}`: the input of `{name}` has shape {tuple(x.shape)}, and so dimensions"
            f" from {-x.ndim} to {x.ndim - 1}. Try `unit_dims={{{name!r}: {x.ndim - 1}}}`.",
        )
        return None

    def _place(self, known: Provenance, selects: bool) -> _Place | None:
        """Tell the owner of this call and what tells it from the owner's other calls; None if it is no site.

        A selection among what parameters feed is a layer wherever it is made: SAELens trains without a forward.
        """
        stack, owner = self.stack, self.stack.path
        key = stack.paths, known, selects
        if (place := self._places.get(key)) is not None:
            return place if self._holds(place) else None
        functional = not (stack and (is_rectifier_module(stack[-1].module) or owner in self.substituted))
        own = next((names for call in reversed(stack) if call.path and (names := call.owned(known.producers))), ())
        inside = functional and not own and not (selects and known.producers)
        place = _Place(owner, functional, (*(own or sorted(known.producers)), *_details(known)), inside)
        if place.inside and not ((known.producers or self._is_bare) and self._holds(place)):
            return None
        home = next((call for call in reversed(stack) if call.has_weights()), None)
        if not known.producers or (home and home.is_passed_by(known)):
            home = home or (stack[0] if stack else None)  # without any parameters
            return place._replace(source=(home.number(owner) if home else "#0",))
        self._places[key] = place
        return place


def _details(known: Provenance) -> list[str]:
    """Tell apart what the same producers feed: slices of their output, and a rectifier behind a rectifier."""
    return [*([known.part] if known.part else []), *([f"+{known.passed}"] if known.passed else [])]


def activations_in(output: Any) -> list[Tensor]:
    """List the tensors that a function returned, if the first holds numbers and no indices."""
    if isinstance(output, Tensor):
        outputs = [output]
    elif isinstance(output, (list, tuple)):
        outputs = [item for item in output if isinstance(item, Tensor)]
    else:
        return []
    return outputs if outputs and (outputs[0].is_floating_point() or outputs[0].is_complex()) else []


def _holds_data(x: Tensor) -> bool:
    return x.is_floating_point() and x.ndim > 0 and x.device.type != "meta" and (x.is_nested or x.numel() > 0)
