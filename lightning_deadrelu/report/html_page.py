"""A run as files: JSON for programs, and one HTML page for people, which needs no network and no script."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import torch

from lightning_deadrelu.render import svg
from lightning_deadrelu.report.raster import Raster, SiteRaster, State
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.site_summary import (
    Gap,
    SiteSummary,
    column_of,
    shortened,
    shortened_names,
    worst_first,
)
from lightning_deadrelu.statistics import LivenessReport

if TYPE_CHECKING:
    from lightning_deadrelu.explain.finding import Finding
    from lightning_deadrelu.explain.postmortem import DeathEvent
    from lightning_deadrelu.repair.policy import Event

_LINES = {"dead_fraction": "dead", "rare_fraction": "rare", "always_on_fraction": "always on"}
_LINES |= {"frozen_fraction": "frozen"}
_OPEN = 3
_UNKNOWN = "#8C8C8C"


def write(run: RunReport, folder: str | Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html``.

    Args:
        run: What to write.
        folder: Where to; made if it is not there.

    Returns:
        The paths of both.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "report.json", folder / "report.html"
    for path, content in zip(paths, (to_json, to_html), strict=True):
        path.write_text(content(run), encoding="utf-8")
    return paths


# -- for programs ----------------------------------------------------------------------------------------


def to_json(run: RunReport) -> str:
    """Write verdicts, curves, events and refusals as strict JSON; what is not finite becomes null.

    Args:
        run: What to write.

    Example:
        >>> json.loads(to_json(RunReport(LivenessReport(()))))["conclusion"]
        'No rectifier was watched.'
    """
    content = {
        "conclusion": run.conclusion,
        **run.report.to_dict(),
        "run": [_run_of(summary) for summary in run.sites],
        "curves": _curves_of(run.history),
        "findings": [finding.to_dict() for finding in run.findings],
        "deaths": [death.to_dict() for death in run.deaths],
        "events": [event._asdict() for event in run.events],
        "refused": run.refused,
    }
    return json.dumps(_strict(content), allow_nan=False, indent=1)


def _run_of(story: SiteSummary) -> dict[str, Any]:
    return {"name": story.site.name} | {key: value for key, value in story._asdict().items() if key != "site"}


def _curves_of(raster: Raster) -> dict[str, Any]:
    if not raster.steps:
        return {}
    return {"steps": raster.steps, "model": dict(raster.curves), "sites": dict(raster.site_curves)}


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- for people ------------------------------------------------------------------------------------------


def to_html(run: RunReport) -> str:
    """Write a page that stands alone: pictures are in it, and it asks for nothing.

    Args:
        run: What to write.

    Example:
        >>> to_html(RunReport(LivenessReport(()))).startswith("<!DOCTYPE html>")
        True
    """
    told, history = run.sites, run.history if run.history.steps else None
    parts = [_tiles(run.report, history, told), _over_time(history, run.events) if history else ""]
    parts += [_findings(run.findings), _deaths(run.deaths), _depth(told)]
    parts += [_heat(history) if history else "", _table(told), _rasters(history, told) if history else ""]
    parts += [_events(run.events), _refusals(run.refused)]
    return Template(_beside("page.html")).substitute(
        style=_beside("page.css"),
        conclusion=_coded(run.conclusion),
        content="\n".join(part for part in parts if part),
    )


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _coded(text: str) -> str:
    """Escape, and set what stands between backticks as code."""
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:  # a name has one
        return escape(text)
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def _tiles(report: LivenessReport, raster: Raster | None, told: Sequence[SiteSummary]) -> str:
    tiles = {"units": f"{report.units:,}", "dead now": f"{report.dead_fraction:.1%}"}
    if raster:
        tiles["dead at worst"] = f"{max([*raster.curves['dead_fraction'], report.dead_fraction]):.1%}"
    remedied = sum(story.remedied for story in told)
    if remedied:
        tiles["remedied, firing"] = f"{remedied:,}, {sum(story.revived for story in told):,}"
    tiles["layers"] = f"{len(report.sites):,}"
    if report.step:
        tiles["training batches"] = f"{report.step:,}"
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items())
    return f'<dl class="tiles">{items}</dl>'


def _over_time(raster: Raster, events: Iterable[Event]) -> str:
    lines = {
        label: raster.curves[name]
        for name, label in _LINES.items()
        if name == "dead_fraction" or max(raster.curves.get(name, (0.0,)), default=0) > 0
    }
    keys = "".join(f'<li class="{name}"><b></b>{name}</li>' for name in lines)
    marks = _marks(raster, events)
    note = " Triangles mark edits." if marks else ""
    return (
        f'<h2>Over the run</h2><p class="note">Share of all units, by training batch.{note}</p>'
        f'<ul class="key">{keys}</ul>{svg.curves(lines, raster.steps, marks, "curves")}'
    )


def _marks(raster: Raster, events: Iterable[Event]) -> dict[int, str]:
    marks: dict[int, str] = {}
    for event in events:
        if event.action == "edited":
            column = column_of(event.step, raster.steps)
            marks[column] = "\n".join(filter(None, (marks.get(column), str(event))))
    return marks


def _depth(told: Sequence[SiteSummary]) -> str:
    told = [story for story in told if not story.site.smooth]
    names = shortened_names([story.site.name for story in told], 26)
    bars = [(name, story.site.dead_fraction, story.worst) for name, story in zip(names, told, strict=True)]
    if not bars:
        return ""
    note = "From the input to the output; bars are dead now, the tick above a bar is the worst of the run."
    return f'<h2>By depth</h2><p class="note">{note}</p>{svg.profile(bars)}'


def _heat(raster: Raster) -> str:
    kinds = {name: site.kind for name, site in raster.sites.items()}
    curves = {name: curve for name, curve in raster.site_curves.items() if name in kinds}
    if not curves:
        return ""
    shares = torch.tensor(list(curves.values()), dtype=torch.float64)
    pixels = torch.where(shares.isnan(), 255.0, (shares.nan_to_num() * 254).round()).to(torch.uint8)
    palette = [*(svg.ramp(number / 254) for number in range(255)), _UNKNOWN]
    marks = svg.key([(f"{share:.0%} dead", svg.ramp(share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)])
    picture = svg.heat(svg.png(pixels, palette), shortened_names(list(curves), 26), raster.steps)
    return (
        f'<h2>By depth and time</h2><p class="note">A row for each layer, a column for each window.</p>{marks}{picture}'
    )


# -- tables ----------------------------------------------------------------------------------------------


def _grid(columns: Sequence[str], rows: Iterable[str]) -> str:
    """Lay out rows; the columns that begin with ``#`` hold numbers."""
    head = "".join(f'<th class="number">{c[1:]}</th>' if c[0] == "#" else f"<th>{c}</th>" for c in columns)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _table(told: Sequence[SiteSummary]) -> str:
    if not told:
        return ""
    columns = ("layer", "kind", "#units", "#dead now", "#worst", "#died at step", "#remedied", "#fire again", "verdict")
    rows = shortened(told)
    short = _grid(columns, map(_row, rows))
    whole = "" if len(rows) == len(told) else _hidden(f"All {len(told)} layers", _grid(columns, map(_row, told)))
    return f"<h2>Layers, in the order of execution</h2>{short}{whole}"


