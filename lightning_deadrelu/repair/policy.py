"""When a remedy acts on a site, whether it helped, and which comes next. Pure, but for the progress it keeps."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.remedies import Remedy
from lightning_deadrelu.statistics import LivenessReport, SiteReport

_SUCCESS = 0.5  # share of the treated units that has to fire afterwards
_JUMP_IN_STDS = 5.0
_SOON = 10  # verdicts
_MOST_HARMS = 3  # in a row, where a remedy may fail for ever


class Event(NamedTuple):
    """What was done to a site, or why not.

    Args:
        step: The training batch, as loggers count.
        site: Name of the site.
        action: ``"edited"``, ``"would edit"`` (a dry run), ``"revived"``, ``"failed"``, ``"harmed"``, ``"refused"``,
            ``"escalated"``, ``"given up"`` or ``"dropped"`` (a term still in flight when training ended).
        remedy: Its class.
        units: Numbers of the units concerned.
        reason: In words.
        before: Dead fraction of the site when it was decided.
        after: Dead fraction when the outcome was judged; not a number where there is none yet.
    """

    step: int
    site: str
    action: str
    remedy: str
    units: tuple[int, ...] = ()
    reason: str = ""
    before: float = math.nan
    after: float = math.nan

    def __str__(self) -> str:
        units = f" ({len(self.units)} units)" if self.units else ""
        return f"step {self.step}: {self.remedy} {self.action} `{self.site}`{units}: {self.reason}"


class Loss(NamedTuple):
    """The loss over a window."""

    mean: float
    std: float

    @classmethod
    def of(cls, sums: Tensor) -> Loss | None:
        """Take it from the number, the sum and the sum of squares of losses; None where there are none.

        Example:
            >>> Loss.of(torch.tensor([2.0, 4.0, 10.0]))
            Loss(mean=2.0, std=1.0)
        """
        number, total, squares = sums.tolist()
        if not number:
            return None
        mean = total / number
        return cls(mean, math.sqrt(max(squares / number - mean * mean, 0.0)))

    def jumped_to(self, after: Loss) -> bool:
        """Whether the loss more than doubled, by far more than it usually varies, or is no number any more.

        Example:
            >>> Loss(1.0, 0.1).jumped_to(Loss(3.0, 0.1)), Loss(1.0, 0.1).jumped_to(Loss(1.4, 0.1))
            (True, False)
        """
        if not math.isfinite(self.mean):
            return False
        return not after.mean <= self.mean + abs(self.mean) + _JUMP_IN_STDS * self.std


class Request(NamedTuple):
    """A wish to edit some units of a site, to be confirmed on a further batch.

    Args:
        site: Name of the site.
        rung: Number of the remedy.
        units: Which units, boolean, shape ``(units,)``.
        reason: In words.
    """

    site: str
    rung: int
    units: Tensor
    reason: str


@dataclass
class Trial:
    """An edit whose outcome is not known yet.

    Args:
        units: What was edited, boolean, shape ``(units,)``.
        windows: Windows left until it is judged.
        before: Dead fraction of the site before.
        loss: Of the window before, as mean and standard deviation; empty where unknown.
        dry: Whether nothing was done in truth.
        fresh: Whether no window has ended since.
    """

    units: Tensor
    windows: int
    before: float
    loss: tuple[float, ...] = ()
    dry: bool = False
    fresh: bool = True


@dataclass
class Progress:
    """How far a site has come.

    Args:
        rung: Number of the remedy that is in turn; past the last, the site is left alone.
        above: Verdicts in a row with a dead fraction above the threshold.
        failures: Edits in a row that did not help, or did harm.
        harms: Edits in a row that did harm.
        relapses: Edits in a row of units that had just come back.
        rest: Verdicts since the last edit was judged.
        edits: Edits of the site by the remedy that is in turn.
        back: Units that came back by the last edit, boolean, shape ``(units,)``.
        trial: The edit in flight.
    """

    rung: int = 0
    above: int = 0
    failures: int = 0
    harms: int = 0
    relapses: int = 0
    rest: int = 0
    edits: int = 0
    back: Tensor | None = None
    trial: Trial | None = None


class EscalationPolicy:
    """Decide, verdict by verdict, which remedy acts on which units.

    Args:
        rungs: The remedies, the first to be tried first.
        threshold: A site is treated while more than this share of its units is dead.
        min_samples: What the monitor asks of a verdict.
    """

    def __init__(self, rungs: Sequence[Remedy], threshold: float, min_samples: int) -> None:
        self.rungs = tuple(rungs)
        self._threshold = threshold
        self._min_samples = min_samples
        self.sites: dict[str, Progress] = {}
        self.edits = [0] * len(self.rungs)

    def decide(
        self, report: LivenessReport, loss: Loss | None = None, busy: Collection[str] = ()
    ) -> tuple[list[Request], list[Event]]:
        """Judge what was done before, and say what to do next.

        Args:
            report: The verdict on a whole window.
            loss: Over that window.
            busy: Sites in which an edit is still under way; they wait.

        Returns:
            Requests, in the order of execution, and what became of earlier edits.
        """
        events: list[Event] = []
        requests = []
        for site in report.headline:
            progress = self.sites.setdefault(site.name, Progress())
            if site.name in busy:
                events += self._harm(progress, site, report.step, loss)
                continue
            events += self._judge(progress, site, report.step, loss)
            request = self._request(progress, site, report.step)
            requests += [request] if request else []
        return requests, events

    def edited(self, request: Request, units: Tensor, before: float, loss: Loss | None, step: int) -> Event:
        """Note that an edit was made, or would have been in a dry run.

        Args:
            request: What was asked for.
            units: Which units it came to, boolean, shape ``(units,)``.
            before: Dead fraction of the site at the verdict behind it.
            loss: Over the window of that verdict.
            step: The training batch.
        """
        remedy = self.rungs[request.rung]
        self.edits[request.rung] += not remedy.dry_run
        progress = self.sites[request.site]
        progress.edits += not remedy.dry_run
        progress.relapses = progress.relapses + 1 if _relapsed(progress, units) else 0
        progress.trial = Trial(units, remedy.cooldown, before, tuple(loss or ()), remedy.dry_run)
        action = "would edit" if remedy.dry_run else "edited"
        return Event(step, request.site, action, _name(remedy), _numbers(units), request.reason, before)

    def refused(self, request: Request, reason: str, step: int) -> list[Event]:
        """Note that a remedy cannot be applied to a site, and turn to the next."""
        progress = self.sites[request.site]
        event = Event(step, request.site, "refused", _name(self.rungs[request.rung]), reason=reason)
        return [event, *self._climb(progress, request.site, step)]

    def dropped(self, site: str, step: int) -> Event:
        """Note that training ended while an edit was under way."""
        rung = self.sites[site].rung if site in self.sites else len(self.rungs)
        why = "training ended before its edit was complete"
        return Event(step, site, "dropped", _name(self.rungs[rung]) if rung < len(self.rungs) else "", reason=why)

    def _harm(self, progress: Progress, site: SiteReport, step: int, loss: Loss | None) -> list[Event]:
        """See whether the loss jumped in the window after an edit."""
        trial = progress.trial
        if trial is None or not trial.fresh:
            return []
        trial.fresh = False
        exact = self.rungs[progress.rung].is_exact  # the loss rose, but not by this edit
        if exact or trial.dry or not trial.loss or loss is None or not Loss(*trial.loss).jumped_to(loss):
            return []
        progress.trial = None
        progress.harms += 1
        why = f"the loss went from {trial.loss[0]:.4g} to {loss.mean:.4g}"
        event = self._outcome("harmed", progress, site, trial, step, why)
        return [event, *self._fell_short(progress, site.name, step)]

    def _judge(self, progress: Progress, site: SiteReport, step: int, loss: Loss | None) -> list[Event]:
        events = self._harm(progress, site, step, loss)
        trial = progress.trial
        if trial is None:
            progress.rest += 1
            return events
        trial.windows -= 1
        if trial.windows > 0 or not site.elements:  # a site that did not run says nothing
            return []
        progress.trial = None
        return [] if trial.dry else self._conclude(progress, site, trial, step)

    def _conclude(self, progress: Progress, site: SiteReport, trial: Trial, step: int) -> list[Event]:
        """Judge an edit by who of the treated fires now."""
        back = trial.units & ~site.silent & ~site.frozen & ~site.rare
        share = int(back.sum()) / int(trial.units.sum())
        why = f"{int(back.sum())} of {int(trial.units.sum())} treated units fire"
        progress.harms = progress.rest = 0
        if share >= _SUCCESS:
            progress.failures, progress.back = progress.relapses, back
            event = self._outcome("revived", progress, site, trial, step, why)
            return [event, *(self._climb(progress, site.name, step) if self._is_spent(progress) else [])]
        event = self._outcome("failed", progress, site, trial, step, why)
        return [event, *self._fell_short(progress, site.name, step)]

    def _fell_short(self, progress: Progress, site: str, step: int) -> list[Event]:
        """Count an edit that did not help, or seems to have done harm: a loss may also jump because the data change."""
        progress.failures += 1
        return self._climb(progress, site, step) if self._is_spent(progress) else []

    def _is_spent(self, progress: Progress) -> bool:
        attempts = self.rungs[progress.rung].attempts
        return progress.harms >= _MOST_HARMS if attempts is None else progress.failures >= attempts

    def _outcome(
        self, action: str, progress: Progress, site: SiteReport, trial: Trial, step: int, reason: str
    ) -> Event:
        name = _name(self.rungs[progress.rung])
        return Event(
            step, site.name, action, name, _numbers(trial.units), reason, trial.before, after=site.dead_fraction
        )

    def _climb(self, progress: Progress, site: str, step: int) -> list[Event]:
        name = _name(self.rungs[progress.rung])
        vars(progress).update(vars(Progress(progress.rung + 1)))
        if progress.rung < len(self.rungs):
            return [Event(step, site, "escalated", name, reason=f"next: {_name(self.rungs[progress.rung])}")]
        return [Event(step, site, "given up", name, reason="no remedy is left; it is watched on")]

    def _request(self, progress: Progress, site: SiteReport, step: int) -> Request | None:
        if progress.trial is not None or progress.rung >= len(self.rungs):
            return None
        remedy = self.rungs[progress.rung]
        units = candidates(site, remedy, self._min_samples)
        share = int(units.sum()) / site.units  # those that died lately have to wait: an attempt would pass them by
        progress.above = progress.above + 1 if share > self._threshold else 0
        spent = remedy.max_edits_per_site is not None and progress.edits >= remedy.max_edits_per_site
        if progress.above < remedy.patience or spent or not self.may(progress.rung, step):
            return None
        units |= frozen_units(site, remedy)
        return Request(site.name, progress.rung, units, f"{share:.1%} dead, above the threshold {self._threshold:.1%}")

    def may(self, rung: int, step: int) -> bool:
        """Whether a remedy may act at all at this step."""
        remedy = self.rungs[rung]
        in_time = remedy.start_step <= step and (remedy.stop_step is None or step < remedy.stop_step)
        return in_time and (remedy.max_edits is None or self.edits[rung] < remedy.max_edits)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress as plain values and tensors."""
        return {"sites": {name: asdict(progress) for name, progress in self.sites.items()}, "edits": list(self.edits)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved, as far as there are as many remedies as then."""
        for name, saved in state["sites"].items():
            known = saved["rung"] < len(self.rungs)
            trial = Trial(**saved["trial"]) if saved["trial"] and known else None
            self.sites[name] = Progress(**{**saved, "trial": trial, "rung": min(saved["rung"], len(self.rungs))})
        if len(state["edits"]) == len(self.rungs):
            self.edits = list(state["edits"])


def candidates(site: SiteReport, remedy: Remedy, evidence: int) -> Tensor:
    """Tell which units are dead beyond doubt, boolean, shape ``(units,)``.

    Args:
        site: The verdict.
        remedy: Says what evidence it asks for.
        evidence: Samples of silence, where it does not say.
    """
    enough = site.age >= (evidence if remedy.evidence is None else remedy.evidence)
    if remedy.significance is None:
        return site.dead & enough
    return site.silent & torch.where(site.usual_rate > 0, improbable(site, remedy.significance), enough)


def improbable(site: SiteReport, significance: float) -> Tensor:
    """Tell whose silence has become improbable under the unit's own history, boolean, shape ``(units,)``.

    A unit that fires at rate ``p`` stays silent for ``a`` samples with probability ``(1 - p) ** a``. Source: Farias
    and Jozefiak 2024, arXiv 2410.20098, with the geometric law.

    Args:
        site: The verdict; its ``usual_rate`` is the history.
        significance: The probability below which silence is no accident.
    """
    log_odds = site.age * torch.log1p(-site.usual_rate.clamp(max=1 - 1e-12))
    silence: Tensor = log_odds <= math.log(significance)
    return silence


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
