"""Join a probe to a metric: which calls are counted, and where in the flat state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.attribution import Attributions, Tracer, merged
from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.rectifiers import SELECTIONS, WATCHPOINT, Rectifier, is_rectifier_module
from lightning_deadrelu.model.sites import Site, SiteNames, clean, is_selected, own_name, plain_path, unmatched
from lightning_deadrelu.observe.compiled import Compiled, Seen
from lightning_deadrelu.observe.padding_mask import over_rows
from lightning_deadrelu.observe.probe import Probe
from lightning_deadrelu.observe.subscribers import RectifierTaker, subscribed
from lightning_deadrelu.observe.watchpoint import Watchpoint
from lightning_deadrelu.statistics import Counts, Rules, UnitLiveness, count
from lightning_deadrelu.statistics.counts import count_indices

ONLY_WATCHED = "it is a watchpoint, which is watched and never repaired"
_NOT_IN_COMPILED = SELECTIONS | {WATCHPOINT}
NOT_TRACED = "it has not run while its layers were traced"


class Ran(NamedTuple):
    """What has run under a watch, for patterns to name.

    Args:
        names: Of the sites, and of rectifiers that are not watched.
        late: Paths of the modules that have not run.
        kinds: Of the sites.
        out_of_range: What of ``unit_dims`` names a dimension that an input has not.
    """

    names: tuple[str, ...]
    late: tuple[str, ...]
    kinds: tuple[str, ...]
    out_of_range: tuple[str, ...]


class Offset(Protocol):
    """A constant that is added to each unit's input for a time."""

    @property
    def value(self) -> Tensor:
        """What is added, shape ``(units,)``."""

    def before(self, x: Tensor) -> Tensor | None:
        """Give what a sum with it was made of; None where the tensor is no such sum."""


