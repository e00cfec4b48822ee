"""Tables and pictures, at any number of sites."""

import pickle
from dataclasses import replace
from itertools import pairwise

import matplotlib
import pytest
import torch
from histories import LONG, run_of
from torch import nn

from lightning_deadrelu import LivenessReport, find_dead_units
from lightning_deadrelu.render.names import shortened_names
from lightning_deadrelu.report import RunReport, plot_run, summary
from lightning_deadrelu.report.raster import Raster, image_of
from lightning_deadrelu.statistics.report_table import headline, plot_report, report_text

matplotlib.use("agg")
pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


def audit(*activations: nn.Module, include=(), data=None, **options) -> LivenessReport:
    layers = [layer for activation in activations for layer in (nn.Linear(8, 8), activation)]
    data = torch.randn(400, 8) if data is None else data
    return find_dead_units(nn.Sequential(*layers), [data], include=include, **options)


def many(count: int, pattern: str = "layer{}.relu") -> LivenessReport:
    site = audit(nn.ReLU()).sites[0]
    return LivenessReport(tuple(replace(site, name=pattern.format(i)) for i in range(count)))


def test_table_of_nothing_says_so():
    assert str(LivenessReport(())) == "No rectifier was watched."
    assert str(LivenessReport((), unwatched={"head": "it has not run"})).endswith("not watched: head: it has not run")


def test_table_has_a_row_for_each_site():
    report = audit(nn.ReLU(), nn.ReLU6())
    title, header, _, first, second = str(report).splitlines()
    assert title == headline(report)
    assert header.split()[:4] == ["layer", "kind", "units", "dead"]
    assert first.split()[:3] == ["1", "relu", "8"]
    assert second.split()[:3] == ["3", "relu6", "8"]


def test_table_gives_the_bound_of_the_youngest_dead_unit():
    site = audit(nn.ReLU()).sites[0]
    mask = torch.tensor([True, True] + [False] * 6)
    site = replace(site, dead=mask, judged=mask, age=torch.tensor([299, 2995] + [0] * 6))
    assert str(LivenessReport((site,))).splitlines()[-1].split()[-1] == "1.00%"


def test_table_judges_smooth_activations_for_dormancy_alone():
    row = str(audit(nn.GELU(), include=["gelu"])).splitlines()[-1].split()
    assert row[:8] == ["1", "gelu", "8", "-", "-", "-", "-", "-"]


def test_table_says_what_is_not_finite_or_not_judged():
    assert "not judged" not in str(audit(nn.ReLU()))
    broken = audit(nn.ReLU(), data=torch.full((400, 8), torch.nan))
    assert headline(broken) == "None of 8 units is dead; 8 are not finite."
    assert "not" in str(broken).splitlines()[1]
    assert "finite" in str(broken).splitlines()[2]
    young = audit(nn.ReLU(), data=torch.zeros(2, 8) - 1)
    silent = int(young.sites[0].silent.sum())
    assert silent
    assert headline(young) == f"None of 8 units is dead; {silent} {'is' if silent == 1 else 'are'} not judged yet."


def test_table_marks_what_is_not_trained_and_not_watched():
    site = audit(nn.ReLU()).sites[0]
    report = LivenessReport((replace(site, trainable=False),), unwatched={"head": "it has not run"})
    assert "1 (not trained)" in str(report)
    assert str(report).startswith("No rectifier in training was watched.")
    assert str(report).endswith("not watched: head: it has not run")


def test_table_keeps_long_and_odd_names():
    name = "model." + "very_long_name." * 8 + "relu"
    lines = report_text(LivenessReport((replace(audit(nn.ReLU()).sites[0], name=name),)), width=100).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert "".join(line[:40].split()[0] for line in lines[3:]) == name
    assert "[bold]:cat:" in str(many(1, "[bold]:cat:"))


def test_plot_shares_add_up():
    _, ax = audit(nn.ReLU(), nn.ReLU()).plot()
    for row in range(2):
        assert sum(bars[row].get_width() for bars in ax.containers) == pytest.approx(1)


def test_plot_draws_only_states_that_occur():
    _, ax = audit(nn.GELU(), include=["gelu"], data=torch.zeros(400, 8)).plot()
    assert {text.get_text() for text in ax.get_legend().get_texts()} <= {"dormant", "alive"}


def test_plot_takes_axes():
    figure, (left, right) = pyplot.subplots(1, 2)
    assert plot_report(many(2), right) == (figure, right)
    assert not left.containers


@pytest.mark.parametrize("count", [0, 1, 3, 30, 200])
@pytest.mark.parametrize(
    "pattern", ["layer{}.relu", "model.backbone.encoder.stages.{}.residual_branch.activation.relu"]
)
@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_plot_keeps_texts_apart(count, pattern, style):
    with pyplot.style.context(style):
        figure, ax = many(count, pattern).plot()
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in ax.get_yticklabels()]
        assert all(above.y0 >= below.y1 - 1 for above, below in pairwise(boxes))
        legend, title = ax.get_legend(), ax._left_title.get_window_extent()
        if legend:
            assert ax.bbox.y1 - 1 <= legend.get_window_extent().y0
            assert legend.get_window_extent().y1 <= title.y0 + 3
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in [*boxes, title])
        labels = [text.get_text() for text in ax.get_yticklabels()]
        assert len(set(labels)) == len(labels)
        assert ax.title.get_color() == matplotlib.rcParams["text.color"]
    assert figure.get_figheight() <= 12


