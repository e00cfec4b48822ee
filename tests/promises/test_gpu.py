"""What only a GPU can show; skipped without one."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.observe.gradient_evidence import GradientEvidence
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics import Rules, UnitHistory, count, judge

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def observe(model: nn.Module, batches: list[torch.Tensor]) -> Watch:
    watch = Watch(model, rules=Rules(1), window=len(batches))
    for number, batch in enumerate(batches):
        watch.liveness.observation = number
        with watch.probe:
            model(batch)
    assert watch.probe.failure is None
    return watch


def test_masks_equal_those_of_the_cpu():
    model = net().double()
    batches = [torch.randn(8, 3, 12, 12, dtype=torch.float64) for _ in range(3)]
    reports = []
    for device in ("cpu", "cuda"):
        watch = observe(copy.deepcopy(model).to(device), [batch.to(device) for batch in batches])
        reports.append(judge(watch.liveness.totals().to_host(), UnitHistory.empty(), watch.layout, Rules(1))[0])
    for one, other in zip(reports[0].sites, reports[1].sites, strict=True):
        for name in ("dead", "rare", "always_on", "frozen", "age"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_waits_for_the_device_between_windows(autocast):
    model = net().cuda()
    batch = torch.randn(8, 3, 12, 12, device="cuda")
    watch = Watch(model, rules=Rules(1), window=10)
    for number in range(5):
        watch.liveness.observation = number
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first allocates the layout
        try:
            with torch.autocast("cuda", enabled=autocast), watch.probe:
                loss = model(batch).float().square().mean()
            loss.backward()
            watch.liveness.flush()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert watch.probe.failure is None
    assert watch.liveness.totals().to_host().samples[0].sum() == 40


def test_gradients_are_asked_without_waiting_for_the_device():
    model = net().cuda()
    batch, optimizer = torch.randn(8, 3, 12, 12, device="cuda"), torch.optim.SGD(model.parameters(), lr=0.0)
    watch, evidence = Watch(model, rules=Rules(1), window=10), GradientEvidence(print)
    watch.trace()
    for number in range(5):
        watch.liveness.observation = number
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first allocates the layout
        try:
            optimizer.zero_grad()
            evidence.begin(watch, model, True, True)
            with watch.probe:
                loss = model(batch).square().mean()
            evidence.note_start()
            loss.backward()
            evidence.step(optimizer, number + 1, True)
            evidence.flush(watch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    totals = watch.liveness.totals().to_host()
    last, proved = totals.last_fired, totals.proved
    assert (proved >= 0).any()
    assert (last[proved >= 0] >= 0).all()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_code_counts_as_eager_code_does(mode, autocast):
    """Also where CUDA graphs reuse the memory of their outputs."""
    torch.compiler.reset()
    model = net().cuda()
    batches = [torch.randn(8, 3, 12, 12, device="cuda") for _ in range(6)]
    watches = []
    for run in (model, torch.compile(model, mode=mode)):
        watch = Watch(model, rules=Rules(1), window=len(batches))
        for number, batch in enumerate(batches):
            watch.liveness.observation = number
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast), watch.probe:
                loss = run(batch).float().square().mean()
            loss.backward()
        assert watch.probe.failure is None
        watches.append(watch)
    assert watches[1].compiled.refusal == ""
    assert watches[1].compiled._proven
    eager, compiled = (
        judge(watch.liveness.totals().to_host(), UnitHistory.empty(), watch.layout, Rules(1))[0] for watch in watches
    )
    for one, other in zip(eager.sites, compiled.sites, strict=True):
        assert (one.name, one.samples, one.elements) == (other.name, other.samples, other.elements)
        assert torch.equal(one.dead, other.dead)
        torch.testing.assert_close(one.firing_rate, other.firing_rate, atol=0.02, rtol=0)
    torch.compiler.reset()


def test_compiled_code_waits_for_nothing_between_windows():
    torch.compiler.reset()
    model = net().cuda()
    run, batch = torch.compile(model, mode="reduce-overhead"), torch.randn(8, 3, 12, 12, device="cuda")
    watch = Watch(model, rules=Rules(1), window=20)
    for number in range(10):
        watch.liveness.observation = number
        torch.cuda.set_sync_debug_mode("error" if number > 5 else "default")  # those before compile and record
        try:
            with watch.probe:
                loss = run(batch).square().mean()
            loss.backward()
            watch.liveness.flush()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert watch.compiled._proven
    assert watch.compiled.refusal == ""
    torch.compiler.reset()


class Scaled(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, batch_idx):
        return self.net(batch).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_fit_with_reduced_precision_is_the_same_with_the_monitor(precision):
    """With a scaler, which skips steps whose gradients overflow."""
    weights = []
    for callbacks in ([], [DeadReLUMonitor(every_n_steps=1, window=2, min_samples=1)]):
        model, batches = Scaled(), list(torch.randn(8, 8, 3, 12, 12, generator=torch.Generator().manual_seed(0)))
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options |= {"accelerator": "cuda", "devices": 1, "max_epochs": 1, "precision": precision}
        trainer = Trainer(callbacks=callbacks, **options)
        trainer.fit(model, DataLoader(batches, batch_size=None))
        weights.append([parameter.detach().cpu() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    assert callbacks[0].report.sites[0].samples == 16


def test_an_observation_is_one_kernel_a_site():
    x = torch.randn(64, 512, device="cuda")
    out = x.relu()
    count(x, out)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        count(x, out)
        torch.cuda.synchronize()
    names = [event.name for event in run.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("_reduce_rows" in name for name in names) == 1
    assert len(names) <= 10
