"""Another activation in a rectifier's place: what it computes, what the model keeps, and how it is judged."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deadrelu.model.sites import Site, names_of
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.repair.activation_swap import (
    no_module,
    records,
    rectifiers,
    substitute_,
    swap_activations_,
)
from lightning_deadrelu.repair.substitute_modules import LeakyUnits, Original, original_of
from lightning_deadrelu.statistics import Rules

KINDS = {
    "leaky_relu": nn.LeakyReLU,
    "rrelu": nn.RReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
FUNCTIONS = {
    "leaky_relu": F.leaky_relu,
    "rrelu": F.rrelu,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def mlp(act: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), act or nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))


# -- what the substitutes compute ------------------------------------------------------------------------


def slowly(x: Tensor, slope: Tensor, dims: tuple[int, ...], original: Original) -> Tensor:
    """Apply per-unit slopes number by number."""
    out = torch.empty_like(x)
    sizes = [x.shape[dim] for dim in sorted(dims)]
    for index in itertools.product(*map(range, x.shape)):
        unit = 0
        for dim, size in zip(sorted(dims), sizes, strict=True):
            unit = unit * size + index[x.ndim + dim]
        value, s = float(x[index]), float(slope[unit])
        if value > original.hinge:
            out[index] = min(value, original.cap)
        else:
            out[index] = original.low + s * (value - original.hinge)
    return out


@pytest.mark.parametrize(
    "original",
    [
        Original("relu"),
        Original("relu", inplace=True),
        Original("relu6", cap=6.0),
        Original("hardtanh", cap=1.5, inplace=True),
        Original("threshold", hinge=0.5),
        Original("threshold", hinge=-0.5, low=2.0, inplace=True),
    ],
)
@pytest.mark.parametrize(
    ("shape", "dims"), [((5, 3), (-1,)), ((2, 3, 4, 2), (-3,)), ((2, 3, 4), (-2, -1)), ((3,), (-1,))]
)
def test_leaky_units_against_a_loop(original, shape, dims):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 4
    slope = torch.rand(math.prod(shape[dim] for dim in dims)) - 0.2
    slope[0] = 0
    expected = slowly(x, slope, dims, original)
    start = x.clone().requires_grad_()
    given = start * 1
    out = LeakyUnits(slope, dims, original)(given)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert (out is given) == original.inplace
    out.sum().backward()
    step = 1e-6
    slope_there = (slowly(x + step, slope, dims, original) - slowly(x - step, slope, dims, original)) / (2 * step)
    torch.testing.assert_close(start.grad, slope_there, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("dims", "shape"), [((-1,), (5, 4)), ((-1,), ()), ((-3,), (6, 4, 2, 2)), ((-3,), (5, 6)), ((-2, -1), (5, 3, 3))]
)
def test_an_input_of_another_width_is_rectified_as_before(dims, shape, inplace):
    """A module that is shared may meet it in a later epoch, or in validation only."""
    x = torch.randn(shape)
    given = x.clone()
    out = LeakyUnits(torch.rand(6), dims, Original("relu", inplace=inplace))(given)
    assert torch.equal(out, x.relu())
    assert (out is given) == inplace
    assert not torch.equal(LeakyUnits(torch.ones(4))(wide := torch.randn(5, 4)), wide.relu())


def test_a_slope_of_zero_is_the_rectifier_to_the_last_bit():
    x = torch.tensor([[-math.inf, -3.0, -0.0, 0.0, 2.0, math.inf, math.nan]]).requires_grad_()
    for original, plain in ((Original("relu"), F.relu), (Original("relu6", cap=6.0), F.relu6)):
        out, expected = LeakyUnits(torch.zeros(7), original=original)(x), plain(x)
        assert torch.equal(out.view(torch.int32), expected.view(torch.int32))
        grads = [torch.autograd.grad(one.nan_to_num(0, 0, 0).sum(), x)[0] for one in (out, expected)]
        assert torch.equal(*grads)


def test_equal_slopes_are_torch_s_leaky_relu():
    x = torch.randn(50, 6)
    assert torch.equal(LeakyUnits(torch.full((6,), 0.3))(x), F.leaky_relu(x, 0.3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_site_takes_torch_s_module(kind):
    model = mlp()
    substitute_(model, "1", kind)
    assert type(model[1]) is KINDS[kind]
    assert type(model[3]) is nn.ReLU
    assert type(model[1].eval()(torch.ones(2))) is Tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU6, lambda inplace: nn.Hardtanh(0.0, 0.5, inplace=inplace), nn.ReLU])
def test_caps_and_in_place_are_kept(kind, inplace, act):
    model = mlp(act(inplace=inplace))
    cap = original_of(model[1]).cap
    substitute_(model, "1", kind)
    model.eval()
    start = torch.linspace(-9, 9, 60).view(10, 6).requires_grad_()
    given = start * 1
    out = model[1](given)
    assert (out is given) == inplace
    twin = start.detach().clone().requires_grad_()
    expected = FUNCTIONS[kind](twin).clamp(max=cap)
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(start.grad, twin.grad)


def test_a_cap_is_kept_by_slopes():
    model = mlp(nn.ReLU6())
    substitute_(model, "1", "leaky_relu", torch.full((3,), 0.5))
    assert model[1](torch.tensor([-2.0, 3.0, 8.0])).tolist() == [-1.0, 3.0, 6.0]


# -- what the model keeps --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "slopes"), [("gelu", None), ("leaky_relu", torch.rand(6)), ("rrelu", None)])
def test_neither_parameters_nor_buffers(kind, slopes):
    model, twin = mlp(), mlp()
    substitute_(model, "1", kind, slopes)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert [*map(len, (list(model.parameters()), list(model.buffers())))] == [6, 0]
    twin.load_state_dict(model.state_dict())


def test_the_slope_follows_the_model():
    model = mlp()
    substitute_(model, "1", "leaky_relu", torch.rand(6))
    assert model.double()[1].slope.dtype == torch.float64
    assert model.half()[1].slope.dtype == torch.float16
    assert model.to("meta")[1].slope.device.type == "meta"


def test_a_half_precision_model_takes_slopes():
    model = mlp().bfloat16()
    substitute_(model, "1", "leaky_relu", torch.rand(6))
    assert model(torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_keeps_its_dtypes():
    model = mlp()
    x = torch.randn(3, 4)
    for kind, slopes in (("leaky_relu", torch.rand(6)), ("leaky_relu", None)):
        substitute_(model, "1", kind, slopes)
        with torch.autocast("cpu", torch.bfloat16):
            assert model[1](model[0](x)).dtype == torch.bfloat16
        assert model[1](model[0](x)).dtype == torch.float32


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize(("kind", "slopes"), [("gelu", None), ("leaky_relu", torch.rand(6))])
def test_copies_and_pickles(kind, slopes, act):
    model, x = mlp(act()), torch.randn(7, 4)
    substitute_(model, "1", kind, slopes)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    for other in copies:
        assert torch.equal(other(x), model(x))
        assert [r["path"] for r in records(other)] == ["1"]
        if isinstance(slopes, Tensor):
            assert other[1].slope.data_ptr() != model[1].slope.data_ptr()


def test_the_mode_and_hooks_are_kept():
    model, seen = mlp(), []
    model[1].eval()
    forward = model[1].register_forward_hook(lambda *args: seen.append("forward"))
    before = model[1].register_forward_pre_hook(lambda *args: seen.append("before"))
    backward = model[1].register_full_backward_hook(lambda *args: seen.append("backward"))
    named = model[1].register_forward_hook(lambda m, a, k, o: seen.append("named"), with_kwargs=True)
    substitute_(model, "1", "gelu")
    assert not model[1].training
    model(torch.randn(2, 4).requires_grad_()).sum().backward()
    assert seen == ["before", "forward", "named", "backward"]
    for handle in (forward, before, backward, named):
        handle.remove()
    model(torch.randn(2, 4).requires_grad_()).sum().backward()
    assert len(seen) == 4


def test_all_places_of_one_module_change():
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.block = nn.Sequential(nn.Linear(3, 3), self.act)

    model = Aliased()
    substitute_(model, "block.1", "gelu")
    assert model.act is model.block[1]
    assert type(model.act) is nn.GELU
    assert list(rectifiers(model)) == ["act"]


def test_a_substitute_can_be_substituted():
    model = mlp(nn.ReLU6())
    for kind, slopes in (("gelu", None), ("leaky_relu", torch.rand(6)), ("leaky_relu", None), ("silu", None)):
        record = substitute_(model, "1", kind, slopes)
        assert record["original"] == {"kind": "relu6", "hinge": 0.0, "cap": 6.0, "low": 0.0, "inplace": False}
    assert len(records(model)) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own look at its input
@pytest.mark.parametrize("way", ["function", "method"])
def test_slopes_change_in_place_without_a_new_graph(way):
    model, twin = mlp(), mlp()[2:]
    substitute_(model, "1", "leaky_relu", torch.full((6,), 0.1))
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if way == "method":
        model.compile(backend=backend, fullgraph=True)
    compiled = model if way == "method" else torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 4)
    for step in range(12):
        model[1].slope.fill_(step / 10)
        with torch.no_grad():
            hidden = model[0](x)
            expected = twin(torch.where(hidden > 0, hidden, hidden * (step / 10)))
        torch.testing.assert_close(compiled(x), expected)
    assert len(graphs) == 1


def test_a_compiled_model_notices_the_substitution():
    model = mlp()
    torch._dynamo.reset()
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(4, 4)
    before = compiled(x)
    substitute_(model, "1", "leaky_relu", torch.full((6,), 0.5))
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), before)
    compiled(x).sum().backward()


# -- refusals --------------------------------------------------------------------------------------------


class Hidden(nn.ReLU):
    """A rectifier of the user's own."""


