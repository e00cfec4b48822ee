"""Gradients as a proof of life, held against a slow loop over all training batches."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from toys import Loader, Log, Net, Verdicts, assert_same, batches, fit, inner, mlp, reports_of, tensors
from two_ranks import ddp_trainer, on_two_ranks

from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.observe.gradient_evidence import GradientEvidence, GradientRows, Plan
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics.counts import RELU

SETTINGS = {"every_n_steps": 4, "window": 3, "min_samples": 30}
EVIDENCE = {**SETTINGS, "gradient_evidence": True}


class Slow(Callback):
    """Looks at every sample of every batch: who fired, and had a gradient from above."""

    def __init__(self, hinge=0.0):
        self.hinge, self.sign, self.samples, self.batch = hinge, {}, {}, 0

    def on_fit_start(self, trainer, pl_module):
        for name, module in pl_module.named_modules():
            if isinstance(module, (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardtanh)):
                module.register_forward_hook(lambda module, args, out, name=name: self.see(name, args[0], out))

    def see(self, name, x, out):
        if out.requires_grad:
            with torch._C.DisableTorchFunction():  # or this would be one more reader of the input
                self._see(name, x, out)

    def _see(self, name, x, out):
        over = [dim for dim in range(x.ndim) if dim != 1]
        hinge = self.hinge if name == "net.threshold" else 0.0
        fires = (x > hinge).detach().clone()
        sign = self.sign.setdefault(name, torch.full((x.shape[1],), -1))
        if self.batch % SETTINGS["every_n_steps"] == 0:
            self.note(sign, fires.any(over[0]) if len(over) == 1 else fires.amax(over))
            seen = self.samples.setdefault(name, {})
            seen[self.batch] = seen.get(self.batch, 0) + len(x)

        def above(gradient, batch=self.batch):
            capped = (x < 6) if name == "net.relu6" else True
            passes = fires & (gradient != 0) & capped
            self.note(sign, passes.any(over[0]) if len(over) == 1 else passes.amax(over))

        out.register_hook(above)

    def note(self, sign, lives):
        sign[lives] = self.batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batch += (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch

    def age(self, name):
        return [sum(n for at, n in self.samples[name].items() if at > last) for last in self.sign[name].tolist()]


class Compared(Verdicts):
    """Holds every verdict against the slow loop's."""

    def __init__(self, slow, sites, **settings):
        super().__init__(**settings)
        self.slow, self.compared = slow, sites

    def on_verdict(self, trainer, pl_module, report):
        super().on_verdict(trainer, pl_module, report)
        for site in report.sites:
            if site.name in self.compared:
                assert site.age.tolist() == self.slow.age(site.name), (site.name, report.step)
                assert torch.equal(site.dead, site.silent & (site.age >= self.min_samples))
                assert site.judged[site.age < min(self.min_samples, site.samples)].all()


class Layers(nn.ModuleDict):
    """Convolutions with a norm, without a bias, in groups and behind a residual, then linear layers."""

    def __init__(self):
        channels = nn.BatchNorm2d(8)
        convolutions = {"conv": nn.Conv2d(2, 8, 3, bias=False), "norm": channels, "relu": nn.ReLU(inplace=True)}
        convolutions |= {"conv2": nn.Conv2d(8, 8, 3, padding=1), "joined": nn.ReLU()}
        convolutions |= {"grouped": nn.Conv2d(8, 8, 3, groups=2, bias=False), "relu6": nn.ReLU6()}
        linear = {"fc": nn.Linear(8, 12, bias=False), "threshold": nn.Threshold(0.05, 0.0), "head": nn.Linear(12, 1)}
        super().__init__(convolutions | linear)
        with torch.no_grad():
            self["norm"].bias -= torch.linspace(0, 4, 8)
            self["conv2"].bias -= torch.linspace(-2, 2, 8)

    def forward(self, x):
        x = self["relu"](self["norm"](self["conv"](x)))
        x = self["joined"](self["conv2"](x) + x - 2)
        x = self["relu6"](self["grouped"](x) + 1).mean((-2, -1))
        return self["head"](self["threshold"](self["fc"](x)))


