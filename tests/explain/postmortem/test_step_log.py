"""The ring of vital signs: against a slow loop, through a real Trainer, and where there is little to note."""

import gc
import math
import pickle
import sys
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import EVERYTHING, Loader, Net, batches, fit, inner, mlp, tensors

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.explain.postmortem.step_log import StepLog, StepLogState


def norm(gradients):
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients if gradient is not None))


class Slow(Callback):
    """Notes all that the ring holds, exactly and waiting for it."""

    def __init__(self):
        self.gradients, self.rates, self.losses, self.inputs = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(norm(p.grad for p in pl_module.parameters()))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.inputs.append(float(batch.abs().max()))


class Halving(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]


def rows_of(monitor):
    return inner(monitor).verdicts.recorder.steps.read(inner(monitor).verdicts.recorder.steps.ring)


def test_the_ring_holds_what_a_slow_loop_notes():
    slow, monitor = Slow(), DeadReLUMonitor(every_n_steps=3, window=2)
    fit(Halving(mlp()), batches(13), slow, monitor)
    rows = rows_of(monitor)
    assert rows.steps == tuple(range(13))
    assert rows.rates == tuple(slow.rates)
    assert rows.column("gradient").tolist() == pytest.approx(slow.gradients, rel=1e-5)  # none has over 256 entries
    assert rows.column("loss").tolist() == pytest.approx(slow.losses)
    assert rows.column("input_0").tolist() == pytest.approx(slow.inputs)
    assert rows.column("input_1").isnan().all()


def test_rows_are_optimizer_steps_and_gradients_are_not_yet_clipped():
    slow, monitor = Slow(), DeadReLUMonitor()
    fit(Net(mlp()), batches(7), slow, monitor, accumulate_grad_batches=2, gradient_clip_val=1e-6)
    rows = rows_of(monitor)
    assert rows.steps == (0, 1, 2, 3)
    assert rows.column("gradient").tolist() == pytest.approx(slow.gradients, rel=1e-5)
    largest = [max(slow.inputs[at : at + 2]) for at in (0, 2, 4, 6)]
    assert rows.column("input_0").tolist() == pytest.approx(largest)


def test_no_bit_of_a_row_depends_on_when_the_ring_is_read():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(50, 20)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    once, often = StepLog(64), StepLog(64)
    for step in range(40):
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for log in (once, often):
            log.note_gradients(optimizer)
            log.close_step(step)
        if step % 7 in (0, 2, 3):
            assert len(often.ring)
    assert torch.equal(*(log.read(log.ring).column("gradient") for log in (once, often)))


class Manual(Net):
    """Two optimizers of its own, of which the second rests at odd batches; the loss is not returned."""

    def __init__(self):
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(self(batch).square().mean())
        first.step()
        if batch_idx % 2 == 0:
            second.step()
        self.zero_grad()

    def configure_optimizers(self):
        first, second = (
            torch.optim.SGD(part.parameters(), lr) for part, lr in ((self.net[0], 0.1), (self.net[2:], 0.2))
        )
        return first, second


