"""Kinds and causes of death: planted in real runs, and one by one."""

import io
from dataclasses import replace

import pytest
import torch
from histories import site_of
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from toys import Loader, fit, run_of
from two_ranks import ddp_trainer, on_two_ranks

from lightning_deadrelu import DeadReLUMonitor, LivenessReport, Reset, watch
from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.explain.death_dates import momentum_of
from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.explain.postmortem import recorder
from lightning_deadrelu.explain.postmortem.death_events import DeathEvent, described, largest, merged, still_true
from lightning_deadrelu.explain.postmortem.dying_units import DyingUnits
from lightning_deadrelu.explain.postmortem.explain import explain
from lightning_deadrelu.explain.postmortem.step_log import Rows

WATCH = {"every_n_steps": 4, "window": 5, "min_samples": 20}


def pushed(layers=1, bias=1.0):
    """Units that fire on all positive inputs, of which each step takes an eighth of the learning rate."""
    net = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(8, 8), nn.ReLU())))
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.fill_(1.0)
            layer.bias.fill_(bias)
    return net


class Pushed(LightningModule):
    """Puts out less at each step; ``rate``, ``scale`` and ``push`` by the number of the batch."""

    def __init__(self, net=None, rate=lambda step: 1e-3, push=lambda step: 1.0, decay=0.0):
        super().__init__()
        self.net, self.rate, self.push, self.decay = net or pushed(), rate, push, decay

    def on_train_batch_start(self, batch, batch_idx):
        for group in self.trainer.optimizers[0].param_groups[:2]:
            group["lr"] = self.rate(batch_idx)

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean() * self.push(batch_idx)

    def configure_optimizers(self):
        first, others = self.net[0], list(self.net[1:].parameters())
        groups = [{"params": [first.bias], "weight_decay": self.decay}, {"params": [first.weight]}]
        return torch.optim.SGD([*groups, *([{"params": others}] if others else [])], lr=1e-6)


def inputs(steps=100, scale=lambda step: 1.0):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(5, 8, generator=generator) * scale(step) + 0.1 for step in range(steps)]


def deaths(model, data=None, **options):
    monitor = DeadReLUMonitor(**{**WATCH, **options})
    fit(model, Loader(data or inputs()), monitor)
    return monitor.deaths


def at(step, value, usual=1.0):
    return lambda now: value if now == step else usual


# -- planted in real runs --------------------------------------------------------------------------------


def test_a_learning_rate_spike_word_by_word():
    (event,) = deaths(Pushed(rate=at(41, 100.0, 1e-3)))
    assert str(event) == (
        "8 units of `net.1` died between steps 40 and 44, when the learning rate rose 100,000-fold at step 41, from"
        " 0.001 to 100; bias moved by -12"
    )
    assert (event.kind, event.cause, event.units) == ("shock", "learning_rate_spike", (8,))
    assert event.finding.edit == "lr=0.001"


def test_a_gradient_spike_before_the_last_sign_of_life():
    data = inputs(scale=lambda step: 0.0 if 41 < step < 44 else 1.0)
    (event,) = deaths(Pushed(push=at(41, 1e5)), data)
    assert (event.kind, event.cause) == ("shock", "gradient_spike")
    assert (event.first_step, event.last_step) == (40, 44)
    assert "when the gradient norm rose" in str(event)
    assert str(event).endswith("bias moved by -12")


def test_an_outlier_comes_before_the_gradient_it_makes():
    (event,) = deaths(Pushed(), inputs(scale=at(41, 1e5)))
    assert (event.kind, event.cause) == ("shock", "outlier_batch")
    assert "when the largest input rose" in str(event)


def test_decay_is_a_drift():
    net = pushed()
    with torch.no_grad():
        net[0].weight.fill_(-0.05)
    (event,) = deaths(Pushed(net, rate=lambda step: 0.1, push=lambda step: 0.0, decay=0.5))
    assert (event.kind, event.cause, event.units) == ("drift", "bias_decay", (8,))
    assert "while a weight decay of 0.5 took their biases from 1 to 0." in str(event)


