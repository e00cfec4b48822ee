"""Train a library's model, watched and unwatched, and hold what the monitor says against the dispatcher."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.loggers import CSVLogger
from recorder import Recorder, Rectified, fires, no_fast_path
from torch import Tensor

from lightning_deadrelu import DeadReLUMonitor, LivenessReport

WINDOW, MIN_SAMPLES = 5, 60
SETTINGS: dict[str, Any] = {"every_n_steps": 1, "window": WINDOW, "min_samples": MIN_SAMPLES}
DEEP = -100.0
"""A bias so low that the unit fires on nothing."""

STEPS, LIFTING = 60, 260
"""Batches of a run, and of one with ``remedy="auto"``, which may lift units over 200 batches."""

Train = Callable[[int, dict[str, Any]], object]
"""Builds a library's model and trains it for so many batches, with these options of a Trainer, by its own code."""


# -- callbacks that look on ----------------------------------------------------------------------------------


class Weights(Callback):
    """Keeps the state of the model as it is when training ends."""

    def __init__(self, kept: dict[str, Tensor]) -> None:
        self.kept = kept

    def __deepcopy__(self, memo: dict[int, object]) -> Weights:
        return self  # some libraries train with copies of the callbacks

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        state = pl_module.state_dict()
        self.kept.update({name: value.clone() for name, value in state.items() if isinstance(value, Tensor)})


class Recording(Callback):
    """Records the rectifiers of each training forward, from the start of a batch to its backward pass."""

    def __init__(self) -> None:
        self.batches: list[list[Rectified]] = []
        self.recorder: Recorder | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Recording:
        return self

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.recorder = Recorder()
        self.recorder.__enter__()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)
            self.batches.append(self.recorder.calls)
            self.recorder = None


class Plant(Callback):
    """Kills the first quarter of a layer's units before training starts."""

    def __init__(self, bias: str) -> None:
        self.bias = bias

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            bias = pl_module.get_parameter(self.bias)
            bias[: quarter(len(bias))] = DEEP


def quarter(units: int) -> int:
    """Tell how many units of a layer are planted dead."""
    return max(1, units // 4)


class Call(NamedTuple):
    """A call of a rectifier that the monitor counts: the number of its site, its input, where the units are."""

    number: int
    x: Tensor
    dims: tuple[int, ...]


class Listening(DeadReLUMonitor):
    """Keeps all verdicts, and which calls of each batch were counted for which site."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.batches: list[list[Call]] = []
        self.verdicts: list[tuple[int, LivenessReport]] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Listening:
        return self

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        assert self._monitor is not None
        self._monitor.watch.subscribe(self._take)

    def _take(self, number: int, rectifier: Any, x: Tensor, dims: tuple[int, ...], valid: Any = None) -> None:
        self.batches[-1].append(Call(number, x.detach().clone(), dims))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append([])
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_verdict(self, trainer: Any, pl_module: Any, report: LivenessReport) -> None:
        self.verdicts.append((len(self.batches), report))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sites, by number."""
        assert self._monitor is not None
        return tuple(self._monitor.watch.layout.names)


# -- one run -------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """What is left of a run: the weights, and the texts of warnings."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def trained(train: Train, *callbacks: Callback, steps: int = STEPS) -> Trained:
    """Train from the same seed with some callbacks."""
    done = Trained()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as raised, no_fast_path():
        warnings.simplefilter("always")
        seed_everything(3, verbose=False)
        train(
            steps,
            {
                "accelerator": "cpu",
                "devices": 1,
                "callbacks": [*callbacks, Weights(done.weights)],
                "logger": CSVLogger(folder),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": folder,
            },
        )
    done.warnings += [str(one.message) for one in raised]
    return done


# -- the ground truth ----------------------------------------------------------------------------------------


def matched(truth: Sequence[Rectified], counted: Sequence[Call]) -> list[Rectified | None]:
    """Find what the dispatcher saw of each counted call, by its values and in order; None where it saw nothing."""
    found: list[Rectified | None] = []
    rest = iter(truth)
    for call in counted:
        found.append(next((one for one in rest if one.x.shape == call.x.shape and torch.equal(one.x, call.x)), None))
    return found


def samples_of(call: Call) -> int:
    """An image behind a convolution, a row where the units come last."""
    return math.prod(call.x.shape[:-1]) if call.dims == (-1,) else call.x.shape[0]


class Observed(NamedTuple):
    """One site in one batch: which units fired, and on how many samples none could have been missed."""

    fired: Tensor
    samples: int


def observed(truth: Sequence[Rectified], counted: Sequence[Call]) -> dict[int, Observed]:
    """Tell by brute force who fired in a batch, by number of the site."""
    sites: dict[int, Observed] = {}
    for call, true in zip(counted, matched(truth, counted), strict=True):
        if true is None:
            raise AssertionError(f"site {call.number}: the dispatcher saw no such call")
        fired, samples = fires(true.x, true.hinge, call.dims), samples_of(call)
        before = sites.get(call.number, Observed(torch.zeros_like(fired), 0))
        sites[call.number] = Observed(before.fired | fired, before.samples + samples)
    return sites


@dataclass
class Masks:
    """What a verdict has to say of a site."""

    silent: Tensor
    age: Tensor

    @property
    def dead(self) -> Tensor:
        return self.silent & (self.age >= MIN_SAMPLES)


def masks(batches: Sequence[dict[int, Observed]]) -> dict[int, Masks]:
    """Go through all batches up to a verdict; its window started at the last multiple of the window's length."""
    known: dict[int, Masks] = {}
    start = (len(batches) - 1) // WINDOW * WINDOW
    for place, batch in enumerate(batches):
        for number, (fired, samples) in batch.items():
            one = known.setdefault(number, Masks(torch.zeros_like(fired), torch.zeros(len(fired), dtype=torch.int64)))
            fresh = place >= start and not any(number in earlier for earlier in batches[start:place])
            one.silent = ~fired if fresh else one.silent & ~fired
            one.age = torch.where(fired, 0, one.age + samples)
    return {number: known[number] for number in {number for batch in batches[start:] for number in batch}}


def differences(recording: Recording, monitor: Listening) -> list[str]:
    """List where a verdict is not that of the brute force."""
    batches = [observed(*pair) for pair in zip(recording.batches, monitor.batches, strict=True)]
    wrong = []
    for seen, report in monitor.verdicts:
        for number, expected in masks(batches[:seen]).items():
            said = report[monitor.names[number]]
            for mask in ("silent", "dead", "age"):
                if not torch.equal(getattr(said, mask), getattr(expected, mask)):
                    wrong.append(f"`{mask}` of `{said.name}` at batch {seen}")
    return wrong


def unseen(recording: Recording, monitor: Listening) -> dict[str, int]:
    """Count, by operation, the calls in the last batch that no site stands for."""
    truth, counted = list(recording.batches[-1]), monitor.batches[-1]
    for found in matched(truth, counted):
        truth = [one for one in truth if one is not found]
    left: dict[str, int] = defaultdict(int)
    for one in truth:
        left[one.op] += 1
    return dict(left)


# -- all that is asked of one library --------------------------------------------------------------------------


class Library(NamedTuple):
    """What is tried with a library.

    Args:
        package: Its name on PyPI.
        model: What is trained, in words.
        train: Trains it.
        bias: The parameter whose first entries are set so low that the units behind it are dead.
        site: The name of the layer where those units live.
    """

    package: str
    model: str
    train: Train
    bias: str
    site: str


@dataclass
class Row:
    """What became of a library; empty where all is well."""

    sites: dict[str, int] = field(default_factory=dict)
    unwatched: dict[str, str] = field(default_factory=dict)
    unseen: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    verdicts: int = 0
    inexact: list[str] = field(default_factory=list)
    other_weights: list[str] = field(default_factory=list)
    crossed: list[str] = field(default_factory=list)
    loud: list[str] = field(default_factory=list)
    planted: int = 0
    died: int = 0
    fire_again: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)


