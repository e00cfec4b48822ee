"""What is said on the terminal while a model trains, each thing once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.explain.postmortem import DeathEvent
from lightning_deadrelu.monitor.host import Host
from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.repair.activation_swap import RESTORING, records
from lightning_deadrelu.repair.event import Event
from lightning_deadrelu.report import RunReport, summary
from lightning_deadrelu.statistics import LivenessReport


@dataclass
class Announced:
    """What was announced already.

    Args:
        crossed: Names of the sites that crossed the threshold.
        copies: Whether it was announced that averaged copies of the weights are left alone.
    """

    crossed: set[str] = field(default_factory=set)
    copies: bool = False


class Announcer:
    """Say what needs an act or is worth knowing."""

    def __init__(self, settings: Settings, host: Host) -> None:
        self._settings, self._host = settings, host
        self.announced = Announced()
        """What was announced already, also in the run that is gone on with."""

    def tell_event(self, event: Event) -> None:
        """Say what was done to a site."""
        if event.action == "refused":
            self._host.warn(f"{event}. `monitor.attribution` shows what is known of all sites.")
        elif event.action != "useful":  # as was to be hoped
            self._host.info(str(event))
        if event.action == "edited" and self._host.averages and not self.announced.copies:
            self.announced.copies = True
            self._host.warn(f"averaged copies of the weights ({self._host.averages}) are left alone.")

    def tell_crossed(self, report: LivenessReport) -> list[str]:
        """Say which sites have crossed the threshold for the first time in the run, and name them."""
        threshold, announced = self._settings.threshold, self.announced.crossed
        crossed = [site for site in report.headline if site.dead_fraction > threshold and site.name not in announced]
        announced.update(site.name for site in crossed)
        if crossed:
            sites = ", ".join(f"`{site.name}` ({int(site.dead.sum())} of {site.units} units)" for site in crossed)
            how_many = f"more than {threshold:.0%} dead at step" if threshold else "dead units at step"
            self._host.warn(
                f"{how_many} {report.step}: {sites}. They have not fired for"
                f" {self._settings.min_samples} samples or more, and get no gradient."
            )
        return [site.name for site in crossed]

    def tell_deaths(self, deaths: Sequence[DeathEvent]) -> None:
        """Say when and why many units died at once, where that is known."""
        for death in deaths:
            if death.is_large and death.finding:
                self._host.info(f"{death}.")

    def tell_findings(self, findings: Sequence[Finding], error: Exception | None) -> None:
        """Say what the check-up found, or that it failed."""
        if error:
            self._host.warn(f"the check-up failed; watching goes on. {error!r}")
        elif findings:
            self._host.warn("\n- ".join(["the check-up found", *map(str, findings)]))
        else:
            self._host.info("the check-up found nothing that kills units.")

    def tell_outcome(self, run: RunReport, model: nn.Module) -> None:
        """Say what became of all units, and which activations stay in the model; nothing where nothing was watched."""
        if not run.report.sites:
            return
        kinds = ", ".join(f"`{record['path']}` is `{record['kind']}`" for record in records(model))
        left = kinds and f"Activations that were exchanged for good: {kinds}; {RESTORING}."
        self._host.say_at_end("\n".join(filter(None, [summary(run), left])))