def test_upstream_is_told_apart_and_comes_second():
    net = pushed(2)
    with torch.no_grad():
        net[2].bias[:3] = -0.5  # fire as long as the layer before does
    first, second = deaths(Pushed(net, rate=at(41, 1000.0, 1e-4)))
    assert (first.kind, first.cause, first.sites) == ("shock", "learning_rate_spike", ("net.1",))
    assert (second.kind, second.cause, second.units) == ("upstream", "upstream_death", (3,))
    assert str(second) == (
        "3 units of `net.3` died between steps 40 and 44, because their input is constant: `net.1` is dead"
    )


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda layer: layer.bias.fill_(-9.0), "negative_bias"),
        (lambda layer: (layer.weight.copy_(-layer.weight), layer.bias.zero_()), "bad_init"),
    ],
)
def test_born_dead(change, cause):
    net = pushed()
    with torch.no_grad():
        change(net[0])
    (event,) = deaths(Pushed(net), [x - x.mean() if cause == "negative_bias" else x.abs() / 8 for x in inputs()])
    assert event.kind == "born dead"
    assert event.cause in (cause, "uncentred_inputs")
    assert str(event).startswith("8 units of `net.1` were born dead, ")


def test_a_few_deaths_have_no_cause():
    net = pushed()
    with torch.no_grad():
        net[0].weight[0], net[0].bias[0] = -1.0, 1.35  # fires on the smallest inputs alone
    events = deaths(Pushed(net, rate=lambda step: 1e-2))
    assert events
    assert {event.cause for event in events} == {"unknown"}
    assert all(event.finding is None for event in events)


def test_deaths_are_in_the_summary_and_on_the_page(tmp_path):
    monitor = DeadReLUMonitor(**WATCH, report_dir=str(tmp_path))
    fit(Pushed(rate=at(41, 100.0, 1e-3)), Loader(inputs()), monitor)
    sentence = f"{monitor.deaths[0]}."
    assert sentence in " ".join(monitor.summary().split())
    assert '"cause": "learning_rate_spike"' in (tmp_path / "report.json").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "When units died, and why" in page
    assert "died between steps 40 and 44" in page


def test_a_resumed_run_tells_the_same(tmp_path):
    whole, resumed = (DeadReLUMonitor(**WATCH) for _ in range(2))
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=46, save_top_k=-1, auto_insert_metric_name=False)
    fit(Pushed(rate=at(41, 100.0, 1e-3)), Loader(inputs()), whole, keep, enable_checkpointing=True)
    state = torch.load(tmp_path / "46.ckpt", weights_only=True)["callbacks"][whole.state_key]
    assert run_of(state).recorder.steps.values.shape == (46, 5)
    fit(Pushed(rate=at(41, 100.0, 1e-3)), Loader(inputs()), resumed, ckpt=tmp_path / "46.ckpt")
    assert resumed.deaths == whole.deaths
    assert len(whole.deaths) == 1


def killed(optimizer, step=133, units=6, width=64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
    optimizer = optimizer(net.parameters())
    with watch(net, optimizer, every_n_steps=100, window=2, min_samples=20) as monitor:
        for now in range(400):
            if now == step:
                net[0].bias.data[:units] = -100.0
            optimizer.zero_grad()
            loss = (net(torch.randn(16, 8)) - torch.randn(16, 4)).square().mean()
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    return monitor.deaths


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.AdamW(p, 1e-3), lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)],
    ids=["AdamW", "SGD"],
)
def test_a_death_between_observations_is_dated_by_the_momentum(optimizer):
    (event,) = killed(optimizer)
    assert (event.units, event.first_step, event.last_step) == ((6,), 100, 200)
    assert event.estimated_step == pytest.approx(133, abs=5)
    date = f"between steps 100 and 200 (about step {event.estimated_step}, by the optimizer's momentum), "
    assert date in str(event)
    assert event.to_dict()["estimated_step"] == event.estimated_step


def test_of_a_wide_layer_few_units_are_read_to_date_its_deaths(monkeypatch):
    read = []
    monkeypatch.setattr(recorder, "momentum_of", lambda *asked: read.append(len(asked[-1])) or momentum_of(*asked))
    (event,) = killed(lambda p: torch.optim.AdamW(p, 1e-3), units=1100, width=3000)
    assert event.units == (1100,)
    assert event.estimated_step == pytest.approx(133, abs=5)
    assert read == [220 + 238]  # of the 1,100 each fifth, and of 1,900 each eighth


