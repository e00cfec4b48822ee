"""Check-up: each finding appears where its cause was planted, and not in the healthy twin."""

import json
import math
from itertools import pairwise

import families
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from models import BasicBlock, net
from torch import nn
from torch.nn import functional as F
from toys import EVERYTHING, Loader, Net, assert_same, batches, fit, mlp, watchers
from two_ranks import ddp_trainer, on_two_ranks

from lightning_deadrelu import DeadReLUMonitor, checkup, decay_groups, find_dead_units

quiet = pytest.mark.filterwarnings("ignore:.*the check-up found")
ROWS = 64


def deep(widths=(64, 64), inputs=16, outputs=4, act=nn.ReLU):
    sizes = [inputs, *widths]
    hidden = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), act())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


def data(seed=0, width=16, rows=ROWS):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def square(model, x):
    return model(x).square().mean()


def causes(model, optimizer=None, batch=None, **options):
    model.requires_grad_(True)
    made = [] if optimizer is None else optimizer
    return [finding.cause for finding in checkup(model, made, data() if batch is None else batch, **options)]


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -- the model before its first step ---------------------------------------------------------------------


def redrawn(draw):
    model = deep()
    for layer in model:
        if isinstance(layer, nn.Linear):
            draw(layer.weight)
    return model


@pytest.mark.parametrize(
    "draw",
    [nn.init.normal_, lambda w: nn.init.normal_(w, std=0.01), nn.init.xavier_uniform_, nn.init.xavier_normal_],
    ids=["N(0, 1)", "N(0, 0.01)", "Xavier uniform", "Xavier normal"],
)
def test_weights_not_drawn_for_a_rectifier(draw):
    (finding,) = checkup(redrawn(draw), [], data())
    assert finding.cause == "bad_init"
    assert finding.edit == "init_for_relu_(model, batch)"


@pytest.mark.parametrize(
    "draw",
    [
        lambda w: None,
        lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
        lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
        lambda w: nn.init.orthogonal_(w, gain=math.sqrt(2)),
        lambda w: nn.init.xavier_uniform_(w, gain=math.sqrt(2)),
    ],
    ids=["PyTorch", "He normal", "He uniform", "orthogonal", "Xavier with the gain of ReLU"],
)
@pytest.mark.parametrize("seed", range(3))
def test_weights_drawn_for_a_rectifier(draw, seed):
    torch.manual_seed(seed)
    assert causes(redrawn(draw), batch=data(seed)) == []


def test_weights_are_not_judged_once_they_were_trained_nor_behind_a_norm():
    model = redrawn(nn.init.normal_)
    optimizer = sgd(model, lr=1e-9, momentum=0.9)
    square(model, data()).backward()
    optimizer.step()
    assert causes(model, optimizer) == []
    normed = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))
    nn.init.normal_(normed[0].weight)
    assert causes(normed) == []


def test_negative_biases_count_only_where_units_are_silent():
    model = deep()
    nn.init.constant_(model[2].bias, -0.01)
    assert causes(model) == []
    nn.init.constant_(model[2].bias, -3.0)
    (finding,) = checkup(model, [], data())
    assert (finding.cause, finding.where, finding.confidence) == ("negative_bias", "2.bias", "certain")
    assert "fire on none of 64 samples" in finding.measured
    assert finding.edit == "nn.init.constant_(model[2].bias, 0.01)"
    nn.init.zeros_(model[2].bias)
    assert causes(model) == []


def test_narrow_and_deep_stacks():
    (finding,) = checkup(deep([3] * 9), [], data())
    assert finding.cause == "narrow_and_deep"
    assert "70%" in finding.measured  # 1 - (1 - 2^-3)^9
    assert finding.confidence in ("likely", "certain")
    assert causes(deep([16] * 9)) == []
    assert causes(deep([3, 3])) == []


def test_a_stack_that_is_born_dead_is_certain():
    model = deep([3] * 9)
    with torch.no_grad():
        model[8].weight.copy_(-model[8].weight.abs())
        model[8].bias.copy_(-model[8].bias.abs())
    (finding,) = checkup(model, [], data())
    assert (finding.cause, finding.confidence) == ("narrow_and_deep", "certain")


