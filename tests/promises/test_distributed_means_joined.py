import time
import warnings
from functools import wraps
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from toys import (
    EVERYTHING,
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
    mlp,
    reports_of,
    run_of,
    watchers,
)
from two_ranks import Branching, ddp_trainer, on_two_ranks, shares

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.monitor import merge, verdicts, window_end
from lightning_deadrelu.monitor import monitor as monitoring
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.remedies import BiasWarming
from lightning_deadrelu.repair import confirming_batch, editor, lift, writer
from lightning_deadrelu.repair.edit_schedule import EditSchedule
from lightning_deadrelu.repair.policy import EscalationPolicy
from lightning_deadrelu.statistics import UnitLiveness
from lightning_deadrelu.statistics.confirmation import Confirmation

GO_ON_WITHIN = 10.0  # seconds on a busy machine; the process group waits for 30
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast", "barrier")
COLLECTIVES += ("broadcast_object_list", "gather", "gather_object", "reduce", "scatter", "reduce_scatter")


def plain(loader):
    return torch.utils.data.DataLoader(loader, batch_size=None, collate_fn=lambda batch: batch)


SETTINGS = {"every_n_steps": 1, "window": 4, "min_samples": 30}


def fit_branching(rank, options):
    torch.manual_seed(0)
    monitor = Verdicts(**SETTINGS)
    ddp_trainer(callbacks=[monitor], **options).fit(Branching(), plain(shares(rank)))
    return reports_of(monitor)


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore:.*did not run in this window")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"max_epochs": 2}], ids=str)
def test_two_ranks_give_the_verdicts_of_one_process_on_the_joined_batches(options):
    torch.manual_seed(0)
    alone = Verdicts(**SETTINGS)
    joined = [list(pair) for pair in zip(shares(0), shares(1), strict=True)]
    fit(Branching(), plain(joined), alone, **options)
    expected = reports_of(alone)
    assert len(expected) > 1
    for reports in on_two_ranks(fit_branching, options):
        assert len(reports) == len(expected)
        for report, one in zip(reports, expected, strict=True):
            assert_alike(report, one)
    assert {site["name"] for site in expected[-1]["sites"]} == {f"net.{name}.{i}" for name in "abc" for i in (1, 3)}
    assert expected[-1]["dead_units"] >= 3


class SavingAtOnce(Callback):
    """Has the state joined in the middle of an accumulated batch, when the ranks have met other sites."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx in (0, 3):
            trainer.callbacks[0].state_dict()


def fit_branching_and_save(rank):
    torch.manual_seed(0)
    monitor = Verdicts(**SETTINGS)
    trainer = ddp_trainer(callbacks=[monitor, SavingAtOnce()], accumulate_grad_batches=2)
    trainer.fit(Branching(), plain(shares(rank)))
    return reports_of(monitor)


@pytest.mark.ranks
def test_saving_within_an_accumulated_batch_loses_nothing():
    saved = on_two_ranks(fit_branching_and_save)
    for reports, expected in zip(saved, on_two_ranks(fit_branching, {"accumulate_grad_batches": 2}), strict=True):
        assert_alike(reports, expected)


def everything_after(rank, watched):
    torch.manual_seed(3)
    model = Net(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1)))
    monitor = DeadReLUMonitor(**EVERYTHING)
    trainer = ddp_trainer(callbacks=[monitor] if watched else [], max_epochs=2)
    trainer.fit(model, batches(9, 4 + rank, seed=rank, shuffle=True), batches(2))
    if watched:
        assert monitor.report.sites[0].samples == 2 * 9  # the last, open window: two batches of 4 and 5
    return model.state_dict(), trainer.optimizers[0].state_dict(), model.losses, torch.get_rng_state()


@pytest.mark.ranks
def test_watching_two_ranks_changes_no_bit():
    assert_same(on_two_ranks(everything_after, True), on_two_ranks(everything_after, False))


def count_collectives(rank):
    counts = []
    monitor = Verdicts(every_n_steps=1, window=2, min_samples=1)

    def counted(*args):
        with mock.patch.multiple(dist, **{name: mock.Mock(wraps=getattr(dist, name)) for name in COLLECTIVES}):
            totals = merge.merged(*args)
            counts.append({name: n for name in COLLECTIVES if (n := getattr(dist, name).call_count)})
        return totals

    with mock.patch.object(window_end, "merged", counted):
        ddp_trainer(callbacks=[monitor], max_epochs=1).fit(Branching(), plain(shares(rank)))
    return counts


@pytest.mark.ranks
def test_three_collectives_in_a_window_once_the_layout_is_settled():
    for counts in on_two_ranks(count_collectives):
        settled, met_new = {"all_reduce": 3}, {"all_reduce": 4, "all_gather_object": 1}
        assert counts == [met_new, met_new] + [settled] * 4  # first met, branch c met, and then never again


def fail_on(victim, owner, name, after):
    """Let one function fail on one rank from its n-th call on."""
    calls, original = [], getattr(owner, name)

    @wraps(original)
    def failing(*args, **kwargs):
        calls.append(1)
        if dist.is_initialized() and dist.get_rank() == victim and len(calls) > after:
            raise RuntimeError("a bug of ours")
        return original(*args, **kwargs)

    failing.calls = calls
    return mock.patch.object(owner, name, failing)


def fit_failing(rank, owner, name, after, victim):
    log, model, monitor = Log(), Net(), Verdicts(every_n_steps=1, window=2, min_samples=1)
    with fail_on(victim, owner, name, after), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer = ddp_trainer(
            callbacks=[monitor, EarlyStopping(KEY, patience=99)], max_epochs=2, val_check_interval=3, logger=log
        )
        trainer.fit(model, batches(7, seed=rank), batches(1))
    told = [str(warning.message) for warning in record if "the monitor failed" in str(warning.message)]
    return len(model.losses), len(told), len(monitor.reports), len(watchers())


FAILURES = {
    "counting, at once": (monitoring.Watch, "_take", 0),
    "counting, later": (monitoring.Watch, "_take", 9),
    "starting": (monitoring, "Watch", 0),
    "judging, at once": (verdicts, "judge", 0),
    "judging, later": (verdicts, "judge", 2),
    "publishing": (window_end, "_publish", 1),
}


@pytest.mark.ranks
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_on_one_rank_stops_the_watch_on_all_and_the_run_on_none(case, victim):
    outcomes = on_two_ranks(fit_failing, *FAILURES[case], victim)
    assert [losses for losses, *_ in outcomes] == [14, 14]
    assert [told for _, told, *_ in outcomes] == [int(rank == victim) for rank in range(2)]
    verdicts = [reports for _, _, reports, _ in outcomes]
    assert verdicts[1 - victim] - verdicts[victim] in (0, 1)
    assert verdicts[1 - victim] <= 4
    assert [left for *_, left in outcomes] == [0, 0]


class Leaving(Callback):
    """Asks for the monitor's state on one rank alone, after an exception."""

    def on_exception(self, trainer, pl_module, exception):
        if trainer.global_rank == 1:
            self.state = trainer.callbacks[0].state_dict()


