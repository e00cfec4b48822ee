"""Real trackers, read back: the same values everywhere, and pictures that are there."""

import csv
import importlib.util
import io
import json
import math
import os
import time
import warnings
from pathlib import Path

import lightning.pytorch as new
import numpy as np
import pytest
import pytorch_lightning as old
from histories import report, run, site
from logged import KEYS, as_wandb, wandb_records
from torch import nn
from toys import EVERYTHING, KEY, Log, Net, Verdicts, batches, fit, mlp

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.report.loggers import Reporter, metrics_of
from lightning_deadrelu.report.loggers.adapters import adapter_of
from lightning_deadrelu.report.loggers.media import LEGEND, MOST_SITES, is_due, media_of
from lightning_deadrelu.report.raster import Raster, image_of
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.statistics.unit_state import State

TESTS = Path(__file__).parents[2]


def loggers_of(package, folder):
    found = package.loggers
    return {
        "wandb": found.WandbLogger(save_dir=folder, offline=True, project="test"),
        "tensorboard": found.TensorBoardLogger(folder / "tensorboard"),
        "csv": found.CSVLogger(folder / "csv"),
        "mlflow": found.MLFlowLogger(
            tracking_uri=f"sqlite:///{folder}/runs.db", artifact_location=str(folder / "artifacts")
        ),
    }


@pytest.fixture(scope="module", params=[new, old], ids=["lightning", "pytorch_lightning"])
def everywhere(request, tmp_path_factory):
    """One run with all loggers: its folder, loggers and reports."""
    import wandb

    folder = tmp_path_factory.mktemp("runs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers = loggers_of(request.param, folder)
        monitor = Verdicts(alerts=True, **EVERYTHING)
        fit(Net(), batches(16), monitor, logger=list(loggers.values()), log_every_n_steps=1)
        wandb.finish()
    return folder, loggers, monitor.reports


@pytest.mark.slow
def test_the_values_are_the_same_everywhere(everywhere):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, loggers, reports = everywhere
    expected = {one.step: metrics_of(one) for one in reports}
    assert list(expected) == [3, 7, 11, 15]
    items = [record["history"]["item"] for record in wandb_records(folder) if record["type"] == "history"]
    rows = {item["trainer/global_step"]: item for item in items if KEY in item}
    assert {step: {key: row[key] for key in as_wandb(expected[step])} for step, row in rows.items()} == {
        step: as_wandb(metrics) for step, metrics in expected.items()
    }
    (file,) = folder.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(file.read_text().splitlines()) if row[KEY]]
    assert {int(row["step"]): {key: float(row[key]) for key in KEYS} for row in rows} == expected
    (file,) = (folder / "tensorboard").rglob("events.*")
    events, mlflow = EventAccumulator(str(file)).Reload(), loggers["mlflow"]
    for key in KEYS:
        curve = {step: metrics[key] for step, metrics in expected.items()}
        assert {event.step: event.value for event in events.Scalars(key)} == pytest.approx(curve)
        assert {p.step: p.value for p in mlflow.experiment.get_metric_history(mlflow.run_id, key)} == curve


def table_of(reports):
    """What each tracker's table should hold, for the windows that draw."""
    drawn = [one for one in reports if one.step in (3, 7, 15)]
    return [{"step": one.step, **row} for one in drawn for row in media_of(RunReport(one)).rows]


