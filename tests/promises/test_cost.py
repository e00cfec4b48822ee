"""What the table of costs says is what was measured: callbacks take turns, and trackers compute what they should."""

import collections
import contextlib
import io
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import cost
import cost_gpu
import cost_small
import pytest
import torch
import trackers
import turns
from lightning.pytorch import Callback
from rich.console import Console
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Loader, Net, fit

from lightning_deadrelu import DeadReLUMonitor, watch
from lightning_deadrelu.observe.watch import Watch


def _small(scale: int = 1) -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
    return net, torch.randn(3 * scale, 4)


def test_in_the_table_of_costs_all_callbacks_take_turns_and_see_their_own_steps_alone():
    callbacks = cost.contestants()
    assert {turns.ALONE, cost.DEFAULTS, cost.EVERY_STEP, *trackers.TRACKERS} <= set(callbacks)
    blocks = turns.compare(_small, callbacks, rounds=2, block=10)
    assert {name: len(taken) for name, taken in blocks.items()} == dict.fromkeys(callbacks, 2)
    for name, taken in blocks.items():
        assert all((block.inside > 0) == (name != turns.ALONE) and block.inside < block.step for block in taken)
    samples = [callbacks[name].report.sites[0].samples for name in (cost.DEFAULTS, cost.EVERY_STEP)]
    assert samples == [3 * 3, 10 * 3]  # one step in ten of three turns; the last window of ten steps
    assert len(callbacks["zero share, .item() per layer"].told) == 2
    assert len(callbacks["fastai ActivationStats"].told) == 3
    assert len(callbacks["Composer ActivationMonitor"].told) == 2 * (5 + 1)  # layers, and all of them together


def test_time_inside_is_counted_once_where_one_function_calls_another(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(trackers, "clock", lambda: now[0])
    run = turns.Turns({}, 1, 1)

    def wait(seconds, then=lambda: None):
        now[0] += seconds
        then()

    inner = run.around(lambda: wait(1.0))
    run.around(lambda: wait(2.0, inner))()
    inner()
    assert run.inside == 4.0


def test_the_table_of_costs_has_a_row_for_each_callback():
    rows = cost.rows(_small, rounds=1)
    assert [row[0] for row in rows] == list(cost.contestants())
    assert {len(row) for row in rows} == {5}
    assert [row[3] for row in rows][1:3] == ["0.5%", "3.0%"]


def test_batches_that_are_not_observed_are_timed():
    took = cost.unobserved(2, rounds=3)
    assert len(took) == 3
    assert 0 < took[0] == min(took)


def test_trackers_compute_what_they_are_known_for():
    x = torch.tensor([[-1.0, 0.0, 0.04, 3.0], [2.0, 2.0, 5.0, -4.0]])
    told = {}
    for kind in trackers.TRACKERS.values():
        tracker = kind()
        tracker.see("layer", (), x)
        told[kind.__name__] = next(iter(tracker.told.values()))
    assert told["ZeroShare"] == pytest.approx([3 / 8])
    assert told["ActivationStats"] == pytest.approx([x.mean().item(), x.std().item(), 4 / 8])
    rows = x.double().tolist()
    centred = [[value - sum(row) / 4 for value in row] for row in rows]
    kurtosis = [4 * sum(v**4 for v in row) / sum(v**2 for v in row) ** 2 for row in centred]
    norms = [sum(v**2 for v in row) ** 0.5 for row in rows]
    expected = [sum(norms) / 2, sum(map(sum, rows)) / 8, sum(kurtosis) / 2, (3 + 5) / 2]
    assert told["ActivationMonitor"] == pytest.approx(expected, rel=1e-5)


def test_the_interval_of_the_median_holds_it_in_95_of_100_cases():
    generator = torch.Generator().manual_seed(0)
    alone, hits = [turns.Block(1.0, 0.0)] * 10, 0
    for _ in range(1000):
        noise = torch.rand(10, generator=generator).tolist()
        _, low, high = turns.slowdown([turns.Block(value, 0.0) for value in noise], alone)
        hits += low <= 0.5 - 1 <= high
    assert 950 <= hits < 1000  # 97.9 % by the binomial law


@pytest.mark.timing
@pytest.mark.parametrize("rates", [False, True])
def test_an_observation_costs_in_proportion_to_what_it_reads(rates):
    def build(scale):
        return nn.Sequential(nn.Linear(8, 1024), nn.ReLU()), torch.randn(2048 * scale, 8)

    def ratio():
        small, large = (cost.observation(partial(build, scale), 9, rates=rates) for scale in (1, 2))
        assert (small.size, large.size) == (8, 16)  # MiB, neither of which the caches hold
        return large.took / small.took

    assert any(ratio() < 2.5 for _ in range(5))  # other programs may disturb one of them


@pytest.mark.parametrize("name", cost_small.MODELS)
def test_steps_of_small_operations_are_timed(name):
    least, median = cost_small.longer(*cost_small.MODELS[name](), steps=2)
    assert 0.5 < least < 20
    assert 0.5 < median < 20


@pytest.mark.slow
@pytest.mark.parametrize("build", [cost_gpu.resnet50, cost_gpu.opt])
def test_the_table_for_gpus_runs_without_one(build):
    torch.manual_seed(0)
    console = Console(record=True, width=120, file=io.StringIO())
    callbacks = {turns.ALONE: None, cost.EVERY_STEP: DeadReLUMonitor(every_n_steps=1)}
    made = partial(cost_gpu.compiled, partial(build, False), "eager")
    cost_gpu.print_one("small", made, "cpu", 1, callbacks, console)
    text = " ".join(console.export_text().split())
    assert cost.EVERY_STEP in text
    assert re.search(
        r"adds [1-9]\d* operations, which move \d+\.\d MiB; .*read once in \d+\.\d\d ms; the host takes", text
    )


class Counted(TorchDispatchMode):
    """Count operations by training batch, views apart."""

    def __init__(self):
        super().__init__()
        self.batch, self.operations = -1, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
        self.operations[self.batch] += not views
        return func(*args, **(kwargs or {}))


class Residual(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))

    def forward(self, x):
        for layer in self.layers:
            x = x + functional.relu(layer(x)) * 0.1
        return x