class Various(nn.Module):
    """Rectifiers that can and cannot be exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.shared, self.own, self.mine = nn.ReLU(), nn.ReLU(), Hidden()

    def forward(self, x):
        x = self.shared(self.layers[0](x))
        x = self.shared(self.layers[1](x))
        return F.relu(self.layers[3](self.mine(self.own(self.layers[2](x)))))


def test_why_a_module_cannot_be_exchanged():
    model = Various()
    watch = Watch(model, exclude=["shared-1"])
    with watch.probe:
        model(torch.randn(3, 4))
    why = {
        name: no_module(model, site, watch.sites) for name, site in zip(names_of(watch.sites), watch.sites, strict=True)
    }
    assert why == {
        "shared": "`shared` is called at 2 places; give each its own `nn.ReLU`",
        "shared-1": "`shared` is called at 2 places; give each its own `nn.ReLU`",
        "own": "",
        "mine": "`mine` is of class `Hidden`; only torch's own rectifiers are exchanged",
        "relu": "its rectifier is called as a function in the model; write it as an `nn.ReLU` module of its own",
    }


def test_modules_that_are_fused_away():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU())
    model = nn.Sequential(layer)
    site = Site("0.activation", False, "relu", ("0.linear1.weight",), 16)
    assert no_module(model, site, [site]) == (
        "`0.activation` belongs to a `TransformerEncoderLayer`, which fuses it away in evaluation"
    )
    with pytest.raises(ValueError, match=r"`0.activation` cannot become `gelu`: .* fuses it away"):
        substitute_(model, "0.activation", "gelu")
    with pytest.raises(ValueError, match=r"fuses it away in evaluation. Leave it out with `include`"):
        swap_activations_(model, nn.PReLU)
    quantised = nn.Sequential(torch.ao.nn.intrinsic.LinearReLU(nn.Linear(2, 2), nn.ReLU()))
    assert "`LinearReLU`" in no_module(quantised, site._replace(owner="0.1"), [])
    compiled = nn.Sequential(torch.compile(nn.ReLU(), backend="eager"))
    assert "`0` is compiled by itself" in no_module(compiled, site._replace(owner="0"), [])
    assert no_module(nn.ReLU(), site._replace(owner=""), []).startswith("it is the model itself")
    assert no_module(model, site._replace(owner="nowhere"), []) == "the model has no module `nowhere`"


@pytest.mark.parametrize(
    ("path", "kind", "slopes", "message"),
    [
        ("1", "prelu", None, r"brings parameters.*Call `swap_activations_\(model, nn.PReLU\)` in `__init__`"),
        ("1", "swish", None, "there is no such kind; choose one of elu, gelu, leaky_relu, rrelu, selu, silu"),
        ("1", "gelu", torch.ones(6), "`slopes` go with `leaky_relu` alone; drop them"),
        ("0", "gelu", None, "`0` is of class `Linear`; only torch's own rectifiers are exchanged"),
        ("9", "gelu", None, "`9` cannot become `gelu`: the model has no module `9`"),
    ],
)
def test_what_cannot_be_substituted(path, kind, slopes, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        substitute_(model, path, kind, slopes)
    assert not records(model)


# -- modules of one's own --------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.stem, self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), net


def test_swapping_all_modules():
    model = mlp(nn.ReLU6())
    assert swap_activations_(model, nn.PReLU) == ["1", "3"]
    assert [type(model[1]), type(model[3])] == [nn.PReLU, nn.PReLU]
    assert model[1] is not model[3]
    assert not rectifiers(model)
    assert len(list(model.parameters())) == 8


def test_swapping_some_modules():
    assert swap_activations_(mlp(), nn.PReLU, include=["3"]) == ["3"]
    assert swap_activations_(mlp(nn.ReLU6()), lambda: nn.LeakyReLU(0.1), kinds=["relu6"]) == ["1"]
    assert swap_activations_(Wrapped(mlp()), nn.PReLU, include=["net.*"]) == ["net.1", "net.3"]
    model = Various()
    assert swap_activations_(model, nn.PReLU) == ["shared", "own"]


def test_shared_modules_stay_shared():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared)
    assert swap_activations_(model, nn.PReLU) == ["1"]
    assert model[1] is model[3]


def test_what_is_swapped_in_follows_the_model():
    model = mlp().half()
    swap_activations_(model.eval(), nn.PReLU)
    assert model[1].weight.dtype == torch.float16
    assert not model[1].training


def test_what_cannot_be_swapped():
    with pytest.raises(ValueError, match=r"matches no module. The modules of these kinds: `1`, `3`."):
        swap_activations_(mlp(), nn.PReLU, include=["2"])
    with pytest.raises(ValueError, match=r"matches no module. The modules of these kinds: none."):
        swap_activations_(nn.Sequential(nn.GELU()), nn.PReLU)
    with pytest.raises(TypeError, match=r"`include='1'`: it takes a list. Try `include=\['1'\]`"):
        swap_activations_(mlp(), nn.PReLU, include="1")
    with pytest.raises(TypeError, match="it made a `float`, not a module"):
        swap_activations_(mlp(), lambda: 0.1)
    with pytest.raises(ValueError, match="it is the model itself"):
        swap_activations_(nn.ReLU(), nn.PReLU)


# -- judged as what it was -------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """A convolution before its rectifier, in a block, then a second site behind the first."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), act)
        self.head = nn.Sequential(nn.Linear(5, 4), nn.ReLU())

    def forward(self, x):
        return self.head(self.block(x).mean((2, 3)))


