"""When a remedy acts on a site, whether it helped, and which comes next. Pure, but for the progress it keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from lightning_deadrelu.model.rectifiers import SELECTIONS, WATCHPOINT
from lightning_deadrelu.remedies import Remedy
from lightning_deadrelu.repair.candidates import candidates, frozen_units
from lightning_deadrelu.repair.event import Event, Loss
from lightning_deadrelu.repair.usefulness import useful
from lightning_deadrelu.statistics import LivenessReport, SiteReport

_SUCCESS = 0.5  # share of the edited units that has to fire afterwards
_RELAPSE_VERDICTS = 10  # within which units that die again have not been revived
_REVIEW_WINDOWS = 5  # after which a unit that came back has to matter
_BLIND_REST = 600  # training batches, in which a new unit learns
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
        verdicts_above: Verdicts in a row with a dead fraction above the threshold.
        failures: Edits in a row that did not help, or did harm.
        harms: Edits in a row that did harm.
        relapses: Edits in a row of units that had just come back.
        verdicts_since: Verdicts since the last edit was judged.
        edits: Edits of the site by the remedy that is in turn.
        revived: Units that came back by the last edit, boolean, shape ``(units,)``.
        trial: The edit in flight.
        review: Units that came back by an edit, until it is judged whether they matter.
        useless: Reviews in a row in which most of them did not.
        blind_from: From which training batch on units may be spared for samples on which no unit fires.
    """

    index: int = 0
    verdicts_above: int = 0
    failures: int = 0
    harms: int = 0
    relapses: int = 0
    verdicts_since: int = 0
    edits: int = 0
    revived: Tensor | None = None
    trial: Trial | None = None
    review: Trial | None = None
    useless: int = 0
    blind_from: int = 0

    def has_relapsed(self, units: Tensor) -> bool:
        """Tell whether an edit goes mostly to units that came back by the one before, and not long ago."""
        if self.revived is None or self.verdicts_since > _RELAPSE_VERDICTS:
            return False
        return int((units & self.revived).sum()) >= _SUCCESS * int(units.sum())


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
        events, requests = self._stop_or_resume(loss, report.step), []
        for site in (one for one in report.headline if one.kind != WATCHPOINT):
            self.state.sites.setdefault(site.name, Progress())
            if site.name in busy:
                events += self._judge_harm(site, report.step, loss)
                continue
            events += self._review(site, report.step, shares.get(site.name))
            events += self._judge(site, report.step, loss)
            request = self._request(site, report.step)
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
        progress.relapses = progress.relapses + 1 if progress.has_relapsed(units) else 0
        if progress.review is not None:
            progress.review.units = progress.review.units & ~units  # their time begins anew
        if request.blind:
            progress.blind_from = step + _BLIND_REST
        blamed = None if remedy.is_exact and not request.blind else loss
        progress.trial = Trial(units, remedy.cooldown, before, blamed, remedy.dry_run)
        action = "would edit" if remedy.dry_run else "edited"
        return Event(step, request.site, action, _name(remedy), _numbers(units), request.reason, before)

    def refused(self, request: Request, reason: str, step: int) -> list[Event]:
        """Record that a remedy cannot be applied to a site, and turn to the next."""
        event = Event(step, request.site, "refused", _name(self.remedies[request.index]), reason=reason)
        return [event, *self._escalate(request.site, step)]

    def dropped(self, site: str, step: int) -> Event:
        """Record that training ended while an edit was under way."""
        index = self.state.sites[site].index if site in self.state.sites else len(self.remedies)
        why = "training ended before its edit was complete"
        return Event(step, site, "dropped", "".join(map(_name, self.remedies[index : index + 1])), reason=why)

    def _judge_harm(self, site: SiteReport, step: int, loss: Loss | None) -> list[Event]:
        """See whether the loss jumped in the window after an edit."""
        progress = self.state.sites[site.name]
        trial = progress.trial
        if trial is None or not trial.fresh:
            return []
        trial.fresh = False
        if trial.dry or trial.loss is None or loss is None or not trial.loss.jumped_to(loss):
            return []
        progress.trial = None
        progress.harms += 1
        progress.failures += 1  # as it seems: a loss may also jump because the data change
        why = f"the loss went from {trial.loss.mean:.4g} to {loss.mean:.4g}"
        return self._outcome("harmed", site, trial, step, why)

    @property
    def in_review(self) -> list[str]:
        """Names of the sites of which it is judged at the next verdict whether repaired units matter."""
        due = ((name, progress.review) for name, progress in self.state.sites.items())
        return [name for name, review in due if review is not None and review.windows <= 1]

    def _review(self, site: SiteReport, step: int, shares: Tensor | None) -> list[Event]:
        """Judge after a fair time how many of the units that came back, and fire on, matter to the loss."""
        progress = self.state.sites[site.name]
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
        progress.useless = 0 if enough else progress.useless + 1
        why = f"{number} of {total} repaired units matter to the loss, {_REVIEW_WINDOWS} windows later"
        event, *more = self._outcome("useful" if enough else "useless", site, review, step, why)
        return [event._replace(useful=_numbers(matter)), *more]

    def _judge(self, site: SiteReport, step: int, loss: Loss | None) -> list[Event]:
        """Judge an edit once its time is over."""
        events = self._judge_harm(site, step, loss)
        progress = self.state.sites[site.name]
        trial = progress.trial
        if trial is None:
            progress.verdicts_since += 1
            return events
        trial.windows -= 1
        if trial.windows > 0 or not site.elements:  # without rates it cannot be told who is back
            return []
        progress.trial = None
        return [] if trial.dry else self._conclude(site, trial, step)

    def _conclude(self, site: SiteReport, trial: Trial, step: int) -> list[Event]:
        """Judge an edit by which of the edited units fire now."""
        progress = self.state.sites[site.name]
        seldom = site.silent if site.kind in SELECTIONS else site.silent | site.rare  # where it is usual to fire seldom
        revived = trial.units & ~seldom & ~site.frozen
        number, total = int(revived.sum()), int(trial.units.sum())
        success = number >= _SUCCESS * total
        progress.harms = progress.verdicts_since = 0
        if success:
            progress.failures, progress.revived = progress.relapses, revived
            progress.review = progress.review or Trial(revived, _REVIEW_WINDOWS, trial.before)
        else:
            progress.failures += 1
        why = f"{number} of {total} repaired units fire"
        return self._outcome("revived" if success else "failed", site, trial, step, why)

    def _outcome(self, action: str, site: SiteReport, trial: Trial, step: int, why: str) -> list[Event]:
        """Record what came of an edit, and turn to the next remedy once this one has had its attempts."""
        progress = self.state.sites[site.name]
        remedy = self.remedies[progress.index]
        units = _numbers(trial.units)
        event = Event(step, site.name, action, _name(remedy), units, why, trial.before, after=site.dead_fraction)
        if remedy.attempts is None:
            exhausted = progress.harms >= _MOST_HARMS
        else:
            exhausted = max(progress.failures, progress.useless) >= remedy.attempts
        return [event, *(self._escalate(site.name, step) if exhausted else [])]

    def _escalate(self, site: str, step: int) -> list[Event]:
        index = self.state.sites[site].index
        self.state.sites[site] = Progress(index + 1)
        name, following = _name(self.remedies[index]), self.remedies[index + 1 : index + 2]
        if following:
            return [Event(step, site, "escalated", name, reason=f"next: {_name(following[0])}")]
        return [Event(step, site, "given up", name, reason="no remedy is left; it is watched on")]

    def _request(self, site: SiteReport, step: int) -> Request | None:
        progress = self.state.sites[site.name]
        if self.state.stopped or progress.trial is not None or progress.index >= len(self.remedies):
            return None
        remedy = self.remedies[progress.index]
        units = candidates(site, remedy, self._min_silent_samples)
        share = int(units.sum()) / site.units  # those that died lately have to wait: an attempt would pass them by
        progress.verdicts_above = progress.verdicts_above + 1 if share > self._threshold else 0
        used_up = remedy.max_edits_per_site is not None and progress.edits >= remedy.max_edits_per_site
        if used_up or not self.may_act(progress.index, step):
            return None
        if progress.verdicts_above < remedy.patience:
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


def _blind_request(progress: Progress, site: SiteReport, remedy: Remedy, step: int) -> Request | None:
    """Ask for units that a layer can spare, if it is silent on too many samples, or some are multiples of others."""
    most = remedy.treats_blind
    if most is None or step < progress.blind_from or not site.elements:
        return None
    live, blind = ~site.silent & ~site.frozen, most < (site.blind_fraction or 0.0) < 1
    if not (blind or site.duplicate.any()):
        return None
    progress.blind_from = step + _BLIND_REST // 10  # if nothing comes of it
    alike = int(site.duplicate.sum())
    why = f"no unit fires on {site.blind_fraction:.1%} of the samples" if blind else f"{alike} multiples of other units"
    return Request(site.name, progress.index, live, why, blind=True)


def _name(remedy: Remedy) -> str:
    return type(remedy).__name__


def _numbers(units: Tensor) -> tuple[int, ...]:
    return tuple(units.nonzero().flatten().tolist())
