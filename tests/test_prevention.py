"""Prevention: what is drawn has the moments it should have, in the layers that feed a rectifier and in no others."""

import math

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BasicBlock, Mlp, net
from torch import nn
from toys import assert_same

from lightning_deadrelu import (
    decay_groups,
    init_for_relu_,
    randomized_asymmetric_init_,
)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


# -- He, with a small positive bias ----------------------------------------------------------------------


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
        nn.GELU(),
        nn.Linear(5, 2),
    )


def test_the_order_of_a_sequential_tells_what_a_batch_tells():
    torch.manual_seed(0)
    model, batch = cnn(), torch.randn(2, 3, 8, 8)
    before = snapshot(model)
    seen = init_for_relu_(model, batch)
    assert seen == init_for_relu_(model) == ("0.weight", "1.bias", "3.weight")
    assert changed(model, before) == set(seen)
    assert torch.all(model[1].bias == 0.01)


def test_drawn_weights_have_the_moments_of_he():
    torch.manual_seed(0)
    transposed = nn.ConvTranspose2d(16, 64, 4, stride=2, bias=False)
    for layer, batch, fan in (
        (nn.Linear(50, 2000), torch.randn(2, 50), 50),
        (nn.Conv2d(8, 512, 3, groups=2), torch.randn(2, 8, 5, 5), 4 * 9),
        (transposed, torch.randn(2, 16, 4, 4), 16 * 16 / 4),
    ):
        init_for_relu_(nn.Sequential(layer, nn.ReLU()), batch, bias=0.1)
        weights = layer.weight.detach().double()
        error = math.sqrt(2 / weights.numel())  # of a normal variance, relative to it
        assert weights.var().item() == pytest.approx(2 / fan, rel=4 * error)
        assert weights.mean().item() == pytest.approx(0, abs=4 * math.sqrt(2 / fan / weights.numel()))
        assert layer.bias is None or torch.allclose(layer.bias, torch.tensor(0.1))


def test_the_second_moment_survives_many_layers():
    torch.manual_seed(0)
    deep = nn.Sequential(*(layer for _ in range(10) for layer in (nn.Linear(256, 256), nn.ReLU())))
    init_for_relu_(deep, bias=0.0)
    x = torch.randn(64, 256)
    assert deep[:-1](x).square().mean().item() == pytest.approx(2, rel=0.5)


def test_a_residual_net_and_an_opt_are_met_where_a_layer_alone_feeds_the_rectifier():
    torch.manual_seed(0)
    block = BasicBlock(4, 4).train()
    before = snapshot(block)
    assert init_for_relu_(block, torch.randn(2, 4, 8, 8)) == ("conv1.weight", "bn1.bias")
    assert changed(block, before) == {"conv1.weight", "bn1.bias"}
    family = families.FAMILIES["OPT"]
    model = families.build(family).train()
    before = snapshot(model)
    written = init_for_relu_(model, families.inputs_of(family))
    assert {name.rpartition("layers.")[2] for name in written} == {
        f"{layer}.fc1.{part}" for layer in (0, 1) for part in ("weight", "bias")
    }
    assert changed(model, before) == set(written)


def test_only_the_rectified_rows_of_a_layer_are_drawn():
    def gated(model, x):
        a, b = model.fc(x).chunk(2, -1)
        return a.relu() * b

    model = net(gated, fc=lambda: nn.Linear(4, 6))()
    before = snapshot(model)
    init_for_relu_(model, torch.randn(5, 4))
    assert torch.equal(model.fc.weight[3:], before["fc.weight"][3:])
    assert not (model.fc.weight[:3] == before["fc.weight"][:3]).any()
    assert (model.fc.bias == 0.01).tolist() == [True] * 3 + [False] * 3


def test_frozen_layers_buffers_modes_and_the_random_state_of_the_forward_are_left_alone():
    model = nn.Sequential(cnn()[:3], nn.Dropout(), nn.Conv2d(8, 8, 3), nn.ReLU()).train()
    model[0][0].weight.requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    init_for_relu_(model, torch.randn(2, 3, 8, 8, generator=generator), generator=generator)
    assert changed(model, before) == {"0.1.bias", "2.weight", "2.bias"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_a_generator_makes_it_repeatable():
    models = [cnn() for _ in range(2)]
    for model in models:
        init_for_relu_(model, generator=torch.Generator().manual_seed(1))
    assert torch.equal(models[0][3].weight, models[1][3].weight)


def test_without_a_batch_a_forward_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"decided by `Mlp\.forward`.* Try `init_for_relu_\(model, batch\)`"):
        init_for_relu_(nn.Sequential(Mlp(), nn.ReLU()))