def test_where_the_momentum_does_not_tell_there_is_no_date():
    (event,) = killed(lambda p: torch.optim.SGD(p, 0.01))
    assert event.estimated_step is None
    assert "between steps 100 and 200, without a known cause" in str(event)


def two_ranks(rank):
    monitor = DeadReLUMonitor(**WATCH)
    trainer = ddp_trainer(callbacks=[monitor], max_epochs=1)
    trainer.fit(Pushed(rate=at(41, 100.0, 1e-3)), Loader(inputs()))
    return [str(event) for event in monitor.deaths]


@pytest.mark.ranks
def test_two_ranks_tell_the_same():
    one, other = on_two_ranks(two_ranks)
    assert one == other
    assert len(one) == 1
    assert one[0].startswith("8 units of `net.1` died between steps 40 and 44, when the learning rate rose")


# -- one by one ------------------------------------------------------------------------------------------


def rows(steps=200, **columns):
    values = torch.full((steps, 5), float("nan"))
    values[:, 0] = 1.0
    for name, column in columns.items():
        if name != "rates":
            values[:, ("gradient", "loss", "input_0").index(name)] = torch.as_tensor(column)
    return Rows(tuple(range(steps)), tuple(columns.get("rates", [1e-3] * steps)), values)


def dying(units=20, size=50, last=100, until=110, peaks=((3.0,), (-1.0,)), **more):
    unknown = torch.full((units,), float("nan"))
    number, no = torch.arange(units), torch.zeros(units, dtype=torch.bool)
    plain = {"first": False, "born": no, "constant": no, "upstream": "", "live_bias": unknown, "live_square": unknown}
    plain |= {
        "last_fired": torch.full_like(number, last),
        "silent_from": torch.full_like(number, until),
        "first_bias": torch.full((size,), float("nan")),
        "bias": unknown,
    }
    peaks = torch.tensor(peaks).expand(-1, units)
    return DyingUnits("fc", size, units=number, peaks=peaks, **{**plain, **more})


def spiked(step, times, count=200):
    return [times if now == step else 1.0 for now in range(count)]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (rows(gradient=spiked(97, 80.0)), "gradient_spike"),
        (rows(gradient=spiked(70, 80.0)), "unknown"),  # long before
        (rows(gradient=spiked(111, 80.0)), "unknown"),  # after
        (rows(gradient=spiked(97, 4.0)), "unknown"),  # as happens in any run
        (rows(gradient=torch.rand(200, generator=torch.Generator().manual_seed(0)) ** 6), "unknown"),  # always so
        (rows(gradient=[1e4 if now == 50 else 1.0 + 99 * (now == 97) for now in range(200)]), "unknown"),  # aftermath
        (rows(input_0=spiked(100, 9.0)), "outlier_batch"),
        (rows(rates=spiked(103, 5.0)), "learning_rate_spike"),
        (rows(rates=[step / 1000 for step in range(200)]), "unknown"),  # a warm-up
        (rows(rates=[0.001 if step < 95 else 1.0 for step in range(200)]), "learning_rate_spike"),
        (rows(loss=[3.0] * 10 + [0.1] * 90 + [3.0] * 20 + [0.1] * 80), "distribution_shift"),
        (rows(loss=[3.0] * 10 + [0.1] * 90 + [3.0] + [0.1] * 99), "unknown"),  # one batch
        (rows(loss=[3.0] * 10 + [0.001] * 90 + [0.01] * 100), "unknown"),  # far from the untrained model's
        (rows(), "unknown"),
    ],
)
def test_what_came_just_before(row, cause):
    (event,) = explain([dying()], row)
    assert event.cause == cause
    assert (event.finding is None) == (cause == "unknown")


def test_a_spike_before_the_interval_says_how_long_before():
    (event,) = explain([dying()], rows(gradient=spiked(97, 80.0)))
    assert str(event) == "20 units of `fc` died between steps 100 and 110, 3 steps after the gradient norm rose 80-fold"


