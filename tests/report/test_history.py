"""What is kept of a run, and what a run tells at its end."""

import json

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from toys import Loader, Log, Net, assert_same, batches, fit, mlp, run_of, tensors

from lightning_deadrelu import DeadReLUMonitor, LivenessReport
from lightning_deadrelu.checkpoint import encode
from lightning_deadrelu.report.history import RunHistory

EAGER = {"every_n_steps": 1, "window": 4, "min_samples": 2, "threshold": 0.0}


def test_the_open_window_is_shown_and_not_kept():
    record = RunHistory()
    record.close(LivenessReport((), step=9), {})
    raster = record.with_open(LivenessReport((), step=12), {})
    assert raster.steps == (9, 12)
    assert record.raster.steps == (9,)


def test_the_history_has_every_window_and_edit():
    torch.manual_seed(0)
    log, monitor = Log(), DeadReLUMonitor(remedy="reset", include=["net.1"], **EAGER)
    fit(Net(mlp(3)), batches(40, 8), monitor, logger=log)
    curves = monitor.run_report.history.curves
    logged = log.verdicts()
    assert list(curves["dead_fraction"]) == [metrics["dead_relu/dead_fraction"] for _, metrics in logged]
    assert list(curves["remedied_units"]) == [metrics["dead_relu_details/remedied_units"] for _, metrics in logged]
    assert sum(curves["remedied_units"]) == sum(len(e.units) for e in monitor.events if e.action == "edited") > 0


class Save(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_a_resumed_run_has_the_history_of_an_uninterrupted_one(tmp_path):
    def run(*callbacks, ckpt=None):
        torch.manual_seed(0)
        monitor = DeadReLUMonitor(remedy="reset", **EAGER)
        fit(Net(mlp(3)), Loader(tensors(30, 8)), monitor, *callbacks, ckpt=ckpt, max_epochs=2)
        return monitor

    whole = run(Save(tmp_path))
    for step in (3, 10, 27, 41):
        resumed = run(ckpt=tmp_path / f"{step}.ckpt")
        assert_same(encode(run_of(resumed.state_dict()).history), encode(run_of(whole.state_dict()).history))
        assert resumed.summary() == whole.summary()


def test_the_end_of_fit_is_told_on_the_terminal(capsys):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy="reset", **EAGER)
    fit(Net(mlp(3)), batches(40, 8), monitor)
    assert monitor.summary() in capsys.readouterr().out
    assert "net.1" in monitor.summary()


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_report_is_written_also_after_an_error(error, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if error and batch_idx == 30:
                raise error

    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy="reset", report_dir=str(tmp_path / "reports"), **EAGER)
    if error:
        with pytest.raises(error):
            fit(Net(mlp(3)), batches(40, 8), monitor, Stop())
    else:
        fit(Net(mlp(3)), batches(40, 8), monitor, Stop())
    page = (tmp_path / "reports" / "report.html").read_text(encoding="utf-8")
    plain = json.loads((tmp_path / "reports" / "report.json").read_text(encoding="utf-8"))
    assert "net.1" in page
    assert "http" not in page.replace("http://www.w3.org/", "")
    assert plain


def test_the_run_is_drawn():
    pytest.importorskip("matplotlib").use("agg")
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(**EAGER)
    fit(Net(mlp(3)), batches(20, 8), monitor)
    figure, axes = monitor.plot()
    assert len(axes) >= 2
    figure.clear()


def test_units_that_sink_are_at_risk_before_they_die():
    class Sinking(Net):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.net[0].bias[0] = 4.0 - 0.05 * batch_idx
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    log = Log()
    monitor = DeadReLUMonitor(every_n_steps=1, window=4, min_samples=30)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        net[0].weight[0] *= 0.2
    fit(Sinking(net, lr=0.0), batches(160, 16), monitor, logger=log)
    risk = [metrics["dead_relu/at_risk_fraction"] for _, metrics in log.verdicts()]
    dead = [metrics["dead_relu_details/dead_units"] for _, metrics in log.verdicts()]
    assert monitor.report["net.1"].dead[0]
    first_risk = next(i for i, value in enumerate(risk) if value > 0)
    first_dead = next(i for i, value in enumerate(dead) if value > 0)
    assert first_risk < first_dead
