"""Promise 5: the forwards of training batches are observed, each sample once, and nothing else."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset
from toys import (
    EVERYTHING,
    KEY,
    WITHIN,
    Log,
    Net,
    Nosy,
    Verdicts,
    bare,
    batches,
    fit,
    mlp,
    reports_of,
    run_of,
    watchers,
)

from lightning_deadrelu import DeadReLUMonitor, find_dead_units


@pytest.mark.parametrize("nosy_first", [True, False])
def test_it_watches_inside_training_batches_only(nosy_first):
    nosy, monitor = Nosy(), DeadReLUMonitor(**EVERYTHING)
    callbacks = [nosy, monitor] if nosy_first else [monitor, nosy]
    fit(Net(), batches(6), *callbacks, val=batches(2), val_check_interval=3, max_epochs=2)
    assert "on_validation_batch_start" in nosy.calls
    assert nosy.armed
    assert nosy.armed <= WITHIN
    assert watchers() == []


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


def look_without_gradients(net):
    with torch.no_grad():
        net(torch.full((7, 4), 9.0))


LOOKS = {
    "an audit": lambda net: find_dead_units(net, [torch.full((7, 4), 9.0)]),
    "a forward without gradients": look_without_gradients,
    "an evaluation": lambda net: (net.eval(), look_without_gradients(net), net.train()),
}


class Looking(Net):
    """Looks at itself within a training step, between its layers."""

    def training_step(self, batch, batch_idx):
        hidden = self.net[:2](batch)
        self.look(self.net)
        loss = (self.net[2:](hidden) - 1).pow(2).mean()
        self.losses.append(loss.detach())
        return loss


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("remedy", [None, "reset", "wake_up"])
def test_a_look_within_a_step_changes_neither_verdicts_nor_repairs(remedy, look):
    def train(look):
        torch.manual_seed(3)
        model, monitor = Looking(), Verdicts(**EVERYTHING, remedy=remedy)
        model.look = look
        fit(model, batches(16), monitor)
        return reports_of(monitor), model.losses, str(monitor.events)

    assert train(LOOKS[look]) == train(lambda net: None)


class Peeking(Callback):
    """Calls the model, or parts of it, in training batches."""

    def __init__(self, call):
        self.call, self.seen = call, torch.full((9, 4), -3.0)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        x = self.seen.clone().requires_grad_()
        with torch.set_grad_enabled(self.call != "without gradients"):
            out = pl_module.net[0](x).relu() if self.call == "a layer" else pl_module.net(x)
        if out.requires_grad:
            again = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
            assert torch.allclose(again, torch.autograd.grad(self.plain(x, pl_module.net), x)[0])

    def plain(self, x, net):
        """Sum up the output as no probe sees it."""
        with torch._C.DisableTorchFunction():
            x = (x @ net[0].weight.T + net[0].bias).relu()
            whole = (x @ net[2].weight.T + net[2].bias).relu() @ net[4].weight.T + net[4].bias
            return (x if self.call == "a layer" else whole).sum()

    on_before_backward = on_before_zero_grad = lambda self, trainer, pl_module, _: pl_module.net(self.seen)


@pytest.mark.parametrize("remedy", ["reset", "bias_warming", "wake_up"])
@pytest.mark.parametrize("call", ["without gradients", "with gradients", "a layer"])
def test_what_another_callback_computes_changes_no_repair_and_is_pushed_by_none(remedy, call):
    told = []
    for peeking in ([], [Peeking(call)]):
        torch.manual_seed(0)
        model, monitor = Net(), DeadReLUMonitor(**EVERYTHING, threshold=0.0, remedy=remedy)
        fit(model, batches(24), monitor, *peeking)
        told.append(([str(event) for event in monitor.events], torch.stack(model.losses).tolist()))
    assert told[0] == told[1]
    assert any("repaired" in event for event in told[0][0])


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
    counted = run_of(monitor.state_dict()).totals.samples[0]
    assert counted[counted > 0].tolist() == samples


def test_a_schedule_of_accumulation_is_followed():
    monitor = DeadReLUMonitor(every_n_steps=1)
    fit(Net(), batches(4), monitor, GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), max_epochs=3)
    assert run_of(monitor.state_dict()).totals.samples[0].tolist() == [5] * 4 + [10] * 2 + [20] + [0] * 3


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
    assert run_of(monitor.state_dict()).progress.batches == 2


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
    assert run_of(monitor.state_dict()).progress.batches == 8


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


class Curious(Callback):
    """Runs the model in every way that trains nothing, before and after the monitor has begun to look."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module(batch)
        with torch.no_grad():
            pl_module(batch)
        with torch.inference_mode():
            pl_module(batch)


class OwnTeacher(Net):
    """Asks itself for targets, as a model does that is distilled from an earlier view of itself."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def training_step(self, batch, batch_idx):
        if self.how == "evaluating":
            self.eval()
            self(batch)
            self.train()
        else:
            with torch.no_grad() if self.how == "no_grad" else torch.inference_mode():
                self(batch)
        return super().training_step(batch, batch_idx)


def masks_and_samples(build, *callbacks):
    monitor = DeadReLUMonitor(**EVERYTHING)
    torch.manual_seed(3)
    fit(build(), batches(8), *[one or monitor for one in callbacks])
    return [(site.name, site.samples, site.dead.tolist(), site.firing_rate.tolist()) for site in monitor.report.sites]


@pytest.mark.parametrize("how", ["no_grad", "inference", "evaluating"])
def test_a_model_that_teaches_itself_is_counted_where_it_learns(how):
    assert masks_and_samples(lambda: OwnTeacher(how), None) == masks_and_samples(Net, None)


@pytest.mark.parametrize("first", [True, False])
def test_forwards_of_other_callbacks_are_no_observations_wherever_they_are_listed(first):
    callbacks = [None, Curious()] if first else [Curious(), None]
    assert masks_and_samples(Net, *callbacks) == masks_and_samples(Net, None)


def test_a_module_that_only_a_callback_runs_is_no_site():
    class Auxiliary(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.other(batch)

    class WithOther(Net):
        def __init__(self):
            super().__init__()
            self.other = nn.Sequential(nn.Linear(4, 3), nn.ReLU())

    assert len(masks_and_samples(WithOther, None, Auxiliary())) == 2


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_a_reentrant_checkpoint_and_a_model_in_evaluation_mode_train_all_the_same():
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(self.net, x.requires_grad_(), use_reentrant=True)

    expected = masks_and_samples(Net, None)
    assert masks_and_samples(Checkpointed, None) == expected
    assert masks_and_samples(lambda: Net().eval(), None) == expected