def _operations(build, shape, callbacks):
    class Numbered(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            counted.batch = batch_idx

    with Counted() as counted:
        fit(Net(build()), Loader([torch.randn(shape)] * 12), Numbered(), *callbacks)
    return counted.operations


MODELS = {
    "MLP": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)), (5, 4)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU()),
        (2, 1, 8, 8),
    ),
    "20 functional rectifiers": (lambda: Residual(20), (5, 4)),
}


@pytest.mark.parametrize(
    ("model", "unobserved", "peaks", "rates"),
    [("MLP", 2, 6, 53), ("convolutions", 2, 8, 61), ("20 functional rectifiers", 2, 42, 143)],
)
def test_a_batch_has_just_so_many_operations_more(model, unobserved, peaks, rates):
    monitor = DeadReLUMonitor(every_n_steps=2, window=3)
    own, plain = (_operations(*MODELS[model], callbacks) for callbacks in ([monitor], []))
    added = [own[batch] - plain[batch] for batch in range(12)]
    assert (added[9], added[8], added[6]) == (unobserved, peaks, rates)  # of the second window: the first has a check


@pytest.mark.parametrize("model", MODELS)
def test_an_observation_reads_each_input_once_and_five_times_where_rates_are_read(model):
    build, shape = MODELS[model]
    watch, reads, inputs = Watch(build(), window=3), [], []
    take = watch.probe.router.sink

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            views = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
            wide = [arg.nbytes for arg in args if isinstance(arg, torch.Tensor) and arg.numel() == self.numel]
            reads.extend([] if views else wide)
            return func(*args, **(kwargs or {}))

    def sink(site, rectifier, x, *rest):
        inputs.append(x.nbytes)
        mode = Reads()
        mode.numel = x.numel()
        with mode:
            take(site, rectifier, x, *rest)

    watch.probe.router.sink = sink
    share = []
    for number in range(3):
        watch.liveness.observation = number
        reads.clear(), inputs.clear()
        with watch.probe:
            watch.probe.model(torch.randn(shape))
        share.append(sum(reads) / sum(inputs))
    assert watch.probe.failure is None
    assert share == [5, 1, 5]