def bursts(count, *shape, often=5):
    """Small inputs, and now and then a large one, on which units fire that otherwise rest."""
    generator = torch.Generator().manual_seed(1)
    items = [torch.randn(*shape, generator=generator) * 0.3 for _ in range(count)]
    for item in items[often - 2 :: often]:
        item[-1] *= 20
    return items


def only_proved(site):
    """Which units gradients alone clear."""
    return site.silent & site.judged & ~site.dead


def shy(net):
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Linear) and len(module.bias) > 1:
                module.bias -= torch.linspace(0, 3, len(module.bias))
    return net


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}], ids=str)
def test_ages_equal_those_of_a_slow_loop(options):
    torch.manual_seed(3)
    slow = Slow()
    monitor = Compared(slow, ["net.1", "net.3"], **EVIDENCE)
    fit(Net(shy(mlp(2)), 0.003), Loader(bursts(90, 5, 4)), slow, monitor, **options)
    assert len(monitor.reports) > (2 if options.get("accumulate_grad_batches") else 7)
    first = monitor.reports[-1]["net.1"]
    assert first.dead[:2].all()
    if not options:
        assert any(only_proved(report["net.1"]).any() for report in monitor.reports)


def test_ages_behind_convolutions_and_norms_equal_those_of_a_slow_loop():
    torch.manual_seed(0)
    slow, sites = Slow(hinge=0.05), ["net.relu", "net.joined", "net.relu6", "net.threshold"]
    monitor = Compared(slow, sites, **{**EVIDENCE, "min_samples": 9})
    fit(Net(Layers(), 0.003), Loader(bursts(60, 3, 2, 8, 8)), slow, monitor)
    assert [site.name for site in monitor.report.sites] == sites
    assert len({name for entries in inner(monitor).evidence._slices.values() for name in [entries[0].name]}) == 4
    assert any(only_proved(site).any() for report in monitor.reports for site in report.sites)


# -- a rare unit -----------------------------------------------------------------------------------------


def rare_net():
    """Unit 0 never fires, unit 1 only on inputs of more than 3, the rest at once."""
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        net[0].weight[:] = torch.tensor([[0.0], [1.0], [1.0], [-1.0]])
        net[0].bias[:] = torch.tensor([-5.0, -3.0, 2.0, 2.0])
        net[2].weight.fill_(0.1)
    return net


def rare_items(count=60, rare=(5, 7), size=40):
    """In some batches, none of which is observed, the last sample is a large one."""
    items = [torch.linspace(-1, 1, size)[:, None].clone() for _ in range(count)]
    for number, item in enumerate(items):
        if number % 8 in rare:
            item[-1] = 4.0
    return items


def run_rare(net=None, loader=None, **settings):
    monitor = Verdicts(**{**SETTINGS, "min_samples": 100, **settings})
    monitor.all_rates = True  # who is rare is told from 100 elements on
    fit(net or Net(rare_net(), 0.0, torch.optim.SGD), loader or Loader(rare_items()), monitor)
    return monitor


def test_a_unit_that_fires_between_observations_is_dead_without_and_rare_with_gradients():
    without, proved = run_rare(), run_rare(gradient_evidence=True)
    assert all(report["1"].dead.tolist() == [True, True, False, False] for report in named(without))
    for report in named(proved)[1:]:
        site = report["1"]
        assert site.dead.tolist() == [True, False, False, False]
        assert site.silent.tolist() == [True, True, False, False]  # of the forward alone
        assert site.rare.tolist() == [False, True, False, False]
        assert site.judged.all()
        assert site.age[1] <= 40 * 2
    assert named(proved)[-1]["1"].born_dead.tolist() == [True, False, False, False]


def named(monitor):
    return [{site.name.removeprefix("net."): site for site in report.sites} for report in monitor.reports]


