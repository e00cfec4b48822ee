import signal
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from toys import (
    KEY,
    Loader,
    Log,
    Net,
    Verdicts,
    assert_alike,
    assert_same,
    bare,
    batches,
    fit,
    inner,
    mlp,
    reports_of,
    run_of,
    tensors,
)
from two_ranks import Branching, ddp_trainer, on_two_ranks, shares

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.remedies import BiasWarming, LeakySlope, Reset
from lightning_deadrelu.repair.activation_swap import records, substitute_

SETTINGS = {"every_n_steps": 2, "window": 3, "min_samples": 40}


def every_step(folder):
    return ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
    )


def fresh_run(*callbacks, items, ckpt=None, **options):
    """Train a model made from the same random numbers; return the loggers' rows."""
    torch.manual_seed(7)
    log = Log()
    fit(Net(lr=0.1), Loader(items), *callbacks, ckpt=ckpt, logger=log, **{"max_epochs": 2, **options})
    return log.verdicts()


OPTIONS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_interrupted_and_resumed_equals_uninterrupted(case, tmp_path):
    items, whole = tensors(11), Verdicts(**SETTINGS)
    curve = fresh_run(whole, every_step(tmp_path), items=items, enable_checkpointing=True, **OPTIONS[case])
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem))
    assert len(saved) > 10
    for path in saved[::2]:
        resumed = Verdicts(**SETTINGS)
        tail = fresh_run(resumed, items=items, ckpt=path, **OPTIONS[case])
        assert tail == curve[len(curve) - len(tail) :]
        assert len(tail) == sum(step >= int(path.stem) for step, _ in curve)
        expected = reports_of(whole)
        assert reports_of(resumed) == expected[len(expected) - len(tail) :]


def test_a_run_goes_on_from_where_fit_ended(tmp_path):
    items, whole, first, second = tensors(8), *(Verdicts(**SETTINGS) for _ in range(3))
    fresh_run(whole, items=items, max_epochs=2)
    torch.manual_seed(7)
    trainer = Trainer(**bare(callbacks=[first], logger=Log(), max_epochs=1))
    trainer.fit(Net(lr=0.1), Loader(items))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh_run(second, items=items, ckpt=tmp_path / "end.ckpt", max_epochs=2)
    assert reports_of(second) == reports_of(whole)[-len(second.reports) :]
    assert len(second.reports) == 2