@pytest.mark.slow
def test_compiled_code_reads_each_input_once_more_and_has_no_kernel_more():
    torch.compiler.reset()
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 1))
    run, watch, x = torch.compile(net), Watch(net, window=1), torch.randn(40, 64)
    _, (plain, *_) = run_and_get_code(run, x)
    with watch.probe:
        run(x)  # as it stands: that all rectifiers are in compiled code is known afterwards
    with watch.probe:
        _, (observed, *_) = run_and_get_code(run, x)
    assert watch.probe.failure is None
    kernels = [code.count("async_compile.cpp_pybinding(") for code in (plain, observed)]
    assert kernels == [2, 2]
    for units in (96, 80):  # both without a rest behind the last full vector, for which there would be a second loop
        by_unit = [len(re.findall(rf"\(x0 \+ {units}L\*x1\)", code)) for code in (plain, observed)]
        assert by_unit == [0, 1]
        all_over = [code.count(f"x0<static_cast<int64_t>({40 * units}L)") for code in (plain, observed)]
        assert all_over == [1, 1]
    torch.compiler.reset()


def _python_calls_more(model, x):
    """Count, by name, the Python calls that an observed forward makes more than a plain one."""
    watch, made = Watch(model, window=9), collections.Counter()

    def run(observed):
        made.clear()
        with watch.probe if observed else contextlib.nullcontext():
            sys.setprofile(lambda frame, event, arg: made.update([frame.f_code.co_name] if event == "call" else []))
            try:
                model(x)
            finally:
                sys.setprofile(None)
        return made.copy()

    for number in range(2):  # the first settles the layout
        watch.liveness.observation = number
        observed = run(True)
    assert watch.probe.failure is None
    observed.subtract(run(False))
    return observed


def test_the_way_of_a_torch_call_takes_no_more_python_calls_than_it_did():
    made = _python_calls_more(Residual(20), torch.randn(5, 4))
    assert made.total() / (4 * 20) <= 21  # linear, relu, mul and add


def test_of_torchs_own_layers_no_function_is_looked_at():
    layers = [layer for _ in range(20) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())]
    made = _python_calls_more(nn.Sequential(*layers), torch.randn(5, 4))
    assert made["__torch_function__"] == 0
    assert made["_leave_leaf"] == 60
    assert made.total() / 60 <= 26


def test_a_windows_end_takes_no_more_calls_for_each_layer_than_it_did():
    def calls(layers):
        made, model = collections.Counter(), nn.Sequential()
        for _ in range(layers):
            model.extend([nn.Linear(4, 4), nn.ReLU()])
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with watch(model, optimizer, every_n_steps=1, window=2, min_samples=1000) as monitor:
            for step in range(24):
                model(torch.randn(5, 4)).sum().backward()
                optimizer.step()
                sys.setprofile((lambda frame, event, arg: made.update([event])) if step == 23 else None)
                monitor.step()
                sys.setprofile(None)
        return made["call"] + made["c_call"]

    assert (calls(12) - calls(4)) / 8 <= 440


def test_an_unobserved_batch_takes_no_more_python_calls_than_it_did(monkeypatch):
    made, monitor = collections.Counter(), DeadReLUMonitor(every_n_steps=100)

    def counted(hook):
        def run(trainer, pl_module, *rest):
            profiled = trainer.fit_loop.epoch_loop.batch_idx in range(20, 30)
            sys.setprofile((lambda frame, event, arg: made.update([event])) if profiled else None)
            try:
                hook(trainer, pl_module, *rest)
            finally:
                sys.setprofile(None)

        return run

    for name in turns.HOOKS:
        monkeypatch.setattr(monitor, name, counted(getattr(monitor, name)))
    fit(Net(MODELS["MLP"][0]()), Loader([torch.randn(5, 4)] * 30), monitor)
    assert 50 < made["call"] / 10 <= 72


def test_the_script_for_gpus_is_a_script_and_names_files_that_exist():
    root = Path(__file__).parents[2]
    script = root / "tests" / "benchmarks" / "gpu.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    named = re.findall(r"tests/\S+?\.py", script.read_text())
    assert len(named) == 3
    assert all((root / name).exists() for name in named)
    limits = [int(number) for number in re.findall(r"^step (\d+)", script.read_text(), re.MULTILINE)]
    assert sum(limits) < 8 * 60
