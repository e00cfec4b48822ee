import copy
import io
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset
from toys import EVERYTHING, KEY, Log, Net, Verdicts, assert_same, bare, batches, fit, mlp, watchers

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu import monitor as monitoring

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*the Trainer has no logger", "ignore:.*get no gradient", "ignore:.*no rectifier ran"
)


# -- watching changes nothing ------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.ReLU())
        self.head, self.reentrant = nn.Linear(8, 1), reentrant

    def forward(self, x):
        return self.head(checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant))


class GAN(Net):
    def __init__(self):
        super().__init__(nn.ModuleDict({"g": mlp(), "d": nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))}))
        self.automatic_optimization = False

    def forward(self, x):
        return self.net["g"](x)

    def training_step(self, batch, batch_idx):
        optimizer_g, optimizer_d = self.optimizers()
        g, d = self.net["g"], self.net["d"]
        for optimizer, sign, fake in ((optimizer_d, 1, g(batch).detach()), (optimizer_g, -1, g(batch))):
            loss = sign * (d(fake).sigmoid().mean() - d(batch[:, :1]).sigmoid().mean())
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.detach().clone())

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[name].parameters(), lr=0.01) for name in ("g", "d")]


def with_batch_norm():
    return Net(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 1)))


IDENTITY = {
    "plain": (Net, {}),
    "accumulated": (Net, {"accumulate_grad_batches": 3}),
    "autocast": (with_batch_norm, {"precision": "bf16-mixed"}),
    "dropout and batch norm": (with_batch_norm, {}),
    "checkpointed": (lambda: Net(Checkpointed(False)), {}),
    "checkpointed, reentrant": (lambda: Net(Checkpointed(True)), {}),
    "manual": (GAN, {}),
    "lbfgs": (lambda: Net(optimizer=torch.optim.LBFGS), {}),
    "clipped": (Net, {"gradient_clip_val": 0.1}),
}


def everything_after(build, options, *callbacks):
    """Train, and return all that watching must not change."""
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    model = build()
    loader = batches(11, shuffle=True)
    trainer = fit(model, loader, *callbacks, val=batches(2), max_epochs=2, **options)
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    rng = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    return model.state_dict(), optimizers, model.losses, rng


@pytest.mark.parametrize("settings", [EVERYTHING, {}], ids=["every step", "defaults"])
@pytest.mark.parametrize("case", IDENTITY)
def test_watching_changes_no_bit(case, settings):
    build, options = IDENTITY[case]
    monitor = DeadReLUMonitor(**settings)
    assert_same(everything_after(build, options), everything_after(build, options, monitor))
    assert monitor.report.units


# -- the verdict is exact ----------------------------------------------------------------------------------


class Recorded(Net):
    """Keeps what each rectifier put out in each training batch, by plain hooks."""

    def __init__(self, net=None, **options):
        super().__init__(net, **options)
        self.taken, self.seen = False, []
        for name, module in self.named_modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda m, args, out, name=name: self._take(name, out))

    def _take(self, name, out):
        if self.taken:
            self.seen[-1].setdefault(name, []).append(out.detach().clone())

    def training_step(self, batch, batch_idx):
        self.seen.append({})
        self.taken = True
        loss = super().training_step(batch, batch_idx)
        self.taken = False
        return loss


def brute_force(observations, min_samples, window):
    """Go through all observations, unit by unit; yield each window's {site: (silent, dead, age, firing rate)}."""
    age = {}
    for start in range(0, len(observations), window):
        verdict = {}
        part = observations[start : start + window]
        for name in {name for outs in part for name in outs}:
            units = next(outs[name][0].shape[1] for outs in part if name in outs)
            rows = []
            for unit in range(units):
                fired = samples = 0
                for outs in part:
                    values = [value for out in outs.get(name, ()) for value in out[:, unit].tolist()]
                    hits = sum(value > 0 for value in values)
                    age[name, unit] = 0 if hits else age.get((name, unit), 0) + len(values)
                    fired, samples = fired + hits, samples + len(values)
                    if hits:
                        age[name, unit] = 0
                rows.append(
                    (fired == 0, fired == 0 and age[name, unit] >= min_samples, age[name, unit], fired / samples)
                )
            verdict[name] = rows
        yield verdict


