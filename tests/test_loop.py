"""The same monitor in a loop of one's own, alone and on two ranks, plain and with Fabric."""

import copy
import io
import logging
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from loops import net
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from toys import Loader, Net, Verdicts, assert_alike, assert_same, fit, mlp, reports_of, watchers
from two_ranks import on_two_ranks

from lightning_deadrelu import find_dead_units, watch
from lightning_deadrelu.repair.repair import Repair

OFTEN = {"every_n_steps": 1, "window": 4, "min_samples": 1}
BATCHES = list(torch.randn(24, 6, 4, generator=torch.Generator().manual_seed(3)))


def loss_of(model, batch):
    return (model(batch) - 1).square().mean()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), 1e-3, **options)


def train(model, optimizer, batches=BATCHES, monitor=None, accumulate=1):
    """Train in a plain loop; return the verdicts."""
    reports = []
    for number, batch in enumerate(batches, 1):
        loss = loss_of(model, batch)
        (loss / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        if monitor:
            reports.append(monitor.step(loss, batch))
    return [report for report in reports if report is not None]


# -- the same as the callback ------------------------------------------------------------------------------

SETTINGS = {
    "alone": {},
    "reset": {"remedy": "reset"},
    "lift": {"remedy": "bias_warming", "gradient_evidence": True},
    "swap": {"remedy": ["leaky", "gelu"], "checkup": True},
    "sparse": {"every_n_steps": 3, "window": 2, "remedy": "thermal_kick"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_verdicts_and_edits_are_those_of_the_callback(settings, accumulate):
    model = Net(net(), lr=1e-3, optimizer=torch.optim.SGD)
    model.training_step = lambda batch, batch_idx: loss_of(model, batch)
    callback = Verdicts(**{**OFTEN, **settings})
    fit(model, Loader(BATCHES), callback, accumulate_grad_batches=accumulate)
    own = Net(net())
    with watch(own, optimizer := sgd(own), **{**OFTEN, **settings}) as monitor:
        reports = train(own, optimizer, monitor=monitor, accumulate=accumulate)
    reports += [] if monitor.report is reports[-1] else [monitor.report]  # an open window is judged at the end
    assert_same([report.to_dict() for report in reports], reports_of(callback))
    assert [tuple(event[:5]) for event in monitor.events] == [tuple(event[:5]) for event in callback.events]
    assert_same(own.state_dict(), model.state_dict())
    assert (monitor.deaths, monitor.findings) == (callback.deaths, callback.findings)
    assert monitor.summary() == callback.summary()


# -- watching changes nothing --------------------------------------------------------------------------------


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.g, self.d = mlp(), nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))


def gan(monitored):
    model = Gan()
    optimizers = [sgd(model.d), sgd(model.g)]
    with monitored(model, optimizers) as monitor:
        for batch in BATCHES:
            for optimizer, sign in zip(optimizers, (1, -1), strict=True):
                loss = sign * (model.d(model.g(batch)).mean() - model.d(batch[:, :1]).mean())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            monitor.step(loss)
    return model


def lbfgs(monitored):
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.01)
    with monitored(model, optimizer) as monitor:
        for batch in BATCHES:

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            monitor.step(optimizer.step(closure))
    return model


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3)), nn.Linear(8, 1)

    def forward(self, x):
        x = x.clone().requires_grad_()
        first = checkpoint(self.inner, x, use_reentrant=False)
        return self.head(first) + self.head(checkpoint(self.inner, x, use_reentrant=True))


def plain(build):
    def run(monitored):
        model = build()
        with monitored(model, optimizer := sgd(model, momentum=0.9)) as monitor:
            for batch in BATCHES:
                train(model, optimizer, [batch])
                monitor.step()
                model.eval()
                with torch.no_grad():
                    model(torch.zeros(99, 4))
                model.train()
        return model

    return run


LOOPS = {"plain": plain(mlp), "checkpointed": plain(Checkpointed), "gan": gan, "lbfgs": lbfgs}
LOOPS |= {"normed": plain(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)))}
COUNTED = {"plain": 6, "checkpointed": 12, "gan": 12, "lbfgs": 6, "normed": 6}  # in each batch