@pytest.mark.slow
def test_wandb_media(everywhere):
    folder, _, reports = everywhere
    records = wandb_records(folder)
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    drawn = [item for item in items if "dead_relu_table/sites._type" in item]
    assert [item["trainer/global_step"] for item in drawn] == [3, 7, 15]
    assert {item["dead_relu_raster/net_1._type"] for item in drawn} == {"image-file"}
    assert {item["dead_relu_rates/net_3._type"] for item in drawn} == {"histogram"}
    assert sum(drawn[0]["dead_relu_rates/net_1.values"]) == 8
    tables = sorted(folder.rglob("media/table/**/*.json"), key=lambda path: path.stat().st_mtime)
    rows = [json.loads(path.read_text()) for path in tables]
    read = [dict(zip(table["columns"], row, strict=True)) for table in rows for row in table["data"]]
    assert read == [{key: row[key] for key in row if key != "step"} for row in table_of(reports)]
    alerts = [record["alert"] for record in records if record["type"] == "alert"]
    assert len(alerts) == 1
    assert alerts[0]["title"].startswith("Dead ReLU units in ")
    assert f"net.1: {int(reports[0]['net.1'].dead.sum())} of 8" in alerts[0]["text"]
    updates = [record["summary"]["update"] for record in records if record["type"] == "summary"]
    summary = {key: value for update in updates for key, value in update.items()}
    assert summary["dead_relu_summary/dead_fraction"] == reports[-1].dead_fraction
    worst = max(reports[-1].sites, key=lambda site: site.dead_fraction)
    assert summary["dead_relu_summary/worst_site"] == worst.name


@pytest.mark.slow
def test_tensorboard_media(everywhere):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, reports = everywhere
    (file,) = (folder / "tensorboard").rglob("events.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "histograms": 0, "tensors": 0}).Reload()
    assert set(events.Tags()["images"]) == {
        "dead_relu_overview/sites",
        "dead_relu_raster/net.1",
        "dead_relu_raster/net.3",
    }
    images = events.Images("dead_relu_raster/net.1")
    assert [image.step for image in images] == [3, 7, 15]
    raster = Raster()
    for one in reports:
        raster.add(one)
    painted = np.array(Image.open(io.BytesIO(images[-1].encoded_image_string)))
    assert np.array_equal(painted, image_of(raster.sites["net.1"], (192, 512)))
    histogram = events.Histograms("dead_relu_rates/net.1")[0].histogram_value
    assert histogram.num == 8
    layouts = events.Tensors("custom_scalars__config__")
    assert len(layouts) == 1
    assert b"dead_relu_sites/" in layouts[0].tensor_proto.string_val[0]


def test_the_legend_names_every_state():
    assert all(f" {state.label}" in LEGEND for state in State)


@pytest.mark.slow
def test_mlflow_media(everywhere):
    folder, _, reports = everywhere
    (file,) = (folder / "artifacts").rglob("sites.json")
    table = json.loads(file.read_text())
    read = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert read == [pytest.approx(row) for row in table_of(reports)]  # it rounds to ten digits
    pictures = [path.name for path in (folder / "artifacts").rglob("*.png")]
    assert sum("net.1" in name for name in pictures) == sum("overview" in name for name in pictures) == 3


@pytest.mark.slow
def test_mlflow_shows_no_progress_bar_for_the_table(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "true")
    fit(Net(), batches(16), Verdicts(**EVERYTHING), logger=loggers_of(new, tmp_path)["mlflow"], log_every_n_steps=1)
    assert "Downloading" not in capfd.readouterr().err
    assert os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] == "true"


@pytest.mark.slow
def test_files_beside_csv(everywhere):
    from PIL import Image

    folder, _, reports = everywhere
    (beside,) = (folder / "csv").rglob("dead_relu")
    assert (beside.parent / "metrics.csv").exists()
    assert {path.name for path in beside.iterdir()} == {
        "overview.png",
        "raster_net.1.png",
        "raster_net.3.png",
        "sites.csv",
    }
    read = list(csv.DictReader((beside / "sites.csv").read_text().splitlines()))
    expected = [{key: "" if value is None else str(value) for key, value in row.items()} for row in table_of(reports)]
    assert read == expected
    with Image.open(beside / "raster_net.1.png") as picture:
        assert picture.width > 400


# -- when, and how much --------------------------------------------------------------------------------------