def looked_at(model: nn.Module, x: Tensor, judged: bool = True) -> Watch:
    watch = Watch(model, rules=Rules(1))
    if judged:
        watch.substitutes = rectifiers(model)
    with watch.probe:
        model(x)
    assert watch.probe.failure is None
    return watch


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Threshold(0.2, 0.0)])
@pytest.mark.parametrize(("kind", "slopes"), [("gelu", None), ("rrelu", None), ("leaky_relu", torch.rand(5))])
def test_the_same_site_and_verdict_before_and_after(act, kind, slopes):
    torch.manual_seed(0)
    model = Convolutional(copy.deepcopy(act))
    with torch.no_grad():
        model.block[1].bias.copy_(torch.tensor([-9.0, 0.0, -9.0, 1.0, 0.3]))
    x = torch.randn(6, 2, 8, 8)
    before = looked_at(model, x)
    substitute_(model, "block.2", kind, slopes, dims=(-3,))
    after = looked_at(model, x)
    assert after.sites == before.sites
    reports = [watch.liveness.report().sites[0] for watch in (before, after)]
    assert reports[0].name == "block.2"
    assert reports[0].dead.tolist() == [True, False, True, False, False]
    for field in ("dead", "silent", "always_on", "firing_rate", "peak", "kind"):
        mine, theirs = (getattr(report, field) for report in reports)
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs, field
    assert not after.unwatched()
    if type(act) is nn.ReLU:  # else it would be a site of another kind, or none
        assert looked_at(model, x, judged=False).sites != before.sites