# -- over a run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs():
    return {count: run_of(count, windows=10, units=20, pattern=LONG) for count in (1, 3, 30, 200)}


@pytest.mark.parametrize("count", [1, 3, 30, 200])
@pytest.mark.parametrize("width", [80, 120])
def test_summary_fits_and_tells_every_site_that_is_not_well(runs, count, width):
    report = runs[count].report
    lines = summary(runs[count], width).splitlines()
    table = next(number for number, line in enumerate(lines) if line.startswith("layer"))
    assert " ".join(" ".join(lines[:table]).split()) == runs[count].conclusion
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= 70
    names = dict(
        zip([site.name for site in report.sites], shortened_names([s.name for s in report.sites]), strict=True)
    )
    worst = sorted(report.sites, key=lambda site: site.dead_fraction)[-1].name
    assert any(line.startswith(names[worst]) for line in lines)
    assert lines[-1] == "not watched: head.relu: it has not run"


def test_summary_counts_what_was_done(runs):
    events = runs[3].events
    lines = summary(runs[3], 140).splitlines()
    over, under, *rows = lines[[line.split()[0] for line in lines].index("layer") :]
    assert over.split() == ["layer", "kind", "units", "dead", "worst", "died", "repaired", "fire", "verdict"]
    assert under.split() == ["now", "at", "again"]
    told = rows[1].split()
    edited = {unit for event in events if event.action == "edited" for unit in event.units}
    assert int(told[7]) == len(edited) > int(told[8])


def test_summary_of_an_audit_leaves_out_what_it_does_not_know():
    report = audit(nn.ReLU())
    assert summary(RunReport(report), width=120).splitlines()[1].split() == [
        "layer",
        "kind",
        "units",
        "dead",
        "verdict",
    ]
    assert summary(RunReport(LivenessReport(()))) == "No rectifier was watched."


def test_a_notebook_shows_headline_and_table_of_a_run_together():
    told = summary(RunReport(many(2, "<b>{}&")))
    shown = told._repr_html_()
    assert shown.index(told.splitlines()[0]) < shown.index("<table>") < shown.index("&lt;b&gt;0&amp;")
    again = pickle.loads(pickle.dumps(told))
    assert (again, again._repr_html_()) == (told, shown)


def test_notebooks_get_a_table_that_is_escaped():
    text = many(2, "<b>{}&")._repr_html_()
    assert "<td>&lt;b&gt;0&amp;</td>" in text
    assert text.count("<tr>") == 3


@pytest.mark.parametrize("count", [1, 3, 30, 200])
@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_history_is_drawn_and_keeps_texts_apart(runs, count, style):
    with pyplot.style.context(style):
        figure, axes = plot_run(runs[count])
        figure.canvas.draw()
        assert len(axes) == 1 + min(count, 4) + (count > 4)
        names = [ax._left_title.get_window_extent() for ax in axes[1:]]
        assert all(box.x1 <= figure.bbox.x1 and box.x0 >= 0 for box in names)
        assert all(name.y0 >= ax.bbox.y1 - 1 for name, ax in zip(names, axes[1:], strict=True))
        assert figure._suptitle.get_window_extent().y1 <= figure.bbox.y1 + 1
        ticks = [label.get_window_extent() for label in axes[-1].get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in pairwise(ticks))
    assert figure.get_figheight() <= 12


def test_history_draws_the_curve_and_marks_the_edits(runs):
    raster, events = runs[3].history, runs[3].events
    _, (curves, *rasters) = plot_run(runs[3])
    dead, marks = curves.lines[0], curves.lines[-1]
    assert tuple(dead.get_ydata()) == raster.curves["dead_fraction"]
    steps = sorted({event.step for event in events if event.action == "edited"})
    assert [raster.steps[column] for column in marks.get_xdata()] == steps
    assert (rasters[0].images[0].get_array().data == image_of(raster.sites[LONG.format(1)])).all()


def test_history_of_nothing_is_empty():
    raster = Raster()
    raster.add(LivenessReport((), step=9))
    _, axes = plot_run(RunReport(LivenessReport((), step=9), raster))
    assert len(axes) == 1


def test_no_line_of_a_summary_is_wider_than_the_terminal():
    report = many(3, "a_long_name_of_a_block.{}.relu")
    said = {"a_long_name_of_a_module": "it has not run while observed, which may be as it should be, or not"}
    run = RunReport(replace(report, unwatched=said))
    assert max(map(len, summary(run, 140).splitlines())) > 80
    assert max(map(len, summary(run, 80).splitlines())) <= 80
    assert summary(run, 80).split() == summary(run, 81).split()