class Unwatched:
    def __init__(self, model, optimizers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def step(self, loss=None):
        pass


@pytest.mark.parametrize("case", LOOPS)
def test_watching_changes_no_bit_and_counts_each_training_forward_once(case):
    seen = []

    def watching(model, optimizers):
        seen.append(watch(model, optimizers, **OFTEN, gradient_evidence=True))
        return seen[0]

    results = []
    for monitored in (Unwatched, watching):
        torch.manual_seed(3)
        results.append((LOOPS[case](monitored).state_dict(), torch.get_rng_state()))
    assert_same(*results)
    assert watchers() == []
    (monitor,) = seen
    assert monitor.failure is None
    assert monitor.report.sites[0].samples == 4 * COUNTED[case]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_runs_without_gradients_is_not_observed(mode):
    model, optimizer = net(dead=0), None
    with watch(model, optimizer := sgd(model), **OFTEN) as monitor, torch.no_grad():
        model[0].bias[0] = -100.0
        for batch in BATCHES[:4]:
            with torch.enable_grad():
                train(model, optimizer, [batch])
            with mode():
                model(torch.full((5, 4), 1e4))  # the unit fires here
            monitor.step()
    assert monitor.report["act"].samples == 4 * 6
    assert (
        monitor.report["act"].dead.tolist() == find_dead_units(model, BATCHES[:4], min_samples=1)["act"].dead.tolist()
    )
    assert monitor.report["act"].dead[0]


def load(target, model):
    target.load_state_dict(model.state_dict())


@torch.no_grad()
def average(target, model):
    for slow, fast in zip(target.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 0.1)


def average_data(target, model):
    for slow, fast in zip(target.parameters(), model.parameters(), strict=True):
        slow.data.copy_(0.1 * fast.data + 0.9 * slow.data)


@pytest.mark.filterwarnings("ignore:.*% dead at step")
@pytest.mark.parametrize("update", [load, average, average_data])
def test_a_target_network_that_follows_the_model_is_no_part_of_it(update):
    torch.manual_seed(0)
    model, target = mlp(), mlp()
    target.requires_grad_(False)
    optimizer, losses = sgd(model), []
    with watch(model, optimizer, **OFTEN, remedy="reset", threshold=0.0) as monitor:
        for batch in BATCHES:
            update(target, model)
            with torch.no_grad():
                wanted = target(batch) + model(batch[0])  # acting
            losses.append((model(batch) - wanted).square().mean())
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(losses[-1])
    assert monitor.failure is None
    assert [site.name for site in monitor.report.sites] == ["1", "3"]
    assert monitor.report["1"].samples == 24
    assert [event.action for event in monitor.events][:2] == ["edited", "revived"], monitor.events


@pytest.mark.filterwarnings("ignore:.*% dead at step")
def test_units_of_single_rows_are_woken_up():
    torch.manual_seed(0)
    model = mlp()
    with torch.no_grad():
        model[0].bias[:3] = -3.0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, **OFTEN, remedy="wake_up", threshold=0.0) as monitor:
        for row in torch.randn(400, 4, generator=torch.Generator().manual_seed(3)):
            loss = loss_of(model, row)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss)
    assert monitor.failure is None
    assert model[0].bias[:3].min() > -3.0  # where it would have stayed


def test_a_compiled_model_is_observed_in_training_forwards_alone():
    model = net()
    compiled = torch.compile(model, backend="aot_eager")
    with watch(compiled, optimizer := sgd(model), **OFTEN) as monitor:
        for batch in BATCHES[:8]:
            train(compiled, optimizer, [batch])
            with torch.no_grad():
                compiled(torch.zeros(50, 4))
            monitor.step()
    assert monitor.failure is None
    assert monitor.report["act"].samples == 4 * 6
    assert monitor.report["act"].dead.tolist() == [True] * 3 + [False] * 5


def penalized(model, optimizer, monitor, batch):
    optimizer.zero_grad()
    loss = loss_of(model, batch) + sum(p.square().sum() for p in model.parameters())
    loss.backward()
    optimizer.step()
    monitor.step(loss)


def test_a_penalty_in_the_loss_is_noticed_also_where_gradients_are_cleared_before_the_forward():
    model = net()
    with watch(model, optimizer := sgd(model), **OFTEN, gradient_evidence=True) as monitor:
        for batch in BATCHES[:3]:
            penalized(model, optimizer, monitor, batch)
        with pytest.warns(UserWarning, match="gradients contradict the forward at `act`"):
            penalized(model, optimizer, monitor, BATCHES[3])
    assert monitor.report["act"].dead.tolist() == [True] * 3 + [False] * 5


