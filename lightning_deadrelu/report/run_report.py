"""All that is known of a run in one object, from which tables, pictures, pages and files are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from lightning_deadrelu.report.raster import Raster
from lightning_deadrelu.report.site_summary import SiteSummary, conclude, summarize
from lightning_deadrelu.statistics import LivenessReport

if TYPE_CHECKING:
    from lightning_deadrelu.attribution.result import Attribution
    from lightning_deadrelu.explain.finding import Finding
    from lightning_deadrelu.explain.postmortem import DeathEvent
    from lightning_deadrelu.repair.event import Event


@dataclass(frozen=True, eq=False)
class RunReport:
    """A run, or an audit, as it stands.

    Args:
        report: The latest verdict.
        history: The states of all units over the run; empty after an audit.
        events: What was done to which units, when and why.
        attribution: What feeds and what reads each site, by name, as far as it is known.
        deaths: When units died, and why.
        findings: What the check-up found.
        name: The monitor's name, the prefix of its metrics.
        about: What else the head of a page tells, such as the model's class and the monitor's settings.

    Example:
        >>> RunReport(LivenessReport(())).conclusion
        'No rectifier was watched.'
    """

    report: LivenessReport
    history: Raster = field(default_factory=Raster)
    events: tuple[Event, ...] = ()
    attribution: Mapping[str, Attribution] = field(default_factory=dict)
    deaths: tuple[DeathEvent, ...] = ()
    findings: tuple[Finding, ...] = ()
    name: str = "dead_relu"
    about: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def sites(self) -> tuple[SiteSummary, ...]:
        """What became of each site, in the order of execution."""
        return tuple(summarize(self.report, self.history, self.events))

    @cached_property
    def conclusion(self) -> str:
        """How the model fares, since when, and what was done, in one sentence."""
        return conclude(self.report, self.history, self.sites)

    @property
    def useful_units(self) -> int:
        """Repaired units that were found to matter to the loss at the latest verdict, if it ended a window."""
        return sum(len(event.useful) for event in self.events if event.step == self.report.step)

    @cached_property
    def refused(self) -> dict[str, dict[str, str]]:
        """What could not be watched, traced or repaired, and why, by site.

        Example:
            >>> RunReport(LivenessReport((), unwatched={"head": "it has not run"})).refused
            {'head': {'not watched': 'it has not run'}}
        """
        found = {name: {"not watched": reason} for name, reason in self.report.unwatched.items()}
        for name, known in self.attribution.items():
            reasons = {"what feeds it": known.no_incoming, "what reads it": known.no_outgoing, "terms": known.no_outlet}
            found.setdefault(name, {}).update({what: why for what, why in reasons.items() if why})
        for event in self.events:
            if event.action == "refused":
                found.setdefault(event.site, {})[event.remedy] = event.reason
        return {name: reasons for name, reasons in found.items() if reasons}