def assert_equals_brute_force(report, verdict):
    assert [site.name for site in report.sites] == sorted(verdict)
    for site in report.sites:
        silent, dead, age, rate = map(list, zip(*verdict[site.name], strict=True))
        assert site.silent.tolist() == silent
        assert site.dead.tolist() == dead
        assert site.age.tolist() == age
        assert site.firing_rate.tolist() == rate


EXACT = {
    "every step": ({"every_n_steps": 1, "window": 4, "min_samples": 30}, {}),
    "every third": ({"every_n_steps": 3, "window": 2, "min_samples": 11}, {}),
    "accumulated": ({"every_n_steps": 2, "window": 3, "min_samples": 30}, {"accumulate_grad_batches": 3}),
    "long window": ({"every_n_steps": 1, "window": 100, "min_samples": 30}, {}),
}


@pytest.mark.parametrize("case", EXACT)
def test_verdicts_equal_a_brute_force_loop(case):
    settings, options = EXACT[case]
    monitor, model = Verdicts(**settings), Recorded(lr=0.3)
    fit(model, batches(22, 7, shuffle=True), monitor, max_epochs=2, **options)
    group = options.get("accumulate_grad_batches", 1)
    epochs = model.seen[:22], model.seen[22:]
    groups = [epoch[start : start + group] for epoch in epochs for start in range(0, 22, group)]
    joined = [{name: [out for seen in part for out in seen[name]] for name in part[0]} for part in groups]
    expected = list(brute_force(joined[:: settings["every_n_steps"]], settings["min_samples"], settings["window"]))
    windows = monitor.reports if len(monitor.reports) == len(expected) else monitor.reports[1:]  # one was provisional
    assert len(windows) == len(expected) > 0
    for report, verdict in zip(windows, expected, strict=True):
        assert_equals_brute_force(report, verdict)
    assert monitor.report.dead_units >= 3


def test_a_provisional_verdict_before_the_first_validation_does_not_end_the_window():
    log, monitor, model = Log(), Verdicts(every_n_steps=2, window=4, min_samples=1), Recorded(lr=0.0)
    fit(model, batches(12), monitor, val=batches(1), val_check_interval=5, logger=log)
    observed = model.seen[::2]
    assert [step for step, _ in log.verdicts()] == [4, 6, 11]
    provisional, first, last = monitor.reports
    assert_equals_brute_force(provisional, next(brute_force(observed[:3], 1, 3)))
    expected = list(brute_force(observed, 1, 4))
    assert_equals_brute_force(first, expected[0])
    assert_equals_brute_force(last, expected[1])


def test_a_short_run_ends_with_one_verdict_over_all_that_was_observed():
    log, monitor = Log(), Verdicts(every_n_steps=1, min_samples=1)
    fit(Net(), batches(3), monitor, logger=log)
    assert [step for step, _ in log.verdicts()] == [2]
    assert monitor.report.sites[0].samples == 15


# -- when it looks -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("nosy_first", [True, False])
def test_it_watches_inside_training_batches_only(nosy_first):
    nosy, monitor = Nosy(), DeadReLUMonitor(**EVERYTHING)
    callbacks = [nosy, monitor] if nosy_first else [monitor, nosy]
    fit(Net(), batches(6), *callbacks, val=batches(2), val_check_interval=3, max_epochs=2)
    assert "on_validation_batch_start" in nosy.calls
    assert nosy.armed
    assert nosy.armed <= WITHIN
    assert watchers() == []


class Deserter(Net):
    """Does something odd at one place of the third batch."""

    def __init__(self, where, what):
        super().__init__()
        self.where, self.what = where, what

    def _act(self, where):
        return self.what() if where == self.where and len(self.losses) == 3 else None

    def on_train_batch_start(self, batch, batch_idx):
        return self._act("on_train_batch_start")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self._act("training_step")
        return loss

    def backward(self, loss):
        self._act("backward")
        loss.backward()

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        optimizer.step(closure)
        self._act("optimizer_step")


def interrupt(error):
    def act():
        raise error("stop here")

    return act


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["on_train_batch_start", "training_step", "backward", "optimizer_step"])
def test_after_an_exception_nothing_watches(where, error):
    monitor = DeadReLUMonitor(**EVERYTHING)
    trainer = Trainer(**bare(callbacks=[monitor]))
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(Deserter(where, interrupt(error)), batches(6))
    assert watchers() == []
    assert monitor.state_dict()["observation"] in (2, 3)


