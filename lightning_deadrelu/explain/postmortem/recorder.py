"""Record what a post-mortem needs while a model trains, and explain why units died."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deadrelu.explain.death_dates import momentum_of, steps_without_gradient
from lightning_deadrelu.explain.postmortem.batch_sample import off_centre
from lightning_deadrelu.explain.postmortem.death_events import DeathEvent, largest, merged
from lightning_deadrelu.explain.postmortem.dying_units import DyingUnits, WeightStats
from lightning_deadrelu.explain.postmortem.explain import explain
from lightning_deadrelu.explain.postmortem.incoming_weights import (
    Incoming,
    IncomingWeights,
    IncomingWeightsState,
    incoming_of,
    trained,
)
from lightning_deadrelu.explain.postmortem.step_log import Rows, StepLog, StepLogState
from lightning_deadrelu.guarded import guarded
from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.rectifiers import SELECTIONS
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.statistics import LivenessReport, SiteReport, Totals
from lightning_deadrelu.warn import warn

_LEAST_ROWS, _MOST_ROWS = 1024, 8192
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
        rows: Steps to keep, from 1,024 to 8,192.

    Example:
        >>> FlightRecorder().deaths
        ()
    """

    def __init__(self, rows: int = _LEAST_ROWS) -> None:
        self.steps = StepLog(min(max(rows, _LEAST_ROWS), _MOST_ROWS))
        """Loss, learning rate and sizes of gradients and inputs of the latest steps."""
        self._incoming = IncomingWeights()
        self._closed: list[DeathEvent] = []
        self._open: tuple[DeathEvent, ...] = ()  # of a window that has not ended
        self._observed: deque[int] = deque(maxlen=_LEAST_ROWS)  # the step of each observation
        self._known_sites = 0
        self._off_centre: Tensor | None = None
        self.failure: Exception | None = None
        """What went wrong; nothing more is recorded since."""

    def _fail(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error
            warn(f"Deaths are explained no longer; watching goes on. {error!r}")

    @property
    def deaths(self) -> tuple[DeathEvent, ...]:
        """Events of death, the latest last; 100 at most, the largest of all and the latest."""
        return (*self._closed, *self._open)

    # -- at each step ------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, model: nn.Module, sites: Sequence[Site]) -> None:
        """Log the gradients; and for sites met for the first time, what feeds their units."""
        if self.failure is None:
            try:  # not `guarded`: this happens at each step, and it takes longer
                if len(sites) != self._known_sites:
                    self._incoming.meet(sites, incoming_of(sites, model))
                    self._known_sites = len(sites)
                self.steps.note_gradients(optimizer)
            except Exception as error:
                self._fail(error)

    def after_batch(self, loss: Any, batch: Any, step: int | None) -> None:
        """Log a batch.

        Args:
            loss: What the training step returned.
            batch: What it was given.
            step: The training batch, as loggers count, once the last of those that accumulate is done; else None.
        """
        if self.failure is None:
            try:
                if self._off_centre is None:
                    self._off_centre = off_centre(batch)
                self.steps.note_batch(loss, batch)
                if step is not None:
                    self.steps.close_step(step)
            except Exception as error:
                self._fail(error)

    def observed(self, step: int) -> None:
        """Note the step of an observation that has been closed."""
        self._observed.append(step)

    # -- at a window's end -------------------------------------------------------------------------------

    def read(self, layout: Layout, model: nn.Module, device: torch.device) -> Readings:
        """Return what lies on the device, to be copied to the host along with the counts."""
        readings = Readings.unknown(len(layout))
        if self.failure is None:
            with guarded(self._fail):
                weights = self._incoming.read(layout.sites, incoming_of(layout.sites, model), device)
                centre = readings.off_centre if self._off_centre is None else self._off_centre.reshape(1)
                readings = Readings(self.steps.ring, weights, centre)
        return Readings(*(one.to(device) for one in readings))

    def explain(
        self,
        report: LivenessReport,
        totals: Totals,
        readings: Readings,
        layout: Layout,
        peaks: Peaks,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
    ) -> tuple[DeathEvent, ...]:
        """Explain the newly dead of a verdict, and nothing else; costs next to nothing where there are none.

        Where there are some, the biases of their sites come from the device, in a second transfer.

        Args:
            report: The verdict.
            totals: The counts it was made from, on the host.
            readings: What came to the host with them.
            layout: The sites in the order of the counts.
            peaks: Returns the largest inputs of some units of a site in the windows before.
            model: The model.
            optimizers: What trains it.
        """
        deaths: tuple[DeathEvent, ...] = ()
        if self.failure is None and report.total("newly_dead"):
            with guarded(self._fail):
                dying = self._dying(report, totals, readings, layout, peaks, incoming_of(layout.sites, model))
                centre, rows = float(readings.off_centre), self.steps.read(readings.steps)
                units = [
                    one._replace(
                        died=_dated(one, ~report[one.site].silent, source, optimizers, rows),
                        **trained(source, optimizers, self.steps.travelled),
                    )
                    for one, source in dying
                ]
                widths = [site.units for site in report.headline]
                deaths = explain(units, rows, off_centre=centre, widths=widths)
        return deaths

    def _dying(
        self,
        report: LivenessReport,
        totals: Totals,
        readings: Readings,
        layout: Layout,
        peaks: Peaks,
        incoming: Sequence[Incoming],
    ) -> list[tuple[DyingUnits, Incoming]]:
        """Gather what is known of the newly dead, by site in the order of execution, with what feeds them."""
        constant = totals.constant(layout)
        numbers = [layout.number(site.name) for site in report.headline if site.newly_dead.any()]
        rows = self._incoming.biases([layout.place(n) for n in numbers], [incoming[n] for n in numbers])
        biases = dict(zip(numbers, rows, strict=True))
        dying: list[tuple[DyingUnits, Incoming]] = []
        dead: list[tuple[str, bool]] = []  # sites dead altogether, and whether their input varied
        for place, site in enumerate(report.sites):
            number = layout.number(site.name)
            still = constant[layout.place(number)]
            if number in biases:
                units = self._fed(self._units_of(site, peaks, still), number, biases[number], readings)
                upstream = next((name for name, is_root in reversed(dead) if is_root), dead[-1][0] if dead else "")
                dying.append((units._replace(first=place == 0, upstream=upstream), incoming[number]))
            if bool(site.dead.all()):
                dead.append((site.name, not bool(still.all())))
        return dying

    def _units_of(self, site: SiteReport, peaks: Peaks, constant: Tensor) -> DyingUnits:
        units = site.newly_dead.nonzero().flatten()
        start = self._observed[0] if self._observed else 0
        last_fired = site.last_fired[units].long()
        last_fired = torch.where(last_fired < 0, start, last_fired)
        observed = torch.tensor(self._observed or [start], dtype=torch.int64)
        after = torch.searchsorted(observed, last_fired, right=True).clamp(max=len(observed) - 1)
        return DyingUnits(
            site.name,
            site.units,
            first=False,
            units=units,
            born=site.born_dead[units],
            last_fired=last_fired,
            silent_from=observed[after].maximum(last_fired),
            constant=constant[units],
            upstream="",
            peaks=torch.cat([peaks(site, units), site.peak[None, units].float()]),
            alive=WeightStats.unknown(len(units)),
            now=WeightStats.unknown(len(units)),
            start=WeightStats.unknown(site.units),
            selected=site.kind in SELECTIONS,
        )

    def _fed(self, dying: DyingUnits, number: int, biases: Tensor, readings: Readings) -> DyingUnits:
        """Put in what feeds them; of the weights, how large those of the site are."""
        start, alive, now = biases
        square, mean = (one.expand(len(start)) for one in readings.weights[0, :, number])
        squares = self._incoming.squares(number, dying.last_fired, float(readings.weights[0, 0, number]))
        return dying._replace(
            alive=dying.alive._replace(bias=alive[dying.units], square=squares),
            now=dying.now._replace(bias=now[dying.units]),
            start=WeightStats(start, square, mean),
        )

    def close_window(
        self, totals: Totals, readings: Readings, layout: Layout, model: nn.Module, deaths: Sequence[DeathEvent]
    ) -> None:
        """End a window."""
        if self.failure is None:
            with guarded(self._fail):
                fired, incoming = totals.last_fired >= 0, incoming_of(layout.sites, model)
                self._incoming.close(fired, layout.places, incoming, readings.weights, self._observed[-1])
                self._closed = largest(merged([*self._closed, *deaths]), _DEATHS)
                self._open = ()

    def keep_open(self, deaths: Sequence[DeathEvent]) -> None:
        """Remember what was found in a window that has not ended, and will be judged anew when it has."""
        self._open = tuple(deaths)

    # -- resume ------------------------------------------------------------------------------------------

    @property
    def state(self) -> RecorderState:
        """What a checkpoint has to hold; of a record that has ended, the deaths."""
        state = RecorderState(deaths=list(self._closed))
        if self.failure is None:
            with guarded(self._fail):
                observed = list(self._observed)
                state = RecorderState(self.steps.state, self._incoming.state, state.deaths, observed, self._off_centre)
        return state

    def restore(self, state: RecorderState) -> None:
        """Go on from a saved state."""
        with guarded(self._fail):
            self._closed = list(state.deaths)
            self._observed = deque(state.observed, maxlen=_LEAST_ROWS)
            self._off_centre = state.off_centre
            self.steps.restore(state.steps)
            self._incoming.restore(state.incoming)


def _dated(
    dying: DyingUnits, live: Tensor, source: Incoming, optimizers: Sequence[Optimizer], rows: Rows
) -> Tensor | None:
    """Tell since which step each unit has had no gradient, after the last observation that saw it fire."""
    if source.weight is None or source.dim is None or not rows.steps:
        return None
    momentum = momentum_of(optimizers, source.weight, source.dim)
    if momentum is None:
        return None
    ages = steps_without_gradient(momentum, live, rows.column("gradient").tolist())[dying.units]
    steps = torch.tensor(rows.steps, dtype=torch.float64)
    place = (len(steps) - ages).nan_to_num(0.0).clamp(0, len(steps) - 1).long()
    died = steps[place].maximum(dying.last_fired + 1.0).minimum(dying.silent_from.double())
    return died.masked_fill(ages.isnan() | dying.born, math.nan)