def test_long_runs_draw_some_dozen_times():
    assert [n for n in range(1, 251) if is_due(n)] == [1, 2, 4, 8, 16, 32, 50, 100, 150, 200, 250]
    raster, one, drawn = Raster(), report(site()), 0
    for _ in range(3000):
        raster.add(one)
        drawn += is_due(raster.windows, raster.stride)
    assert drawn < 40


class Csv(Log):
    """Takes files, into a folder."""

    log_dir = None


Csv.__name__ = "CSVLogger"


def taker(folder):
    logger = Csv()
    logger.log_dir = str(folder)
    return logger


def test_only_the_sites_with_most_dead_units_are_drawn_and_all_are_in_the_table(tmp_path):
    sites = [site(40, f"layer{i}", dead=range(i % 40)) for i in range(60)]
    raster = Raster()
    raster.add(report(*sites, step=5))
    media = media_of(RunReport(report(*sites, step=5), raster))
    assert len(media.rasters) == len(media.rates) == MOST_SITES
    assert (media.left_out, len(media.rows)) == (28, 60)
    assert "layer39" in media.rasters
    assert "layer0" not in media.rasters
    assert list(media.rasters) == sorted(media.rasters, key=lambda name: int(name[5:]))
    assert len(raster.site_curves) == 60


