import csv
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from logged import KEYS, as_wandb, wandb_records
from torch import nn
from toys import EVERYTHING, KEY, Log, Net, Verdicts, batches, fit, mlp

from lightning_deadrelu import DeadReLUMonitor, LivenessReport
from lightning_deadrelu.report.loggers import Reporter, metrics_of


class Logged(Net):
    """Logs the number of its batch, as a curve to compare the x-axis with."""

    def training_step(self, batch, batch_idx):
        self.log("batch", float(batch_idx), on_step=True, on_epoch=False)
        return super().training_step(batch, batch_idx)


def watched(logger, **options):
    """Train for two windows under a logger; return what each verdict should have logged, by step."""
    monitor = Verdicts(**EVERYTHING)
    loggers = logger if isinstance(logger, list) else [logger]
    fit(Logged(), batches(8), monitor, logger=loggers, log_every_n_steps=1, **options)
    expected = {report.step: metrics_of(report) for report in monitor.reports}
    assert list(expected) == [3, 7]
    return expected


def test_every_logger_gets_each_verdict_in_one_call_with_the_keys_of_the_contract():
    first, second = Log(), Log()
    expected = watched([first, second])
    assert first.verdicts() == second.verdicts() == list(expected.items())
    assert all(set(metrics) == KEYS for metrics in expected.values())
    assert [set(metrics) & KEYS for _, metrics in first.rows if set(metrics) & KEYS] == [KEYS, KEYS]


def test_the_values_are_those_of_the_report():
    log, monitor = Log(), DeadReLUMonitor(**EVERYTHING)
    trainer = fit(Net(), batches(4), monitor, logger=log)
    report, metrics = monitor.report, log.verdicts()[-1][1]
    assert metrics[KEY] == report.dead_fraction == pytest.approx(float(trainer.callback_metrics[KEY]))
    assert metrics["dead_relu_details/dead_units"] == report.dead_units >= 3
    assert metrics["dead_relu_details/judged_fraction"] == 1.0
    assert metrics["dead_relu/newly_dead_units"] == report.dead_units
    assert metrics["dead_relu_details/dormant_fraction"] == sum(int(site.dormant.sum()) for site in report.sites) / 14
    for site in report.sites:
        assert metrics[f"dead_relu_sites/{site.name}"] == site.dead_fraction
    assert all(type(value) is float for value in metrics.values())


def test_a_name_of_ones_own_and_smooth_activations():
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
    log, monitor = Log(), DeadReLUMonitor(name="mine", include=["relu", "gelu"], **EVERYTHING)
    fit(Net(net), batches(4), monitor, logger=log)
    metrics = log.verdicts("mine")[-1][1]
    sites = {key for key in metrics if not key.startswith(("mine/", "mine_details/"))}
    assert sites == {"mine_dormant/net.1", "mine_sites/net.3"}
    assert monitor.report.units == 6


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"max_epochs": 2}], ids=str)
def test_the_x_axis_is_that_of_built_in_curves(options):
    log, monitor = Log(), Verdicts(every_n_steps=1, window=1)
    lr = LearningRateMonitor()
    fit(Logged(), batches(6), monitor, lr, logger=log, log_every_n_steps=1, **options)
    curves = {key: [step for step, row in log.rows if key in row] for key in ("batch", "lr-Adam", KEY)}
    assert curves[KEY] == sorted(set(curves["batch"])) == sorted(set(curves["lr-Adam"]))


def test_the_x_axis_of_manual_optimisation_counts_batches():
    class Twice(Logged):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                loss = super().training_step(batch, batch_idx)
                self.manual_backward(loss)
                self.optimizers().step()
                self.optimizers().zero_grad()

    log = Log()
    fit(Twice(), batches(4), DeadReLUMonitor(every_n_steps=1, window=1), logger=log, log_every_n_steps=1)
    assert [step for step, _ in log.verdicts()] == [0, 1, 2, 3]


# -- real loggers ------------------------------------------------------------------------------------------


def wandb_logger(kind, folder):
    """The run is started by the logger, handed to it, or found by it."""
    import wandb

    if kind == "own":
        return WandbLogger(save_dir=folder, offline=True, project="test")
    run = wandb.init(mode="offline", dir=folder, project="test")
    return WandbLogger(experiment=run) if kind == "given" else WandbLogger()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a wandb run already in progress")