def test_an_epoch_that_is_skipped_half_way_leaves_nothing_behind():
    nosy, log = Nosy(), Log()
    monitor, model = Verdicts(**EVERYTHING), Deserter("on_train_batch_start", lambda: -1)
    early = EarlyStopping("dead_relu/dead_fraction", mode="max", patience=9)
    fit(model, batches(6), monitor, nosy, early, max_epochs=3, logger=log)
    assert len(model.losses) == 3  # the epoch ended, and all further ones at once
    assert nosy.armed <= WITHIN
    assert watchers() == []
    assert monitor.report.sites[0].samples == 15


def test_no_verdict_ever_counts_what_runs_outside_of_training_batches():
    class Chatty(Net):
        def on_validation_epoch_end(self):
            self(torch.zeros(99, 4))

        def on_train_epoch_start(self):
            self(torch.zeros(99, 4))

    model, monitor = Chatty(), DeadReLUMonitor(every_n_steps=1)
    model.example_input_array = torch.zeros(7, 4)
    fit(model, batches(4), monitor, val=batches(3), enable_model_summary=True, num_sanity_val_steps=2)
    assert monitor.report.sites[0].samples == 20


def test_log_graph_is_no_observation(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    model, monitor = Net(), DeadReLUMonitor(every_n_steps=1)
    model.example_input_array = torch.zeros(7, 4)
    fit(model, batches(4), monitor, logger=TensorBoardLogger(tmp_path, log_graph=True))
    assert monitor.report.sites[0].samples == 20


SAMPLES = {
    "plain": ({}, 60),
    "fast_dev_run": ({"fast_dev_run": True}, 5),
    "limit_train_batches": ({"limit_train_batches": 4}, 20),
    "overfit_batches": ({"overfit_batches": 2}, 10),
    "max_steps": ({"max_steps": 7}, 35),
    "barebones": ({"barebones": True, "logger": None}, 60),
    "short last group": ({"accumulate_grad_batches": 5}, 60),
    "two epochs": ({"max_epochs": 2}, 120),
}


@pytest.mark.filterwarnings("ignore:.*overfit_batches", "ignore:You are using.*`Trainer\\(barebones")
@pytest.mark.parametrize("case", SAMPLES)
def test_every_training_sample_is_counted_once(case):
    options, samples = SAMPLES[case]
    monitor = DeadReLUMonitor(every_n_steps=1, window=100)
    if case == "barebones":
        options = {**options, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}
    fit(Net(), batches(12), monitor, **options)
    assert [site.samples for site in monitor.report.sites] == [samples, samples]


@pytest.mark.parametrize(("accumulate", "every", "samples"), [(3, 2, [15, 15]), (5, 2, [25, 10]), (4, 3, [20])])
def test_accumulated_batches_are_one_observation(accumulate, every, samples):
    monitor = DeadReLUMonitor(every_n_steps=every)
    fit(Net(), batches(12), monitor, accumulate_grad_batches=accumulate)
    counted = monitor.state_dict()["totals"]["samples"][0]
    assert counted[counted > 0].tolist() == samples


def test_a_schedule_of_accumulation_is_followed():
    monitor = DeadReLUMonitor(every_n_steps=1)
    fit(Net(), batches(4), monitor, GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), max_epochs=3)
    assert monitor.state_dict()["totals"]["samples"][0].tolist() == [5] * 4 + [10] * 2 + [20] + [0] * 3


def test_a_closure_that_is_called_again_is_observed_once():
    monitor, model = DeadReLUMonitor(every_n_steps=1), Net(optimizer=torch.optim.LBFGS)
    fit(model, batches(3), monitor)
    assert len(model.losses) > 3
    assert monitor.report.sites[0].samples == 15


MANUAL = {
    "adam": torch.optim.Adam,
    "adam, fused": lambda parameters, lr: torch.optim.Adam(parameters, lr, fused=True),
    "sgd, one by one": lambda parameters, lr: torch.optim.SGD(parameters, lr, foreach=False),
}


