"""Small models and a Trainer without ornaments, for the tests of the callback."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.checkpoint import decode
from lightning_deadrelu.monitor.monitor import Monitor
from lightning_deadrelu.monitor.state import MonitorState, RunState
from lightning_deadrelu.observe.probe import Probe

KEY = "dead_relu/dead_fraction"
EVERYTHING = {"every_n_steps": 1, "window": 4, "min_samples": 1}


def mlp(dead: int = 3) -> nn.Sequential:
    """Two rectifiers of 8 and 6 units; the first ``dead`` units of the first are dead."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
    with torch.no_grad():
        net[0].bias[:dead] = -100.0
    return net


class Net(LightningModule):
    """Trains ``net`` to put out nothing; ``losses`` holds the curve."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.01, optimizer: Any = torch.optim.Adam) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.lr, self.optimizer = lr, optimizer
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = (self(batch) - 1).pow(2).mean()
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch).pow(2).mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return self.optimizer(trained, lr=self.lr)


def batches(count: int, size: int = 5, width: int = 4, seed: int = 1, **options: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(torch.randn(count * size, width, generator=generator), batch_size=size, **options)


class Loader:
    """Hands out the same batches in every run, and goes on where it was saved, as torchdata's loaders do."""

    def __init__(self, items):
        self.items, self.at = items, 0

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        self.at %= len(self.items)
        while self.at < len(self.items):
            self.at += 1
            yield self.items[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def tensors(count, size=5):
    return list(torch.randn(count, size, 4, generator=torch.Generator().manual_seed(5)))


def bare(**options: Any) -> dict[str, Any]:
    """Trainer options without ornaments, where ``options`` do not ask for them."""
    plain = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return {**plain, **options}


def fit(model: LightningModule, loader: Any, *callbacks: Any, val: Any = None, ckpt: Any = None, **options: Any) -> Any:
    trainer = Trainer(**bare(callbacks=list(callbacks), **options))
    trainer.fit(model, loader, val, ckpt_path=ckpt)
    return trainer


class Log:
    """A logger as a third party writes it, without a base class."""

    name = version = log_dir = save_dir = root_dir = None
    group_separator = "/"

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def verdicts(self, name: str = "dead_relu") -> list[tuple[int, dict[str, float]]]:
        return [(step, metrics) for step, metrics in self.rows if f"{name}/dead_fraction" in metrics]


def watchers() -> list[object]:
    """What a probe leaves in the process while it is armed."""
    from torch.nn.modules import module
    from torch.overrides import _get_current_function_mode_stack

    modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Probe)]
    return [*modes, *module._global_forward_hooks.values(), *module._global_forward_pre_hooks.values()]


def left_behind(model: nn.Module) -> tuple[object, ...]:
    """What there may be of ours in the process, and what hooks in a model."""
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    stance = torch._dynamo.eval_frame._stance
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return watchers(), limits, (stance.stance, stance.backend), hooks


class Nosy(Callback):
    """Notes at which events something watches."""

    def __init__(self):
        self.armed = set()
        self.calls = []

    def __getattribute__(self, name):
        if name.startswith("on_") or name in ("setup", "teardown"):
            calls, armed = object.__getattribute__(self, "calls"), object.__getattribute__(self, "armed")

            def note(*args, **kwargs):
                calls.append(name)
                if watchers():
                    armed.add(name)

            return note
        return object.__getattribute__(self, name)


WITHIN = {"on_train_batch_start", "on_before_zero_grad", "on_before_backward"}


def inner(monitor: DeadReLUMonitor) -> Monitor:
    """What a callback owns from the start of a fit on."""
    assert monitor._monitor is not None
    return monitor._monitor


def run_of(state: dict[str, Any]) -> RunState:
    """What a saved state holds of a run."""
    run = decode(MonitorState, state).run
    assert run is not None
    return run


class Verdicts(DeadReLUMonitor):
    """Keeps all reports."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.reports = []

    def on_verdict(self, trainer, pl_module, report):
        self.reports.append(report)


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert_same(list(a.values()), list(b.values()))
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def reports_of(monitor):
    return [report.to_dict() for report in monitor.reports]


def assert_alike(a, b):
    """Compare reports; sums of floats may be rounded otherwise, and all else is exact."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            rounded = key in ("dormancy", "firing_rate", "peak")
            assert a[key] == pytest.approx(b[key]) if rounded else assert_alike(a[key], b[key]) is None
    elif isinstance(a, list) and a and isinstance(a[0], dict):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_alike(x, y)
    else:
        assert a == b