def test_optimizers_of_one_batch_add_up():
    exact = {0: [], 1: []}

    class Each(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            held = [p.grad for group in optimizer.param_groups for p in group["params"]]
            exact[len(held) > 2].append(norm(held))

    monitor = DeadReLUMonitor(every_n_steps=2)
    fit(Manual(), batches(6), Each(), monitor)
    rows = rows_of(monitor)
    both = [math.hypot(exact[0][at], exact[1][at // 2]) if at % 2 == 0 else exact[0][at] for at in range(6)]
    assert rows.column("gradient").tolist() == pytest.approx(both, rel=1e-5)
    assert rows.rates == (0.2, 0.1) * 3
    assert rows.column("loss").isnan().all()


def test_the_oldest_rows_make_room_and_a_saved_ring_goes_on():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    one, other = StepLog(rows=8), StepLog(rows=8)
    for step in range(20):
        if step == 11:
            other.restore(decode(StepLogState, encode(other.state)))
        layer.weight.grad = torch.full((2, 3), float(step))
        for log in (one, other):
            log.note_gradients(optimizer)
            log.note_batch(torch.tensor(float(step)), torch.ones(2, 3))
            log.close_step(step)
    rows = one.read(one.ring)
    assert rows.steps == tuple(range(12, 20))
    assert rows.column("loss").tolist() == list(range(12, 20))
    assert rows.column("gradient").tolist() == pytest.approx([step * 6**0.5 for step in range(12, 20)])
    assert torch.equal(other.read(other.ring).values[:, :3], rows.values[:, :3])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_estimate_of_a_large_gradient_is_near(layout):
    errors = []
    for seed in range(20):
        torch.manual_seed(seed)
        net = nn.Sequential(*(nn.Conv2d(64, 64, 3) for _ in range(4)), nn.Linear(512, 512))
        for p in net.parameters():
            rank_one = torch.randn(p.shape[0], *[1] * (p.ndim - 1)) * torch.randn(1, *p.shape[1:])
            p.grad = rank_one if p.ndim < 4 else rank_one.contiguous(memory_format=layout)
            p.grad[::2] = 0.0  # half of the units get none
        log = StepLog(rows=1)
        log.note_gradients(torch.optim.SGD(net.parameters(), 0.1))
        log.close_step(0)
        errors.append(float(log.read(log.ring).column("gradient")[0]) / norm(p.grad for p in net.parameters()))
    assert all(0.6 < error < 1.5 for error in errors)
    assert 0.93 < sum(errors) / len(errors) < 1.07


def test_what_cannot_be_read_is_passed_over():
    embedding, half, idle = nn.Embedding(9, 3, sparse=True), nn.Linear(40, 30).half(), nn.Linear(2, 2)
    embedding(torch.tensor([1, 2])).sum().backward()
    half.weight.grad = torch.full((30, 40), 300.0, dtype=torch.float16)  # whose square is no half
    net = nn.ModuleList([embedding, half, idle])
    log = StepLog(rows=2)
    log.note_gradients(torch.optim.SGD(net.parameters(), 0.1))
    log.note_batch(torch.ones(3), {"x": [torch.zeros(0, 3), torch.arange(4)], "y": None})
    log.close_step(0)
    log.close_step(1)
    rows = log.read(log.ring)
    assert rows.column("gradient")[0] == pytest.approx(300 * 1200**0.5, rel=1e-3)
    assert rows.values[0, 1:].isnan().all()
    assert rows.values[1].isnan().all()


# -- odd batches and gradients --------------------------------------------------------------------------------


class Beside(Net):
    """Its batches hold something beside the inputs."""

    def training_step(self, batch, batch_idx):
        return (self(batch["x"]) - 1).pow(2).mean()

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


class Exchanged(Net):
    """Gets another head, in the same place."""

    def on_train_batch_start(self, batch, batch_idx):
        self.net[4] = nn.Linear(6, 50 * batch_idx + 1)
        self.trainer.optimizers[0].param_groups[0]["params"] = list(self.net.parameters())


class Sparse(Net):
    """Has a gradient that is sparse at times."""

    def __init__(self, net=None, **settings):
        super().__init__(net, **settings)
        self.table = nn.Parameter(torch.ones(300, 4))

    def training_step(self, batch, batch_idx):
        rows = nn.functional.embedding(torch.tensor([1, 2]), self.table, sparse=batch_idx % 2 == 1)
        return super().training_step(batch + rows.mean(), batch_idx)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["nested", "float8"])
def test_odd_inputs_are_passed_over(kind):
    ones = torch.ones(3, 3)
    beside = torch.nested.nested_tensor(list(ones)) if kind == "nested" else ones.to(torch.float8_e4m3fn)
    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(Beside(), Loader([{"a": beside, "x": x} for x in tensors(8)]), monitor)
    assert monitor.report["net.1"].samples == 20
    assert inner(monitor).verdicts.recorder.guard.failure is None


@pytest.mark.parametrize("model", [Exchanged, Sparse])
def test_gradients_that_change_their_form(model):
    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(model(optimizer=torch.optim.SGD), Loader(tensors(8)), monitor)
    assert monitor.report["net.1"].samples == 20
    assert inner(monitor).verdicts.recorder.guard.failure is None
    rows = inner(monitor).verdicts.recorder.steps.read(inner(monitor).verdicts.recorder.steps.ring)
    assert rows.column("gradient").isfinite().all()


def test_optimizers_on_several_devices():
    log = StepLog(rows=4)
    for device in ("cpu", "meta"):
        layer = nn.Linear(3, 2, device=device)
        layer(torch.ones(1, 3, device=device)).sum().backward()
        log.note_gradients(torch.optim.SGD(layer.parameters(), lr=0.1))
    log.close_step(0)
    log.note_gradients(torch.optim.SGD(layer.parameters(), lr=0.1))
    log.close_step(1)
    first, second = log.read(log.ring).column("gradient").tolist()
    assert first == pytest.approx(math.sqrt(8))
    assert math.isnan(second)


# -- what a step costs, without noise -----------------------------------------------------------------------

VIEWS = {"alias", "as_strided", "detach", "expand", "reshape", "slice", "unsqueeze", "view"}


class Dispatched(TorchDispatchMode):
    """Lists the operations that are no views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names += [name] if name not in VIEWS else []
        return function(*args, **(kwargs or {}))


def logged(layers, steps=5):
    """Log some steps, and return a function that logs one more."""
    net = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer, batch = torch.optim.Adam(net.parameters()), [torch.ones(64, 3, 32, 32), torch.zeros(64)]
    log, loss = StepLog(), torch.tensor(1.0)

    def step():
        log.note_gradients(optimizer)
        log.note_batch(loss, batch)
        log.close_step(0)

    for _ in range(steps):
        step()
    return step


@pytest.mark.parametrize("layers", [3, 300])
def test_a_step_takes_two_operations(layers):
    step = logged(layers)
    with Dispatched() as dispatched:
        step()
    assert dispatched.names == ["cat", "cat"]


def calls_of(step):
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def test_no_python_runs_for_each_parameter():
    some, many = (calls_of(logged(layers)) for layers in (80, 800))  # 160 and 1,600 parameters
    assert some == many <= 109


def test_an_optimizer_is_held_no_longer_than_it_lives():
    layer, log = nn.Linear(3, 2), StepLog()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    log.note_gradients(optimizer)
    gone = [weakref.ref(layer.weight), weakref.ref(optimizer)]
    del layer, optimizer
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert pickle.loads(pickle.dumps(log)).ring.shape == log.ring.shape
