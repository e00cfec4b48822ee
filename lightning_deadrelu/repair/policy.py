"""When a remedy acts on a site, whether it helped, and which comes next. Pure, but for the progress it keeps."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_deadrelu.model.rectifiers import SELECTIONS, WATCHPOINT
from lightning_deadrelu.remedies import Remedy
from lightning_deadrelu.repair.event import Event, Loss
from lightning_deadrelu.repair.usefulness import useful
from lightning_deadrelu.statistics import LivenessReport, SiteReport

_SUCCESS = 0.5  # share of the edited units that has to fire afterwards
_SOON = 10  # verdicts
_FAIR = 5  # windows, after which a unit that came back has to matter
_REST = 600  # training batches, in which a new unit learns
_MOST_HARMS = 3  # in a row, where a remedy may fail for ever


@dataclass(frozen=True, eq=False)
class Request:
    """A wish to edit some units of a site, to be confirmed on a further batch.

    Args:
        site: Name of the site.
        index: Number of the remedy.
        units: Which units, boolean, shape ``(units,)``.
        reason: In words.
        blind: Whether they fire, and some of them may be spared for samples on which no unit does.
    """

    site: str
    index: int
    units: Tensor
    reason: str
    blind: bool = False


@dataclass
class Trial:
    """An edit whose outcome is not known yet, or of which it is not known yet whether it was of use.

    Args:
        units: What was edited, boolean, shape ``(units,)``.
        windows: Windows left until it is judged.
        before: Dead fraction of the site before.
        loss: Of the window before; None where it is unknown, or where the edit cannot have changed it.
        dry: Whether nothing was done in truth.
        fresh: Whether no window has ended since.
    """

    units: Tensor
    windows: int
    before: float
    loss: Loss | None = None
    dry: bool = False
    fresh: bool = True


@dataclass
class Progress:
    """How far a site has come.

    Args:
        index: Number of the remedy that is in turn; past the last, the site is left alone.
        above: Verdicts in a row with a dead fraction above the threshold.
        failures: Edits in a row that did not help, or did harm.
        harms: Edits in a row that did harm.
        relapses: Edits in a row of units that had just come back.
        rest: Verdicts since the last edit was judged.
        edits: Edits of the site by the remedy that is in turn.
        back: Units that came back by the last edit, boolean, shape ``(units,)``.
        trial: The edit in flight.
        review: Units that came back by an edit, until it is judged whether they matter.
        useless: Reviews in a row in which most of them did not.
        rests: Until which training batch no unit is spared for samples on which no unit fires.
    """

    index: int = 0
    above: int = 0
    failures: int = 0
    harms: int = 0
    relapses: int = 0
    rest: int = 0
    edits: int = 0
    back: Tensor | None = None
    trial: Trial | None = None
    review: Trial | None = None
    useless: int = 0
    rests: int = 0


@dataclass
class PolicyState:
    """What a resumed policy needs.

    Args:
        sites: How far each site has come, by name.
        edits: Edits made in the run, by remedy.
        stopped: Whether the loss was not a number at the last verdict.
    """

    sites: dict[str, Progress]
    edits: list[int]
    stopped: bool = False


class EscalationPolicy:
    """Decide, verdict by verdict, which remedy acts on which units."""

    def __init__(self, remedies: Sequence[Remedy], threshold: float, min_samples: int) -> None:
        self.remedies = tuple(remedies)
        self._threshold = threshold
        self._min_silent_samples = min_samples
        self.state = PolicyState({}, [0] * len(self.remedies))

    def decide(
        self,
        report: LivenessReport,
        loss: Loss | None = None,
        busy: Collection[str] = (),
        shares: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> tuple[list[Request], list[Event]]:
        """Judge what was done before, and say what to do next.

        Args:
            report: The verdict on a whole window.
            loss: Over that window.
            busy: Sites in which an edit is still under way; they wait.
            shares: What :class:`~lightning_deadrelu.repair.usefulness.TaylorShares` has added up over that window.

        Returns:
            Requests, in the order of execution, and what became of earlier edits.
        """
        events = self._stop_or_resume(loss, report.step)
        requests = []
        for site in (one for one in report.headline if one.kind != WATCHPOINT):
            progress = self.state.sites.setdefault(site.name, Progress())
            if site.name in busy:
                events += self._judge_harm(progress, site, report.step, loss)
                continue
            events += self._review(progress, site, report.step, shares.get(site.name))
            events += self._judge(self.state.sites[site.name], site, report.step, loss)
            request = self._request(self.state.sites[site.name], site, report.step)
            requests += [request] if request else []
        return requests, events

    def _stop_or_resume(self, loss: Loss | None, step: int) -> list[Event]:
        """Ask for no edit while the loss is not a number: a unit that is silent then may not be dead."""
        was_stopped, self.state.stopped = self.state.stopped, loss is not None and not loss.is_finite
        if was_stopped or not self.state.stopped:
            return []
        why = "the loss is not a finite number; nothing is edited until it is one again"
        return [Event(step, "", "stopped", ", ".join(dict.fromkeys(map(_name, self.remedies))), reason=why)]

    def edited(self, request: Request, units: Tensor, before: float, loss: Loss | None, step: int) -> Event:
        """Record that an edit was made, or would have been in a dry run."""
        remedy = self.remedies[request.index]
        self.state.edits[request.index] += not remedy.dry_run
        progress = self.state.sites[request.site]
        progress.edits += not remedy.dry_run
        progress.relapses = progress.relapses + 1 if _relapsed(progress, units) else 0
        if progress.review is not None:
            progress.review.units = progress.review.units & ~units  # their time begins anew
        if request.blind:
            progress.rests = step + _REST
        blamed = None if remedy.is_exact and not request.blind else loss
        progress.trial = Trial(units, remedy.cooldown, before, blamed, remedy.dry_run)
        action = "would edit" if remedy.dry_run else "edited"
        return Event(step, request.site, action, _name(remedy), _numbers(units), request.reason, before)

    def refused(self, request: Request, reason: str, step: int) -> list[Event]:
        """Record that a remedy cannot be applied to a site, and turn to the next."""
        progress = self.state.sites[request.site]
        event = Event(step, request.site, "refused", _name(self.remedies[request.index]), reason=reason)
        return [event, *self._escalate(progress, request.site, step)]

    def dropped(self, site: str, step: int) -> Event:
        """Record that training ended while an edit was under way."""
        index = self.state.sites[site].index if site in self.state.sites else len(self.remedies)
        why = "training ended before its edit was complete"
        return Event(step, site, "dropped", "".join(map(_name, self.remedies[index : index + 1])), reason=why)

    def _judge_harm(self, progress: Progress, site: SiteReport, step: int, loss: Loss | None) -> list[Event]:
        """See whether the loss jumped in the window after an edit."""
        trial = progress.trial
        if trial is None or not trial.fresh:
            return []
        trial.fresh = False
        if trial.dry or trial.loss is None or loss is None or not trial.loss.jumped_to(loss):
            return []
        progress.trial = None
        progress.harms += 1
        why = f"the loss went from {trial.loss.mean:.4g} to {loss.mean:.4g}"
        event = self._outcome("harmed", progress, site, trial, step, why)
        return [event, *self._count_failure(progress, site.name, step)]

    @property
    def in_review(self) -> list[str]:
        """Names of the sites of which it is judged at the next verdict whether repaired units matter."""
        due = ((name, progress.review) for name, progress in self.state.sites.items())
        return [name for name, review in due if review is not None and review.windows <= 1]

    def _review(self, progress: Progress, site: SiteReport, step: int, shares: Tensor | None) -> list[Event]:
        """Judge after a fair time how many of the units that came back, and fire on, matter to the loss."""
        review = progress.review
        if review is None:
            return []
        review.windows -= 1
        if review.windows > 0 or shares is None or not site.elements:
            return []
        progress.review = None
        fires = review.units & ~site.silent & ~site.frozen
        if not (fires.any() and shares.any()):
            return []
        matter = fires & useful(shares, ~site.silent & ~review.units)
        number, total = int(matter.sum()), int(fires.sum())
        enough = number >= _SUCCESS * total
        why = f"{number} of {total} repaired units matter to the loss, {_FAIR} windows later"
        event = self._outcome("useful" if enough else "useless", progress, site, review, step, why)
        event = event._replace(useful=_numbers(matter))
        progress.useless = 0 if enough else progress.useless + 1
        return [event, *(self._escalate(progress, site.name, step) if self._is_exhausted(progress) else [])]

    def _judge(self, progress: Progress, site: SiteReport, step: int, loss: Loss | None) -> list[Event]:
        events = self._judge_harm(progress, site, step, loss)
        trial = progress.trial
        if trial is None:
            progress.rest += 1
            return events
        trial.windows -= 1
        if trial.windows > 0 or not site.elements:  # without rates it cannot be told who is back
            return []
        progress.trial = None
        return [] if trial.dry else self._conclude(progress, site, trial, step)

    def _conclude(self, progress: Progress, site: SiteReport, trial: Trial, step: int) -> list[Event]:
        """Judge an edit by which of the edited units fire now."""
        seldom = site.silent if site.kind in SELECTIONS else site.silent | site.rare  # where it is usual to fire seldom
        back = trial.units & ~seldom & ~site.frozen
        share = int(back.sum()) / int(trial.units.sum())
        why = f"{int(back.sum())} of {int(trial.units.sum())} repaired units fire"
        progress.harms = progress.rest = 0
        if share >= _SUCCESS:
            progress.failures, progress.back = progress.relapses, back
            progress.review = progress.review or Trial(back, _FAIR, trial.before)
            event = self._outcome("revived", progress, site, trial, step, why)
            return [event, *(self._escalate(progress, site.name, step) if self._is_exhausted(progress) else [])]
        event = self._outcome("failed", progress, site, trial, step, why)
        return [event, *self._count_failure(progress, site.name, step)]

    def _count_failure(self, progress: Progress, site: str, step: int) -> list[Event]:
        """Count an edit that did not help, or seems to have done harm: a loss may also jump because the data change."""
        progress.failures += 1
        return self._escalate(progress, site, step) if self._is_exhausted(progress) else []

    def _is_exhausted(self, progress: Progress) -> bool:
        attempts = self.remedies[progress.index].attempts
        if attempts is None:
            return progress.harms >= _MOST_HARMS
        return max(progress.failures, progress.useless) >= attempts

    def _outcome(
        self, action: str, progress: Progress, site: SiteReport, trial: Trial, step: int, reason: str
    ) -> Event:
        name = _name(self.remedies[progress.index])
        return Event(
            step, site.name, action, name, _numbers(trial.units), reason, trial.before, after=site.dead_fraction
        )

    def _escalate(self, progress: Progress, site: str, step: int) -> list[Event]:
        name = _name(self.remedies[progress.index])
        self.state.sites[site] = progress = Progress(progress.index + 1)
        if progress.index < len(self.remedies):
            return [Event(step, site, "escalated", name, reason=f"next: {_name(self.remedies[progress.index])}")]
        return [Event(step, site, "given up", name, reason="no remedy is left; it is watched on")]

    def _request(self, progress: Progress, site: SiteReport, step: int) -> Request | None:
        if self.state.stopped or progress.trial is not None or progress.index >= len(self.remedies):
            return None
        remedy = self.remedies[progress.index]
        units = candidates(site, remedy, self._min_silent_samples)
        share = int(units.sum()) / site.units  # those that died lately have to wait: an attempt would pass them by
        progress.above = progress.above + 1 if share > self._threshold else 0
        used_up = remedy.max_edits_per_site is not None and progress.edits >= remedy.max_edits_per_site
        if used_up or not self.may_act(progress.index, step):
            return None
        if progress.above < remedy.patience:
            return _blind_request(progress, site, remedy, step)
        units |= frozen_units(site, remedy)
        return Request(site.name, progress.index, units, f"{share:.1%} dead, above the threshold {self._threshold:.1%}")

    def may_act(self, index: int, step: int) -> bool:
        """Whether a remedy may act at all at this step."""
        remedy = self.remedies[index]
        in_time = remedy.start_step <= step and (remedy.stop_step is None or step < remedy.stop_step)
        return in_time and (remedy.max_edits is None or self.state.edits[index] < remedy.max_edits)

    def restore(self, state: PolicyState) -> None:
        """Go on from what was saved, as far as there are as many remedies as then."""
        for progress in state.sites.values():
            if progress.index >= len(self.remedies):
                progress.index, progress.trial, progress.review = len(self.remedies), None, None
        edits = state.edits if len(state.edits) == len(self.remedies) else self.state.edits
        self.state = PolicyState(state.sites, edits, state.stopped)


def candidates(site: SiteReport, remedy: Remedy, min_silent_samples: int) -> Tensor:
    """Tell which units are dead beyond doubt, boolean, shape ``(units,)``."""
    enough = site.age >= (min_silent_samples if remedy.evidence is None else remedy.evidence)
    if remedy.significance is None:
        return site.dead & enough
    return site.silent & torch.where(site.fired_ever > 0, improbable(site, remedy.significance), enough)


def improbable(site: SiteReport, significance: float) -> Tensor:
    """Tell whose silence has become improbable under the unit's own history, boolean, shape ``(units,)``.

    While nothing changes, the ``k`` times that a unit has fired lie anywhere among its ``n`` elements until then and
    the ``a`` samples since, with equal chance. All lie among the first ``n`` in ``C(n, k)`` of ``C(n + a, k)`` cases:
    Fisher's exact test. With many firings that is the geometric law, ``(1 - k / n) ** a``; a unit that has fired once
    has to be silent 19 times as long as that took to be improbable at 0.05. Source: Farias and Jozefiak 2024,
    arXiv 2410.20098, for the question.

    Args:
        site: The verdict; its ``fired_ever`` and ``seen`` are the history.
        significance: The probability below which silence is no accident.
    """
    fired, seen, age = site.fired_ever.double(), site.seen.double(), site.age.double()
    silence: Tensor = _log_ways(seen, fired) - _log_ways(seen + age, fired) <= math.log(significance)
    return silence


def _log_ways(among: Tensor, fired: Tensor) -> Tensor:
    """Count the orders in which so many firings can lie among elements, as a logarithm."""
    return torch.lgamma(among + 1) - torch.lgamma(among - fired + 1)


def _blind_request(progress: Progress, site: SiteReport, remedy: Remedy, step: int) -> Request | None:
    """Ask for units that a layer can spare, if it is silent on too many samples, or some are multiples of others."""
    most = remedy.treats_blind
    if most is None or step < progress.rests or not site.elements:
        return None
    live, blind = ~site.silent & ~site.frozen, most < (site.blind_fraction or 0.0) < 1
    if not (blind or site.duplicate.any()):
        return None
    progress.rests = step + _REST // 10  # if nothing comes of it
    alike = int(site.duplicate.sum())
    why = f"no unit fires on {site.blind_fraction:.1%} of the samples" if blind else f"{alike} multiples of other units"
    return Request(site.name, progress.index, live, why, blind=True)


def frozen_units(site: SiteReport, remedy: Remedy) -> Tensor:
    """Tell which frozen units are to be treated along, boolean, shape ``(units,)``."""
    return site.frozen & remedy.treats_frozen


def _relapsed(progress: Progress, units: Tensor) -> bool:
    """Whether an edit goes mostly to units that came back by the one before, and not long ago."""
    if progress.back is None or progress.rest > _SOON:
        return False
    return int((units & progress.back).sum()) >= _SUCCESS * int(units.sum())


def _name(remedy: Remedy) -> str:
    return type(remedy).__name__


def _numbers(units: Tensor) -> tuple[int, ...]:
    return tuple(units.nonzero().flatten().tolist())