def test_the_site_goes_on_while_the_model_changes():
    """The same watch counts before and after, and once the old module is back."""
    model = Convolutional(nn.ReLU())
    original = model.block[2]
    watch = looked_at(model, x := torch.randn(6, 2, 8, 8))
    for step in range(2):
        substitute_(model, "block.2", "leaky_relu", torch.rand(5), dims=(-3,))
        watch.substitutes = rectifiers(model)
        with watch.probe:
            model(x)
        model.block[2] = original
        watch.substitutes = rectifiers(model)
        with watch.probe:
            model(x)
        assert watch.liveness.totals().elements.sum(1).tolist() == [6 * 36 * (3 + 2 * step), 6 * (3 + 2 * step)]
    assert len(watch.sites) == 2


def test_the_verdict_is_that_of_a_count_by_hand():
    model = mlp(nn.ReLU(inplace=True))
    for kind, slopes in (("leaky_relu", torch.rand(6)), ("elu", None), ("gelu", None)):
        substitute_(model, "1", kind, slopes)
        x = torch.randn(9, 4)
        hidden = model[0](x)
        site = looked_at(model, x).liveness.report().sites[0]
        assert torch.equal(site.firing_rate, (hidden > 0).double().mean(0).to(site.firing_rate))
        torch.testing.assert_close(site.peak, hidden.amax(0).to(site.peak))


