"""Record what a post-mortem needs while a model trains, and explain why units died."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_deadrelu.explain.death_dates import momentum_of, steps_without_gradient
from lightning_deadrelu.explain.postmortem.batch_sample import off_centre
from lightning_deadrelu.explain.postmortem.death_events import DeathEvent, largest, merged
from lightning_deadrelu.explain.postmortem.dying_units import DyingUnits
from lightning_deadrelu.explain.postmortem.explain import explain
from lightning_deadrelu.explain.postmortem.incoming_weights import (
    Incoming,
    IncomingWeights,
    IncomingWeightsState,
    incoming_of,
    trained,
)
from lightning_deadrelu.explain.postmortem.step_log import Rows, StepLog, StepLogState
from lightning_deadrelu.guarded import Guard, unless_failed
from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.rectifiers import SELECTIONS
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics import LivenessReport, SiteReport, Totals
from lightning_deadrelu.warn import warn

_LEAST_ROWS, _MOST_ROWS = 1024, 8192
_DATED = 256  # of the dying units of a layer, and as many of the live
_DEATHS = 100

Peaks = Callable[[SiteReport, Tensor], Tensor]
"""Returns the largest inputs of some units of a site in the windows before, shape ``(windows, units)``."""


class Readings(NamedTuple):
    """What comes to the host with the counts of a window.

    Args:
        steps: See :attr:`~lightning_deadrelu.explain.postmortem.step_log.StepLog.ring`.
        weights: See :meth:`IncomingWeights.read`, shape ``(2, 2, sites)``.
        off_centre: See :func:`~lightning_deadrelu.explain.postmortem.batch_sample.off_centre`, shape ``(1,)``.
    """

    steps: Tensor
    weights: Tensor
    off_centre: Tensor

    @classmethod
    def unknown(cls, sites: int) -> Readings:
        """Know nothing."""
        return cls(Rows.empty().values, torch.full((2, 2, sites), math.nan), torch.full((1,), math.nan))


@dataclass
class RecorderState:
    """What a checkpoint holds of a :class:`FlightRecorder`."""

    steps: StepLogState = field(default_factory=StepLogState)
    incoming: IncomingWeightsState = field(default_factory=IncomingWeightsState)
    deaths: list[DeathEvent] = field(default_factory=list)
    observed: list[int] = field(default_factory=list)
    off_centre: Tensor | None = None


class FlightRecorder:
    """Keep a log of the latest steps and of what feeds each unit, and explain from them why units died.

    An error in here ends the record, and never the counts, which need nothing of it.

    Args:
        watch: Counts what the units do.
        rows: Steps to keep, from 1,024 to 8,192.
    """

    def __init__(self, watch: Watch, rows: int = _LEAST_ROWS) -> None:
        self._watch, self._model = watch, watch.probe.model
        self.guard = Guard(lambda: None, _say_end)
        """Keeps what went wrong; nothing more is recorded since."""
        self.steps = StepLog(min(max(rows, _LEAST_ROWS), _MOST_ROWS))
        """Loss, learning rate and sizes of gradients and inputs of the latest steps."""
        self._incoming = IncomingWeights()
        self._closed: list[DeathEvent] = []
        self._open: tuple[DeathEvent, ...] = ()  # of a window that has not ended
        self._observed: deque[int] = deque(maxlen=_LEAST_ROWS)  # the step of each observation
        self._known_sites = 0
        self._off_centre: Tensor | None = None

    @property
    def deaths(self) -> tuple[DeathEvent, ...]:
        """Events of death, the latest last; 100 at most, the largest of all and the latest."""
        return (*self._closed, *self._open)

    def _sources(self) -> list[Incoming]:
        """Find what feeds the sites, in the order of the counts: anew each time, as shards are freed in between."""
        return incoming_of(self._watch.sites, self._model)

    # -- at each step ------------------------------------------------------------------------------------

    @unless_failed
    def before_step(self, optimizer: Optimizer) -> None:
        """Log the gradients; and for sites met for the first time, what feeds their units."""
        sites = self._watch.sites
        if len(sites) != self._known_sites:
            self._incoming.meet(sites, self._sources())
            self._known_sites = len(sites)
        self.steps.note_gradients(optimizer)

    @unless_failed
    def after_batch(self, loss: Any, batch: Any, step: int | None) -> None:
        """Log a batch.

        Args:
            loss: What the training step returned.
            batch: What it was given.
            step: The training batch, as loggers count, once the last of those that accumulate is done; else None.
        """
        if self._off_centre is None:
            self._off_centre = off_centre(batch)
        self.steps.note_batch(loss, batch)
        if step is not None:
            self.steps.close_step(step)

    def observed(self, step: int) -> None:
        """Note the step of an observation that has been closed."""
        self._observed.append(step)

    # -- at a window's end -------------------------------------------------------------------------------

    def read(self, device: torch.device) -> Readings:
        """Return what lies on the device of the counts, to be copied to the host along with these."""
        readings = self._read(device) or Readings.unknown(len(self._watch.layout))
        return Readings(*(one.to(device) for one in readings))

    @unless_failed
    def _read(self, device: torch.device) -> Readings:
        weights = self._incoming.read(self._watch.sites, self._sources(), device)
        centre = torch.tensor(math.nan) if self._off_centre is None else self._off_centre
        return Readings(self.steps.ring, weights, centre.reshape(1))

    def explain(
        self, report: LivenessReport, totals: Totals, readings: Readings, peaks: Peaks, optimizers: Sequence[Optimizer]
    ) -> tuple[DeathEvent, ...]:
        """Explain the newly dead of a verdict, and nothing else; costs next to nothing where there are none.

        Where there are some, the biases of their sites come from the device, in a second transfer.
        """
        if not report.total("newly_dead"):
            return ()
        return self._explain(report, totals, readings, peaks, optimizers) or ()

    @unless_failed
    def _explain(
        self,
        report: LivenessReport,
        totals: Totals,
        readings: Readings,
        peaks: Peaks,
        optimizers: Sequence[Optimizer],
    ) -> tuple[DeathEvent, ...]:
        rows = self.steps.read(readings.steps)
        norms = tuple(rows.column("gradient").tolist())
        dying = [
            units._replace(
                died=_dated(units, ~report[units.site].silent, source, optimizers, rows, norms),
                **trained(source, optimizers, self.steps.travelled),
            )
            for units, source in self._dying(report, totals.constant(self._watch.layout), readings, peaks)
        ]
        widths = [site.units for site in report.headline]
        return explain(dying, rows, off_centre=float(readings.off_centre), widths=widths)

    def _dying(
        self, report: LivenessReport, constant: Tensor, readings: Readings, peaks: Peaks
    ) -> Iterator[tuple[DyingUnits, Incoming]]:
        """Gather what is known of the newly dead, by site in the order of execution, with what feeds them."""
        layout, sources = self._watch.layout, self._sources()
        dead_before = _dead_before(report, constant, layout)
        chosen = {layout.number(site.name): site for site in report.headline if site.newly_dead.any()}
        places = [layout.place(number) for number in chosen]
        dying = [site.newly_dead.nonzero().flatten() for site in chosen.values()]
        read = self._incoming.biases(places, [sources[number] for number in chosen], dying)
        for (number, site), place, units, (start, alive, now) in zip(chosen.items(), places, dying, read, strict=True):
            last_fired, silent_from = self._interval(site, units)
            square, mean = readings.weights[0, :, number].tolist()
            yield (
                DyingUnits(
                    site=site.name,
                    size=site.units,
                    first=site is report.sites[0],
                    units=units,
                    born=site.born_dead[units],
                    last_fired=last_fired,
                    silent_from=silent_from,
                    constant=constant[place][units],
                    upstream=dead_before[site.name],
                    peaks=torch.cat([peaks(site, units), site.peak[None, units].float()]),
                    first_bias=start,
                    first_square=square,
                    first_mean=mean,
                    live_bias=alive,
                    live_square=self._incoming.squares(number, last_fired, square),
                    bias=now,
                    selected=site.kind in SELECTIONS,
                ),
                sources[number],
            )

    def _interval(self, site: SiteReport, units: Tensor) -> tuple[Tensor, Tensor]:
        """Tell at which observation each unit fired last, and which came after, shape ``(dying,)``."""
        observed = np.array(self._observed or [0])
        last_fired = site.last_fired.numpy()[units.numpy()].astype(np.int64)
        last_fired[last_fired < 0] = observed[0]
        after = observed.searchsorted(last_fired, side="right").clip(max=len(observed) - 1)
        return torch.from_numpy(last_fired), torch.from_numpy(np.maximum(observed[after], last_fired))

    @unless_failed
    def close_window(self, totals: Totals, readings: Readings, deaths: Sequence[DeathEvent]) -> None:
        """End a window, in which :meth:`explain` has found some deaths."""
        fired, places = totals.last_fired >= 0, self._watch.layout.places
        self._incoming.close(fired, places, self._sources(), readings.weights, self._observed[-1])
        self._closed = largest(merged([*self._closed, *deaths]), _DEATHS)
        self._open = ()

    def keep_open(self, deaths: Sequence[DeathEvent]) -> None:
        """Remember what was found in a window that has not ended, and will be judged anew when it has."""
        self._open = tuple(deaths)

    # -- resume ------------------------------------------------------------------------------------------

    @property
    def state(self) -> RecorderState:
        """What a checkpoint has to hold; of a record that has ended, the deaths."""
        return self._state() or RecorderState(deaths=list(self._closed))

    @unless_failed
    def _state(self) -> RecorderState:
        observed = list(self._observed)
        return RecorderState(self.steps.state, self._incoming.state, list(self._closed), observed, self._off_centre)

    @unless_failed
    def restore(self, state: RecorderState) -> None:
        """Go on from a saved state."""
        self._closed = list(state.deaths)
        self._observed = deque(state.observed, maxlen=_LEAST_ROWS)
        self._off_centre = state.off_centre
        self.steps.restore(state.steps)
        self._incoming.restore(state.incoming)


def _say_end(error: Exception) -> None:
    warn(f"Deaths are explained no longer; watching goes on. {error!r}")


def _dead_before(report: LivenessReport, constant: Tensor, layout: Layout) -> dict[str, str]:
    """Name, by site, the nearest one before that is dead altogether, best one whose own input varies; or nothing."""
    before: dict[str, str] = {}
    dead = root = ""
    for site in report.sites:
        before[site.name] = root or dead
        if bool(site.dead.all()):
            dead = site.name
            root = root if bool(constant[layout.place(layout.number(dead))].all()) else dead
    return before


def _dated(
    dying: DyingUnits,
    live: Tensor,
    source: Incoming,
    optimizers: Sequence[Optimizer],
    rows: Rows,
    norms: Sequence[float],
) -> Tensor | None:
    """Tell of some units since which step each has had no gradient, after the last time that it was seen to fire."""
    if source.weight is None or source.dim is None or not rows.steps:
        return None
    dated, living = _some(len(dying.units)), np.flatnonzero(live.numpy())
    asked = torch.cat([dying.units[dated], torch.from_numpy(living[_some(len(living))])])
    momentum = momentum_of(optimizers, source.weight, source.dim, asked)
    if momentum is None:
        return None
    ages = torch.full((len(dying.units),), math.nan, dtype=torch.float64)
    lives = torch.arange(len(asked)) >= len(ages[dated])
    ages[dated] = steps_without_gradient(momentum, lives, norms)[~lives]
    steps = torch.tensor(rows.steps, dtype=torch.float64)
    place = (len(steps) - ages).nan_to_num(0.0).clamp(0, len(steps) - 1).long()
    died = steps[place].maximum(dying.last_fired + 1.0).minimum(dying.silent_from.double())
    return died.masked_fill(ages.isnan() | dying.born, math.nan)


def _some(number: int) -> slice:
    """Choose 256 at most, evenly: of their momentum many numbers are read, and told is the median."""
    return slice(None, None, math.ceil(number / _DATED) or 1)