def interrupted(rank):
    class Doomed(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("stop here")
            return super().training_step(batch, batch_idx)

    leaving, monitor = Leaving(), DeadReLUMonitor(every_n_steps=1)
    with pytest.raises(RuntimeError, match="stop here"):
        ddp_trainer(callbacks=[leaving, monitor]).fit(Doomed(), batches(7, seed=rank))
    run = run_of(leaving.state if rank else monitor.state_dict())
    return run.totals.samples.sum(1).tolist() if rank else len(run.progress.window.steps)


@pytest.mark.ranks
def test_after_an_exception_the_state_is_had_without_other_ranks():
    assert on_two_ranks(interrupted) == [3, [15, 15]]


def two_trainers(rank):
    dist.init_process_group("gloo", rank=rank, world_size=2)
    monitor = DeadReLUMonitor(**EVERYTHING)
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with mock.patch.dict("os.environ", environment):
        Trainer(**bare(callbacks=[monitor])).fit(Net(), batches(5 + 4 * rank, seed=rank))
    return monitor.report.sites[0].samples, monitor.report.step


@pytest.mark.ranks
def test_trainers_of_their_own_within_one_process_group_do_not_mix():
    assert on_two_ranks(two_trainers) == [(5, 4), (5, 8)]


def stop_early(rank):
    monitor, early = DeadReLUMonitor(), EarlyStopping(KEY, divergence_threshold=0.1)
    trainer = ddp_trainer(callbacks=[early, monitor], max_epochs=3)
    trainer.fit(Net(), batches(20, 96, seed=rank), batches(1))
    return trainer.current_epoch, monitor.report.to_dict()


@pytest.mark.ranks
def test_early_stopping_stops_all_ranks():
    one, other = on_two_ranks(stop_early)
    assert one == other
    assert one[0] == 1
    assert one[1]["sites"][0]["samples"] == 2 * 2 * 96


def misspelt(rank):
    monitor = DeadReLUMonitor(every_n_steps=1, window=2, include=["encodr.*"])
    model = Net()
    with pytest.raises(MisconfigurationException, match=r"encodr\.\* *.*`net\.1`, `net\.3`"):
        ddp_trainer(callbacks=[monitor]).fit(model, batches(9, seed=rank))
    return len(model.losses)


@pytest.mark.ranks
def test_a_pattern_that_matches_nothing_is_refused_on_all_ranks():
    assert on_two_ranks(misspelt) == [2, 2]


class OneHalf(Branching):
    """Takes its second branch on rank 0 alone."""

    def forward(self, batch):
        x, rank, _ = batch
        return sum(self.net[name](x).sum() for name in ("a", *([] if rank else ["b"])))


def misspelt_for_one(rank):
    monitor = DeadReLUMonitor(every_n_steps=1, window=2, include=["net.a.*", "net.b.0"])
    with pytest.raises(MisconfigurationException, match=r"net\.b\.0"):
        ddp_trainer(callbacks=[monitor]).fit(OneHalf(), Loader(shares(rank)))
    return True


@pytest.mark.ranks
def test_a_pattern_that_one_rank_knows_to_match_nothing_is_refused_on_all():
    assert on_two_ranks(misspelt_for_one) == [True, True]


def rows(rank):
    log = Log()
    ddp_trainer(callbacks=[DeadReLUMonitor(**EVERYTHING)], logger=log).fit(Net(), batches(8, seed=rank))
    return log.verdicts()


@pytest.mark.ranks
def test_values_are_the_same_on_all_ranks():
    one, other = on_two_ranks(rows)
    assert one == other
    assert [step for step, _ in one] == [3, 7]


class Lopsided(Net):
    """Rank 1 has a reader and a rectifier of its own, so that ranks differ in layout and attribution."""

    def __init__(self):
        super().__init__(nn.ModuleList([mlp(3), nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))]))

    def forward(self, x):
        main, extra = self.net
        hidden = main[:2](x)
        return main[2:](hidden) + (extra(hidden) if dist.get_rank() else 0.0)