def other(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Name the weights that differ in any bit."""
    assert a.keys() == b.keys()
    assert a
    return [name for name in a if not torch.equal(a[name].nan_to_num(), b[name].nan_to_num())]


def examine(library: Library) -> dict[str, Any]:
    """Train a library's model as often as it takes, and tell what came of it."""
    torch.set_num_threads(1)
    row = Row()
    _healthy(library, row)
    _dead(library, row)
    for remedy, steps in {"reset": STEPS, "auto": LIFTING}.items():
        _repaired(library, remedy, steps, row)
    return asdict(row)


def _healthy(library: Library, row: Row) -> None:
    """Without and with a monitor as a user has it."""
    first, plain = trained(library.train), trained(library.train)  # the first one's imports may change how to warn
    assert not other(first.weights, plain.weights), "two runs differ without a monitor"
    monitor = DeadReLUMonitor(every_n_steps=1, window=WINDOW)
    watched = trained(library.train, monitor)
    row.other_weights = other(plain.weights, watched.weights)
    told = [text for text in watched.warnings if text not in plain.warnings]
    row.crossed = [text for text in told if "% dead at step" in text]
    row.loud = [text for text in told if text not in row.crossed]
    if monitor.report is None:
        row.broken.append("the monitor that was passed has no report")
    if monitor.failure is not None:
        row.broken.append(repr(monitor.failure))


def _dead(library: Library, row: Row) -> None:
    """With units planted dead: the verdicts against the dispatcher's record of an unwatched run."""
    recording, monitor = Recording(), Listening(**SETTINGS)
    plain = trained(library.train, Plant(library.bias), recording)
    watched = trained(library.train, Plant(library.bias), monitor)
    assert monitor.report is not None
    assert recording.batches
    row.other_weights += other(plain.weights, watched.weights)
    row.sites = {site.name: site.units for site in monitor.report.sites}
    row.unwatched = dict(monitor.report.unwatched)
    row.inexact, row.verdicts = differences(recording, monitor), len(monitor.verdicts)
    row.unseen = unseen(recording, monitor)
    row.planted = quarter(monitor.report[library.site].units)
    row.died = int(monitor.report[library.site].dead[: row.planted].sum())


def _repaired(library: Library, remedy: str, steps: int, row: Row) -> None:
    monitor = Listening(remedy=remedy, **SETTINGS)
    trained(library.train, Plant(library.bias), monitor, steps=steps)
    assert monitor.report is not None
    row.fire_again[remedy] = int((~monitor.report[library.site].silent[: row.planted]).sum())
    row.reasons[remedy] = [str(event) for event in monitor.events if event.site in ("", library.site)]