def test_the_state_is_plain_and_small(tmp_path):
    monitor = DeadReLUMonitor(**SETTINGS)
    trainer = Trainer(**bare(callbacks=[monitor], max_steps=5))
    trainer.fit(Net(), batches(9))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"][monitor.state_key]
    progress = run_of(state).progress
    assert [progress.batches, progress.window.observations] == [5, 0]
    torch.save(state, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 25_000
    resumed = DeadReLUMonitor(**SETTINGS)
    trainer = Trainer(**bare(callbacks=[resumed], max_steps=9, max_epochs=9))
    trainer.fit(Net(), batches(9), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert inner(resumed).progress.batches == 9


def test_two_monitors_need_two_names(tmp_path):
    with pytest.raises(RuntimeError, match="state_key"):
        Trainer(**bare(callbacks=[DeadReLUMonitor(), DeadReLUMonitor()]))

    def pair():
        return Verdicts(**SETTINGS), Verdicts(every_n_steps=1, window=5, include=["net.3"], name="second")

    items, whole = tensors(9), pair()
    fresh_run(*whole, every_step(tmp_path), items=items, enable_checkpointing=True)
    resumed = pair()
    fresh_run(*resumed, items=items, ckpt=tmp_path / "7.ckpt")
    for a, b in zip(resumed, whole, strict=True):
        assert reports_of(a) == reports_of(b)[-len(a.reports) :]
        assert len(a.reports) > 1
    assert [site.name for site in resumed[1].report.sites] == ["net.3"]


def test_early_stopping_finds_its_key_after_a_resume(tmp_path):
    items = tensors(9)
    settings = {**SETTINGS, "min_samples": 1}
    fresh_run(DeadReLUMonitor(**settings), every_step(tmp_path), items=items, enable_checkpointing=True)
    seen = []

    class Reader(Callback):
        def on_train_batch_start(self, trainer, *args):
            seen.append(float(trainer.callback_metrics[KEY]))

    early = EarlyStopping(KEY, patience=99)
    fresh_run(DeadReLUMonitor(**settings), early, Reader(), items=items, ckpt=tmp_path / "8.ckpt")
    assert seen[0] > 0.2


@pytest.mark.parametrize("window", [1, 2, 7])
def test_another_window_after_a_resume_is_tolerated(window, tmp_path):
    items = tensors(9)
    fresh_run(Verdicts(**SETTINGS), every_step(tmp_path), items=items, enable_checkpointing=True)
    resumed = Verdicts(every_n_steps=1, window=window, min_samples=60)
    fresh_run(resumed, items=items, ckpt=tmp_path / "9.ckpt")
    assert resumed.report.sites[0].samples <= 5 * window
    assert int(resumed.report["net.1"].age.max()) > 5 * 9  # ages go on from before
    assert resumed.report.dead_units >= 3


@pytest.mark.parametrize("before", ["reset", Reset(blind=0.9, dry_run=True)])
@pytest.mark.parametrize("after", ["reset", Reset(blind=0.9, dry_run=True)])
def test_a_share_of_silent_samples_is_of_the_samples_it_was_counted_on(before, after, tmp_path):
    def train(remedy, *callbacks, **options):
        net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
        for layer, value in [(net[0].weight, 1.0), (net[0].bias, 0.0)]:
            nn.init.constant_(layer, value)
        monitor = Verdicts(every_n_steps=1, window=4, min_samples=20, remedy=remedy)
        signs = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])[:, None].expand(5, 4)  # of five samples, two silence all
        fit(Net(net, lr=0.0), Loader([signs] * 6), monitor, *callbacks, **options)
        return monitor

    train(before, every_step(tmp_path), enable_checkpointing=True)
    resumed = train(after, ckpt=tmp_path / "2.ckpt", max_epochs=2)
    expected = None if after == "reset" else pytest.approx(2 / 5)
    assert [report["net.1"].blind_fraction for report in resumed.reports] == [expected] * len(resumed.reports)
    assert len(resumed.reports) >= 2


@pytest.mark.parametrize("selection", [{"exclude": ["net.1"]}, {"include": ["net.3"]}, {"unit_dims": {"net.3": -1}}])
def test_other_patterns_after_a_resume_hold_from_then_on(selection, tmp_path):
    items = tensors(9)
    settings = {**SETTINGS, "gradient_evidence": True}
    fresh_run(Verdicts(**settings), every_step(tmp_path), items=items, enable_checkpointing=True)
    resumed = Verdicts(**settings, **selection)
    with pytest.warns(UserWarning, match="other layers are selected than in the checkpoint"):
        fresh_run(resumed, items=items, ckpt=tmp_path / "9.ckpt")
    expected = ["net.1", "net.3"] if "unit_dims" in selection else ["net.3"]
    assert all(known.incoming for known in resumed.attribution.values())  # layers are traced anew
    assert [site.name for site in resumed.report.sites] == expected
    assert int(resumed.report["net.3"].age.max()) <= 5 * 9  # from zero


def test_a_resume_with_nothing_left_to_do_keeps_the_state(tmp_path):
    trainer = fit(Net(), batches(9), monitor := DeadReLUMonitor(**SETTINGS))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = DeadReLUMonitor(**SETTINGS)
    fit(Net(), batches(9), resumed, ckpt=tmp_path / "a.ckpt")
    assert str(resumed.state_dict()) == str(monitor.state_dict())