# -- randomized asymmetric initialisation ----------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 50_000), lambda: nn.Conv1d(2, 50_000, 2)])
def test_one_entry_of_each_unit_is_beta_and_the_others_are_normal(make):
    torch.manual_seed(0)
    layer = make()
    randomized_asymmetric_init_(layer)
    drawn = torch.cat([layer.bias[:, None], layer.weight.flatten(1)], 1).detach().double()
    units, entries = drawn.shape
    variance = 0.6007**2 / (entries - 1)
    mean, square = 2 / 3 / entries, (1 / 2 + (entries - 1) * variance) / entries
    for place in range(entries):  # each is equally often the positive one
        column = drawn[:, place]
        assert column.mean().item() == pytest.approx(mean, abs=4 * column.std().item() / math.sqrt(units))
        error = column.square().std().item() / math.sqrt(units)
        assert column.square().mean().item() == pytest.approx(square, abs=4 * error)


def test_narrow_deep_nets_are_born_dead_less_often():
    """9 layers of width 2 on |x|: 88 % with He, 24 % with RAI (Lu et al.'s setting)."""
    torch.manual_seed(0)
    nets, x = 400, torch.linspace(-math.sqrt(3), math.sqrt(3), 32)[:, None]
    dead = 0
    for _ in range(nets):
        model = nn.Sequential(*(part for n in (1, *[2] * 8) for part in (nn.Linear(n, 2), nn.ReLU())))
        randomized_asymmetric_init_(model)
        with torch.no_grad():
            dead += bool((model(x).std(0) < 1e-9).all())
    assert dead / nets == pytest.approx(0.236, abs=4 * math.sqrt(0.236 * 0.764 / nets))


@pytest.mark.parametrize(("module", "why"), [(nn.ReLU(), "no linear layer"), (nn.Linear(2, 2, bias=False), "no bias")])
def test_asymmetric_needs_layers_with_biases(module, why):
    with pytest.raises(ValueError, match=why):
        randomized_asymmetric_init_(module)


# -- groups for an optimizer -----------------------------------------------------------------------------

PARTS = {
    "linear": lambda: nn.Linear(3, 3),
    "conv": lambda: nn.Conv2d(3, 3, 1, bias=False),
    "batch norm": lambda: nn.BatchNorm2d(3),
    "layer norm over a plane": lambda: nn.LayerNorm((3, 3)),
    "recurrent": lambda: nn.GRU(3, 3),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "slopes": nn.PReLU,
    "embedding": lambda: nn.Embedding(3, 3),
}


@given(parts=st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=6), data=st.data())
@settings(max_examples=30)
def test_groups_are_complete_and_disjoint(parts, data):
    model = nn.Sequential(*(PARTS[part]() for part in parts))
    for parameter in model.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        with pytest.raises(ValueError, match="no parameter"):
            decay_groups(model, 0.1)
        return
    groups = decay_groups(model, 0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, trained))
    weights = {
        id(p) for m in model.modules() if not isinstance(m, nn.LayerNorm) for p in m.parameters(False) if p.ndim > 1
    }
    for group in groups:
        assert {id(p) in weights for p in group["params"]} == {group["weight_decay"] == 0.1}
    torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3)
    assert {group["weight_decay"] for group in groups} <= {0.1, 0.0}


def test_a_tied_parameter_comes_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embedding"].weight
    decayed, plain = decay_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(5, 3)]
    assert [p.shape for p in plain["params"]] == [(5,)]


def test_decay_of_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="grow"):
        decay_groups(nn.Linear(1, 1), -0.1)


# -- closed forms ----------------------------------------------------------------------------------------


def test_a_batch_leaves_no_gradient_behind():
    model = cnn()
    init_for_relu_(model, torch.randn(2, 3, 8, 8))
    assert_same([p.grad for p in model.parameters()], [None] * len(list(model.parameters())))