def test_an_error_within_a_substitute_passes_through():
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.broken = nn.Sequential(nn.ReLU()), True

        def forward(self, x):
            x = self.inner(x)
            if self.broken:
                raise KeyError("mine")
            return x

    model = mlp(Breaks())
    watch = Watch(model, rules=Rules(1))
    watch.substitutes = {"1": Original("relu").rectifier}
    with pytest.raises(KeyError, match="mine"), watch.probe:
        model(torch.randn(3, 4))
    model[1].broken = False
    with watch.probe:
        model(torch.randn(3, 4))
    assert watch.probe.failure is None
    assert names_of(watch.sites) == ["1", "3"]


def test_recomputation_in_backward_is_no_observation():
    from torch.utils.checkpoint import checkpoint as recomputed

    model = mlp()
    substitute_(model, "1", "gelu")
    for reentrant in (False, True):
        watch = Watch(model, rules=Rules(1))
        watch.substitutes = rectifiers(model)
        x = torch.randn(3, 4, requires_grad=True)
        with watch.probe:
            recomputed(model, x, use_reentrant=reentrant).sum().backward()
        assert watch.liveness.totals().elements.sum(1).tolist() == [3, 3]


def test_a_substitute_called_by_keyword_is_named():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 3), nn.ReLU()

        def forward(self, x):
            return self.act(input=self.fc(x))

    model = Named()
    substitute_(model, "act", "gelu")
    watch = looked_at(model, torch.randn(2, 4))
    assert watch.unwatched() == {"act": "its substitute was not called with a tensor by position"}


def test_a_compiled_model_is_judged_too():
    model, x = Convolutional(nn.ReLU()), torch.randn(6, 2, 8, 8)
    torch._dynamo.reset()
    before = looked_at(model, x)
    substitute_(model, "block.2", "leaky_relu", torch.rand(5), dims=(-3,))
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    watch = Watch(compiled, rules=Rules(1))
    watch.substitutes = rectifiers(compiled)
    with watch.probe:
        compiled(x)
    assert watch.sites == before.sites
