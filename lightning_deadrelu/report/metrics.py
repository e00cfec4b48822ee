"""Reports as the scalars that are logged."""

from __future__ import annotations

from lightning_deadrelu.report.latents import latent_metrics
from lightning_deadrelu.statistics import LivenessReport

_COUNTED = {"newly_dead": "newly_dead_units", "revived": "revived_units", "redied": "died_again_units"}
_SHARED = {name: f"{name}_fraction" for name in ("rare", "always_on", "frozen", "dormant")}
EVENTS = frozenset((*_COUNTED.values(), "remedied_units", "useful_units"))
"""Metrics that count what happened in a window, and so add up over windows; all others say how things stand."""
_HEADLINE = frozenset(("dead_fraction", "newly_dead_units", "revived_units", "at_risk_fraction"))


def headline_metrics(
    report: LivenessReport, remedied_units: int = 0, at_risk_fraction: float = 0.0
) -> dict[str, float]:
    """Turn a report into the scalars of the whole model."""
    totals: dict[str, float] = {"dead_fraction": report.dead_fraction, "dead_units": report.dead_units}
    totals["judged_fraction"] = report.fraction("judged")
    totals |= {key: report.total(mask) for mask, key in _COUNTED.items()}
    totals |= {key: report.fraction(mask) for mask, key in _SHARED.items()}
    totals |= {"remedied_units": remedied_units, "at_risk_fraction": at_risk_fraction}
    return {key: float(value) for key, value in totals.items()}


def site_metrics(report: LivenessReport) -> dict[str, float]:
    """Tell the dead fraction of each site, by name; of smooth activations, which are never dead, the dormant one."""
    return {
        site.name: int(site.dormant.sum()) / site.units if site.smooth else site.dead_fraction for site in report.sites
    }


def metrics_of(
    report: LivenessReport,
    name: str = "dead_relu",
    remedied_units: int = 0,
    at_risk_fraction: float = 0.0,
    useful_units: int = 0,
    latents: bool = False,
) -> dict[str, float]:
    """Turn a report into the scalars that are logged.

    Args:
        report: The verdict.
        name: Prefix of the keys.
        remedied_units: Units edited since the last report.
        at_risk_fraction: Share of the units that sink towards silence.
        useful_units: Repaired units that were found to matter to the loss.
        latents: Whether those of sparse autoencoders are wanted, too.

    Returns:
        ``<name>/...`` for what to look at first, ``<name>_details/...`` for the rest of the whole model, and
        ``<name>_sites/<site>`` for the dead fraction of each site; for smooth activations, of which none is ever
        dead, ``<name>_dormant/<site>``. Trackers make a section of what stands before the ``/``.
    """
    totals = headline_metrics(report, remedied_units, at_risk_fraction) | {"useful_units": float(useful_units)}
    metrics = {f"{name if key in _HEADLINE else f'{name}_details'}/{key}": value for key, value in totals.items()}
    sections = {site.name: f"{name}_dormant" if site.smooth else f"{name}_sites" for site in report.sites}
    metrics |= latent_metrics(report, name) if latents else {}
    return metrics | {f"{sections[site]}/{site}": value for site, value in site_metrics(report).items()}