@pytest.mark.parametrize("optimizer", MANUAL.values(), ids=MANUAL)
def test_forwards_after_a_step_of_the_same_batch_are_observed(optimizer):
    class Twice(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                loss = super().training_step(batch, batch_idx)
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()

    monitor = DeadReLUMonitor(every_n_steps=1)
    fit(Twice(optimizer=optimizer), batches(4), monitor)
    assert [(site.name, site.samples) for site in monitor.report.sites] == [("net.1", 40), ("net.3", 40)]


def test_an_iterable_data_set_without_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.randn(30, 4))

    monitor = DeadReLUMonitor(every_n_steps=1, window=100)
    fit(Net(), DataLoader(Stream(), batch_size=5), monitor, accumulate_grad_batches=4)
    assert monitor.report.sites[0].samples == 30
    assert monitor.state_dict()["batches"] == 2


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_a_training_step_that_returns_none():
    class Shy(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx % 2 else None

    nosy, monitor = Nosy(), DeadReLUMonitor(**EVERYTHING)
    fit(Shy(), batches(8), monitor, nosy)
    assert monitor.report.dead_units
    assert nosy.armed <= WITHIN | {"on_before_optimizer_step"}
    assert watchers() == []


# -- with other callbacks and ways to train ----------------------------------------------------------------


@pytest.mark.parametrize("val", [None, 2], ids=["without validation", "with validation"])
@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "monitor last"])
def test_others_find_the_key_with_default_settings(val, first, tmp_path):
    monitor = DeadReLUMonitor()
    others = [EarlyStopping(KEY, divergence_threshold=0.1), ModelCheckpoint(tmp_path, monitor=KEY, mode="min")]
    callbacks = [monitor, *others] if first else [*others, monitor]
    loader = batches(44, 64)
    trainer = fit(Net(), loader, *callbacks, val=val and batches(val), max_epochs=3, enable_checkpointing=True)
    assert trainer.current_epoch == 1  # stopped, as 3 of 14 units are dead
    assert float(others[1].best_model_score) == pytest.approx(monitor.report.dead_fraction)
    assert monitor.report.dead_fraction >= 3 / 14


def test_the_key_is_there_from_the_first_step(tmp_path):
    seen = []

    class Reader(Callback):
        def on_train_batch_start(self, trainer, *args):
            seen.append(float(trainer.callback_metrics[KEY]))

    saver = ModelCheckpoint(tmp_path, monitor=KEY, every_n_train_steps=1)
    fit(Net(), batches(5), Reader(), DeadReLUMonitor(**EVERYTHING), saver, val=batches(1), enable_checkpointing=True)
    assert seen == [0.0] * 4 + [pytest.approx(3 / 14, abs=0.2)]
    assert seen[-1] > 0.2


def test_a_plateau_scheduler_finds_the_key_at_its_first_step():
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return [optimizer], [{"scheduler": scheduler, "monitor": KEY, "interval": "step"}]

    fit(Scheduled(), batches(4), DeadReLUMonitor())


@pytest.mark.parametrize("order", [1, -1])
def test_learning_rate_and_batch_size_are_found_unwatched(order, tmp_path):
    model, monitor = Net(), DeadReLUMonitor(every_n_steps=1)
    finders = [LearningRateFinder(num_training_steps=5)]
    fit(model, batches(4), *[monitor, *finders][::order], default_root_dir=tmp_path)
    assert monitor.report.sites[0].samples == 20
    trainer = Trainer(**bare(callbacks=[monitor], default_root_dir=tmp_path))
    Tuner(trainer).lr_find(model, batches(4), num_training=5)
    assert watchers() == []
    trainer.fit(model, batches(3))
    assert monitor.report.sites[0].samples == 15


def test_a_learning_rate_search_in_mid_fit_keeps_the_window(tmp_path):
    class Midway(LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    monitor = DeadReLUMonitor(every_n_steps=1, window=100)
    finder = Midway(num_training_steps=3, update_attr=False)
    fit(Net(), batches(4), monitor, finder, max_epochs=2, default_root_dir=tmp_path)
    assert monitor.report.sites[0].samples == 40
    assert monitor.state_dict()["batches"] == 8


def test_batch_size_finder(tmp_path):
    class Sized(Net):
        batch_size = 2

        def train_dataloader(self):
            return batches(8, self.batch_size)

        val_dataloader = train_dataloader

    monitor = DeadReLUMonitor(every_n_steps=1)
    finder = BatchSizeFinder(max_trials=1, steps_per_trial=1)
    Trainer(**bare(callbacks=[monitor, finder], default_root_dir=tmp_path)).fit(Sized())
    assert monitor.report.sites[0].samples > 0


@pytest.mark.filterwarnings("ignore:.*swa_lrs", "ignore:Swapping scheduler")
@pytest.mark.parametrize(
    "net", [mlp, lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))]
)
def test_stochastic_weight_averaging_is_not_observed(net):
    monitor = DeadReLUMonitor(every_n_steps=1, window=100)
    model = Net(net())
    fit(model, batches(4), monitor, StochasticWeightAveraging(0.01, swa_epoch_start=1), max_epochs=3)
    assert monitor.report.sites[0].samples == 3 * 20  # a further epoch only measures BatchNorm statistics