class Watch:
    """Count what a probe sees of a model.

    Every site met gets a place in the layout, so that names do not depend on what is left out; a site that
    is left out has no units there.

    Args:
        model: The model to watch.
        include: Shell patterns over site names, or kinds; empty for all rectifiers.
        exclude: Patterns or kinds to leave out.
        rules: What a verdict asks for.
        window: Observations per window.
        unit_dims: See :class:`~lightning_deadrelu.observe.probe.Probe`.
        keep_fused: See :class:`~lightning_deadrelu.observe.probe.Probe`.
        device: Where to count; by default where the model's first parameter is.
        blind: Why no site is to be counted; empty if all are.

    Raises:
        TypeError: If ``include`` or ``exclude`` is a string.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        rules: Rules = Rules(),
        window: int = 1,
        unit_dims: Mapping[str, int] | None = None,
        keep_fused: bool = False,
        device: torch.device | None = None,
        blind: str = "",
    ) -> None:
        _check_lists(include=include, exclude=exclude)
        self._model = model
        self._include, self._exclude = tuple(include), tuple(exclude)
        self._wants = partial(_wants, self._include, self._exclude)
        self._unit_dims = dict(unit_dims or {})
        self._places, self._names = dict[Site, int](), SiteNames()
        self._window, self._rules, self._blind = window, rules, blind
        self.device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
        self.liveness = self._new_liveness()
        self.probe = Probe(model, self._take, unit_dims, keep_fused, self._wants)
        self.compiled = Compiled(self)
        self.probe.compiled = self.compiled
        self.tracer = Tracer(self.probe.model, self._name_of)
        """Knows who feeds and reads whom, as far as all traced batches tell."""
        self.valid: Tensor | None = None
        """True where the current batch holds data, False where padding; None where all is data."""
        self.masked = False
        """Whether batches may hold padding."""
        self.mask_fits = False
        """Whether the mask has spoken of a site."""
        self._trained: set[int] = set()
        self._untrained: list[tuple[int, Counts]] = []  # forwards without gradients, until the batch is over
        self.probe.ended = self._count_untrained
        self.offsets: dict[int, Offset] = {}
        """By number of the site, what is added to each unit's input for a time; a verdict looks past it."""
        self._takers: OrderedDict[int, RectifierTaker] = OrderedDict()
        self._tracing: RemovableHandle | None = None
        self.dims: dict[int, tuple[int, ...]] = {}
        """By number of the site, the dimensions of its input that hold the units, counted from the end."""
        self.hinges: dict[int, float] = {}
        """By number of the site, what an input has to exceed to fire."""

    def _new_liveness(self) -> UnitLiveness:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        precise = any(parameter.dtype == torch.float64 for parameter in self._model.parameters())
        peak_dtype = dtype if precise else torch.float32
        return UnitLiveness(window=self._window, rules=self._rules, dtype=dtype, peak_dtype=peak_dtype).to(self.device)

    @property
    def substitutes(self) -> Mapping[str, Rectifier]:
        """See :attr:`~lightning_deadrelu.observe.probe.Probe.substitutes`."""
        return self.probe.substitutes

    @substitutes.setter
    def substitutes(self, rectifiers: Mapping[str, Rectifier]) -> None:
        self.probe.substitutes = rectifiers

    @property
    def layout(self) -> Layout:
        """Every site met, in order; those left out have 0 units."""
        return self.liveness.layout

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the layout."""
        return self.layout.sites

    def _take(self, site: Site, rectifier: Rectifier, x: Tensor, out: Tensor, dims: tuple[int, ...]) -> None:
        if not self.probe.router.observes():  # called outside of any module
            return
        place = self._places.get(site)
        if place is None:
            left_out = self._places.get(site._replace(units=0))
            place = self._places[site] = self._add(site) if left_out is None else left_out
        trains = self.probe.router.is_training
        if not self.liveness.layout.sites[place].units or (place in self._trained and not trains):
            return
        if site.kind in _NOT_IN_COMPILED:
            self.compiled.refuse(f"`{self.name_of(place)}` is a {site.kind}, of which compiled code has no trace")
        else:
            self.compiled.saw(place)
        self.dims[place], self.hinges[place] = dims, rectifier.hinge
        chosen = x[..., None] if rectifier.indexed and self.valid is not None and x.shape == self.valid.shape else x
        valid = None if self.valid is None else over_rows(self.valid, chosen, dims)
        self.mask_fits = self.mask_fits or valid is not None
        if place in self.offsets:
            x, out, rectifier = _without(self.offsets[place], x, dims, rectifier)
        wanted = self.liveness.wants_rates(place), self.liveness.rules.redundancy
        chose = count_indices(x, site.units, valid, wanted[1]) if rectifier.indexed else None
        lend, in_kernel = self.liveness.accumulators.lend, trains and x.is_cuda
        room = lend(self.layout, place, self.liveness.observation, x) if in_kernel else None
        self._add_counts(place, chose or count(x, out, dims, rectifier, valid, *wanted, room), trains)
        for taker in self._takers.values():
            taker(place, rectifier, x, dims, valid)

    def _add_counts(self, place: int, counts: Counts, trains: bool) -> None:
        if trains:
            self._trained.add(place)
            self.liveness.add(place, counts)
        else:
            self._untrained.append((place, counts))

    def _count_untrained(self) -> None:
        """Count forwards without gradients of sites that have no others: a teacher is watched, a second look is not."""
        untrained, self._untrained = self._untrained, []
        for place, counts in untrained:
            if place not in self._trained:
                self.liveness.add(place, counts)

    def subscribe(self, taker: RectifierTaker) -> RemovableHandle:
        """Have each counted call of a rectifier handed on too, until the handle is removed."""
        return subscribed(self._takers, taker)

    def __enter__(self) -> Watch:
        self.probe.arm()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop to look for good: no hook, mode, graph or raised limit of ours is left. What was counted stays."""
        self.probe.disarm()
        self.compiled.close()

    def needs_eager_code(self) -> bool:
        """See :class:`~lightning_deadrelu.observe.compiled.Counter`."""
        busy = self.probe.is_subscribed or self.probe.substitutes or self.offsets or self._takers
        return bool(busy) or self.masked or self.valid is not None or self.liveness.wants_redundancy

    def number_of(self, seen: Seen) -> int | None:
        """See :class:`~lightning_deadrelu.observe.compiled.Counter`."""
        place = self._places.get(seen.site, self._places.get(seen.site._replace(units=0)))
        if place is None or not self.sites[place].units:
            return None if place is None else -1
        known = (self.dims.get(place), self.hinges.get(place))
        return place if known == (seen.dims, seen.rectifier.hinge) else None

    def add_counts(self, number: int, counts: Counts) -> None:
        """See :class:`~lightning_deadrelu.observe.compiled.Counter`."""
        trains = self.probe.trains()
        if self.probe.router.observes() and (trains or number not in self._trained):
            self._add_counts(number, counts, trains)

    def name_of(self, number: int) -> str:
        """See :class:`~lightning_deadrelu.observe.compiled.Counter`."""
        return self.layout.names[number]

    def _name_of(self, site: Site) -> str:
        """Name a site as everywhere else: its own name is not enough where a module has several."""
        place = self._places.get(site, self._places.get(site._replace(units=0)))
        return own_name(site) if place is None else self.layout.names[place]

    def _add(self, site: Site) -> int:
        name = self._names.add(site)
        selected = self._wants(name, site)
        if self._blind and selected:
            self.probe.unwatched[name] = self._blind
            selected = False
        return self.liveness.add_site(site if selected else site._replace(units=0))

    def adopt(self, layout: Collection[Site]) -> None:
        """Move the counts to another layout, which has all sites of the present one and perhaps more."""
        old = self.liveness
        old.flush()
        self.liveness, self._names = self._new_liveness(), SiteNames(layout)
        self.liveness.observation = old.observation
        self._places = {site: self.liveness.add_site(site) for site in layout}
        for place, site in enumerate(old.layout):
            self.liveness.copy_site(old, place, self._places[site])
        self.liveness.take_batch(old, [self._places[site] for site in old.layout])
        self._trained = {self._places[old.layout.sites[place]] for place in self._trained}
        self.dims = {self._places[old.layout.sites[place]]: dims for place, dims in self.dims.items()}
        self.hinges = {self._places[old.layout.sites[place]]: hinge for place, hinge in self.hinges.items()}
        self.compiled.forget()

    def trace(self) -> None:
        """Follow the next observed batch from layers to sites and on; what was known before is added to."""
        if self._tracing is not None:
            self._tracing.remove()  # asked for twice, it is followed once
        self._tracing = self.probe.router.subscribe_calls(self.tracer)

    @property
    def attributions(self) -> Attributions:
        """Which entries feed and read the units of each site, as far as all traced batches tell."""
        known = merged(self.tracer.attributions(), self.sites, self.tracer.failure or NOT_TRACED)
        known |= merged({}, [site for site in self.sites if site.kind == WATCHPOINT], ONLY_WATCHED)
        named = zip(self.layout.names, self.sites, strict=True)
        return Attributions({name: known[site] for name, site in named if site.units}, self.tracer.known.used)

    def unwatched(self) -> dict[str, str]:
        """Say, by name, why a rectifier of the model is not watched."""
        return {**dict.fromkeys(self._idle(), "it has not run while observed"), **self.probe.unwatched}

    def has_seen_all(self) -> bool:
        """See :class:`~lightning_deadrelu.observe.compiled.Counter`."""
        return not self._idle()

    def _idle(self) -> list[str]:
        """List the rectifiers that have not run yet."""
        known = {*(plain_path(site.owner) for site in self.sites), *self.probe.unwatched}
        exact = (plain_path(clean(name)) for name, module in self._model.named_modules() if _can_die(module))
        return [path for path in exact if path not in known]

    @property
    def ran(self) -> Ran:
        """What patterns may name, as far as this process knows: other ranks may have run other layers."""
        modules = [clean(name) for name, _ in self._model.named_modules()]
        late = tuple(plain_path(name) for name in modules if name and name not in self.probe.entered)
        kinds = tuple(site.kind for site in self.sites)
        return Ran((*self.layout.names, *self.unwatched()), late, kinds, tuple(self.probe.out_of_range.values()))

    def check_patterns(self, ran: Sequence[Ran] = ()) -> None:
        """Refuse patterns that match nothing that ran or is known to exist.

        Args:
            ran: :attr:`ran` of each rank, so that all come to the same answer; by default that of this process.

        Raises:
            ValueError: If a pattern of ``include``, ``exclude`` or ``unit_dims`` matches no site on any rank, or names
                a dimension that an input has not on one.
        """
        given = {"include": self._include, "exclude": self._exclude, "unit_dims": self._unit_dims}
        _refuse_unmatched({argument: list(patterns) for argument, patterns in given.items()}, ran or [self.ran])


