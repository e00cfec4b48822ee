"""Keep what a post-mortem needs: the vital signs, when each unit last fired, what feeds it, and the waves told."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deadrelu.explain.postmortem import DeathEvent, DyingUnits, WeightStats, explain, joined, most_telling
from lightning_deadrelu.explain.postmortem.incoming_weights import IncomingWeights, sources_of, trained
from lightning_deadrelu.explain.postmortem.step_log import StepLog, off_centre
from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.statistics import LivenessReport, SiteReport, Totals
from lightning_deadrelu.statistics.totals import CONSTANT

_LEAST_ROWS, _MOST_ROWS = 1024, 8192
_WAVES = 100

T = TypeVar("T")


class Notes(NamedTuple):
    """What comes to the host with the counts of a window.

    Args:
        ring: See :attr:`~lightning_deadrelu.explain.postmortem.step_log.StepLog.ring`.
        weights: See :meth:`IncomingWeights.notes`, shape ``(2, 2, sites)``.
        centre: See :func:`~lightning_deadrelu.explain.postmortem.step_log.off_centre`, shape ``(1,)``.
    """

    ring: Tensor
    weights: Tensor
    centre: Tensor


class FlightRecorder:
    """Watch over the vital signs, and find out why units died.

    Args:
        rows: Steps to keep, from 1,024 to 8,192.

    Example:
        >>> FlightRecorder().waves
        ()
    """

    def __init__(self, rows: int = _LEAST_ROWS) -> None:
        self.vitals = StepLog(min(max(rows, _LEAST_ROWS), _MOST_ROWS))
        self._closed: list[DeathEvent] = []
        self._open: tuple[DeathEvent, ...] = ()  # of a window that has not ended
        self._observed: deque[int] = deque(maxlen=_LEAST_ROWS)  # the step of each observation
        self._feeds = IncomingWeights()
        self._met = 0
        self._centre: Tensor | None = None
        self.failure: Exception | None = None
        """What went wrong; nothing more is noted since."""

    def _guard(self, step: Callable[..., T], *args: Any) -> T | None:
        """Take a step; an error ends the vital signs, and not the counts, which need none of them."""
        if self.failure is None:
            try:
                return step(*args)
            except Exception as error:
                self.failure = error
                warnings.warn(
                    f"The vital signs of the run are kept no longer; watching goes on. {error!r}", stacklevel=2
                )
        return None

    @property
    def waves(self) -> tuple[DeathEvent, ...]:
        """The waves of deaths, the latest last; 100 at most, the largest of all and the latest."""
        return (*self._closed, *self._open)

    # -- at each step ------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, model: nn.Module, sites: Sequence[Site]) -> None:
        """Note the gradients; and as soon as sites are met, what feeds their units.

        Args:
            optimizer: Which is about to step.
            model: The model.
            sites: The sites met so far.
        """
        self._guard(self._before_step, optimizer, model, sites)

    def _before_step(self, optimizer: Optimizer, model: nn.Module, sites: Sequence[Site]) -> None:
        if len(sites) != self._met:
            sources = sources_of(sites, model)
            self.vitals.biases = {id(source.bias) for source in sources if source.bias is not None}
            self._feeds.meet(sites, sources)
            self._met = len(sites)
        self.vitals.note_gradients(optimizer)

    def after_batch(self, loss: Any, batch: Any, step: int | None) -> None:
        """Note a batch.

        Args:
            loss: What the training step returned.
            batch: What it was given.
            step: The training batch, as loggers count, once the last of those that accumulate is done; else None.
        """
        self._guard(self._after_batch, loss, batch, step)

    def _after_batch(self, loss: Any, batch: Any, step: int | None) -> None:
        if self._centre is None:
            self._centre = off_centre(batch)
        self.vitals.note_batch(loss, batch)
        if step is not None:
            self.vitals.close(step)

    def observed(self, step: int) -> None:
        """Note the step of an observation that has been closed."""
        self._observed.append(step)

    # -- at a window's end -------------------------------------------------------------------------------

    def notes(self, layout: Layout, model: nn.Module, device: torch.device) -> Notes:
        """Return what lies on the device, to be copied to the host along with the counts.

        Args:
            layout: The sites in the order of the counts.
            model: The model.
            device: Where the counts are.
        """
        weights = self._feeds.notes(layout.sites, sources_of(layout.sites, model), device)
        centre = torch.full((1,), math.nan) if self._centre is None else self._centre.reshape(1)
        return Notes(self.vitals.ring.to(device), weights, centre.to(device))

    def look(
        self,
        report: LivenessReport,
        totals: Totals,
        notes: Notes,
        layout: Layout,
        peaks: Callable[[SiteReport, Tensor], Tensor],
        patient: tuple[nn.Module, Sequence[Optimizer]],
    ) -> tuple[DeathEvent, ...]:
        """Explain the newly dead of a verdict, and nothing else; costs next to nothing where there are none.

        Where there are some, the biases of their sites come from the device, in a second transfer.

        Args:
            report: The verdict.
            totals: The counts it was made from, on the host.
            notes: What came to the host with them.
            layout: The sites in the order of the counts.
            peaks: Gives the largest inputs of some units of a site in the windows before, shape ``(windows, units)``.
            patient: The model and its optimizers.
        """
        return self._guard(self._explained, report, totals, notes, layout, peaks, patient) or ()

    def _explained(
        self,
        report: LivenessReport,
        totals: Totals,
        notes: Notes,
        layout: Layout,
        peaks: Callable[[SiteReport, Tensor], Tensor],
        patient: tuple[nn.Module, Sequence[Optimizer]],
    ) -> tuple[DeathEvent, ...]:
        if not report.total("newly_dead"):
            return ()
        model, optimizers = patient
        constant = totals.maxima[2] == CONSTANT
        places = dict(zip(layout.names, layout.places, strict=True))
        sources = dict(zip(layout.names, sources_of(layout.sites, model), strict=True))
        dying = [site.name for site in report.headline if site.newly_dead.any()]
        rows = self._feeds.biases([places[name] for name in dying], [sources[name] for name in dying])
        biases = dict(zip(dying, rows, strict=True))
        victims: list[DyingUnits] = []
        dead: list[tuple[str, bool]] = []
        for number, site in enumerate(report.sites):
            place = places[site.name]
            if site.name in biases:
                of = self._victims(site, peaks, constant[place])
                of = self._fed(of, layout.number(site.name), biases[site.name], notes)
                upstream = next((name for name, root in reversed(dead) if root), dead[-1][0] if dead else "")
                how = trained(sources[site.name], optimizers, self.vitals.travelled)
                victims.append(of._replace(first=number == 0, upstream=upstream, **how))
            if bool(site.dead.all()):
                dead.append((site.name, not bool(constant[place].all())))
        centre = float(notes.centre)
        return explain(victims, self.vitals.read(notes.ring), off_centre=centre, sites=len(report.headline))

    def _victims(self, site: SiteReport, peaks: Callable[[SiteReport, Tensor], Tensor], constant: Tensor) -> DyingUnits:
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
        )

    def _fed(self, victims: DyingUnits, number: int, biases: Tensor, notes: Notes) -> DyingUnits:
        """Put in what feeds them; of the weights, how large those of the site are."""
        start, alive, now = biases
        square, mean = (one.expand(len(start)) for one in notes.weights[0, :, number])
        squares = self._feeds.squares(number, victims.last_fired, float(notes.weights[0, 0, number]))
        return victims._replace(
            alive=victims.alive._replace(bias=alive[victims.units], square=squares),
            now=victims.now._replace(bias=now[victims.units]),
            start=WeightStats(start, square, mean),
        )

    def close(
        self, totals: Totals, notes: Notes, layout: Layout, model: nn.Module, waves: Sequence[DeathEvent]
    ) -> None:
        """End a window.

        Args:
            totals: Its counts, on the host.
            notes: What came to the host with them.
            layout: The sites in the order of the counts.
            model: The model.
            waves: What :meth:`look` found in it.
        """
        sources = sources_of(layout.sites, model)
        self._feeds.close(totals.maxima[1] >= 0, layout.places, sources, notes.weights, self._observed[-1])
        self._closed = most_telling(joined([*self._closed, *waves]), _WAVES)
        self._open = ()

    def keep_open(self, waves: Sequence[DeathEvent]) -> None:
        """Remember what was found in a window that has not ended, and will be judged anew when it has."""
        self._open = tuple(waves)

    # -- to be continued ---------------------------------------------------------------------------------

    def state_dict(self, notes: Notes) -> dict[str, Any]:
        """Return plain values and tensors.

        Args:
            notes: What is on the device, copied to the host.
        """
        return {
            "vitals": self.vitals.state_dict(notes.ring),
            "waves": [wave.to_dict() for wave in self._closed],
            "observed": list(self._observed),
            "feeds": self._feeds.state_dict(notes.weights),
            "centre": notes.centre.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what was saved.

        Args:
            state: What :meth:`state_dict` returned.
            device: Of the model.
        """
        self.vitals.load_state_dict(state["vitals"], device)
        self._closed = [DeathEvent.from_dict(plain) for plain in state["waves"]]
        self._observed = deque(state["observed"], maxlen=_LEAST_ROWS)
        self._feeds.load_state_dict(state["feeds"], device)
        self._centre = state["centre"].to(device)
