"""A run as strict JSON, for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lightning_deadrelu.report.raster import Raster
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.site_summary import SiteSummary


def to_json(run: RunReport) -> str:
    """Write verdicts, curves, events and refusals as strict JSON; what is not finite becomes null."""
    content = {
        "name": run.name,
        "about": run.about,
        "conclusion": run.conclusion,
        **run.report.to_dict(),
        "run": [_became(summary) for summary in run.sites],
        "curves": _curves(run.history),
        "findings": [finding.to_dict() for finding in run.findings],
        "deaths": [death.to_dict() for death in run.deaths],
        "events": [event._asdict() for event in run.events],
        "refused": run.refused,
    }
    return json.dumps(_strict(content), allow_nan=False, indent=1)


def _became(summary: SiteSummary) -> dict[str, Any]:
    return {"name": summary.site.name} | {key: value for key, value in summary._asdict().items() if key != "site"}


def _curves(history: Raster) -> dict[str, Any]:
    if not history.steps:
        return {}
    return {"steps": history.steps, "model": history.curves, "sites": history.site_curves}


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