def test_a_few_of_one_layer_share_the_cause_of_many_of_another():
    few = dying(units=2)._replace(site="fc1")
    (event,) = explain([few, dying()], rows(gradient=spiked(97, 80.0)))
    assert event.units == (2, 20)
    assert str(event).startswith(
        "22 units of 2 layers (most in `fc`, 20) died between steps 100 and 110, 3 steps after"
    )
    (alone,) = explain([few], rows(gradient=spiked(97, 80.0)))
    assert alone.cause == "unknown"


def test_steps_as_large_as_the_weights():
    small = torch.full((20,), 0.01)
    (event,) = explain([dying(live_square=small, adaptive=True)], rows(rates=[0.1] * 200))
    assert event.cause == "high_learning_rate"
    assert event.measured == "after steps of 100% of the weights' size at a learning rate of 0.1"
    (calm,) = explain([dying(live_square=small, adaptive=True)], rows(rates=[1e-3] * 200))
    assert calm.cause == "unknown"


def test_a_gradient_that_spikes_after_too_large_steps_is_no_cause_of_its_own():
    square = torch.full((20,), 0.01)  # 20 x 50 weights of size 0.1: a norm of 3.2
    layer = {"live_square": square, "fan_in": 20}
    row = {"gradient": spiked(97, 80.0)}
    (event,) = explain([dying(**layer)], rows(**row, rates=[0.5] * 200))
    assert (event.cause, event.finding.edit) == ("high_learning_rate", "lr=0.05")
    assert event.measured == (
        "after steps of 16% of the weights' size at a learning rate of 0.5, when the gradient norm rose 80-fold"
    )
    (calm,) = explain([dying(**layer)], rows(**row, rates=[0.05] * 200))
    assert calm.cause == "gradient_spike"


def test_gradients_that_overflowed_do_not_tell_how_large_steps_were():
    square, gradient = torch.full((20,), 0.01), torch.ones(200)
    gradient[80:] = torch.inf  # steps that a scaler of mixed precision skips
    (event,) = explain([dying(live_square=square, fan_in=20)], rows(gradient=gradient, rates=[0.05] * 200))
    assert event.cause == "unknown"


def test_sinking_over_windows_is_a_drift_and_a_fall_is_not():
    sinking = ((8.0,), (6.0,), (5.0,), (3.0,), (1.0,), (-0.5,))
    falling = ((8.0,), (8.0,), (8.0,), (7.0,), (8.0,), (-0.5,))
    plunging = ((8.0,), (6.0,), (5.0,), (3.0,), (1.0,), (-50.0,))
    to_the_end = ((3.3e38,), (3e38,), (2e38,), (1e38,), (1e38,), (-3.3e38,))
    kinds = [explain([dying(peaks=peaks)], rows())[0].kind for peaks in (sinking, falling, plunging, to_the_end)]
    assert kinds == ["drift", "shock", "shock", "shock"]


def fitted(burst, low=0.001):
    """A loss that comes near zero, and what it does from step 100 on."""
    generator = torch.Generator().manual_seed(0)
    noise = 1 + 0.1 * torch.rand(200, generator=generator)
    return torch.tensor([3.0] * 10 + [low] * 90 + burst + [low] * (100 - len(burst))) * noise


@pytest.mark.parametrize(
    ("loss", "adaptive", "cause"),
    [
        (fitted([0.002, 0.005, 0.02, 0.3]), True, "adam_spike"),
        (fitted([0.002, 0.005, 0.02, 0.3]), False, "unknown"),
        (fitted([0.3]), True, "unknown"),  # one batch
        (fitted([0.6, 0.7, 0.9, 5.0], low=0.5), True, "unknown"),  # not near zero
        (fitted([0.3]).bfloat16().float(), True, "low_precision"),
        (fitted([0.3]).half().float(), True, "low_precision"),
        (fitted([0.3]).bfloat16().float(), False, "unknown"),
    ],
)
def test_spikes_of_adam_where_the_loss_had_come_near_zero(loss, adaptive, cause):
    (event,) = explain([dying(adaptive=adaptive)], rows(loss=loss))
    assert event.cause == cause


def test_an_outlier_among_the_inputs_comes_before_a_spike_of_adam():
    loss, largest = fitted([0.002, 0.005, 0.02, 0.3]), spiked(100, 50.0)
    (event,) = explain([dying(adaptive=True)], rows(loss=loss, input_0=largest))
    assert event.cause == "outlier_batch"