@pytest.mark.parametrize("kind", ["own", "given", "found"])
def test_wandb(kind, tmp_path):
    import wandb

    expected = watched(wandb_logger(kind, tmp_path))
    wandb.finish()
    records = wandb_records(tmp_path)
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    rows = [item for item in items if KEY in item]
    assert [row["trainer/global_step"] for row in rows] == [3, 7]
    for row, metrics in zip(rows, expected.values(), strict=True):
        assert {key: row[key] for key in as_wandb(metrics)} == as_wandb(metrics)
    axes = {m.get("glob_name"): m.get("step_metric") for m in (r["metric"] for r in records if r["type"] == "metric")}
    sections = "dead_relu", "dead_relu_details", "dead_relu_sites"
    assert {axes.get(f"{section}/*") for section in sections} == {"trainer/global_step"}
    configs = [record["config"].get("update", {}) for record in records if record["type"] == "config"]
    names = {"dead_relu_sites/net_1": "net.1", "dead_relu_sites/net_3": "net.3"}
    assert [config["dead_relu_sites"] for config in configs if "dead_relu_sites" in config] == [names]


def test_wandb_keeps_sites_apart_whose_names_differ_in_dots_only():
    class Run(WandbLoggerOfRankOne):
        experiment = MagicMock()

    Run.__name__ = "WandbLogger"
    logger, net = Run(), nn.Sequential(OrderedDict(a=mlp(8), b=nn.Linear(1, 4), a_1=nn.ReLU(), c=nn.Linear(4, 1)))
    fit(Net(net), batches(4), DeadReLUMonitor(**EVERYTHING), logger=logger)
    metrics = logger.verdicts()[-1][1]
    assert metrics["dead_relu_sites/net_a_1"] == 1.0
    assert metrics["dead_relu_sites/net_a_1_"] < 1.0
    (mapped,) = (call.args[0]["dead_relu_sites"] for call in logger.experiment.config.update.call_args_list)
    assert mapped["dead_relu_sites/net_a_1"] == "net.a.1"
    assert mapped["dead_relu_sites/net_a_1_"] == "net.a_1"


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = watched(TensorBoardLogger(tmp_path))
    (file,) = tmp_path.rglob("events.*")
    events = EventAccumulator(str(file)).Reload()
    assert set(events.Tags()["scalars"]) >= KEYS
    for key in KEYS:
        read = [(event.step, event.value) for event in events.Scalars(key)]
        assert read == [(step, pytest.approx(metrics[key])) for step, metrics in expected.items()]


def test_csv(tmp_path):
    expected = watched(CSVLogger(tmp_path))
    (file,) = tmp_path.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(file.read_text().splitlines()) if row[KEY]]
    read = {int(row["step"]): {key: float(row[key]) for key in KEYS} for row in rows}
    assert read == expected


@pytest.mark.slow
def test_mlflow(tmp_path):
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/runs.db", artifact_location=str(tmp_path / "artifacts"))
    expected = watched(logger)
    for key in KEYS:
        history = logger.experiment.get_metric_history(logger.run_id, key)
        assert {point.step: point.value for point in history} == {s: metrics[key] for s, metrics in expected.items()}


class Unknown(Logger):
    """A third party's logger."""

    name, version = "unknown", 0

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_an_unknown_logger():
    logger = Unknown()
    expected = watched(logger)
    assert [row for row in logger.rows if KEY in row[1]] == list(expected.items())


# -- what can go wrong -------------------------------------------------------------------------------------


class Broken(Log):
    calls = 0

    def log_metrics(self, metrics, step=None):
        if KEY in metrics:
            self.calls += 1
            raise ConnectionError("the server is gone")


def test_a_logger_that_fails_is_left_out_and_the_others_are_served():
    broken, log = Broken(), Log()
    with pytest.warns(
        UserWarning, match="Broken took no metrics and is left out: ConnectionError.*server is gone"
    ) as record:
        watched([broken, log])
    assert sum("took no metrics" in str(warning.message) for warning in record) == 1
    assert broken.calls == 1
    assert len(log.verdicts()) == 2