def _refuse_unmatched(given: Mapping[str, list[str]], ran: Sequence[Ran]) -> None:
    for wrong in (wrong for one in ran for wrong in one.out_of_range):
        raise ValueError(wrong)
    names = list(dict.fromkeys(name for one in ran for name in one.names))
    late = set(ran[0].late).intersection(*(one.late for one in ran))
    kinds = [kind for one in ran for kind in one.kinds]
    for argument, patterns in given.items():
        if missing := unmatched(patterns, [*names, *late], kinds):
            known = ", ".join(f"`{name}`" for name in names) or "none"
            raise ValueError(
                f"`{argument}={patterns}`: {missing} matches no activation that ran. Mend or drop it; the"
                f" sites of this model: {known}."
            )


def _wants(include: Sequence[str], exclude: Sequence[str], name: str, what: Rectifier | Site) -> bool:
    return is_selected(name, what.kind, what.smooth, include, exclude)


def _check_lists(**arguments: Sequence[str]) -> None:
    for name, patterns in arguments.items():
        if isinstance(patterns, str):
            raise TypeError(f"`{name}={patterns!r}`: it takes a list of patterns. Try `{name}={[patterns]}`.")


_SMOOTH_MODULES = (nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.RReLU, nn.LeakyReLU, nn.PReLU)


def _can_die(module: nn.Module) -> bool:
    """Whether a module makes a site, of which units can be exactly silent."""
    if not is_rectifier_module(module):
        return isinstance(module, Watchpoint)
    return not isinstance(module, _SMOOTH_MODULES) and not (isinstance(module, nn.Hardtanh) and module.min_val != 0)


def _without(
    offset: Offset, x: Tensor, dims: tuple[int, ...], rectifier: Rectifier
) -> tuple[Tensor, Tensor, Rectifier]:
    """Take a term off a rectifier's input, and say what it would put out then.

    Half precision rounds small inputs away beside a large term, so that they are looked up where that is possible.
    """
    if (before := offset.before(x)) is None:
        shape = [x.shape[dim] if dim in dims else 1 for dim in range(-x.ndim, 0)]
        before = x - offset.value.to(x.device, x.dtype).view(shape)
    x = before
    return x, (x - rectifier.hinge).clamp(min=0), rectifier._replace(plain=False)
