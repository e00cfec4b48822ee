"""What watching costs on a GPU: ResNet-50 and OPT-1.3B's blocks in bfloat16, eager and compiled.

CUDA events take the time. Beside it: how many kernels an observation adds to a step, how many bytes its operations move
(what a Triton kernel reads is no operation's), the lower limit, which is each rectifier's input once, and how long one
such read takes on this device; and how long the host takes for a forward, plain and observed. Run by
``cost.py --device cuda``; ``cost.py --gpu-models small`` runs the same code on a CPU, on models of no importance.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trackers import Tracker
from transformers import OPTConfig, OPTModel, ResNetConfig, ResNetModel
from turns import ALONE, Build, compare, slowdown

from lightning_deadrelu.observe.watch import Watch

POINTS = 0.02  # what an observation of every step may cost beyond one read of every rectifier's input


def resnet50(large: bool) -> tuple[nn.Module, Tensor]:
    small = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = ResNetConfig(**({} if large else small))  # by default it is a ResNet-50
    batch = torch.randn(128, 3, 224, 224) if large else torch.randn(2, 3, 32, 32)
    return ResNetModel(config).bfloat16(), batch.bfloat16()


def opt(large: bool) -> tuple[nn.Module, Tensor]:
    """As OPT-1.3B has them, but 8 of its 24 blocks."""
    sizes = {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192, "num_hidden_layers": 8}
    small = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 1}
    config = OPTConfig(**(sizes if large else small), num_attention_heads=32 if large else 4, vocab_size=1000)
    config.dropout, config.activation_function = 0.0, "relu"
    return OPTModel(config).bfloat16(), torch.randint(0, 1000, (8, 1024) if large else (4, 16))


def compiled(build: Build, backend: str) -> tuple[nn.Module, Tensor]:
    model, batch = build()
    return torch.compile(model, backend=backend), batch


class Moved(TorchDispatchMode):
    """Add up the bytes that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            self.bytes += sum(x.nbytes for x in tensors.values())
        return out


class Observation(NamedTuple):
    """Kernels it adds, bytes they move, bytes of all rectifiers' inputs, and the seconds to read these once.

    And the seconds that the host takes for a forward, plain and observed.
    """

    kernels: int
    moved: int
    least: int
    read: float
    host: tuple[float, float]


def observe(build: Build, device: torch.device) -> Observation:
    """Look at one observation of a training step from several sides."""
    model, batch = build()
    model, batch = model.to(device), batch.to(device)
    watch, moved, inputs = Watch(model, window=100), Moved(), []
    take, counting = watch.probe.router.sink, False

    def sink(site: Any, rectifier: Any, x: Tensor, *rest: Any) -> None:
        if not counting:
            return take(site, rectifier, x, *rest)
        inputs.append((x.shape, x.dtype))
        with moved:
            return take(site, rectifier, x, *rest)

    watch.probe.router.sink = sink
    for observed in (False, True, False, True):  # compile, and trace
        _step(model, batch, watch, observed)
    kernels = [_kernels(partial(_step, model, batch, watch, observed), device) for observed in (False, True)]
    host = _host_time(model, batch, watch, False), _host_time(model, batch, watch, True)
    counting = True
    with torch.compiler.set_stance("force_eager"):  # where calls are handed over one by one
        _step(model, batch, watch, True)
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in inputs]
    return Observation(kernels[1] - kernels[0], moved.bytes, sum(sizes), _read_once(inputs, device), host)


def _step(model: nn.Module, batch: Tensor, watch: Watch, observed: bool) -> None:
    if observed:
        watch.probe.arm()
    output = model(batch)
    watch.probe.pause()
    (output if isinstance(output, Tensor) else output[0]).square().mean().backward()
    watch.probe.disarm()
    watch.liveness.flush()
    model.zero_grad()


def _host_time(model: nn.Module, batch: Tensor, watch: Watch, observed: bool, repeats: int = 8) -> float:
    """Time a forward until the host is done with it: the median of some, each begun on an idle device."""
    taken = []
    for _ in range(repeats):
        _wait(batch.device)
        start = time.perf_counter()
        with watch.probe if observed else nullcontext():
            model(batch)
        taken.append(time.perf_counter() - start)
        watch.liveness.flush()
    return statistics.median(taken)


def _kernels(step: Callable[[], None], device: torch.device) -> int:
    """Count what runs on the device: kernels and copies; on a CPU, operations."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as run:
        step()
        _wait(device)
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    return sum(event.device_type == kind for event in run.events())


def _read_once(inputs: list[tuple[torch.Size, torch.dtype]], device: torch.device, repeats: int = 20) -> float:
    """Time a flat maximum of tensors like these: the median of some."""
    largest = max(shape.numel() for shape, _ in inputs)
    numbers = {dtype: torch.zeros(largest, dtype=dtype, device=device) for _, dtype in inputs}
    taken = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        for shape, dtype in inputs:
            numbers[dtype][: shape.numel()].amax()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_gpu(
    device: str,
    size: str,
    rounds: int,
    contestants: Callable[[], Mapping[str, Callback | None]],
    console: Console,
    part: str = "",
) -> None:
    """Print a table for each model and way to run it whose title holds the part.

    Other trackers' hooks would be compiled in, so none there.
    """
    backend = "inductor" if device == "cuda" else "eager"
    large = size == "large"
    for name, build in {"ResNet-50": partial(resnet50, large), "OPT blocks": partial(opt, large)}.items():
        ways = {
            "eager": (build, contestants()),
            "compiled": (
                partial(compiled, build, backend),
                {key: callback for key, callback in contestants().items() if not isinstance(callback, Tracker)},
            ),
        }
        for way, (made, callbacks) in ways.items():
            if part in (title := f"{name} ({size}), bf16, {way}"):
                print_one(title, made, device, rounds, callbacks, console)


def print_one(
    title: str, build: Build, device: str, rounds: int, callbacks: Mapping[str, Callback | None], console: Console
) -> None:
    """Print what each callback costs on one model, against the limits, and what an observation consists of."""
    blocks = compare(build, callbacks, rounds, device=device)
    seen = observe(build, torch.device(device))
    alone = statistics.median(block.step for block in blocks[ALONE])
    limits = {"ours, defaults": 0.005, "ours, every step": seen.read / alone + POINTS}
    limits["ours, defaults, and gradient evidence"] = 0.008
    table = Table("callback", "ms per step", "limit", "steps longer by", title=title)
    for name, own in blocks.items():
        middle, low, high = slowdown(own, blocks[ALONE])
        limit = f"{limits[name]:.1%}" if name in limits else ""
        longer = "" if name == ALONE else f"{middle:+.1%} [{low:+.1%}, {high:+.1%}]"
        table.add_row(name, f"{statistics.median(block.step for block in own) * 1e3:.2f}", limit, longer)
    console.print(table)
    plain, observed = (seconds * 1e3 for seconds in seen.host)
    console.print(
        f"an observation adds {seen.kernels} {'kernels' if device == 'cuda' else 'operations'}, which move"
        f" {seen.moved / 2**20:.1f} MiB; the rectifiers' inputs are {seen.least / 2**20:.1f} MiB, read once in"
        f" {seen.read * 1e3:.2f} ms; the host takes {plain:.1f} ms for a forward, {observed:.1f} ms if it is observed"
    )