def test_a_unit_that_was_proved_and_rests_for_long_dies_and_comes_back():
    items = rare_items(rare=()), rare_items(rare=(5,))
    monitor = run_rare(loader=Loader(items[1][:24] + items[0][:36] + items[1][:24]), gradient_evidence=True)
    second = [{name: getattr(r["1"], name)[1].item() for name in NAMES} for r in named(monitor)]
    assert [one["dead"] for one in second] == [False, False, True, True, True, False, False]
    assert [one["newly_dead"] for one in second] == [False, False, True, False, False, False, False]
    assert [one["revived"] for one in second] == [False, False, False, False, False, True, False]
    assert not any(one["born_dead"] for one in second)


NAMES = ("dead", "newly_dead", "revived", "born_dead")


def test_a_gradient_of_zero_convicts_nobody():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.act, self.out = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)
            nn.init.zeros_(self.out.weight)

        def forward(self, x):
            return x + self.out(self.act(self.inner(x)))

    pair = []
    for settings in (SETTINGS, EVIDENCE):
        torch.manual_seed(0)
        monitor = Verdicts(**settings)
        fit(Net(Branch(), 0.0), Loader(tensors(40)), monitor)
        pair.append(reports_of(monitor))
    assert pair[0] == pair[1]
    assert not pair[0][-1]["dead_units"]


# -- what is not believed --------------------------------------------------------------------------------


class Penalised(Net):
    """Has an L2 term over all parameters in its loss."""

    strength = 1e-2

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.strength * sum(
            p.square().sum() for p in self.parameters()
        )


def test_a_penalty_in_the_loss_is_noticed_at_once():
    monitor = Verdicts(**EVIDENCE)
    net = mlp(3)
    with torch.no_grad():
        net[2].bias.fill_(5.0)
    with pytest.warns(UserWarning, match="contradict the forward at `net.1`:.*`weight_decay`") as caught:
        fit(Penalised(net, 0.0), batches(40), monitor)
    assert sum("contradict" in str(one.message) for one in caught) == 1
    assert {site.owner for site in inner(monitor).evidence._refuted} == {"net.1"}  # nobody is silent in the other
    without = Verdicts(**SETTINGS)
    fit(Penalised(net, 0.0), batches(40), without)
    assert [r["net.1"].to_dict() for r in monitor.reports] == [r["net.1"].to_dict() for r in without.reports]
    assert monitor.report["net.1"].dead[:3].all()


class Unannounced(Penalised):
    """Calls backward past Lightning."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        super().training_step(batch, batch_idx).backward()
        optimizer.step()


def test_gradients_of_an_unannounced_backward_prove_nothing():
    model = Unannounced(mlp(), 0.01)
    model.automatic_optimization = False
    monitor = Verdicts(**SETTINGS, gradient_evidence=True)
    with pytest.warns(UserWarning, match="manual_backward") as record:
        fit(model, batches(40), monitor)
    assert sum("manual_backward" in str(one.message) for one in record) == 1
    assert monitor.report["net.1"].dead[:3].all()


class Closure(torch.optim.LBFGS):
    def __init__(self, params, lr):
        super().__init__(params, lr, max_iter=4)


@pytest.mark.parametrize("net", [Net(rare_net(), 0.05, Closure), Net(rare_net(), 0.05, torch.optim.SGD)])
def test_nothing_is_refuted_without_reason(net):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*contradict")
        monitor = run_rare(net, gradient_evidence=True)
    assert monitor.failure is None


class ByHand(Net):
    """Adds up the gradients of three batches, by hand; as some do, zeroes them after the step."""

    def __init__(self, net, keep):
        super().__init__(net, 0.0, torch.optim.SGD)
        self.automatic_optimization = False
        self.keep = keep

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 3 == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=not self.keep)


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_added_up_by_hand_prove_and_refute_nothing_wrongly(keep):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*contradict")
        monitor = run_rare(ByHand(rare_net(), keep), gradient_evidence=True)
    assert named(monitor)[-1]["1"].dead.tolist() == [True, False, False, False]
    with pytest.warns(UserWarning, match="contradict"):
        run_rare(Noisy(rare_net(), keep), gradient_evidence=True)


class Noisy(ByHand):
    """Adds noise to the gradients, as private learning does, and steps with each batch."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad(set_to_none=not self.keep)
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        for p in self.parameters():
            p.grad += 1e-3
        optimizer.step()