def test_weight_averaging_is_not_observed():
    monitor = DeadReLUMonitor(every_n_steps=1, window=100)
    fit(Net(), batches(4), monitor, EMAWeightAveraging(), val=batches(3), max_epochs=2)
    assert monitor.report.sites[0].samples == 40


def test_several_fits_on_one_trainer_start_anew():
    monitor, model = DeadReLUMonitor(every_n_steps=1), Net()
    trainer = fit(model, batches(4), monitor)
    first = monitor.report
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches(6))
    assert [first.sites[0].samples, monitor.report.sites[0].samples] == [20, 30]
    assert trainer.global_step == 10


def test_another_model_on_the_same_monitor():
    monitor = DeadReLUMonitor(every_n_steps=1)
    fit(Net(), batches(4), monitor)
    fit(Net(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 1))), batches(2), monitor)
    assert [(site.units, site.samples) for site in monitor.report.sites] == [(9, 10)]


def test_test_and_validate_leave_the_report_and_a_later_fit_alone(tmp_path):
    monitor, model = DeadReLUMonitor(every_n_steps=1), Net()
    trainer = fit(model, batches(4), monitor)
    report = monitor.report
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.test(model, batches(2), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    trainer.validate(model, batches(2), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert monitor.report is report
    fit(model, batches(2), monitor)
    assert monitor.report.sites[0].samples == 10


def test_layers_made_in_configure_model():
    class Late(Net):
        def __init__(self):
            super().__init__(nn.Identity())

        def configure_model(self):
            self.net = mlp()

    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(Late(), batches(4), monitor)
    assert monitor.report["net.1"].dead.sum() >= 3


@pytest.mark.filterwarnings(
    "ignore:Lazy modules", "ignore:.*uninitialized parameter", "ignore:A layer with UninitializedParameter"
)
def test_lazy_layers():
    monitor = DeadReLUMonitor(**EVERYTHING)
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(1))
    model = Net(net)
    net(torch.zeros(1, 4))
    fit(model, batches(4), monitor)
    assert monitor.report.units == 8


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_both_packages(package):
    pl = pytest.importorskip(package)

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, batch_idx):
            return self.net(batch).pow(2).mean()

        configure_optimizers = Net.configure_optimizers
        optimizer, lr = torch.optim.SGD, 0.01

    log, monitor = Log(), DeadReLUMonitor(**EVERYTHING)
    trainer = pl.Trainer(**bare(callbacks=[monitor, pl.callbacks.EarlyStopping(KEY)], logger=log, max_epochs=2))
    trainer.fit(Model(), batches(6))
    assert monitor.report.dead_units >= 3
    assert [step for step, _ in log.verdicts()] == [3, 7, 11]


def test_a_compiled_module():
    torch.compiler.reset()
    model, monitor = Net(), DeadReLUMonitor(every_n_steps=2, window=2, min_samples=1)
    model.net = torch.compile(model.net, backend="eager")
    fit(model, batches(4), monitor)
    assert [site.name for site in monitor.report.sites] == ["net.1", "net.3"]
    assert monitor.report.sites[0].samples == 10
    compiled, monitor = torch.compile(Net(), backend="eager"), DeadReLUMonitor(every_n_steps=2, window=2, min_samples=1)
    fit(compiled, batches(4), monitor)
    assert [site.name for site in monitor.report.sites] == ["net.1", "net.3"]
    assert monitor.report.units == 14


# -- copies ------------------------------------------------------------------------------------------------