# -- from start to end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "backward", "step", "nowhere"])
def test_nothing_is_left_behind(place, error, tmp_path):
    model = net()
    optimizer = sgd(model)
    monitor = watch(model, optimizer, **OFTEN, remedy="reset", mask=lambda batch: None, report_dir=str(tmp_path))

    def act(where):
        if where == place:
            raise error("stop here")

    def run():
        with monitor:
            train(model, optimizer, BATCHES[:6], monitor)
            loss = loss_of(model, BATCHES[6])
            act("forward")
            loss.backward()
            act("backward")
            optimizer.step()
            act("step")

    if place == "nowhere":
        run()
    else:
        with pytest.raises(error, match="stop here"):
            run()
    assert watchers() == []
    assert not optimizer._optimizer_step_pre_hooks
    assert not model._forward_pre_hooks
    assert [event.action for event in monitor.events] == ["edited"]
    assert (tmp_path / "report.html").exists()
    with pytest.raises(RuntimeError, match="outside of its `with` block"):
        monitor.step()


def test_a_run_goes_on_as_if_it_had_not_ended():
    settings = {**OFTEN, "remedy": "bias_warming", "window": 5}
    model = net()
    with watch(model, optimizer := sgd(model), **settings) as whole:
        expected = train(model, optimizer, monitor=whole)
    first = net()
    with watch(first, optimizer := sgd(first), **settings) as monitor:
        train(first, optimizer, BATCHES[:7], monitor)
        torch.save((first.state_dict(), monitor.state_dict()), file := io.BytesIO())
    for inside in (False, True):
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        second = net()
        second.load_state_dict(weights)
        monitor = watch(second, optimizer := sgd(second), **settings)
        if not inside:
            monitor.load_state_dict(state)
        with monitor:
            if inside:
                monitor.load_state_dict(state)
            reports = train(second, optimizer, BATCHES[7:], monitor)
        assert_same([report.to_dict() for report in reports], [report.to_dict() for report in expected[1:]])
        assert_same(second.state_dict(), model.state_dict())
        assert monitor.summary() == whole.summary()


def test_a_loop_of_which_no_optimizer_steps_is_told_what_is_missing():
    model, other = net(), net()
    with (
        pytest.warns(UserWarning, match=r"Pass to `watch` the optimizers that step"),
        watch(model, sgd(other), **OFTEN) as monitor,
    ):
        train(model, sgd(model), monitor=monitor)
    assert monitor.report is None


def test_a_failure_ends_the_watch_and_not_the_loop(monkeypatch):
    model = net()
    with watch(model, optimizer := sgd(model), **OFTEN) as monitor:
        monkeypatch.setattr(Repair, "note_loss", lambda self, loss: 1 / 0)
        with pytest.warns(UserWarning, match=r"(?s)watches no longer.*ZeroDivisionError"):
            assert train(model, optimizer, monitor=monitor) == []
    assert isinstance(monitor.failure, ZeroDivisionError)
    assert watchers() == []


# -- what it takes, and says -----------------------------------------------------------------------------------


def test_metrics_go_to_the_function_once_a_window_until_it_fails():
    rows, model = [], net()

    def log(metrics, step):
        rows.append((step, metrics["dead_relu/dead_fraction"]))
        assert step < 12, "full"

    with (
        pytest.warns(UserWarning, match=r"`log` took no metrics and is left out: AssertionError\('full"),
        watch(model, optimizer := sgd(model), **OFTEN, log=log) as monitor,
    ):
        train(model, optimizer, monitor=monitor)
    assert rows == [(3, 3 / 8), (7, 3 / 8), (11, 3 / 8), (15, 3 / 8)]
    assert monitor.failure is None


def test_what_came_of_it_is_printed_at_the_end_and_repairs_are_logged(capsys, caplog):
    model = net()
    settings = OFTEN | {"remedy": "reset", "name": "mine"}
    with caplog.at_level(logging.INFO, "lightning_deadrelu"), watch(model, optimizer := sgd(model), **settings) as one:
        train(model, optimizer, monitor=one)
    assert capsys.readouterr().out.startswith(f"mine: {one.run_report.conclusion}")
    assert f"mine: {one.events[0]}" in caplog.messages


@pytest.mark.parametrize("by_name", [True, False])
def test_a_mask_is_called_with_what_the_model_is_called_with(by_name):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(dead=0)

        def forward(self, x, mask=None):
            return self.net(x)

    model, tokens = Tagger(), torch.randn(3, 5, 4)
    valid = torch.arange(5).expand(3, 5) < torch.tensor([[5], [2], [0]])
    mask = (lambda batch: batch["mask"]) if by_name else (lambda batch: batch[..., 0] == tokens[..., 0])
    with watch(model, optimizer := sgd(model), **OFTEN, mask=mask) as monitor:
        for _ in range(4):
            (model(x=tokens, mask=valid) if by_name else model(tokens, valid)).sum().backward()
            optimizer.step()
            monitor.step()
    assert monitor.report.sites[0].samples == 4 * (7 if by_name else 15)