def test_a_checkpoint_without_a_monitor_can_be_resumed(tmp_path):
    items = tensors(9)
    fresh_run(every_step(tmp_path), items=items, enable_checkpointing=True)
    resumed = Verdicts(**SETTINGS)
    fresh_run(resumed, items=items, ckpt=tmp_path / "9.ckpt")
    assert resumed.reports


def test_a_state_of_another_model_ends_the_watch_and_not_the_run(tmp_path):
    trainer = fit(Net(), batches(9), DeadReLUMonitor(**SETTINGS))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    key = next(iter(checkpoint["callbacks"]))
    del checkpoint["callbacks"][key]["run"]["units"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    model = Net()
    with pytest.warns(UserWarning, match="(?s)the monitor failed and watches no longer.*units"):
        fit(model, batches(9), DeadReLUMonitor(**SETTINGS), ckpt=tmp_path / "a.ckpt", max_epochs=2)
    assert len(model.losses) == 9


def test_after_an_exception_a_checkpoint_holds_the_window(tmp_path):
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("stop here")
            return super().training_step(batch, batch_idx)

    monitor = DeadReLUMonitor(every_n_steps=1)
    with pytest.raises(RuntimeError, match="stop here"):
        fit(Failing(), batches(9), monitor, OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    state = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["callbacks"][monitor.state_key]
    assert run_of(state).totals.samples[0].tolist() == [5] * 5 + [0] * 5


class Interrupted(Net):
    """Does something at one place of the eighth batch; has a head that never runs."""

    def __init__(self, where="", act=lambda: None):
        super().__init__(lr=0.1)
        self.where, self.act = where, act
        self.head = nn.Linear(8, 8)  # it is trained: remedies wait to see it read something

    def _come_to(self, where):
        if where == self.where and len(self.losses) == 8 - (where == HOOKS[0]):
            self.act()

    def on_train_batch_start(self, batch, batch_idx):
        self._come_to("on_train_batch_start")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self._come_to("training_step")
        return loss

    def on_before_backward(self, loss):
        self._come_to("on_before_backward")

    def on_after_backward(self):
        self._come_to("on_after_backward")

    def on_before_optimizer_step(self, optimizer):
        self._come_to("on_before_optimizer_step")


HOOKS = ["on_train_batch_start", "training_step", "on_before_backward", "on_after_backward"]
HOOKS += ["on_before_optimizer_step"]
EVERY_REMEDY = ["reset", BiasWarming(at_once=True, steps=7), LeakySlope(ramp_steps=5)]
EVERY_REMEDY += ["thermal_kick", "wake_up", "gelu"]
REPAIRING = {"every_n_steps": 1, "window": 3, "min_samples": 10, "threshold": 0.0, "remedy": EVERY_REMEDY}


class OnceMore(Loader):
    """Hands a batch out again that was under way when it was saved."""

    def state_dict(self):
        return {"at": self.at - 1}


def outcome(monitor, model):
    """All that a run leaves, but for the numbers of steps, which Lightning counts on by one after an exception."""
    reports = [[site | {"last_fired": 0} for site in report["sites"]] for report in reports_of(monitor)[-3:]]
    return reports, [str(event._replace(step=0)) for event in monitor.events], model.state_dict()


def raising(error):
    def act():
        raise error("stop here")

    return act


@pytest.mark.filterwarnings("ignore:dead_relu")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
@pytest.mark.parametrize("where", HOOKS)
def test_a_checkpoint_from_mid_batch_goes_on_as_if_nothing_had_been(where, error, tmp_path):
    def train(*callbacks, seed=7, ckpt=None, **interruption):
        torch.manual_seed(seed)
        model, monitor = Interrupted(**interruption), Verdicts(**REPAIRING)
        trainer = Trainer(**bare(callbacks=[monitor, *callbacks], enable_checkpointing=True))
        expected = {ValueError: ValueError, KeyboardInterrupt: SystemExit}.get(error if interruption else None)
        if interruption and error is None:
            model.act = lambda: trainer.save_checkpoint(tmp_path / "meanwhile.ckpt")
        with pytest.raises(expected) if expected else nullcontext():
            trainer.fit(model, OnceMore(items), ckpt_path=ckpt)
        return outcome(monitor, model), monitor

    items = tensors(40)
    whole, monitor = train()
    assert {event.action for event in monitor.events} >= {"edited", "revived"}
    first, _ = train(OnExceptionCheckpoint(tmp_path), where=where, act=raising(error) if error else None)
    assert error or str(first) == str(whole)
    resumed, _ = train(seed=8, ckpt=tmp_path / ("on_exception.ckpt" if error else "meanwhile.ckpt"))
    assert_same(resumed, whole)


def preempted(tmp_path, ckpt=None):
    """Train; without a checkpoint, until the scheduler of a cluster says that it wants its machine back."""
    torch.manual_seed(7)
    preempt = partial(signal.raise_signal, signal.SIGTERM)
    model = Interrupted() if ckpt else Interrupted("on_after_backward", preempt)
    monitor, saver = Verdicts(**REPAIRING), OnExceptionCheckpoint(tmp_path)
    with nullcontext() if ckpt else pytest.raises(SIGTERMException):
        fit(model, Loader(tensors(40)), monitor, saver, ckpt=ckpt, enable_checkpointing=True)
    return outcome(monitor, model)


@pytest.mark.filterwarnings("ignore:dead_relu")
def test_a_preempted_run_goes_on_as_if_nothing_had_been(tmp_path):
    torch.manual_seed(7)
    fit(model := Interrupted(), Loader(tensors(40)), whole := Verdicts(**REPAIRING))
    preempted(tmp_path)
    assert_same(preempted(tmp_path, tmp_path / "on_exception.ckpt"), outcome(whole, model))


class Reader(Callback):
    """Notes what there is to read when a run begins."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not hasattr(self, "report"):
            self.report, self.summary = trainer.callbacks[0].report, trainer.callbacks[0].summary()


def test_a_resumed_run_knows_its_last_verdict_at_once(tmp_path):
    items, whole, reader = tensors(9), Verdicts(**SETTINGS), Reader()
    fresh_run(whole, every_step(tmp_path), items=items, max_epochs=1, enable_checkpointing=True)
    fresh_run(Verdicts(**SETTINGS), reader, items=items, ckpt=tmp_path / "6.ckpt")
    assert reader.report.to_dict() == whole.reports[0].to_dict()
    assert "net.1" in reader.summary


class AlwaysSaving(Callback):
    """Has the state read after each batch, also where more are to accumulate."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.callbacks[0].state_dict()


def test_no_bit_tells_whether_the_state_was_read_between_accumulated_batches():
    plain, read = Verdicts(**SETTINGS), Verdicts(**SETTINGS)
    for monitor, callbacks in ((plain, []), (read, [AlwaysSaving()])):
        fresh_run(monitor, *callbacks, items=tensors(30, 7), accumulate_grad_batches=3)
    assert len(plain.reports) > 1
    assert reports_of(plain) == reports_of(read)


def test_a_state_loaded_and_not_yet_used_is_saved_again(tmp_path):
    class Saver(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "again.ckpt")

    trainer = fit(Net(), batches(9), monitor := DeadReLUMonitor(**SETTINGS))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(Net(), batches(9), Saver(), DeadReLUMonitor(**SETTINGS), ckpt=tmp_path / "a.ckpt", max_epochs=2)
    a, b = (torch.load(tmp_path / name, weights_only=True)["callbacks"] for name in ("a.ckpt", "again.ckpt"))
    assert str(a[monitor.state_key]) == str(b[monitor.state_key])


# -- on two ranks ------------------------------------------------------------------------------------------


def two_rank_run(rank, folder, ckpt):
    torch.manual_seed(0)
    monitor = Verdicts(every_n_steps=1, window=5, min_samples=30)
    callbacks = [monitor, every_step(folder)] if folder else [monitor]
    trainer = ddp_trainer(callbacks=callbacks, enable_checkpointing=bool(folder), max_epochs=2, logger=Log())
    trainer.fit(Branching(), Loader(shares(rank)), ckpt_path=ckpt)
    if folder:
        trainer.save_checkpoint(f"{folder}/end.ckpt")
    return reports_of(monitor)


def one_rank_run(ckpt=None):
    torch.manual_seed(0)
    monitor = Verdicts(every_n_steps=1, window=5, min_samples=30)
    joined = [list(pair) for pair in zip(shares(0), shares(1), strict=True)]
    fit(Branching(), Loader(joined), monitor, ckpt=ckpt, max_epochs=2, logger=Log())
    return reports_of(monitor)


@pytest.mark.ranks
@pytest.mark.parametrize("step", [2, 8, 13])
@pytest.mark.filterwarnings("ignore:.*did not run in this window")  # the branch c, indeed
def test_nothing_is_lost_that_two_ranks_save_in_mid_window(step, tmp_path):
    whole = on_two_ranks(two_rank_run, tmp_path, None)[0]
    ckpt = tmp_path / f"{step}.ckpt"
    again, other = on_two_ranks(two_rank_run, None, ckpt)
    assert again == other == whole[-len(again) :]
    alone = one_rank_run(ckpt)
    assert len(alone) == len(again) > 2
    for report, expected in zip(alone, one_rank_run()[-len(alone) :], strict=True):
        assert_alike(report, expected)


@pytest.mark.ranks
def test_what_two_ranks_save_after_fit_holds_both_their_counts(tmp_path):
    reports = on_two_ranks(two_rank_run, tmp_path, None)[0]
    state = next(iter(torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"].values()))
    assert run_of(state).totals.samples.sum(1).tolist() == [site["samples"] for site in reports[-1]["sites"]]


def test_models_of_any_size_are_known_again_by_their_sites(tmp_path):
    trainer = fit(Net(), batches(9), DeadReLUMonitor(every_n_steps=1, window=100))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    monitor, model = DeadReLUMonitor(every_n_steps=1, window=100), Net(mlp(2))
    fit(model, batches(9), monitor, ckpt=tmp_path / "a.ckpt", max_epochs=2)
    assert monitor.report["net.1"].samples == 90


OLD = {"before formats": {}, "6": {"format": 6, "observation": 2, "steps": [0, 2], "sites": [], "told": ["net.1"]}}


@pytest.mark.parametrize("old", OLD.values(), ids=OLD)
@pytest.mark.parametrize("swapped", [True, False])
def test_a_checkpoint_of_another_version_costs_the_ages_alone(old, swapped, tmp_path):
    monitor, model = DeadReLUMonitor(**SETTINGS), Net()
    if swapped:
        substitute_(model, "net.1", "gelu")
    trainer = Trainer(**bare(callbacks=[monitor], max_steps=5))
    trainer.fit(model, batches(9))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    activations = {"activations": checkpoint["callbacks"][monitor.state_key]["activations"]} if swapped else {}
    checkpoint["callbacks"][monitor.state_key] = {**old, **activations, "batches": 5}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed, model = DeadReLUMonitor(**SETTINGS), Net()
    trainer = Trainer(**bare(callbacks=[resumed], max_steps=9, max_epochs=9))
    with pytest.warns(UserWarning, match="of another version of the monitor; all ages start at zero"):
        trainer.fit(model, batches(9), ckpt_path=tmp_path / "old.ckpt", weights_only=True)
    assert resumed.report is not None
    assert [record["path"] for record in records(model)] == (["net.1"] if swapped else [])
