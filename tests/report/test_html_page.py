"""The files of a run: strict JSON, and a page that stands alone and opens without errors."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import LONG, SHORT, run_of
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn
from toys import EVERYTHING, Net, batches, fit

from lightning_deadrelu import DeadReLUMonitor, LivenessReport, find_dead_units
from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.explain.postmortem import DeathEvent
from lightning_deadrelu.report import html_page as page
from lightning_deadrelu.report.json_export import to_json
from lightning_deadrelu.report.raster import image_of
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.site_summary import shortened

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = [(0, SHORT), (1, SHORT), (3, SHORT), (30, LONG), (200, LONG)]


@pytest.fixture(scope="module")
def runs():
    return {count: run_of(count, windows=10, units=20, pattern=pattern) for count, pattern in SIZES if count}


class Page(HTMLParser):
    """Check that all that opens closes, in order, and gather what is told and what is asked for."""

    VOID = frozenset({"meta", "link", "img", "br", "line", "path", "rect", "image"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.tags, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "action", "data", "xlink:href")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("count", [1, 3, 30, 200])
def test_the_page_stands_alone(runs, count):
    text = page.to_html(runs[count])
    read = Page(text)
    assert all(address.startswith("data:") for address in read.addresses)
    assert "script" not in read.tags
    assert not re.search(r"url\(|@import", text)
    assert len(text) < 5_000 * count + 40_000


def test_the_page_tells_all(runs):
    words = " ".join(Page(page.to_html(runs[3])).words)
    for site in runs[3].report.sites:
        assert site.name in words
    assert "Reset" in words
    assert "its parameters are sharded" in words
    assert "feeds are shared by 2 layers: <b>" in words
    assert "it has not run" in words
    assert "299 silent samples" in words
    assert runs[3].conclusion.replace("`", "") in "".join(Page(page.to_html(runs[3])).words)


def test_the_head_tells_runs_apart(runs):
    words = " ".join(Page(page.to_html(replace(runs[3], name="mine", about={"model": "Net<1>"}))).words)
    assert "mine: dead ReLU report" in words
    assert "Net<1>" in words
    assert torch.__version__.split("+")[0] in words  # the package of a wheel for CUDA does not name it


def test_the_head_names_the_run_as_its_logger_does(tmp_path):
    def head(logger):
        fit(Net(), batches(4), DeadReLUMonitor(**EVERYTHING, report_dir=str(tmp_path)), logger=logger)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    assert "<title>lab/version_7: dead ReLU report</title>" in head(CSVLogger(tmp_path, name="lab", version=7))
    assert "<title>dead_relu: dead ReLU report</title>" in head(False)


def test_deaths_stand_by_their_cause_and_those_without_one_in_a_line(runs):
    finding = Finding(
        cause="gradient_spike", where="a", measured="it rose", confidence="likely", edit="clip <it>", source="Pascanu"
    )
    named = [
        DeathEvent("shock", "gradient_spike", ("a",), (n,), n, n + 1, "as gradients rose", finding=finding)
        for n in range(1, 7)
    ]
    others = [DeathEvent("drift", "unknown", ("b",), (n,), n, n + 9, "having sunk") for n in (2, 3)]
    read = Page(page.to_html(replace(runs[1], deaths=(*others, *named), findings=(finding,))))
    words = " ".join(read.words)
    assert words.count("clip <it>") == 2  # of the check-up, and of all deaths of this cause
    assert "it rose" in words
    assert "2 more of this cause" in words
    assert "5 more deaths without a known cause" in words


def test_a_cause_stands_before_what_follows_from_it(runs):
    causes = {"upstream_death": 30, "negative_bias": 20}
    findings = {c: Finding(cause=c, where="a", measured="", confidence="certain", edit="", source="") for c in causes}
    deaths = [DeathEvent("born dead", c, ("a",), (n,), 0, 9, "seen", None, findings[c]) for c, n in causes.items()]
    words = " ".join(Page(page.to_html(replace(runs[1], deaths=tuple(deaths), findings=()))).words)
    assert words.index("negative_bias") < words.index("upstream_death")


def test_odd_names_are_escaped():
    name = '<img src=x onerror="alert(1)">&`'
    run = run_of(2, windows=3, units=4, pattern=name + "{}")
    read = Page(page.to_html(run))
    assert all(address.startswith("data:") for address in read.addresses)
    assert any(name in word for word in read.words)


def test_an_audit_has_a_page_without_curves():
    report = find_dead_units(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), [torch.rand(300, 4)])
    words = " ".join(Page(page.to_html(RunReport(report))).words)
    assert "Layers" in words
    assert "Over the run" not in words


def test_nothing_is_no_error():
    nothing = RunReport(LivenessReport(()))
    assert "No rectifier was watched." in page.to_html(nothing)
    assert json.loads(to_json(nothing))["events"] == []


def strict(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_json_holds_all(runs, tmp_path):
    report, raster, events = runs[3].report, runs[3].history, runs[3].events
    raster.add(LivenessReport(report.sites[:2], 9999))  # a site that is missing leaves a gap
    written = page.write(runs[3], tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["report.json", "report.html"]
    content = strict(written[0].read_text(encoding="utf-8"))
    assert content["dead_units"] == report.dead_units
    assert [site["dead"] for site in content["sites"]] == [
        site.dead.nonzero().flatten().tolist() for site in report.sites
    ]
    assert content["curves"]["steps"] == list(raster.steps)
    assert content["curves"]["model"]["dead_fraction"] == list(raster.curves["dead_fraction"])
    assert content["curves"]["sites"]["layer2.relu"][-1] is None
    assert [event["units"] for event in content["events"]] == [list(event.units) for event in events]
    assert content["events"][-1]["before"] is None
    assert content["refused"]["layer0.relu"]["Reset"] == "its parameters are sharded"
    assert content["refused"]["head.relu"] == {"not watched": "it has not run"}
    assert content["run"][1]["repaired"] > content["run"][1]["fire_again"] > 0
    assert content["conclusion"] == runs[3].conclusion


def test_curves_are_where_the_values_are(runs):
    drawn = re.search(r'class="line dead" d="M([^"]*)h0"', page.to_html(runs[3]))[1]
    heights = [100 - float(point.split(",")[1]) for point in drawn.split(" L")]
    curve = runs[3].history.curves["dead_fraction"]
    top = max(curve)
    assert heights == pytest.approx([value / top * max(heights) for value in curve], abs=0.02)


def test_the_pictures_are_those_of_the_history(runs):
    addresses = [address for address in Page(page.to_html(runs[3])).addresses if address.startswith("data:image")]
    pictures = [Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) for address in addresses]
    assert [np.array(picture).tolist() for picture in pictures] == [
        image_of(site).tolist() for site in runs[3].history.sites.values()
    ]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("count", [3, 200])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_opens_it_without_errors(runs, tmp_path, count, theme):
    _, path = page.write(runs[count], tmp_path)
    picture = tmp_path / "page.png"
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={tmp_path}",
    ]
    theme = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    command = [CHROMIUM, *flags, *theme, "--window-size=1000,800", f"--screenshot={picture}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_example_writes_a_page_and_its_picture(tmp_path):
    pytest.importorskip("sklearn")
    script = Path(__file__).parents[2] / "examples" / "report.py"
    options = ["--epochs", "2", "--out", str(tmp_path), "--picture", str(tmp_path / "page.png")]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "of 192 units" in done.stdout
    assert (tmp_path / "page.png").stat().st_size > 10_000
    strict((tmp_path / "report.json").read_text(encoding="utf-8"))


# -- what is told ----------------------------------------------------------------------------------------


def test_few_sites_are_all_told_and_many_are_gathered(runs):
    for count in (3, 30, 200):
        rows = shortened(runs[count].sites)
        assert [summary.site.name for row in rows for summary in row] == [
            site.name for site in runs[count].report.sites
        ]
        assert len(rows) <= max(count, 3) if count <= 12 else len(rows) <= 62


def test_the_worst_and_the_step_of_death_are_those_of_the_curve(runs):
    raster = runs[30].history
    for summary in runs[30].sites:
        curve = raster.site_curves[summary.site.name]
        assert summary.worst == max(curve)
        rises = [b - a for a, b in zip((0.0, *curve), curve, strict=False)]
        assert summary.died_at == (raster.steps[rises.index(max(rises))] if max(rises) > 0 else None)


def test_the_conclusion_counts(runs):
    report, events, line = runs[3].report, runs[3].events, runs[3].conclusion
    edited = {unit for event in events if event.action == "edited" for unit in event.units}
    fire = sum(not report["layer1.relu"].silent[unit] for unit in edited)
    assert line.startswith(f"{report.dead_units} of 60 units are dead")
    assert line.endswith(f"; {len(edited)} were repaired, and {fire} fire again.")


def test_a_healthy_model_needs_few_words():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    nn.init.constant_(model[0].bias, 5.0)

    def conclusion():
        return RunReport(find_dead_units(model, [torch.rand(300, 4)])).conclusion

    assert conclusion() == "None of 8 units is dead."
    nn.init.constant_(model[0].bias[:1], -50.0)
    assert conclusion() == "1 of 8 units is dead (12.5%), in `1`."
    nn.init.constant_(model[0].bias, -50.0)
    assert conclusion() == "8 of 8 units are dead (100.0%), all in `1`."