def test_units_that_sink_after_a_new_task_began_died_of_it():
    sinking = ((8.0,), (6.0,), (5.0,), (3.0,), (1.0,), (-0.5,))
    small = torch.full((20,), 0.01)
    losses = [3.0] * 10 + [0.1] * 40 + [3.0] * 8 + [0.5] * 142
    (event,) = explain([dying(peaks=sinking, live_square=small, adaptive=True)], rows(loss=losses, rates=[0.1] * 200))
    assert (event.kind, event.cause, event.finding.confidence) == ("drift", "distribution_shift", "likely")
    assert event.measured == "after the loss rose from 0.1 to 3 at step 50, and stayed high"


def test_units_that_die_at_other_times_are_other_waves():
    times = torch.tensor([0, 0, 0, 4, 40, 40])
    part = dying(units=6)._replace(last_fired=times, silent_from=times + 5)
    assert [(w.units, w.first_step, w.last_step) for w in explain([part], rows())] == [((4,), 0, 9), ((2,), 40, 45)]


def test_waves_outlive_a_checkpoint_and_join():
    (event,) = explain([dying()], rows(gradient=spiked(97, 80.0)))
    paper = io.BytesIO()
    torch.save(encode(event), paper)
    paper.seek(0)
    assert decode(DeathEvent, torch.load(paper, weights_only=True)) == event
    (both,) = merged([event, event])
    assert both.units == (40,)


def test_of_many_waves_the_largest_are_told():
    cause = Finding(cause="c", where="fc", measured="seen", confidence="likely", edit="lr=1", source="a paper")
    one = DeathEvent("shock", "c", ("fc",), (1,), 0, 0, "seen", finding=cause)
    events = [replace(one, units=(n,), first_step=100 * n, last_step=100 * n + 10) for n in range(1, 20)]
    lines = [line for line in described(events).splitlines() if not line.startswith("  c (likely)")]
    assert [line.split()[0] for line in lines] == ["15", "16", "17", "18", "19", "105"]
    assert lines[-1] == "105 more deaths; see `monitor.deaths`."


def test_deaths_without_a_cause_are_counted_and_not_described():
    events = [DeathEvent("shock", "unknown", ("fc",), (9,), step, step + 10, "unseen") for step in (0, 20)]
    assert described(events) == "18 deaths without a known cause; see `monitor.deaths`."


def test_born_dead_is_said_of_units_that_are_so_still():
    born = [DeathEvent("born dead", cause, ("a", "b"), (7, 2), 0, 9, "silent") for cause in ("born_dead", "bad_init")]
    shock = DeathEvent("shock", "unknown", ("a",), (4,), 10, 20, "unseen")
    sites = site_of("a", torch.arange(20) < 9), site_of("b", torch.zeros(4, dtype=torch.bool))
    told = still_true([*born, shock], LivenessReport(tuple(replace(one, born_dead=one.dead) for one in sites)))
    assert [(death.sites, death.units) for death in told] == [(("a",), (7,)), (("a",), (2,)), (("a",), (4,))]


