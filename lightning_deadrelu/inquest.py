"""Keep what a post-mortem needs: the vital signs, when each unit last fired, what feeds it, and the waves told."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deadrelu.postmortem import Feed, Victims, Wave, explain, joined
from lightning_deadrelu.sites import Site, clean, names_of
from lightning_deadrelu.statistics import LivenessReport, SiteReport, Totals
from lightning_deadrelu.statistics.verdicts import CONSTANT
from lightning_deadrelu.vitals import Vitals, coprime, off_centre

_LEAST_ROWS, _MOST_ROWS = 1024, 8192
_WEIGHTS, _READ = 32, 30_000  # of a unit, which tell their size; and of a layer, which one thread reads
_WAVES = 100
_ADAPTIVE = frozenset({"betas", "alpha", "lr_decay", "rho", "beta2_decay"})


class Source(NamedTuple):
    """The parameters that feed a site, each where there is just one.

    Args:
        name: Of the bias, or of BatchNorm's beta; empty if there is none.
        bias: It.
        weight: The matrix or kernel whose rows are the units'; without one, BatchNorm's gamma.
        normed: Whether a norm follows, which takes the size of the weights out again.
    """

    name: str = ""
    bias: Tensor | None = None
    weight: Tensor | None = None
    normed: bool = False

    @property
    def fan_in(self) -> int:
        """Weights per unit; 0 where it is not known, or says nothing."""
        if self.weight is None or self.weight.ndim < 2 or self.normed:
            return 0
        return self.weight[0].numel()


class Notes(NamedTuple):
    """What comes to the host with the counts of a window.

    Args:
        ring: See :attr:`~lightning_deadrelu.vitals.Vitals.ring`.
        now: What feeds all units, shape ``(3, units)``: see :class:`~lightning_deadrelu.postmortem.Feed`.
        start: The same before the first step, NaN where it was noted before; shape ``(3, units)``, or ``(3, 0)`` where
            nothing is new.
        centre: See :func:`~lightning_deadrelu.vitals.off_centre`, shape ``(1,)``.
    """

    ring: Tensor
    now: Tensor
    start: Tensor
    centre: Tensor


class Inquest:
    """Watch over the vital signs, and find out why units died.

    Args:
        rows: Steps to keep, from 1,024 to 8,192.

    Example:
        >>> Inquest().waves
        ()
    """

    def __init__(self, rows: int = _LEAST_ROWS) -> None:
        self.vitals = Vitals(min(max(rows, _LEAST_ROWS), _MOST_ROWS))
        self._closed: deque[Wave] = deque(maxlen=_WAVES)
        self._open: tuple[Wave, ...] = ()  # of a window that has not ended
        self._observed: deque[int] = deque(maxlen=_LEAST_ROWS)  # the step of each observation
        self._start, self._before, self._alive = (torch.empty(3, 0) for _ in range(3))
        self._first: dict[Site, Tensor] = {}  # what fed the units before their first step, until it is read
        self._met = 0
        self._centre: Tensor | None = None

    @property
    def waves(self) -> tuple[Wave, ...]:
        """The waves of deaths, the latest last; the last 100."""
        return (*self._closed, *self._open)

    # -- at each step ------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, model: nn.Module, sites: Sequence[Site]) -> None:
        """Note the gradients; and as soon as sites are met, what feeds their units.

        Args:
            optimizer: Which is about to step.
            model: The model.
            sites: The sites met so far.
        """
        if len(sites) != self._met:
            sources = sources_of(sites, model)
            self.vitals.biases = {id(source.bias) for source in sources if source.bias is not None}
            fresh = list(zip(sites, sources, strict=True))[self._met :]
            self._first |= {site: fed(source, site.units) for site, source in fresh}
            self._met = len(sites)
        self.vitals.note_gradients(optimizer)

    def after_batch(self, loss: Any, batch: Any, step: int | None) -> None:
        """Note a batch.

        Args:
            loss: What the training step returned.
            batch: What it was given.
            step: The training batch, as loggers count, once the last of those that accumulate is done; else None.
        """
        if self._centre is None:
            self._centre = off_centre(batch)
        self.vitals.note_batch(loss, batch)
        if step is not None:
            self.vitals.close(step)

    def observed(self, step: int) -> None:
        """Note the step of an observation that has been closed."""
        self._observed.append(step)

    # -- at a window's end -------------------------------------------------------------------------------

    def notes(self, sites: Sequence[Site], model: nn.Module, device: torch.device) -> Notes:
        """Return what lies on the device, to be copied to the host along with the counts.

        Args:
            sites: The sites in the order of the counts.
            model: The model.
            device: Where the counts are.
        """
        sources = sources_of(sites, model)
        now = [fed(source, site.units).to(device) for site, source in zip(sites, sources, strict=True)]
        start = [
            self._first[site].to(device) if site in self._first else torch.full_like(values, math.nan)
            for site, values in zip(sites if self._first else (), now, strict=bool(self._first))
        ]
        nothing = torch.empty(3, 0, device=device)
        centre = torch.full((1,), math.nan, device=device) if self._centre is None else self._centre.reshape(1)
        ring = self.vitals.ring.to(device)
        return Notes(ring, torch.cat([nothing, *now], 1), torch.cat([nothing, *start], 1), centre.to(device))

    def look(
        self,
        report: LivenessReport,
        totals: Totals,
        notes: Notes,
        sites: Sequence[Site],
        peaks: Mapping[str, Tensor],
        patient: tuple[nn.Module, Sequence[Optimizer]],
    ) -> tuple[Wave, ...]:
        """Explain the newly dead of a verdict, and nothing else; costs next to nothing where there are none.

        Args:
            report: The verdict.
            totals: The counts it was made from, on the host.
            notes: What came to the host with them.
            sites: The sites in the order of the counts.
            peaks: Largest inputs in the windows before, by site, shape ``(windows, units)``.
            patient: The model and its optimizers.
        """
        self._grow(notes)
        if not report.total("newly_dead"):
            return ()
        model, optimizers = patient
        constant = totals.maxima[2] == CONSTANT
        places = _places(sites)
        sources = dict(zip(names_of(sites), sources_of(sites, model), strict=True))
        victims: list[Victims] = []
        dead: list[tuple[str, bool]] = []
        for number, site in enumerate(report.sites):
            place = places[site.name]
            if site.in_headline and site.newly_dead.any():
                of = self._victims(site, place, notes, peaks.get(site.name), constant[place])
                upstream = next((name for name, root in reversed(dead) if root), dead[-1][0] if dead else "")
                trained = _trained(sources[site.name], optimizers, self.vitals.travelled)
                victims.append(of._replace(first=number == 0, upstream=upstream, **trained))
            if bool(site.dead.all()):
                dead.append((site.name, not bool(constant[place].all())))
        centre = float(notes.centre)
        return explain(victims, self.vitals.read(notes.ring), off_centre=centre, sites=len(report.headline))

    def _victims(self, site: SiteReport, place: slice, notes: Notes, peaks: Tensor | None, constant: Tensor) -> Victims:
        units = site.newly_dead.nonzero().flatten()
        now = site.peak[None].float()
        history = torch.cat([peaks, now]) if peaks is not None and peaks.shape[1] == site.units else now
        start = self._observed[0] if self._observed else 0
        last_fired = site.last_fired[units].long()
        last_fired = torch.where(last_fired < 0, start, last_fired)
        observed = torch.tensor(self._observed or [start], dtype=torch.int64)
        after = torch.searchsorted(observed, last_fired, right=True).clamp(max=len(observed) - 1)
        return Victims(
            site.name,
            site.units,
            first=False,
            units=units,
            born=site.born_dead[units],
            last_fired=last_fired,
            silent_from=observed[after].maximum(last_fired),
            constant=constant[units],
            upstream="",
            peaks=history[:, units],
            alive=Feed(*self._alive[:, place][:, units]),
            now=Feed(*notes.now[:, place][:, units]),
            start=Feed(*self._start[:, place]),
        )

    def _grow(self, notes: Notes) -> None:
        """Make room for new units, and take what fed them at the start."""
        units = notes.now.shape[1]
        if units > self._start.shape[1]:
            fresh = torch.full((3, units - self._start.shape[1]), math.nan)
            self._start, self._before, self._alive = (
                torch.cat([old, fresh], 1) for old in (self._start, self._before, self._alive)
            )
        for known in (self._start, self._before, self._alive) if notes.start.numel() else ():
            known.copy_(torch.where(known.isnan(), notes.start, known))

    def close(self, totals: Totals, notes: Notes, waves: Sequence[Wave]) -> None:
        """End a window.

        Args:
            totals: Its counts, on the host.
            notes: What came to the host with them.
            waves: What :meth:`look` found in it.
        """
        torch.where(totals.maxima[1] >= 0, self._before, self._alive, out=self._alive)
        self._before = notes.now
        self._first.clear()
        self._closed = deque(joined([*self._closed, *waves]), maxlen=_WAVES)
        self._open = ()

    def keep_open(self, waves: Sequence[Wave]) -> None:
        """Remember what was found in a window that has not ended, and will be judged anew when it has."""
        self._open = tuple(waves)

    # -- to be continued ---------------------------------------------------------------------------------

    def state_dict(self, notes: Notes) -> dict[str, Any]:
        """Return plain values and tensors.

        Args:
            notes: What is on the device, copied to the host.
        """
        self._grow(notes)
        return {
            "vitals": self.vitals.state_dict(notes.ring),
            "waves": [wave.to_dict() for wave in self._closed],
            "observed": list(self._observed),
            "fed": torch.stack([self._start, self._before, self._alive]),
            "centre": notes.centre.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what was saved.

        Args:
            state: What :meth:`state_dict` returned.
            device: Of the model.
        """
        self.vitals.load_state_dict(state["vitals"], device)
        self._closed = deque((Wave.from_dict(plain) for plain in state["waves"]), maxlen=_WAVES)
        self._observed = deque(state["observed"], maxlen=_LEAST_ROWS)
        self._start, self._before, self._alive = state["fed"].clone().unbind()
        self._centre = state["centre"].to(device)