class Copies(Callback):
    """Copies and pickles model and monitor while the monitor watches."""

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        monitor = trainer.callbacks[0]
        assert watchers()
        self.monitors = [copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))]
        self.models = [copy.deepcopy(pl_module.net), pickle.loads(pickle.dumps(pl_module.net))]
        for model in self.models:
            model(torch.zeros(50, 4))


class Described(Net):
    def __init__(self, net):
        super().__init__(net)
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`", "ignore:dead_relu")
@pytest.mark.parametrize("options", [{}, {"gradient_evidence": True, "checkup": True, "remedy": "reset"}])
def test_copies_are_inert_and_checkpoints_can_hold_the_model(options, tmp_path):
    monitor, copies = DeadReLUMonitor(every_n_steps=1, **options), Copies()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(Described(mlp()), batches(4), monitor, copies, saver, enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == 4
    assert monitor.report.sites[0].samples == 20
    for other in copies.monitors:
        assert other.every_n_steps == 1
        assert other.state_dict() == {}
        assert not hasattr(other, "log")
        fit(Net(), batches(2), other)
        assert other.report.sites[0].samples == 10
    assert pickle.loads(pickle.dumps(monitor)).report.to_dict() == monitor.report.to_dict()
    torch.save(monitor, buffer := io.BytesIO())
    assert buffer.tell() < 100_000


# -- frozen parts ------------------------------------------------------------------------------------------


class Distilled(Net):
    """A student, and a teacher that is not trained for one of several reasons."""

    def __init__(self, why):
        super().__init__(nn.ModuleDict({"student": mlp(0), "teacher": mlp(3)}))
        self.why = why
        if why == "frozen":
            self.net["teacher"].requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.set_grad_enabled(self.why == "perceptual"):
            target = self.net["teacher"](batch)
        return (self.net["student"](batch) - target).pow(2).mean()

    def configure_optimizers(self):
        trained = self.parameters() if self.why == "no_grad" else self.net["student"].parameters()
        return torch.optim.Adam(trained, lr=1e-3)


@pytest.mark.parametrize("why", ["frozen", "perceptual", "no_grad"])
def test_frozen_parts_are_watched_but_stay_out_of_headlines(why):
    log, monitor = Log(), DeadReLUMonitor(**EVERYTHING)
    fit(Distilled(why), batches(4), monitor, logger=log)
    assert {site.name: site.trainable for site in monitor.report.sites} == {
        "net.teacher.1": False,
        "net.teacher.3": False,
        "net.student.1": True,
        "net.student.3": True,
    }
    assert monitor.report["net.teacher.1"].dead.sum() >= 3
    assert monitor.report.units == 14
    metrics = log.verdicts()[-1][1]
    assert metrics["dead_relu_sites/net.teacher.1"] >= 3 / 8
    assert metrics[KEY] == monitor.report.dead_fraction


def test_what_is_unfrozen_later_joins_the_headlines():
    class Thaw(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

    log, monitor = Log(), Verdicts(every_n_steps=1, window=4, min_samples=1)
    fit(Net(), batches(4), monitor, Thaw(), max_epochs=2, logger=log)
    assert [report.units for report in monitor.reports] == [6, 14]


# -- bad input ---------------------------------------------------------------------------------------------


REFUSED = [
    ({"every_n_steps": 0}, "every_n_steps=0.*whole number of at least 1.*Try `every_n_steps=10`"),
    ({"every_n_steps": -1}, "every_n_steps=-1"),
    ({"every_n_steps": True}, "every_n_steps=True"),
    ({"every_n_steps": 2.0}, "every_n_steps=2.0"),
    ({"window": 0}, "window=0.*Try `window=10`"),
    ({"window": True}, "window=True"),
    ({"min_samples": 0}, "min_samples=0.*Try `min_samples=299`"),
    ({"min_samples": None}, "min_samples=None"),
    ({"gradient_evidence": 1}, "gradient_evidence=1.*a switch"),
    ({"gradient_evidence": True, "mask": len}, "gradient_evidence=True.*padding"),
    ({"threshold": 1.5}, "threshold=1.5.*from 0 to 1.*Try `threshold=0.1`"),
    ({"threshold": -0.1}, "threshold=-0.1"),
    ({"threshold": float("nan")}, "threshold=nan"),
    ({"tau": 2}, "tau=2.*Try `tau=0.025`"),
    ({"tau": True}, "tau=True"),
    ({"include": "encoder.*"}, r"include='encoder\.\*'.*list of patterns.*Try `include=\['encoder\.\*'\]`"),
    ({"exclude": "relu"}, "exclude='relu'.*list of patterns"),
    ({"include": [3]}, r"include=\[3\].*list of patterns"),
    ({"include": None}, "include=None.*list of patterns"),
    ({"name": "dead/relu"}, "name='dead/relu'.*metric keys start with it"),
    ({"name": ""}, "name=''"),
    ({"mask": "attention_mask"}, "mask='attention_mask'.*called with each batch"),
    ({"unit_dims": [1]}, r"unit_dims=\[1\].*maps patterns to dimensions"),
    ({"unit_dims": {"relu": True}}, "unit_dims=.*maps patterns to dimensions"),
]


@pytest.mark.parametrize(("settings", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_senseless_arguments_are_refused(settings, text):
    with pytest.raises(MisconfigurationException, match=text):
        DeadReLUMonitor(**settings)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_at_the_first_batch(argument):
    model, monitor = Net(), DeadReLUMonitor(**{argument: ["encodr.*", "net.1"]})
    with pytest.raises(MisconfigurationException, match=r"encodr\.\*.*matches no activation.*`net\.1`, `net\.3`"):
        fit(model, batches(9), monitor)
    assert len(model.losses) == 1
    assert watchers() == []


def test_patterns_choose_sites_and_keep_names():
    monitor = DeadReLUMonitor(include=["net.3"], **EVERYTHING)
    fit(Net(), batches(4), monitor)
    assert [site.name for site in monitor.report.sites] == ["net.3"]


def masked(returned):
    return lambda batch: returned


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (masked([[True]]), r"`mask` returned list; it has to return a boolean tensor of shape \(batch, time\)"),
        (masked(torch.ones(5)), r"`mask` returned shape \(5,\); it has to return"),
        (lambda batch: {}["attention_mask"], "KeyError.*attention_mask"),
    ],
    ids=["list", "shape", "raises"],
)
def test_a_mask_that_fails_is_refused_at_the_first_batch_and_later_ends_the_watch_alone(mask, text):
    with pytest.raises(MisconfigurationException, match=rf"`DeadReLUMonitor\(mask=...\)`: .*{text}"):
        fit(Net(), batches(6), DeadReLUMonitor(every_n_steps=1, mask=mask))
    calls = []

    def later(batch):
        calls.append(batch)
        return None if len(calls) < 3 else mask(batch)

    model, monitor = Net(), DeadReLUMonitor(every_n_steps=1, mask=later)
    with pytest.warns(UserWarning, match=f"(?s)the monitor failed and watches no longer.*{text}") as record:
        fit(model, batches(6), monitor)
    assert len([warning for warning in record if "the monitor failed" in str(warning.message)]) == 1
    assert len(model.losses) == 6
    assert monitor.report is None


def test_a_mask_hides_padding():
    class Tokens(Net):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).mean()

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[0, 0] = 1.0
        net[0].bias.copy_(torch.tensor([0.0] + [1.0] * 7))
    x = torch.full((6, 3, 4), -1.0)
    x[:, 2] = 1.0  # padding, on which alone unit 0 fires
    valid = torch.tensor([[1, 1, 0]] * 6)
    loader = DataLoader(torch.utils.data.TensorDataset(x, valid), batch_size=2)
    monitor = DeadReLUMonitor(**EVERYTHING, mask=lambda batch: batch[1])
    fit(Tokens(net, lr=0.0), loader, monitor)
    assert monitor.report["net.1"].dead.tolist() == [True] + [False] * 7
    assert monitor.report["net.1"].samples == 12
    monitor = DeadReLUMonitor(**EVERYTHING, mask=lambda batch: None)
    fit(Tokens(net, lr=0.0), loader, monitor)
    assert not monitor.report["net.1"].dead.any()


def test_a_model_without_rectifiers_is_trained_and_told_once():
    log, model, monitor = (
        Log(),
        Net(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))),
        DeadReLUMonitor(**EVERYTHING),
    )
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fit(model, batches(9), monitor, logger=log)
    assert sum("no rectifier ran in the observed batches" in str(warning.message) for warning in record) == 1
    assert log.verdicts() == []
    assert len(model.losses) == 9
    assert monitor.report.dead_fraction == 0.0


def test_a_layer_that_never_runs_is_neither_alive_nor_dead():
    model, monitor = Net(), DeadReLUMonitor(**EVERYTHING)
    model.spare = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    fit(model, batches(4), monitor)
    assert [site.name for site in monitor.report.sites] == ["net.1", "net.3"]
    assert monitor.report.unwatched == {"spare.1": "it has not run while observed"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_silence(value):
    class Poisoned(Net):
        def training_step(self, batch, batch_idx):
            batch = batch.clone()
            batch[0, 0] = value
            return self(batch).mean() * 0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(Poisoned(mlp(8)), batches(4), monitor)
    assert monitor.report["net.1"].nonfinite.any()
    assert not (monitor.report["net.1"].dead & monitor.report["net.1"].peak.isnan()).any()


def test_empty_batches_count_nothing():
    class Emptied(Net):
        def training_step(self, batch, batch_idx):
            return self(batch[:0] if batch_idx % 2 else batch).sum()

    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(Emptied(), batches(4), monitor)
    assert monitor.report["net.1"].samples == 10


# -- failures ----------------------------------------------------------------------------------------------


def broken(*args, **kwargs):
    raise RuntimeError("a bug of ours")


@pytest.mark.parametrize("place", ["judge", "count", "watch", "restore", "unwatched"])
def test_a_failure_of_the_monitor_neither_ends_the_run_nor_loses_a_checkpoint(place, monkeypatch, tmp_path):
    owner, name = {
        "judge": (monitoring, "judge"),
        "count": (monitoring.Watch, "_take"),
        "watch": (monitoring, "Watch"),
        "restore": (DeadReLUMonitor, "_joined"),
        "unwatched": (monitoring.Watch, "unwatched"),
    }[place]
    monkeypatch.setattr(owner, name, broken)
    model, monitor = Net(), DeadReLUMonitor(**EVERYTHING)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    with pytest.warns(UserWarning, match="dead_relu: the monitor failed and watches no longer") as record:
        fit(
            model,
            batches(12),
            monitor,
            saver,
            EarlyStopping(KEY),
            val=batches(1),
            max_epochs=2,
            enable_checkpointing=True,
        )
    ours = [str(warning.message) for warning in record if "the monitor failed" in str(warning.message)]
    assert len(ours) == 1
    assert "a bug of ours" in ours[0]
    assert len(model.losses) == 24
    assert len(list(tmp_path.glob("*.ckpt"))) == 8
    assert watchers() == []


def test_what_a_user_raises_on_a_verdict_ends_the_run():
    class Strict(DeadReLUMonitor):
        def on_verdict(self, trainer, pl_module, report):
            if report.dead_fraction > self.threshold:
                raise RuntimeError("too many dead units")

    model = Net()
    with pytest.raises(RuntimeError, match="too many dead units"):
        fit(model, batches(12), Strict(**EVERYTHING))
    assert len(model.losses) == 4
    assert watchers() == []


def test_dead_sites_are_told_once():
    with pytest.warns(UserWarning, match="and get no gradient") as record:
        fit(Net(), batches(12), DeadReLUMonitor(**EVERYTHING))
    told = [str(warning.message) for warning in record if "get no gradient" in str(warning.message)]
    assert sum("`net.1`" in text for text in told) == 1
    assert "dead at step 3: `net.1` (3 of 8 units)" in told[0]


# -- from the command line ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_the_command_line(tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    class Commanded(Net):
        def __init__(self):
            super().__init__()

        def train_dataloader(self):
            return batches(6)

    monkeypatch.chdir(tmp_path)
    args = ["fit", *(f"--trainer.{key}={value}" for key, value in bare(logger="false").items())]
    args += ["--trainer.callbacks+=lightning_deadrelu.DeadReLUMonitor", "--trainer.callbacks.every_n_steps=5"]
    args += ["--trainer.callbacks.include=[net.1]"]
    cli = LightningCLI(Commanded, args=args, save_config_callback=None)
    monitor = next(c for c in cli.trainer.callbacks if isinstance(c, DeadReLUMonitor))
    assert monitor.every_n_steps == 5
    assert monitor.report.sites[0].samples == 10
    with pytest.raises(SystemExit):
        LightningCLI(Commanded, args=[*args, "--trainer.callbacks.every_n_steps=often"], save_config_callback=None)