def test_log_densities_of_latents_are_histograms(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = []

    class WandbLogger(Log):
        class experiment:
            summary, config, define_metric = {}, {}, staticmethod(lambda *call, **options: None)

        def log_metrics(self, metrics, step=None):
            rows.append(metrics)

    one = report(site(8, "sae"), step=5)
    raster, board = run(Raster(), [0]), TensorBoardLogger(tmp_path)
    for latents in (False, True):
        Reporter("a", [WandbLogger(), board], latents=latents).media(RunReport(one, raster), final=True)
    board.experiment.close()
    assert ["a_log_density/sae" in row for row in rows] == [False, True]
    found = rows[1]["a_log_density/sae"]
    counts = dict(zip(found.bins[:-1], found.histogram, strict=True))
    logs = [min(0.0, math.log10(rate + 1e-10)) for rate in one.sites[0].firing_rate.tolist()]
    for low, count in counts.items():
        assert count == sum(low <= log < low + 0.25 or (log == 0 and low == -0.25) for log in logs)
    (file,) = tmp_path.rglob("events.*")
    assert EventAccumulator(str(file)).Reload().Tags()["histograms"].count("a_log_density/sae") == 1


def test_the_end_of_fit_draws_once_and_other_ranks_never(tmp_path):
    raster, one = run(Raster(), [0], [1], [1]), report(site(), step=29)
    logger = taker(tmp_path)
    reporter = Reporter("a", [logger])
    Reporter("a", [logger], is_first_rank=False).media(RunReport(one, raster), final=True)
    reporter.media(RunReport(one, raster))
    assert not list(tmp_path.iterdir())
    reporter.media(RunReport(one, raster), final=True)
    reporter.media(RunReport(one, raster), final=True)
    assert len((tmp_path / "a" / "sites.csv").read_text().splitlines()) == 2


def test_a_logger_that_fails_with_pictures_still_gets_scalars(tmp_path):
    (tmp_path / "file").write_text("in the way")
    raster, bad, good = run(Raster(), [0]), taker(tmp_path / "file"), taker(tmp_path / "folder")
    reporter = Reporter("dead_relu", [bad, good])
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for step in (9, 19):
            one = report(site(), step=step)
            reporter.log(one)
            reporter.media(RunReport(one, raster), final=True)
    assert len([w for w in record if "CSVLogger took no media and is left out" in str(w.message)]) == 1
    assert len(bad.rows) == len(good.rows) == 2
    assert (tmp_path / "folder" / "dead_relu" / "overview.png").exists()


def test_mlflow_names_are_legal_and_never_collide():
    class MLFlowLogger:
        pass

    names = adapter_of(MLFlowLogger()).names_of(["a/x[0]", "a/x(0]", "a/x.0-relu"])
    assert names == {"a/x_0_": "a/x[0]", "a/x_0__": "a/x(0]", "a/x.0-relu": "a/x.0-relu"}


def test_alerts_are_off_unless_asked_for_and_are_joined_if_they_come_too_soon(monkeypatch):
    calls = []

    class WandbLogger(Log):
        class experiment:
            define_metric = staticmethod(lambda *call, **options: None)

            @staticmethod
            def alert(title, text, level):
                calls.append((title, text))

    logger, one = WandbLogger(), report(site(name="a" * 99), site(name="b", dead=[0]))
    Reporter("x", [logger]).alert(["b"], one)
    Reporter("x", [logger], is_first_rank=False, alerts=True).alert(["b"], one)
    assert not calls
    monkeypatch.setattr(time, "monotonic", lambda: now)
    now, reporter = 1000.0, Reporter("x", [logger], alerts=True)
    for name in ("a" * 99, "b", "b"):
        reporter.alert([name], one)
        now += 299
    assert len(calls) == 1
    assert len(calls[0][0]) < 64
    now += 4
    reporter.alert([], one)
    assert calls[1][0] == "Dead ReLU units in 2 layers"
    assert "b: 1 of 8" in calls[1][1]


@pytest.mark.parametrize("sites", [1, 3, 30, 200, pytest.param(1000, marks=pytest.mark.slow)])
def test_pictures_of_any_size(sites):
    raster = Raster()
    for step in (9, 19):
        last = report(*(site(3, f"a.very.long.path.{'x' * 60}.{i}") for i in range(sites)), step=step)
        raster.add(last)
    media = media_of(RunReport(last, raster))
    for picture in (media.overview, *media.rasters.values()):
        assert picture.dtype == np.uint8
        assert 192 <= picture.shape[0] <= 1000
        assert 512 <= picture.shape[1] <= 1024


def test_the_saved_workspace_is_built():
    pytest.importorskip("wandb_workspaces")
    spec = importlib.util.spec_from_file_location("view", Path(__file__).parents[3] / "examples" / "wandb_workspace.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    view = module.workspace_of("me", "mine", "dead_relu")
    names = ["Dead ReLU units", "Dead ReLU pictures", "Dead ReLU details"]
    assert [section.name for section in view.sections] == names
    assert view.sections[0].panels[2].metric_regex == "dead_relu_sites/.*"


class LongNames(Net):
    """Has two rectifiers whose names are too long for a file's, and differ in their middle alone."""

    def __init__(self):
        super().__init__(nn.Sequential())
        for part, module in zip("abcde", mlp().children(), strict=True):
            self.net.add_module("x" * 300 + part + "y" * 300, module)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:dead_relu.*is left out")
@pytest.mark.parametrize("kind", ["wandb", "tensorboard", "csv", "mlflow"])
def test_long_names_cost_no_tracker_anything(kind, tmp_path):
    import wandb

    logger = loggers_of(new, tmp_path)[kind]
    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(LongNames(), batches(4), monitor, logger=logger, log_every_n_steps=1)
    wandb.finish()
    assert monitor.failure is None
    adapter = adapter_of(logger)
    keys = [key for key in metrics_of(monitor.report) if "x" * 300 in key]
    names = adapter.names_of(keys)
    assert len(names) == 2
    assert max(map(len, names)) <= adapter.longest
    if kind == "csv":
        assert len(list(tmp_path.rglob("sites.csv"))) == 1
        assert len(list(tmp_path.rglob("raster_*.png"))) == 2
    if kind == "mlflow":
        assert all(logger.experiment.get_metric_history(logger.run_id, name) for name in names)


def test_names_that_are_cut_are_cut_alike_each_time_and_apart():
    adapter = adapter_of(type("MLFlowLogger", (Log,), {})())
    first, second = ("/".join(("dead_relu_sites", "x" * 300 + part + "y" * 300)) for part in "ab")
    names = adapter.names_of([first, second])
    assert len(names) == 2
    assert {key: name for name, key in adapter.names_of([second]).items()}[second] in names
