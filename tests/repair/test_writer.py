"""Edits are exact: nothing but what is named, and no change of the output where nothing reads a new unit."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from views import view_of

from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.model.parameters import tensors_of
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.remedies import InitDistribution, Reset, Write
from lightning_deadrelu.repair.writer import check_writes, init_distributions, why_not, write_


def rows(name, role, units, dims=(0,), shape=()):
    units = torch.as_tensor(units)
    return Slice(name, role, units, units[:, None], dims, shape)


# -- slices ------------------------------------------------------------------------------------------------------------


@st.composite
def sliced(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    dims = draw(st.lists(st.sampled_from(range(len(shape))), min_size=1, max_size=len(shape), unique=True))
    places = st.tuples(*[st.integers(0, shape[dim] - 1) for dim in dims])
    index = draw(st.lists(places, max_size=5, unique=True))
    split = draw(st.booleans())  # the tensor itself has some dimensions fused
    own = [shape[0] * shape[1], *shape[2:]] if split and len(shape) > 1 else shape
    strides = draw(st.booleans())
    return tuple(shape), tuple(dims), index, tuple(own), strides


@settings(max_examples=200)
@given(sliced())
def test_slices_read_and_write_as_a_slow_loop(case):
    shape, dims, index, own, strided = case
    tensor = torch.arange(torch.Size(own).numel(), dtype=torch.float32).reshape(own)
    if strided:  # in memory the other way round
        tensor = tensor.permute(*reversed(range(len(own)))).contiguous().permute(*reversed(range(len(own))))
    where = torch.tensor(index, dtype=torch.int64).reshape(len(index), len(dims))
    view = shape if shape != own else ()
    entries = Slice("w", "weight", torch.arange(len(index)), where, dims, view)

    def entry(place):
        return tuple(place[dims.index(dim)] if dim in dims else slice(None) for dim in range(len(shape)))

    def rest(one):  # behind the chosen dimensions come the others, in their order
        return one.reshape([shape[dim] for dim in range(len(shape)) if dim not in dims])

    whole = tensor.reshape(shape)
    expected = [rest(whole[entry(place)]) for place in index]
    read = entries.read(tensor)
    assert all(torch.equal(a, b) for a, b in zip(read, expected, strict=True))
    target, slow = tensor.clone(), whole.clone()
    entries.write_(target, -1 - read)
    for place in index:
        slow[entry(place)] = -1 - slow[entry(place)]
    assert torch.equal(target.reshape(shape), slow)
    entries.write_(target, read)
    assert torch.equal(target, tensor)


# -- names -------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3)


def test_tensors_have_all_their_names_without_wrappers():
    net = Tied()
    wrapped = nn.Sequential()
    wrapped.add_module("_orig_mod", net)
    tensors = tensors_of(wrapped)
    assert tensors["a.weight"] is tensors["b.weight"] is net.a.weight
    assert tensors["norm.running_mean"] is net.norm.running_mean
    assert set(tensors) == set(tensors_of(net)) == set(net.state_dict())


def test_init_distributions_names():
    net = Tied()
    laws = init_distributions(net)
    assert laws["norm.weight"] == InitDistribution(1.0, 0.0, False)
    assert laws["b.weight"] == InitDistribution.of(net.a.weight)
    assert set(laws) == {"a.weight", "a.bias", "b.weight", "norm.weight", "norm.bias"}
    assert init_distributions(nn.LazyLinear(2)) == {}


# -- writes ------------------------------------------------------------------------------------------------------------


def trained(make=torch.optim.Adam, dtype=torch.float32):
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    optimizer = make(net.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 4, dtype=dtype)).square().sum().backward()
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nothing_else_changes(dtype):
    net, optimizer = trained(dtype=dtype)
    before = copy.deepcopy({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    grads = [one.grad.clone() for one in net.parameters()]
    weight, mean = rows("0.weight", "weight", [1, 4]), rows("1.running_mean", "mean", [1, 4])
    reader = rows("3.weight", "reader", [1, 4], (1,))
    new = torch.randn(2, 4)
    write_([Write(reader, 0.0), Write(weight, new), Write(mean, torch.ones(2))], net, [optimizer])
    after = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    assert torch.equal(net[0].weight[[1, 4]], new.to(dtype))
    assert not net[3].weight[:, [1, 4]].any()
    written = {"0.weight": ([1, 4], slice(None)), "1.running_mean": [1, 4], "3.weight": (slice(None), [1, 4])}
    names = [name for name, _ in net.named_parameters()]
    for name, value in before["net"].items():
        undone = after["net"][name].clone()
        if name in written:
            assert not torch.equal(undone, value)
            undone[written[name]] = value[written[name]]
        assert torch.equal(undone, value), name
    for number, state in before["optimizer"]["state"].items():
        for key, value in state.items():
            undone = after["optimizer"]["state"][number][key].clone()
            if names[number] in written and key != "step":
                undone[written[names[number]]] = value[written[names[number]]]
            assert torch.equal(undone, value), (names[number], key)
    assert all(torch.equal(one.grad, grad) for one, grad in zip(net.parameters(), grads, strict=True))
    assert all(one.requires_grad and one.is_leaf for one in net.parameters())


def test_averages_of_parameters_follow():
    net, optimizer = trained(torch.optim.ASGD)
    row = rows("0.weight", "weight", [2])
    write_([Write(row, torch.ones(1, 4)), Write(row, torch.full((1, 4), 2.0))], net, [optimizer])
    assert optimizer.state[net[0].weight]["ax"][2].tolist() == [2.0] * 4


def test_live_rows_give_the_second_moments():
    net, optimizer = trained()
    moments = optimizer.state[net[0].weight]["exp_avg_sq"]
    expected = moments[5].clone()
    live = [rows("0.bias", "bias", [0]), rows("0.weight", "weight", [5])]
    write_([Write(rows("0.weight", "weight", [2]), 0.0)], net, [optimizer], live)
    assert torch.equal(moments[2], expected)


def test_tied_parameters_and_those_without_optimizer():
    net = Tied()
    write_([Write(rows("b.weight", "weight", [0]), 7.0)], net, [])
    assert net.a.weight[0].tolist() == [7.0] * 3


def test_nothing_to_write_is_no_work():
    net, optimizer = trained()
    versions = [one._version for one in net.parameters()]
    write_([Write(rows("0.weight", "weight", torch.tensor([], dtype=torch.int64)), 0.0)], net, [optimizer])
    write_([], net, [optimizer])
    assert [one._version for one in net.parameters()] == versions


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("0.wieght", 0.0, "`0.wieght` is no parameter or buffer of the model"),
        ("0.weight", torch.zeros(4), r"shape \(4,\), and `slice.read` returns \(1, 4\)"),
        ("0.weight", torch.full((1, 4), torch.nan), "not all finite"),
        ("0.weight", torch.inf, "not all finite"),
        ("0.weight", "many", "`Write` to `0.weight`: "),
        ("0.weight", None, "`Write` to `0.weight`: "),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(name, values, reason):
    net, optimizer = trained()
    before = copy.deepcopy(net.state_dict())
    good, bad = Write(rows("0.bias", "bias", [1]), 5.0), Write(rows(name, "weight", [1]), values)
    assert re.search(reason, check_writes([good, bad], net, [optimizer]))
    assert check_writes([good], net, [optimizer]) == ""
    with pytest.raises(ValueError, match=reason):
        write_(iter([good, bad]), net, [optimizer])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_rows_that_are_not_there_are_refused():
    net, optimizer = trained()
    beyond = Write(rows("0.weight", "weight", [6]), 0.0)
    assert check_writes([beyond], net, [optimizer]).startswith("`Write` to `0.weight`: index 6 is out of bounds")
    net[0].weight.data = torch.zeros(0)  # and where the values are elsewhere, that is what is said
    assert check_writes([beyond], net, [optimizer]).startswith("`0.weight` is empty between steps")


def test_parameters_that_are_not_trained_are_refused():
    net, optimizer = trained()
    held = {id(one) for one in net[0].parameters()}
    assert why_not(net, [optimizer], ["0.weight", "1.running_mean"], held) == ""
    assert why_not(net, [optimizer], ["0.bias", "3.weight"]) == ""
    assert why_not(net, [optimizer], ["0.bias", "3.weight"], held) == (
        "`3.weight` is not trained, so what is written there would stay for good"
    )
    tied = Tied()
    assert why_not(tied, [], ["b.weight"], {id(tied.a.weight)}) == ""


def test_overflow_in_half_precision_is_refused():
    net = nn.Linear(2, 2).half()
    with pytest.raises(ValueError, match=r"not all finite as torch\.float16"):
        write_([Write(rows("bias", "bias", [0]), 1e6)], net, [])


def test_unknown_state_is_refused():
    net = nn.Linear(2, 2)
    assert "`LBFGS` keeps" in why_not(net, [torch.optim.LBFGS(net.parameters())], ["weight"])
    with pytest.raises(ValueError, match=r"`LBFGS` keeps .* Nothing was written"):
        write_([Write(rows("bias", "bias", [0]), 1.0)], net, [torch.optim.LBFGS(net.parameters())])
    assert why_not(nn.LazyLinear(2), [], ["weight"]) == "`weight` has no values yet"
    net.weight.data = torch.zeros(0)
    assert why_not(net, [], ["weight"]).startswith("`weight` is empty between steps")


# -- a reset changes the output by exactly nothing -----------------------------------------------------------------


def linear_net():
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    incoming = (rows("0.weight", "weight", range(8)), rows("0.bias", "bias", range(8)))
    attribution = Attribution(incoming, (rows("2.weight", "reader", range(8), (1,)),))
    return net, attribution, 8, net[0].bias, (16, 5)


def norm_net():
    """Grouped convolutions around a norm: two groups of three units, read by two groups."""
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.BatchNorm2d(4)
    )
    roles = {"weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "variance"}
    incoming = (rows("0.weight", "weight", range(6)), rows("0.bias", "bias", range(6)))
    incoming += tuple(rows(f"1.{name}", role, range(6)) for name, role in roles.items())
    units = torch.arange(6)
    reader = Slice("3.weight", "reader", units, torch.stack([units // 3, units % 3], 1), (0, 2), (2, 2, 3, 3, 3))
    return net, Attribution(incoming, (reader,)), 6, net[1].bias, (4, 4, 9, 9)


def flat_net():
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 3))
    incoming = (rows("0.weight", "weight", range(6)), rows("0.bias", "bias", range(6)))
    columns = torch.arange(54)
    reader = Slice("4.weight", "reader", columns // 9, columns[:, None], (1,))
    return net, Attribution(incoming, (reader,)), 6, net[0].bias, (4, 2, 8, 8)


def norm_behind_net():
    """The reader's output goes through a norm that uses the batch."""
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    _, attribution, *_ = linear_net()
    return net, attribution, 8, net[0].bias, (16, 5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [linear_net, norm_net, flat_net, norm_behind_net])
