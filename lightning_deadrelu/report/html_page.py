"""A run as one HTML page for people, which needs no network and no script."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_deadrelu.render.names import shortened_names
from lightning_deadrelu.render.scale import round_ticks, shades_of
from lightning_deadrelu.render.table import Cell, coded, shown_columns
from lightning_deadrelu.report.figures import CURVES
from lightning_deadrelu.report.json_export import to_json
from lightning_deadrelu.report.raster import Raster, image_of
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.site_summary import COLUMNS, SiteSummary, column_of, rows_of, shortened, worst_first
from lightning_deadrelu.statistics.unit_state import State

if TYPE_CHECKING:
    from lightning_deadrelu.explain.postmortem import DeathEvent

_OPEN = 3
_FEW = 4  # layers; of more, a picture shows all at a glance
_ROWS = 30  # of that picture, that are named
_DEATHS = 4  # sentences for each cause
_LONGEST_NAME = 26


def write(run: RunReport, folder: str | Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html``.

    Returns:
        The paths of both.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "report.json", folder / "report.html"
    for path, content in zip(paths, (to_json, to_html), strict=True):
        path.write_text(content(run), encoding="utf-8")
    return paths


def to_html(run: RunReport) -> str:
    """Write a page that stands alone: pictures are in it, and it asks for nothing."""
    sites = run.history.sites
    page: str = _template().render(
        run=run,
        about=dict(run.about) | _versions(),
        states=list(State),
        tiles=_tiles(run),
        chart=_chart(run) if run.history.steps else None,
        heat=_heat(run.history) if len(sites) > _FEW else None,
        deaths=_by_cause(run.deaths),
        columns=shown_columns(COLUMNS, [summary.row() for summary in run.sites]),
        rows=_rows(shortened(run.sites)),
        all_rows=_rows([(summary,) for summary in run.sites]),
        rasters=_rasters(run),
        seen=[state for state in State if any((site.states == state).any() for site in sites.values())],
    )
    return page


@lru_cache
def _template() -> Any:
    loader = PackageLoader("lightning_deadrelu", "report")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters["coded"] = lambda text: Markup(coded(text))
    return pages.get_template("page.html")


def _versions() -> dict[str, str]:
    names = "lightning-deadrelu", "torch"
    return {"written": f"{datetime.now():%Y-%m-%d %H:%M}"} | {name: version(name) for name in names}


def _tiles(run: RunReport) -> dict[str, str]:
    report, curve = run.report, run.history.curves.get("dead_fraction", ())
    tiles = {"dead now": f"{report.dead_fraction:.1%}"}
    if curve:
        tiles["dead at worst"] = f"{max(*curve, report.dead_fraction):.1%}"
    repaired = sum(summary.repaired for summary in run.sites)
    if repaired:
        tiles["fire after a repair"] = f"{sum(summary.fire_again for summary in run.sites):,} of {repaired:,}"
    tiles |= {"units": f"{report.units:,}", "layers": f"{len(report.sites):,}"}
    return tiles | ({"training batches": f"{report.step + 1:,}"} if report.step else {})


# -- pictures: all places are in percent of the width or the height --------------------------------------


def _chart(run: RunReport) -> dict[str, Any]:
    """Place the curves of the whole model, and a mark at each repair."""
    history = run.history
    curves = {state: history.curves[name] for name, state in CURVES.items() if name in history.curves}
    curves = {state: curve for state, curve in curves.items() if state is State.DEAD or any(curve)}
    top = min(max(0.05, *(1.1 * max(curve) for curve in curves.values())), 1.0)
    places = _places(len(history.steps))
    lines = {
        state: "M" + " L".join(f"{x:.2f},{100 - y / top * 100:.2f}" for x, y in zip(places, curve, strict=True)) + "h0"
        for state, curve in curves.items()
    }
    marks: dict[int, list[str]] = {}
    for event in run.events:
        if event.action == "edited":
            marks.setdefault(column_of(event.step, history.steps), []).append(str(event))
    return {
        "lines": [(state, path, curves[state][-1]) for state, path in lines.items()],
        "shares": [(100 - share / top * 100, f"{share:.0%}") for share in round_ticks(0, top, 6)],
        "steps": _steps(history),
        "marks": [(places[column], "\n".join(texts)) for column, texts in marks.items()],
    }  # fmt: skip


def _places(columns: int) -> list[float]:
    """Place each window in the middle of its share of the width."""
    return [(column + 0.5) / columns * 100 for column in range(columns)]


def _steps(history: Raster) -> list[tuple[float, str]]:
    ticks = round_ticks(history.steps[0], history.steps[-1])
    places = np.interp(ticks, history.steps, _places(len(history.steps)))
    return [(place, f"{tick:,.0f}") for place, tick in zip(places.tolist(), ticks, strict=True)]


def _heat(history: Raster) -> dict[str, Any]:
    """Paint the dead share of all layers, a row for each, and name some of them."""
    curves, every = history.site_curves, -(-len(history.site_curves) // _ROWS)
    names = shortened_names(list(curves), _LONGEST_NAME)
    shades = [(share, "#{:02x}{:02x}{:02x}".format(*shades_of(np.array(share)))) for share in (0.0, 0.1, 0.5, 1.0)]
    return {
        "picture": _png(shades_of(np.array(list(curves.values())))),
        "height": max(min(22 * len(names), 480), 120),
        "layers": list(zip(_places(len(names)), names, strict=True))[::every],
        "steps": _steps(history),
        "shades": [(f"{share:.0%} dead", colour) for share, colour in shades],
    }


def _png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """Write a picture as a data URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _rasters(run: RunReport) -> list[dict[str, Any]]:
    """Paint what became of the units of each layer; the worst are open."""
    sites = run.history.sites
    worst = {summary.site.name for summary in worst_first(run.sites)[:_OPEN]}
    return [
        {"summary": summary, "picture": _png(image_of(sites[name])), "open": name in worst, "steps": sites[name].steps}
        for summary in run.sites
        if (name := summary.site.name) in sites
    ]


# -- tables ----------------------------------------------------------------------------------------------


def _rows(groups: Sequence[Sequence[SiteSummary]]) -> list[tuple[dict[str, Cell], SiteSummary | None]]:
    """Join each row to the layer it tells of, if it is one alone."""
    return [(row, group[0] if len(group) == 1 else None) for row, group in zip(rows_of(groups), groups, strict=True)]


def _by_cause(deaths: Iterable[DeathEvent]) -> dict[str, Any]:
    """Gather deaths by their cause, most units first and what follows from others last; those without one apart."""
    ordered = sorted(deaths, key=lambda death: (death.cause, death.first_step))
    named = [death for death in ordered if death.finding]
    groups = [list(group) for _, group in itertools.groupby(named, key=lambda death: death.cause)]
    groups.sort(key=lambda group: (group[0].cause == "upstream_death", -sum(sum(death.units) for death in group)))
    rest = sorted((death for death in ordered if not death.finding), key=lambda death: death.first_step)
    return {
        "causes": [(group[0].finding, group[:_DEATHS], group[_DEATHS:]) for group in groups],
        "unknown": rest,
        "unknown_units": sum(sum(death.units) for death in rest),
    }