class Clock(Callback):
    """Keeps the longest time between the ends of two batches, and what training has come to."""

    def __init__(self):
        self.last, self.longest = None, 0.0

    def on_train_batch_end(self, *args):
        now = time.monotonic()
        self.longest = max(self.longest, now - (self.last or now))
        self.last = now


PLACES = {
    "layouts": (Watch, "adopt", "reset"),
    "totals": (UnitLiveness, "totals", "reset"),
    "deciding": (EscalationPolicy, "decide", "reset"),
    "looking again": (Confirmation, "__call__", "reset"),
    "rows of inputs": (Confirmation, "rows", "reset"),
    "digest of attributions": (confirming_batch, "plain", "reset"),
    "joining attributions": (confirming_batch, "joined_over_ranks", "reset"),
    "laying out what is known": (confirming_batch, "values_of", "reset"),
    "fingerprints": (confirming_batch, "fingerprint", "reset"),
    "writing, halfway": (writer, "repair_", "reset"),
    "behind writing": (EditSchedule, "add", "bias_warming"),
    "exchanging an activation": (editor, "substitute_", "gelu"),
}


def fail_everywhere(rank, victim):
    """Let each place fail on one rank, in a run of its own."""
    outcomes = {}
    for place, (owner, name, remedy) in PLACES.items():
        torch.manual_seed(0)
        clock, model = Clock(), Lopsided()
        monitor = Verdicts(remedy=remedy, every_n_steps=1, window=3, min_samples=2, threshold=0.0)
        with fail_on(victim, owner, name, 0) as failing, warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            trainer = ddp_trainer(callbacks=[monitor, clock], max_epochs=1)
            trainer.fit(model, batches(20, 8, seed=rank))
        warned = [str(warning.message) for warning in record if "the monitor failed" in str(warning.message)]
        outcomes[place] = {
            "batches": len(model.losses),
            "warnings": len(warned),
            "verdicts": len(monitor.reports),
            "edited": [event.action for event in monitor.events if event.action == "edited"],
            "left": len(watchers()),
            "longest": clock.longest,
            "state": (model.state_dict(), trainer.optimizers[0].state_dict()["state"]),
            "met": len(failing.calls),
        }
    return outcomes


@pytest.mark.ranks
@pytest.mark.parametrize("victim", [0, 1])
def test_wherever_one_rank_fails_all_go_on_without_the_monitor(victim):
    outcomes = on_two_ranks(fail_everywhere, victim)
    for place in PLACES:
        one, other = outcomes[victim][place], outcomes[1 - victim][place]
        assert one["met"] > 0, place
        assert (one["batches"], other["batches"]) == (20, 20), place
        assert (one["warnings"], other["warnings"]) == (1, 0), place
        assert one["verdicts"] <= other["verdicts"] <= one["verdicts"] + 1 <= 4, place
        assert one["edited"] == other["edited"] == [], place
        assert one["left"] == other["left"] == 0, place
        assert max(one["longest"], other["longest"]) < GO_ON_WITHIN, place
        assert_same(one["state"], other["state"])


def lift_failing(rank, victim):
    torch.manual_seed(0)
    clock, model, remedy = Clock(), Net(lr=0.01), BiasWarming(steps=30)
    monitor = Verdicts(remedy=remedy, every_n_steps=1, window=3, min_samples=2, threshold=0.0)
    with fail_on(victim, lift, "add_", 1) as failing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = ddp_trainer(callbacks=[monitor, clock], max_epochs=1)
        trainer.fit(model, batches(20, 8, seed=rank))
    edited = [event.action for event in monitor.events if event.action == "edited"]
    return len(failing.calls), len(model.losses), edited, clock.longest, model.state_dict()


@pytest.mark.ranks
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lift_that_fails_on_one_rank_leaves_equal_parameters_on_all(victim):
    outcomes = on_two_ranks(lift_failing, victim)
    assert all(calls > 1 for calls, *_ in outcomes)
    assert [(losses, edited) for _, losses, edited, *_ in outcomes] == [(20, ["edited"])] * 2
    assert max(longest for *_, longest, _ in outcomes) < GO_ON_WITHIN
    assert_same(*(state for *_, state in outcomes))