def test_reset_changes_the_output_by_exactly_nothing(make, dtype, training):
    net, attribution, count, bias, shape = make()
    laws = init_distributions(net)
    dead = torch.tensor([unit % 2 == 1 for unit in range(count)])
    with torch.no_grad():
        bias[dead] = -1e3
    net.to(dtype).train(training)
    optimizer = torch.optim.Adam(net.parameters())
    x = torch.randn(shape, dtype=dtype)
    start = copy.deepcopy(net.state_dict())
    logits = net(x).detach()
    net.load_state_dict(start)
    view = view_of(attribution, dead, tensors_of(net), laws)
    edits = Reset().propose(view, torch.Generator().manual_seed(1))
    assert all(torch.equal(net.state_dict()[key], value) for key, value in start.items())  # proposing is pure
    write_(edits.writes, net, [optimizer])
    changed = [key for key, value in net.state_dict().items() if not torch.equal(value, start[key])]
    named = {write.slice.name for write in edits.writes}
    assert set(changed) <= named
    assert {"0.weight", attribution.outgoing[0].name} <= set(changed)
    assert torch.equal(net(x), logits)
    hidden = nn.Sequential(*net[: 1 + next(i for i, one in enumerate(net) if isinstance(one, nn.ReLU))])(x)
    assert (hidden.movedim(1, 0).flatten(1) > 0).any(1)[dead].all()  # and the new units are alive


@pytest.mark.parametrize("make", [linear_net, norm_net, flat_net])
def test_reset_units_learn_again(make):
    net, attribution, count, bias, shape = make()
    laws, dead = init_distributions(net), torch.arange(count) < 2
    with torch.no_grad():
        bias[dead] = -1e3
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x, y = torch.randn(shape), 2.0

    def train():
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        train()
    weight = net[0].weight
    assert not weight.grad[dead].any()
    view = view_of(attribution, dead, tensors_of(net), laws)
    write_(Reset().propose(view, torch.Generator().manual_seed(1)).writes, net, [optimizer])
    train()
    assert not weight.grad[dead].any()  # nothing reads them yet
    train()
    assert weight.grad[dead].flatten(1).any(1).all()