def _places(sites: Sequence[Site]) -> dict[str, slice]:
    places, start = {}, 0
    for name, site in zip(names_of(sites), sites, strict=True):
        places[name] = slice(start, start := start + site.units)
    return places


# -- what feeds a site -----------------------------------------------------------------------------------


def sources_of(sites: Sequence[Site], model: nn.Module) -> list[Source]:
    """Find the bias and the weights that feed each site; where there are several of a kind, none.

    Args:
        sites: The sites.
        model: Their model.
    """
    named = {clean(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    return [_source(site, named) for site in sites]


def _source(site: Site, named: Mapping[str, Tensor]) -> Source:
    if not site.traced or "-" in site.source:  # behind a negation, a bias that rises makes the input fall
        return Source()
    known = {name: named[name] for name in site.source if name in named and not hasattr(named[name], "to_local")}
    mine = {name: p for name, p in known.items() if p.ndim and p.shape[0] == site.units}
    scales = [name for name, p in mine.items() if p.ndim == 1 and name.endswith("weight")]
    norms = {name.rpartition(".")[0] for name in scales}
    biases = [name for name, p in mine.items() if p.ndim == 1 and name.endswith("bias")]
    if norms:  # a bias before the norm is lost in it
        biases = [name for name in biases if name.rpartition(".")[0] in norms]
    weights = [p for p in mine.values() if p.ndim > 1] or [mine[name] for name in scales]
    name = biases[0] if len(biases) == 1 else ""
    return Source(name, mine.get(name), weights[0] if len(weights) == 1 else None, bool(norms))


@torch.no_grad()
def fed(source: Source, units: int) -> Tensor:
    """Measure what feeds a site's units, shape ``(3, units)``: see :class:`~lightning_deadrelu.postmortem.Feed`.

    Args:
        source: Bias and weights.
        units: How many units there are.
    """
    like = next((p for p in (source.weight, source.bias) if p is not None), None)
    missing = torch.full((units,), math.nan, device=None if like is None else like.device)
    bias = missing if source.bias is None or not units else source.bias.detach().float()
    if source.weight is None or not units:
        return torch.stack([bias, missing, missing])
    rows = source.weight.detach().reshape(units, -1)
    columns = max(min(_WEIGHTS, _READ // units), 4)
    stride = coprime(max(rows.shape[1] // columns, 1), rows.shape[1])
    sample = rows[:, ::stride][:, :columns].float()
    return torch.stack([bias, sample.square().mean(1), sample.mean(1)])


def _trained(source: Source, optimizers: Sequence[Optimizer], travelled: float) -> dict[str, Any]:
    """Tell how the parameters of a site are optimized."""
    held = source.weight if source.bias is None else source.bias
    groups = ((group, one) for one in optimizers for group in one.param_groups)
    none: tuple[dict[str, Any], Any] = ({}, None)
    group, optimizer = next((pair for pair in groups if any(p is held for p in pair[0]["params"])), none)
    decay, momentum = (_number(group.get(key)) for key in ("weight_decay", "momentum"))
    adaptive = bool(_ADAPTIVE & group.keys())
    decoupled = group.get("decoupled_weight_decay", type(optimizer).__name__.endswith("W"))
    left = math.exp(-decay * travelled / (1 - min(momentum, 0.99)))
    if adaptive and decay and not decoupled:  # Adam divides it by the gradients' size
        left = 0.0
    return {"fan_in": source.fan_in, "adaptive": adaptive, "momentum": momentum, "decay": decay, "left": left}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