@pytest.mark.parametrize("convolves", [False, True])
def test_inputs_far_from_centred_count_only_where_units_suffer(convolves):
    model, x = deep(), data()
    if convolves:
        model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 2))
        x = torch.randn(ROWS, 3, 8, 8)
    assert causes(model, batch=x) == []
    (finding,) = checkup(model, [], x + 20)
    assert (finding.cause, finding.confidence) == ("uncentred_inputs", "certain")
    ratio = (x + 20).mean((0, 2, 3) if convolves else 0).square().sum()
    ratio /= (x + 20).square().mean((0, 2, 3) if convolves else 0).sum()
    assert f"= {ratio:.2f} over" in finding.measured
    norm = nn.BatchNorm2d(3) if convolves else nn.BatchNorm1d(16)
    assert causes(nn.Sequential(norm, model), batch=x + 20) == []


# -- where rectifiers stand ------------------------------------------------------------------------------


def one_hot(shares, rows=256, copies=1):
    """Draw independent categories of these shares, one-hot, side by side."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.multinomial(torch.tensor(shares), rows, True, generator=generator) for _ in range(copies)]
    return torch.cat([F.one_hot(kinds, len(shares)).float() for kinds in drawn], 1)


@pytest.mark.parametrize("shares", [(0.9, 0.1), (0.8, 0.1, 0.1), (0.7, 0.1, 0.1, 0.1)])
def test_one_hot_features_of_a_few_kinds_are_silent_by_chance(shares):
    x = one_hot(shares)
    model = deep(inputs=len(shares), widths=(200, 64))
    site = find_dead_units(model, [x], min_samples=29).sites[0]
    assert site.dead_fraction + float(site.always_on.double().mean()) > 0.3  # 2 / (kinds + 1), centred or not
    assert "uncentred_inputs" not in causes(model, batch=x)


def test_what_mends_indicators_divides_by_no_deviation():
    x = one_hot((0.97, 0.01, 0.01, 0.01), copies=12)
    model = deep(inputs=48, widths=(400, 64))
    (finding,) = [one for one in checkup(model, [], x) if one.cause == "uncentred_inputs"]
    assert finding.confidence == "possible"
    assert "std" not in finding.edit


def test_a_batchnorm_behind_the_rectifier():
    def conv(*parts):
        return nn.Sequential(nn.Conv2d(3, 8, 3), *parts, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 2))

    images = torch.randn(ROWS, 3, 8, 8)
    assert causes(conv(nn.ReLU(), nn.BatchNorm2d(8)), batch=images) == ["batchnorm_order"]
    assert causes(conv(nn.BatchNorm2d(8), nn.ReLU()), batch=images) == []
    assert causes(conv(nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)), batch=images) == []


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, x: model(x),
        square,
        lambda model, x: F.mse_loss(model(x), torch.ones(ROWS, 4)),
        lambda model, x: F.cross_entropy(model(x), torch.zeros(ROWS, dtype=torch.long)),
        lambda model, x: model(x).softmax(-1).log().mean(),
    ],
)
def test_a_rectified_output(loss):
    assert causes(nn.Sequential(*deep(), nn.ReLU()), forward=loss) == ["relu_output"]
    assert causes(deep(), forward=loss) == []


def attention(act, direct=False):
    def forward(model, x):
        scores = act(model.score(x)) if direct else model.score(act(model.hidden(x)))
        return model.out((scores.softmax(1) * x).sum(1))

    hidden = {} if direct else {"hidden": lambda: nn.Linear(16, 32)}
    return net(forward, score=lambda: nn.Linear(16 if direct else 32, 1), out=lambda: nn.Linear(16, 2), **hidden)()


@pytest.mark.parametrize("direct", [True, False])
def test_a_rectifier_that_scores_for_a_softmax(direct):
    x = torch.randn(ROWS, 5, 16)
    assert causes(attention(torch.relu, direct), batch=x) == ["attention_relu"]
    assert causes(attention(torch.tanh, direct), batch=x) == []


def test_scores_without_a_softmax_count_where_their_gradient_runs_away():
    def found(divisor):
        torch.manual_seed(0)

        def forward(model, x):
            return model.out((torch.relu(model.score(x)).mT @ x / divisor).flatten(1))

        model = net(forward, score=lambda: nn.Linear(16, 8), out=lambda: nn.Linear(128, 2))()
        target, x = torch.arange(ROWS) % 2, torch.randn(ROWS, 64, 16)
        optimizer = sgd(model, 0.1, momentum=0.9)
        return causes(model, optimizer, x, forward=lambda model, x: F.cross_entropy(model(x), target))

    assert found(1) == ["attention_relu"]
    assert found(64) == []


class Adversaries(LightningModule):
    """A generator of 4 numbers and its judge."""

    def __init__(self, *norm, act=nn.ReLU):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), *norm, act(), nn.Linear(32, 6), nn.Tanh())
        self.judge = nn.Sequential(nn.Linear(6, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def configure_optimizers(self):
        nets = self.generator, self.judge
        return [torch.optim.Adam(one.parameters(), lr=2e-4, betas=(0.5, 0.999)) for one in nets], []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer, sign in ((second, 1), (first, -1)):
            optimizer.zero_grad()
            loss = sign * self.judge(self.generator(batch)).mean()
            self.manual_backward(loss)
            optimizer.step()


def test_a_rectifier_in_a_generator_without_a_norm():
    def found(model):
        made, _ = model.configure_optimizers()
        return causes(model, made, data(width=4), forward=lambda model, z: model.judge(model.generator(z)).mean())

    assert found(Adversaries()) == ["generator_relu"]
    assert found(Adversaries(nn.BatchNorm1d(32))) == []
    assert found(Adversaries(act=lambda: nn.LeakyReLU(0.2))) == []


# -- how it is trained -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "healthy"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05), lambda p: torch.optim.SGD(p, lr=0.1)),
        (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
        ),
        (lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1), lambda p: torch.optim.Adam(p, weight_decay=1e-4)),
        (lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=1.0), lambda p: torch.optim.AdamW(p, weight_decay=0.1)),
    ],
)
def test_biases_that_decay(make, healthy):
    model = deep()
    assert causes(model, make(model.parameters())) == ["bias_decay"]
    assert causes(model, make(decay_groups(model, 0.1)[1:])) == []
    assert causes(model, healthy(model.parameters())) == []


def test_norms_that_decay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    spared = [p for name, p in model.named_parameters() if name.endswith("bias")]
    decayed = [p for name, p in model.named_parameters() if name.endswith("weight")]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": spared}]
    (finding,) = checkup(model, torch.optim.SGD(groups, 0.1, momentum=0.9), torch.randn(ROWS, 3, 8, 8))
    assert (finding.cause, finding.where, finding.confidence) == ("bias_decay", "1.weight", "likely")
    assert f"in {math.log(2) / 0.2:.0f} steps" in finding.measured
    healthy = torch.optim.SGD(decay_groups(model, 0.2), 0.1, momentum=0.9)
    assert checkup(model, healthy, torch.randn(ROWS, 3, 8, 8)) == ()


@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_a_high_learning_rate_of_adam_without_warm_up(lr):
    model = deep()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    assert causes(model, optimizer) == ["high_learning_rate", "no_schedule"]
    assert causes(model, optimizer, scheduled=True) == ["high_learning_rate"]
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01)
    assert causes(model, optimizer, scheduled=True) == []
    assert causes(model, torch.optim.Adam(model.parameters(), lr=1e-3)) == []


def test_a_high_learning_rate_of_sgd_beside_its_gradient():
    model = deep()
    gradient = torch.autograd.grad(100 * square(model, data()), model[0].weight)[0].norm() / model[0].weight.norm()
    lr = 0.3 / gradient.item()

    def loss(model, x):
        return 100 * square(model, x)

    assert causes(model, sgd(model, max(lr, 0.11)), forward=loss) == ["high_learning_rate"]
    assert causes(model, sgd(model, 0.11), forward=square) == []
    assert causes(model, sgd(model, 5.0)) == []  # without a loss nothing is known of the gradient


@pytest.mark.parametrize("momentum", [0.9, 0.999, 0.9999, 1.0])
def test_a_momentum_of_one_is_no_division_by_zero(momentum):
    model = deep()
    (finding,) = [
        one
        for one in checkup(model, sgd(model, lr=0.3, momentum=momentum), data(), forward=square)
        if one.cause == "high_learning_rate"
    ]
    assert f"after {min(1 / (1 - momentum + 1e-9), 1000):.0f} such steps" in finding.measured


def test_a_large_gradient_that_is_not_clipped():
    def loss(model, x):
        return (model(x) - 1000).square().mean()

    model = deep()
    (finding,) = checkup(model, sgd(model, 0.05), data(), forward=loss)
    assert (finding.cause, finding.confidence) == ("no_clipping", "likely")
    assert causes(model, sgd(model, 0.05), forward=loss, clipped=True) == []


# -- nothing is said of healthy models -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ResNet, basic", "OPT", "Bert"])
def test_usual_models_with_usual_settings(name):
    family = families.FAMILIES[name]
    model, batch = families.build(family).train(), families.inputs_of(family)
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        *(torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01) for lr in (3e-4, 1e-3)),
    ]
    for optimizer in optimizers:
        found = checkup(model, optimizer, batch, forward=lambda model, batch: model(**batch)[0].square().mean())
        assert found == ()


def test_a_residual_block_is_healthy():
    assert causes(BasicBlock(4, 4), batch=torch.randn(ROWS, 4, 8, 8)) == []


# -- what it leaves alone --------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 1))
    optimizer = sgd(model, momentum=0.9)
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    checkup(model, optimizer, data(), forward=square)
    assert_same(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert [p.grad for p in model.parameters()] == [None] * 6
    assert not optimizer.state
    assert watchers() == []


def test_frozen_layers_are_not_judged():
    model = redrawn(nn.init.normal_)
    assert checkup(model.requires_grad_(False), [], data()) == ()


# -- in a fit --------------------------------------------------------------------------------------------


class Trained(Net):
    """As the plain function is told: the same loss."""

    def training_step(self, batch, batch_idx):
        loss = square(self, batch)
        self.losses.append(loss.detach())
        return loss


def loader(count=3, rows=ROWS, shift=0.0):
    return Loader([data(seed) + shift for seed in range(count)])


def planted(kind):
    model = deep()
    if kind == "negative":
        nn.init.constant_(model[0].bias, -3.0)
    if kind == "large":
        nn.init.normal_(model[2].weight)
    return model


@quiet
@pytest.mark.parametrize(("kind", "lr"), [("negative", 0.01), ("large", 0.01), ("healthy", 0.1), ("healthy", 1e-3)])
def test_the_monitor_finds_what_the_function_finds(kind, lr):
    torch.manual_seed(1)
    model = planted(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    expected = checkup(model, optimizer, data(0), forward=square)
    monitor = DeadReLUMonitor(checkup=True, **EVERYTHING)
    fit(Trained(model, lr=lr), loader(), monitor)
    mine = [finding.to_dict() for finding in monitor.findings]
    for finding in mine:
        finding["where"] = finding["where"].removeprefix("net.")
    assert [(one["cause"], one["where"], one["confidence"]) for one in mine] == [
        (one.cause, one.where, one.confidence) for one in expected
    ]
    assert bool(mine) == (kind != "healthy" or lr > 0.01)


def test_double_precision_is_looked_at_too():
    def found(dtype):
        model = planted("negative").to(dtype)
        return [one.cause for one in checkup(model, torch.optim.SGD(model.parameters(), lr=0.1), data().to(dtype))]

    assert found(torch.float64) == found(torch.float32) != []


@quiet
def test_it_is_told_once_and_changes_nothing():
    def run(**options):
        torch.manual_seed(2)
        model = Trained(planted("negative"))
        monitor = DeadReLUMonitor(**EVERYTHING, **options)
        trainer = fit(model, loader(8), monitor)
        return monitor, (model.state_dict(), trainer.optimizers[0].state_dict(), model.losses, torch.get_rng_state())

    with pytest.warns(UserWarning, match="check-up") as record:
        watched, result = run(checkup=True)
    assert sum("the check-up found\n- negative_bias" in str(warning.message) for warning in record) == 1
    bare, expected = run()
    assert_same(list(result), list(expected))
    assert watched.report.to_dict() == bare.report.to_dict()
    assert bare.findings == ()
    assert watchers() == []


@quiet
def test_it_is_on_the_page_and_in_json(tmp_path):
    monitor = DeadReLUMonitor(checkup=True, report_dir=str(tmp_path), **EVERYTHING)
    fit(Trained(planted("negative")), loader(4), monitor)
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["findings"] == [finding.to_dict() for finding in monitor.findings] != []
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("What the check-up found") == 1
    assert "<code>negative_bias</code>" in page


@quiet
def test_two_optimizers_by_hand():
    monitor = DeadReLUMonitor(checkup=True, **EVERYTHING)
    fit(Adversaries(), Loader([data(width=4)] * 2), monitor)
    assert [finding.cause for finding in monitor.findings] == ["generator_relu"]


@quiet
@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
def test_a_compiled_model_and_one_without_optimizers():
    model = Trained(planted("negative"), lr=1e-3)
    model.net = torch.compile(model.net, backend="eager")
    monitor = DeadReLUMonitor(checkup=True, **EVERYTHING)
    fit(model, loader(2), monitor)
    assert [finding.cause for finding in monitor.findings] == ["negative_bias"]

    class Idle(Trained):
        def configure_optimizers(self):
            return None

    monitor = DeadReLUMonitor(checkup=True, **EVERYTHING)
    fit(Idle(planted("negative")), loader(2), monitor)
    assert [finding.cause for finding in monitor.findings] == ["negative_bias"]


@quiet
def test_a_failure_costs_the_checkup_alone(monkeypatch):
    from lightning_deadrelu.explain.checkup import CheckRun

    monkeypatch.setattr(CheckRun, "_read_first_input", lambda self: 1 / 0)
    monitor = DeadReLUMonitor(checkup=True, **EVERYTHING)
    with pytest.warns(UserWarning, match="the check-up failed; watching goes on"):
        fit(Trained(mlp()), batches(4), monitor)
    assert monitor.findings == ()
    assert monitor.report.sites


def on_ranks(rank):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(checkup=True, **EVERYTHING)
    trainer = ddp_trainer(callbacks=[monitor])
    trainer.fit(Trained(planted("negative"), lr=1e-3), torch.utils.data.DataLoader(torch.randn(256, 16), batch_size=64))
    return [finding.cause for finding in monitor.findings], float(trainer.callback_metrics["dead_relu/dead_fraction"])


@pytest.mark.ranks
def test_two_ranks():
    first, second = on_two_ranks(on_ranks)
    assert first == second
    assert first[0] == ["negative_bias"]


@pytest.mark.filterwarnings("ignore:.*check-up found", "ignore:.*more than 10% dead")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory", "ignore:.*LeafSpec")
def test_findings_outlast_a_checkpoint_and_are_not_looked_for_again(tmp_path):
    def trained(steps, ckpt=None):
        torch.manual_seed(0)
        net = deep()
        nn.init.constant_(net[0].bias, -8.0)  # gone from the findings once it was trained
        monitor = DeadReLUMonitor(checkup=True, every_n_steps=1, window=4, min_samples=1)
        keep = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=4)
        fit(
            Net(net), Loader([data(step) for step in range(steps)]), monitor, keep, enable_checkpointing=True, ckpt=ckpt
        )
        return monitor.findings

    first = trained(4)
    assert "negative_bias" in [finding.cause for finding in first]
    assert trained(8, ckpt=tmp_path / "last.ckpt") == first


def test_an_optimizer_that_sets_its_own_rate_is_no_failure():
    """As Adafactor of transformers, whose groups hold None."""
    model = deep()
    optimizer = sgd(model)
    optimizer.param_groups[0].update(lr=None, weight_decay=None)
    assert causes(model, optimizer) == []