class Spared(Pushed):
    """Half of the units are silent, and some of these are lifted later."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.net[0].bias[:4] = -20.0

    def training_step(self, batch, batch_idx):
        if batch_idx == 60:
            with torch.no_grad():
                self.net[0].bias[:3] = 1.0
        return super().training_step(batch, batch_idx)


def test_units_that_fire_after_all_were_not_born_dead():
    monitor = DeadReLUMonitor(**WATCH)
    fit(Spared(), Loader(inputs()), monitor)
    (born,) = [death for death in monitor.deaths if death.kind == "born dead"]
    assert born.units == (1,)
    assert monitor.report.sites[0].born_dead.sum() == 1


@pytest.mark.filterwarnings("ignore:.*Reset refused")
@pytest.mark.parametrize(
    ("remedy", "advised"),
    [(None, True), (Reset(start_step=10_000), False), (Reset(dry_run=True), True)],
)
def test_a_remedy_that_is_on_is_not_advised(remedy, advised):
    net = pushed(2)
    with torch.no_grad():
        net[2].bias[:3] = -0.5
    monitor = DeadReLUMonitor(**{**WATCH, "every_n_steps": 1}, remedy=remedy)
    fit(Pushed(net, rate=at(41, 1000.0, 1e-4)), Loader(inputs()), monitor)
    assert "upstream_death (certain)" in " ".join(monitor.summary().split())
    assert ("try `DeadReLUMonitor(remedy=" in " ".join(monitor.summary().split())) == advised


def test_a_large_wave_outlasts_any_number_of_small_ones():
    large = DeathEvent("shock", "unknown", ("fc1",), (80,), 10, 20, "as seen")
    small = [DeathEvent("shock", "unknown", ("fc1",), (1,), step, step + 1, "as seen") for step in range(30, 230)]
    events = []
    for event in [large, *small]:
        events = largest([*events, event], 100)
    assert events == [large, *small[-99:]]


@pytest.mark.parametrize(("width", "layers"), [(2, 5), (4, 12), (6, 5), (8, 20), (10, 12), (16, 5), (16, 40), (64, 8)])
def test_narrow_layers_are_blamed_only_where_their_chance_of_dying_is_no_small_one(width, layers):
    alive = 1.0
    for _ in range(layers):
        alive *= 1 - 0.5**width
    born = torch.ones(width, dtype=torch.bool)
    (event,) = explain([dying(units=width, size=width, born=born)], rows(), widths=[width] * layers)
    assert (event.cause == "narrow_and_deep") == (1 - alive >= 0.05 and width >= 3)
    if event.finding and event.cause == "narrow_and_deep":
        assert f"a probability of {1 - alive:.0%}" in event.measured


def test_wide_layers_beside_narrow_ones_add_no_chance():
    born = torch.ones(4, dtype=torch.bool)
    (event,) = explain([dying(units=4, size=4, born=born)], rows(), widths=[4] * 6 + [256] * 6)
    assert (
        event.measured == "because one of 6 layers of at most 4 units is silent on an input with a probability of 32%"
    )


# -- layers that are bare parameters ---------------------------------------------------------------------


class Bare(LightningModule):
    """A layer without a module of its own, whose output is pushed down."""

    def __init__(self, form, lr):
        super().__init__()
        self.form, self.lr = form, lr
        torch.manual_seed(0)
        weight = torch.randn(8, 32) * 0.5
        self.kernel = nn.Parameter({"linear": weight.T, "conv": weight.T[:, :, None]}.get(form, weight).contiguous())
        shape = {"row": (1, 32), "conv": (32,)}.get(form, (32,))
        self.b = nn.Parameter(torch.zeros(shape))

    def hidden(self, x):
        if self.form == "linear":
            return nn.functional.linear(x, self.kernel, self.b)
        if self.form == "einsum":
            return torch.einsum("ni,io->no", x, self.kernel) + self.b
        if self.form == "conv":
            return nn.functional.conv1d(x[:, :, None], self.kernel, self.b).flatten(1)
        return x @ self.kernel + self.b

    def forward(self, x):
        return self.hidden(x).relu()

    def training_step(self, batch, batch_idx):
        return self(batch).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("form", ["matmul", "row", "einsum", "linear", "conv"])
def test_the_learning_rate_is_found_where_a_layer_is_a_bare_parameter(form):
    options = {"every_n_steps": 1, "window": 4}
    too_high, usual = (deaths(Bare(form, lr), inputs(20), **options) for lr in (1.0, 1e-3))
    measured = [event.measured for event in too_high if event.cause == "high_learning_rate"]
    assert any("of the weights' size at a learning rate of 1" in one for one in measured)
    assert "high_learning_rate" not in {event.cause for event in usual}


def test_of_layers_born_dead_that_is_named_first_which_the_others_follow_from():
    first, follows = (
        DeathEvent("born dead", cause, (site,), (units,), 0, 9, "seen", None, finding)
        for cause, site, units in (("negative_bias", "a", 20), ("upstream_death", "b", 30))
        for finding in [Finding(cause=cause, where=site, measured="", confidence="certain", edit="", source="")]
    )
    said = described([follows, first])
    assert said.index("of `a` were born dead") < said.index("of `b` were born dead")