def _hidden(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _row(row: SiteSummary | Gap) -> str:
    if isinstance(row, Gap):
        return f'<td class="gap" colspan="9">{escape(str(row))}</td>'
    site = row.site
    share = f'<span class="share"><i style="width:{site.dead_fraction:.1%}"></i></span>'
    dead = "-" if site.smooth else f"{int(site.dead.sum()):,} ({site.dead_fraction:.1%}){share}"
    worst = "-" if math.isnan(row.worst) else f"{row.worst:.1%}"
    died = "-" if row.died is None else f"{row.died:,}"
    revived = "-" if site.smooth or not row.remedied else f"{row.revived:,}"
    numbers = (f"{site.units:,}", dead, worst, died, f"{row.remedied:,}" if row.remedied else "-", revived)
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    name = f'<td class="name"><code>{escape(site.name)}</code></td><td>{escape(site.kind)}</td>'
    return f"{name}{cells}<td>{row.verdict}</td>"


def _rasters(raster: Raster, told: Sequence[SiteSummary]) -> str:
    sites = raster.sites
    open_now = {story.site.name for story in worst_first(told)[:_OPEN]}
    drawn = [_raster(sites[s.site.name], s, s.site.name in open_now) for s in told if s.site.name in sites]
    seen = {int(value) for site in sites.values() for value in site.states.unique()}
    marks = svg.key([(state.label, state.colour) for state in State if state in seen])
    note = "A row for each unit (of more than 256, a sample), a column for each window. The three worst are open."
    return f'<h2>Unit by unit</h2><p class="note">{note}</p>{marks}{"".join(drawn)}'


def _raster(site: SiteRaster, story: SiteSummary, is_open: bool) -> str:
    dead = "" if story.site.smooth else f", {story.site.dead_fraction:.1%} dead now"
    title = f"<code>{escape(site.name)}</code> <span>{site.units:,} units{dead}, {story.verdict}</span>"
    picture = svg.png(site.states, [state.colour for state in State])
    first, last = (f"step {site.steps[place]:,}" for place in (0, -1))
    image = f'<img src="{picture}" alt="states of the units of {escape(site.name)} over the run" loading="lazy">'
    ends = f'<div class="ends"><span>{first}</span><span>{last}</span></div>'
    opened = " open" if is_open else ""
    return f'<details{opened}><summary>{title}</summary><div class="raster">{image}{ends}</div></details>'


def _deaths(deaths: Sequence[DeathEvent]) -> str:
    if not deaths:
        return ""
    rows = {wave: f"<td>{_coded(str(wave))}.</td>{_cause(wave)}" for wave in sorted(deaths, key=_first_step)}
    columns = ("what", "cause", "try")
    large = [row for wave, row in rows.items() if wave.is_large]
    short = _grid(columns, large) if large else ""
    whole = (
        "" if len(large) == len(rows) else _hidden(f"All {len(rows)}, also of few units", _grid(columns, rows.values()))
    )
    note = "The steps are the last at which a unit was seen to fire, and the first from which on all were silent."
    return f'<h2>When units died, and why</h2><p class="note">{note}</p>{short}{whole}'


def _first_step(wave: DeathEvent) -> int:
    return wave.first_step


def _findings(findings: Iterable[Finding]) -> str:
    rows = [
        f'<td class="name"><code>{escape(found.where)}</code></td><td>{_coded(found.evidence)}</td>{_named(found)}'
        for found in findings
    ]
    return f"<h2>What the check-up found</h2>{_grid(('where', 'evidence', 'cause', 'try'), rows)}" if rows else ""


def _cause(wave: DeathEvent) -> str:
    return _named(wave.finding) if wave.finding else "<td>unknown</td><td></td>"


def _named(found: Finding) -> str:
    cause = f'<td class="word"><code>{escape(found.cause)}</code><br>{found.confidence}</td>'
    return f'{cause}<td><code>{escape(found.edit)}</code><br><span class="note">{escape(found.source)}</span></td>'


def _events(events: Sequence[Event]) -> str:
    if not events:
        return ""
    cells: tuple[Callable[[Event], str], ...] = (
        lambda event: f'<td class="number">{event.step:,}</td>',
        lambda event: f'<td class="name"><code>{escape(event.site)}</code></td>',
        lambda event: f"<td>{escape(event.remedy)}</td><td>{escape(event.action)}</td>",
        lambda event: f'<td class="number">{len(event.units) or "-"}</td><td>{_coded(event.reason)}</td>',
    )
    rows = ("".join(cell(event) for cell in cells) for event in events)
    return f"<h2>What was done</h2>{_grid(('#step', 'layer', 'remedy', 'outcome', '#units', 'why'), rows)}"


def _refusals(reasons_of: Mapping[str, Mapping[str, str]]) -> str:
    rows = [
        f'<td class="name"><code>{escape(name)}</code></td><td>{escape(what)}</td><td>{_coded(why)}</td>'
        for name, reasons in reasons_of.items()
        for what, why in reasons.items()
    ]
    return f"<h2>What was left alone</h2>{_grid(('layer', 'what', 'why'), rows)}" if rows else ""
