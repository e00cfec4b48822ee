"""``find_dead_units``: the verdict, and that the model is left as it was."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_deadrelu import find_dead_units
from lightning_deadrelu.observe.watch import Watch


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(6 * 16, 8),
        nn.ReLU(),
    )


def kill(layer: nn.Linear, units: list[int]) -> None:
    with torch.no_grad():
        layer.bias[units] = -1000.0


def images(n: int = 40, batches: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 1, 6, 6, generator=generator) for _ in range(batches)]


def test_finds_the_units_that_were_killed():
    model = net().eval()
    kill(model[5], [2, 5])
    report = find_dead_units(model, images())
    assert report["6"].dead.nonzero().flatten().tolist() == [2, 5]
    assert not report["2"].dead.any()
    assert report.units == 14
    assert report["6"].samples == 320


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("training", [True, False])
def test_layers_that_have_no_values_yet_get_them(training):
    def audited(*batches):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyLinear(64), nn.LazyBatchNorm1d(), nn.ReLU()).train(training)
        for batch in batches:
            model(batch)
            model[1].reset_running_stats()
        return find_dead_units(model, [data], min_samples=1)

    data = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    report = audited()
    assert training or 0 < report.dead_units < 64  # a batch norm in training lets all fire
    assert report.to_dict() == audited(data).to_dict()


@pytest.mark.parametrize("training", [True, False])
def test_leaves_everything_as_found(training):
    model = net().train(training)
    model[1].eval()  # a layer in another mode than the rest
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = {name: id(value) for name, value in (*model.named_buffers(), *model.named_parameters())}
    model(images()[0]).sum().backward()
    model.load_state_dict(before)
    grads = [p.grad.clone() for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    find_dead_units(model, images())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: id(value) for name, value in (*model.named_buffers(), *model.named_parameters())} == objects
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_leaves_everything_as_found_after_an_error():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"shape|channels|size"):
        find_dead_units(model, [*images(batches=1), torch.zeros(2, 1, 9, 9)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.overrides._get_current_function_mode_stack() == []


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x, scale=1.0):
        return torch.relu(self.fc(x) * scale)


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        (torch.ones(4, 3), None),
        ((torch.ones(4, 3), torch.zeros(4)), None),
        ([torch.ones(4, 3), torch.zeros(4)], None),
        ({"x": torch.ones(4, 3), "scale": 1.0}, None),
        ("anything", lambda model, batch: model(torch.ones(4, 3))),
    ],
)
def test_batches_of_every_kind(batch, forward):
    torch.manual_seed(0)
    model = TwoInputs()
    report = find_dead_units(model, iter([batch]), min_samples=1, forward=forward)
    expected = (model.fc(torch.ones(1, 3)) <= 0).flatten()
    assert torch.equal(report["relu"].dead, expected)


def test_too_few_samples_are_no_evidence():
    model = TwoInputs()
    kill(model.fc, [0, 1])
    silent = find_dead_units(model, [torch.rand(298, 3)])["relu"]
    assert silent.silent.any()
    assert not silent.dead.any()
    assert find_dead_units(model, [torch.rand(298, 3), torch.rand(1, 3)])["relu"].dead[:2].all()


def test_units_of_frozen_layers_count_in_an_audit():
    model = TwoInputs().requires_grad_(False)
    assert find_dead_units(model, [torch.rand(300, 3)]).units == 5


def test_a_whole_rectifier_as_model():
    report = find_dead_units(nn.ReLU(), [torch.tensor([[1.0, -1.0]])], min_samples=1)
    assert report.sites[0].dead.tolist() == [False, True]


def test_smooth_activations_only_when_asked_for():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 4), nn.ReLU())
    assert [site.name for site in find_dead_units(model, [torch.rand(9, 3)]).sites] == ["3"]
    report = find_dead_units(model, [torch.rand(9, 3)], include=["gelu"])
    assert [site.kind for site in report.sites] == ["gelu", "relu"]
    assert report.units == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, r"`batches` is empty: without data nothing can be said"),
        ({"min_samples": 0}, r"`min_samples=0`: a verdict needs at least 1 sample"),
        (
            {"include": ["encodr.*"]},
            r"`include=\['encodr.\*'\]`: \['encodr.\*'\] matches no activation .* sites of this model: `2`, `6`",
        ),
        ({"include": ["2.*"]}, r"`include=\['2.\*'\]`: \['2.\*'\] matches no"),
        ({"exclude": ["2", "nowhere"]}, r"`exclude=\['2', 'nowhere'\]`: \['nowhere'\] matches no"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_dead_units(net(), **{"batches": images(), **arguments})


def test_a_model_without_rectifiers_has_an_empty_report():
    report = find_dead_units(nn.Linear(2, 2), [torch.rand(3, 2)])
    assert report.sites == ()
    assert str(report).startswith("No rectifier was watched.")


def test_rectifiers_that_did_not_run_are_named():
    model = nn.Module()
    model.used, model.idle = nn.ReLU(), nn.ReLU()
    report = find_dead_units(model, [torch.rand(3, 2)], forward=lambda model, batch: model.used(batch))
    assert report.unwatched == {"idle": "it has not run while observed"}


class HingeLoss(nn.Module):
    def forward(self, x):
        return nn.functional.relu(1 - x).mean()


def test_a_hinge_in_a_loss_of_the_model_is_listed_as_one():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    model.loss = HingeLoss()
    body = model[:3]
    report = find_dead_units(model, [torch.rand(9, 2)], forward=lambda model, batch: model.loss(body(batch)))
    assert [site.name for site in report.sites] == ["1"]
    assert report.unwatched == {"loss-relu": "it runs outside the model's forward, as a loss does"}


class ScatteredSoftplus(nn.Module):
    """Rectifies single entries, smoothly, which have no unit dimension."""

    def __init__(self):
        super().__init__()
        self.body, self.soft = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)), nn.Softplus()

    def forward(self, x):
        y = self.body(x)
        return self.soft(y[torch.arange(9), torch.arange(9) % 3])


@pytest.mark.parametrize(("include", "listed"), [([], []), (["softplus", "relu"], ["soft"])])
def test_a_smooth_activation_is_listed_as_unwatched_only_if_somebody_asked_for_it(include, listed):
    watch = Watch(model := ScatteredSoftplus(), include=include)
    with watch.probe:
        model(torch.rand(9, 2))
    assert list(watch.unwatched()) == listed


def test_lists_of_patterns_are_not_strings():
    with pytest.raises(
        TypeError, match=r"`include='encoder'`: it takes a list of patterns. Try `include=\['encoder'\]`"
    ):
        find_dead_units(net(), images(), include="encoder")


class Bare(nn.Module):
    """Has no parameters, and one rectifier for two inputs."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.act(x) + self.act(-x).mean() + self.act(x - 9)


@pytest.mark.parametrize("act", [nn.ReLU(), torch.relu], ids=["module", "function"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_without_parameters_has_one_site_for_each_call(act, inside):
    x = torch.rand(300, 3) + 0.1
    model = nn.Sequential(nn.Flatten(), Bare(act)) if inside else Bare(act)
    report = find_dead_units(model, [x[:100], x[100:]])
    assert [int(site.dead.sum()) for site in report.sites] == [0, 3, 3]
    assert {site.samples for site in report.sites} == {300}