class Adversaries(LightningModule):
    """Two optimizers in turn; the step of one leaves gradients in what the other holds."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        with torch.no_grad():
            self.maker[0].bias[:2] = self.critic[0].bias[:3] = -50.0

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.0) for net in (self.maker, self.critic)]

    def training_step(self, batch, batch_idx):
        make, judge = self.optimizers()
        judge.zero_grad()
        self.manual_backward(self.critic(batch).mean() - self.critic(self.maker(batch).detach()).mean())
        judge.step()
        make.zero_grad()
        self.manual_backward(self.critic(self.maker(batch)).mean())
        make.step()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_gradient_with_a_graph_of_its_own_is_read():
    bias = nn.Parameter(torch.ones(2))
    bias.square().sum().backward(create_graph=True)
    plan = plan_of(bias)
    plan.step(torch.optim.SGD([bias]), 1, False)
    assert plan.flush(2)[0].tolist() == [1, 1]
    assert not plan._proved.requires_grad


def test_two_optimizers_in_turn():
    slow = Slow()
    monitor = Compared(slow, ["maker.1"], **EVIDENCE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*contradict")
        fit(Adversaries(), Loader(bursts(57, 5, 4)), slow, monitor)
    for name, dead in (("maker.1", 2), ("critic.1", 3)):
        assert monitor.report[name].dead[:dead].all()
        assert not monitor.report[name].dead.all()
    ages = zip(monitor.report["critic.1"].age.tolist(), slow.age("critic.1"), strict=True)
    assert all(age >= least for age, least in ages)  # the loop also counts what the maker's step leaves in the critic


def test_what_another_optimizer_holds_proves_nothing():
    first, second = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    first.grad, second.grad = torch.ones(2), torch.ones(2)
    one = plan_of(first, second)
    one.step(torch.optim.SGD([second]), 3, False)
    assert one.flush(4)[0].tolist() == [-1, -1, 3, 3]
    assert one.flush(4)[0].tolist() == [-1] * 4


def plan_of(*biases):
    numbers = torch.arange(2)
    entries = Slice("bias", "bias", numbers, numbers[:, None], (0,))
    parts = [(GradientRows.of(bias, (0,), ()), entries, 2 * place) for place, bias in enumerate(biases)]
    return Plan(parts, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_infinite_entries_prove_nothing(dtype):
    bias = nn.Parameter(torch.zeros(2, dtype=dtype))
    for values, proved in (([0.0, 1.0], [-1, 0]), ([torch.inf, -torch.inf], [-1, -1]), ([torch.nan, -1e-4], [-1, 0])):
        bias.grad = torch.tensor(values, dtype=dtype)
        plan = plan_of(bias)
        plan.step(torch.optim.SGD([bias]), 0, False)
        assert plan.flush(2)[0].tolist() == proved
    bias.grad = None
    plan.step(torch.optim.SGD([bias]), 0, False)
    assert plan.flush(2)[0].tolist() == [-1, -1]


# -- what is left out ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, then):
        super().__init__()
        self.fc, self.other, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.then = then

    def forward(self, x):
        return self.out(self.then(self, x))


def twice(self, x):
    return F.relu(self.fc(x)) + F.relu(self.fc(-x))


BLOCKS = {
    "plain": (lambda self, x: F.relu(self.fc(x)), True),
    "joined": (lambda self, x: F.relu(self.fc(x) + x.repeat(1, 2)[:, :6]), True),
    "two layers": (lambda self, x: F.relu(self.fc(x) + self.other(x)), True),
    "gate": (lambda self, x: F.relu(self.fc(x)) * self.other(x), True),
    "called twice": (twice, True),
    "read twice": (lambda self, x: (h := self.fc(x)) + F.relu(h), False),
    "its own gate": (lambda self, x: (h := self.fc(x)) * F.relu(h), False),
    "two rectifiers": (lambda self, x: F.relu(h := self.fc(x)) + F.relu6(h), False),
    "both signs": (lambda self, x: F.relu(h := self.fc(x)) - F.relu(-h), False),
    "clamp": (lambda self, x: self.fc(x).clamp(min=0), False),
    "maximum": (lambda self, x: torch.maximum(h := self.fc(x), torch.zeros_like(h)), False),
    "gelu": (lambda self, x: F.gelu(self.fc(x)), False),
    "tied": (lambda self, x: F.relu(self.fc(x)) + F.linear(x, self.fc.weight, self.fc.bias), False),
    "out of sight": (lambda self, x: F.relu(self.fc(x).cumsum(1)), False),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_only_who_reads_alone_is_asked(name):
    then, asked = BLOCKS[name]
    told = []
    assert (plan_for(Block(then), told) is not None) == asked
    assert any("changes nothing" in one for one in told) == (not asked)


def plan_for(model, told, **altered):
    watch = Watch(model, include=["*", "gelu"])
    watch.trace()
    with watch.probe:
        model(torch.randn(3, 4)).sum().backward()
    evidence = GradientEvidence(told.append)
    for name, value in altered.items():
        setattr(watch, name, value)
    evidence.begin(watch, model, True, True)
    return evidence._plan


def test_a_site_with_a_term_or_another_activation_is_left_out():
    model = mlp()
    whole, lifted = plan_for(model, []), plan_for(model, [], offsets={0: torch.ones(8)})
    exchanged = plan_for(model, [], substitutes={"1": RELU})
    assert [len(plan._sources) for plan in (whole, lifted, exchanged)] == [2, 1, 1]
    assert len(lifted._proved) == len(exchanged._proved) == 6


# -- the monitor's promises ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_training_is_the_same_to_the_last_bit(options):
    ends = []
    for callbacks in ([], [Verdicts(**EVIDENCE)]):
        torch.manual_seed(0)
        net = Net(nn.Sequential(nn.Dropout(0.2), mlp(2)))
        trainer = fit(net, batches(20), *callbacks, **options)
        ends.append((net.state_dict(), trainer.optimizers[0].state_dict(), net.losses, torch.get_rng_state()))
    assert_same(*ends)


def saved_run(*callbacks, items, ckpt=None, net=Net):
    torch.manual_seed(7)
    log = Log()
    fit(net(shy(mlp(2)), 0.02), Loader(items), *callbacks, ckpt=ckpt, logger=log, enable_checkpointing=True)
    return log.verdicts()


@pytest.mark.parametrize("net", [Net, Penalised])
@pytest.mark.filterwarnings("ignore:.*contradict")
def test_interrupted_and_resumed_equals_uninterrupted(net, tmp_path):
    items, whole = bursts(40, 5, 4), Verdicts(**EVIDENCE)
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    saved_run(whole, every, items=items, net=net)
    for step in (1, 3, 18, 30):
        resumed = Verdicts(**EVIDENCE)
        keep = ModelCheckpoint(tmp_path / "other", save_top_k=0)
        saved_run(resumed, keep, items=items, ckpt=tmp_path / f"{step}.ckpt", net=net)
        assert reports_of(resumed) == reports_of(whole)[-len(resumed.reports) :]
        assert len(resumed.reports) >= 1


class Decaying(Net):
    """Adds a decay to the gradients."""

    def on_after_backward(self):
        for p in self.parameters():
            p.grad += 1e-2 * p.detach()


def fit_rare(rank, decay):
    torch.manual_seed(0)
    monitor = Verdicts(**{**EVIDENCE, "min_samples": 150})
    net = Decaying if decay else Net
    items = rare_items() if rank else rare_items(rare=())
    ddp_trainer(callbacks=[monitor]).fit(net(rare_net(), 0.0, torch.optim.SGD), Loader(items))
    return reports_of(monitor), len(inner(monitor).evidence._refuted)


@pytest.mark.ranks
@pytest.mark.parametrize("decay", [False, True])
def test_what_fires_on_one_rank_is_cleared_on_both(decay):
    first, second = on_two_ranks(fit_rare, decay)
    assert first == second
    reports, refuted = first
    assert refuted == decay
    assert reports[-1]["sites"][0]["dead"] == ([0, 1] if decay else [0])