def test_a_loop_that_goes_on_after_a_refused_mask_is_not_observed_where_it_is_not_due():
    model, modes = mlp(), []
    optimizer = sgd(model)
    with watch(model, optimizer, every_n_steps=8, mask=lambda batch: torch.ones(3, 3, dtype=torch.bool)) as monitor:
        for number, batch in enumerate(BATCHES[:4]):
            loss = loss_of(model, batch)
            modes.append(len(_get_current_function_mode_stack()))
            loss.backward()
            optimizer.step()
            with pytest.raises(ValueError, match="mask") if number == 0 else nullcontext():
                monitor.step(loss)
    assert modes == [1, 0, 0, 0]


def test_a_mask_that_cannot_tell_from_a_call_without_arguments_is_refused():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(dead=0)

        def forward(self):
            return self.net(torch.randn(3, 5, 4))

    with (
        pytest.raises(ValueError, match=r"`watch\(mask=...\)`: .*not subscriptable"),
        watch(model := Noise(), sgd(model), **OFTEN, mask=lambda batch: batch["mask"]),
    ):
        model()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"window": 0}, r"`watch\(window=0\)`.*Try `window=10`"),
        ({"log": 3}, r"`watch\(log=3\)`.*Try `log=wandb.log`"),
        ({"optimizers": []}, r"`watch\(optimizers=\[\]\)`.*optimizer of torch"),
        ({"include": ["relu7"]}, r"watch: .*relu7.*matches no activation"),
        ({"mask": lambda batch: 3}, r"`watch\(mask=...\)`.*returned int"),
    ],
)
def test_what_cannot_work_is_refused_in_three_parts(wrong, said):
    model = net()
    optimizer = sgd(model)
    with (
        pytest.raises(ValueError, match=said),
        watch(model, wrong.pop("optimizers", optimizer), **OFTEN | wrong) as monitor,
    ):
        train(model, optimizer, monitor=monitor)
    assert watchers() == []


# -- several ranks, and Fabric -----------------------------------------------------------------------------------


def halves(rank):
    return [batch[rank::2] for batch in BATCHES]


def reset_on(rank, way):
    """Train with DDP, or with Fabric; return verdicts, events, weights, and what was logged."""
    rows = []
    model = net()
    optimizer = sgd(model)
    if way == "fabric":
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        called, optimizer = fabric.setup(model, optimizer)
    else:
        dist.init_process_group("gloo")
        called = DistributedDataParallel(model, find_unused_parameters=True)
    with watch(called, optimizer, **OFTEN, remedy="reset", log=lambda *row: rows.append(row)) as monitor:
        reports = train(called, optimizer, halves(rank), monitor)
        state = monitor.state_dict()
    assert monitor.failure is None
    events = [tuple(event[:5]) for event in monitor.events]
    return [report.to_dict() for report in reports], events, model.state_dict(), rows, state


@pytest.mark.ranks
@pytest.mark.parametrize("way", ["ddp", "fabric"])
def test_two_ranks_come_to_the_verdicts_and_edits_of_one(way):
    model = net()
    with watch(model, optimizer := sgd(model), **OFTEN, remedy="reset") as alone:
        expected = train(model, optimizer, monitor=alone)
    (first, *_, rows, _), (second, *_, nothing, _) = ranks = on_two_ranks(reset_on, way)
    for reports in (first, second):
        for report, one in zip(reports, expected, strict=True):
            assert_alike(report, one.to_dict())
    assert ranks[0][1] == ranks[1][1] == [tuple(event[:5]) for event in alone.events]
    assert_same(ranks[0][2], ranks[1][2])
    assert len(rows) == len(expected)
    assert nothing == []


def test_fabric_on_one_device_changes_nothing_either():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = net()
    called, optimizer = fabric.setup(model, sgd(model))
    plain_model = copy.deepcopy(net())
    with watch(called, optimizer, **OFTEN) as monitor:
        reports = train(called, optimizer, monitor=monitor)
    train(plain_model, sgd(plain_model))
    assert_same(model.state_dict(), plain_model.state_dict())
    assert reports[-1]["act"].dead.tolist() == [True] * 3 + [False] * 5