class LateLogger(Callback):
    """Gives the Trainer its logger when training starts."""

    def __init__(self, logger):
        self.logger = logger

    def on_train_start(self, trainer, pl_module):
        trainer.logger = self.logger


def test_a_logger_that_another_callback_brings_when_training_starts_gets_all():
    log = Log()
    fit(Net(), batches(8), DeadReLUMonitor(**EVERYTHING), LateLogger(log))
    assert log.verdicts()


@pytest.mark.filterwarnings("default:.*the Trainer has no logger")
def test_without_a_logger_there_is_one_warning_and_all_else_works():
    monitor = DeadReLUMonitor(**EVERYTHING)
    with pytest.warns(UserWarning, match="the Trainer has no logger, so nothing is logged") as record:
        trainer = fit(Net(), batches(8), monitor)
    assert sum("no logger" in str(warning.message) for warning in record) == 1
    assert float(trainer.callback_metrics[KEY]) == pytest.approx(monitor.report.dead_fraction)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_progress_bar_shows_what_the_users_module_logs():
    monitor, seen = DeadReLUMonitor(**EVERYTHING), []

    class Watching(Net):
        def training_step(self, batch, batch_idx):
            self.log("dead", self.trainer.callback_metrics[KEY], prog_bar=True)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args):
            seen.append(self.trainer.progress_bar_metrics["dead"])

    fit(Watching(), batches(8), monitor, max_epochs=2)
    assert seen[:4] == [0.0] * 4
    assert seen[4] >= 3 / 14
    assert seen[7] == seen[4]  # until the next verdict


class WandbLoggerOfRankOne(Log):
    """Its run is a dummy that takes nothing."""

    @property
    def experiment(self):
        raise AssertionError("no rank but 0 may touch the run")


class WandbLoggerWithoutRun(Log):
    """Its run could not be started."""

    experiment = None


WandbLoggerOfRankOne.__name__ = WandbLoggerWithoutRun.__name__ = "WandbLogger"


def test_no_rank_but_zero_touches_a_run():
    logger = WandbLoggerOfRankOne()
    Reporter("dead_relu", [logger], is_first_rank=False).log(LivenessReport((), 5))
    assert [step for step, _ in logger.rows] == [5]


def test_a_run_that_cannot_be_prepared_is_left_out():
    logger, log, monitor = WandbLoggerWithoutRun(), Log(), DeadReLUMonitor(**EVERYTHING)
    with pytest.warns(UserWarning, match="WandbLogger took no metrics and is left out"):
        fit(Net(), batches(4), monitor, logger=[logger, log])
    assert logger.verdicts() == []
    assert len(log.verdicts()) == 1


@pytest.mark.slow
def test_wandb_need_not_be_installed(tmp_path):
    script = f"""
        import sys, warnings
        sys.modules["wandb"] = None
        warnings.simplefilter("ignore")
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from lightning.pytorch.loggers import CSVLogger
        from toys import EVERYTHING, Net, batches, fit
        from lightning_deadrelu import DeadReLUMonitor
        monitor = DeadReLUMonitor(**EVERYTHING)
        fit(Net(), batches(4), monitor, logger=CSVLogger({str(tmp_path)!r}))
        assert monitor.report.dead_units >= 3
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120, capture_output=True)
    (file,) = tmp_path.rglob("metrics.csv")
    assert KEY in file.read_text()


@pytest.mark.filterwarnings("ignore:.*did not run in this window")
def test_a_model_that_grows_gets_its_new_site_mapped_and_logged():
    class Growing(Net):
        def __init__(self):
            super().__init__(nn.ModuleList([mlp(), mlp()]))

        def training_step(self, batch, batch_idx):
            return self.net[int(batch_idx > 3)](batch).mean()

    log = Log()
    fit(Growing(), batches(8), DeadReLUMonitor(**EVERYTHING), logger=log)
    sites = [{key for key in metrics if key.startswith("dead_relu_sites/")} for _, metrics in log.verdicts()]
    assert [len(names) for names in sites] == [2, 4]
    assert not any(torch.tensor(value).isnan() for _, metrics in log.verdicts() for value in metrics.values())
