"""What watching may cost: no waiting between windows, and memory that depends on the units alone."""

import inspect
import weakref

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics import counts

WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique")


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(4 * 16, 8), nn.ReLU6(), nn.Linear(8, 2))
        self.batches = 0

    def training_step(self, batch, batch_idx):
        self.batches = batch_idx
        return self.head(self.conv(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Waiting(TorchDispatchMode):
    """Record when this package asks for something that has to wait for the device."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net, self.at = net, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        to_host = name == "_to_copy" and str((kwargs or {}).get("device")) == "cpu"
        if (name in WAITS or to_host) and _from_package(inspect.stack(0)):
            self.at.add(self.net.batches)
        return func(*args, **(kwargs or {}))


def _from_package(stack: list[inspect.FrameInfo]) -> bool:
    """Whether the package asked; a call of the model passes through the probe's ``__torch_function__`` too."""
    own = [frame.function for frame in stack if "lightning_deadrelu/" in frame.filename]
    return bool(own) and own[0] != "__torch_function__"


@pytest.mark.filterwarnings("ignore:dead_relu")
@pytest.mark.parametrize(
    ("every_n_steps", "remedy", "gradients"),
    [
        (1, None, False),
        *(pytest.param(*given, marks=pytest.mark.slow) for given in ((2, None, True), (1, "reset", True))),
    ],
)
def test_nothing_is_read_on_the_host_between_windows(monkeypatch, every_n_steps, remedy, gradients):
    monkeypatch.setattr(counts, "_may_look", lambda x: False)  # as on a GPU
    net, batches = Net(), [torch.randn(3, 1, 6, 6)] * 25
    settings = {"every_n_steps": every_n_steps, "window": 5, "min_samples": 1}
    monitor = DeadReLUMonitor(**settings, remedy=remedy, gradient_evidence=gradients)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=monitor,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with Waiting(net) as waiting:
        trainer.fit(net, DataLoader(batches, batch_size=None))
    ends = {every_n_steps * (5 * window - 1) for window in (1, 2, 3, 4, 5) if every_n_steps * (5 * window - 1) < 25}
    edits = {event.step for event in monitor.events if event.action == "edited"}  # who is looked at once more
    assert bool(edits) == bool(remedy)
    assert waiting.at <= ends | edits | {0, 24}  # 0: the start of fit and the first look; 24: the last batch
    assert ends <= waiting.at  # so the test would notice


def test_no_activation_is_kept():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(inplace=True))
    watch, kept = Watch(model), []
    for layer in model:
        layer.register_forward_hook(lambda module, args, out: kept.append(weakref.ref(out)))
    with watch.probe:
        model(torch.randn(16, 4))
        watch.liveness.flush()
    assert len(kept) == 4
    assert not any(reference() is not None for reference in kept)


@pytest.mark.parametrize("batch", [1, 64])
def test_memory_depends_on_the_units_alone(batch):
    model = nn.Sequential(nn.Conv2d(1, 7, 3), nn.ReLU())
    watch = Watch(model, window=10)
    with watch.probe:
        model(torch.randn(batch, 1, 9, 9))
    tensors = [value for value in vars(watch.liveness).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= 100 * 7 + 8 * 11  # and one site
