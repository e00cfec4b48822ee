"""Edits that enter the forward for a time: what they add, when, and that nothing of them stays."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Net as Trained
from toys import batches, fit

from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.repair.activation_swap import records, rectifiers, substitute_
from lightning_deadrelu.repair.bias_offset import BiasOffset, offset_left
from lightning_deadrelu.repair.edit_schedule import EditSchedule, ScheduleState
from lightning_deadrelu.repair.slope_ramp import SlopeRamp, slope_share
from lightning_deadrelu.repair.substitute_modules import LeakyUnits
from lightning_deadrelu.repair.wake_up import PushProbe
from lightning_deadrelu.statistics import Rules

GAMMA = torch.tensor([0.0, 3.0, 0.0, 1.5, 0.1, 0.0])


def mlp(act: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), act or nn.ReLU(), nn.Linear(6, 1))


def offset(values: Tensor, steps: int, *, site: str = "1", path: str = "0", channels=None, dim: int = -1) -> BiasOffset:
    channels = torch.arange(len(values)) if channels is None else torch.tensor(channels)
    return BiasOffset(site=site, path=path, values=values, channels=channels, dim=dim, steps=steps)


def ramp(values: Tensor, steps: int, *, site: str = "1", path: str = "1") -> SlopeRamp:
    return SlopeRamp(site=site, path=path, values=values, dims=(-1,), steps=steps)


def scheduled(model: nn.Module, *edits: BiasOffset | SlopeRamp) -> EditSchedule:
    schedule = EditSchedule(model)
    for edit in edits:
        schedule.add(edit)
    return schedule


def warmed(model: nn.Module, steps: int = 4, gamma: Tensor = GAMMA) -> EditSchedule:
    return scheduled(model, offset(gamma, steps))


def ramped(model: nn.Module, steps: int = 4) -> EditSchedule:
    return scheduled(model, ramp(GAMMA / 10, steps))


def untouched(model: nn.Module) -> bool:
    """Whether nothing of ours is left in the model."""
    hooks = any(module._forward_hooks for module in model.modules())
    return not hooks and not any(isinstance(module, LeakyUnits) for module in model.modules())


def by_hand(model: nn.Sequential, x: Tensor, gamma: Tensor | float = 0.0, slope: Tensor | float = 0.0) -> Tensor:
    hidden = model[0](x) + gamma
    return model[2](torch.where(hidden > 0, hidden, hidden * slope))


@pytest.mark.parametrize("first", ["warmth", "slope"])
def test_a_term_that_cannot_be_taken_out_keeps_no_other_in(first, monkeypatch):
    model = mlp()
    edits = [offset(GAMMA, 4), ramp(GAMMA, 4)]
    schedule = scheduled(model, *(edits if first == "warmth" else edits[::-1]))
    schedule.begin()
    with monkeypatch.context() as patch:
        patch.setattr(nn.Sequential, "__setattr__", lambda *args: [][0])
        with pytest.raises(IndexError):
            schedule.end()
    assert not model[0]._forward_hooks
    schedule.end()
    assert untouched(model)


# -- the warmth ------------------------------------------------------------------------------------------


def test_gamma_is_added_and_annealed():
    model, x = mlp(), torch.randn(7, 4)
    plain, twin = model(x), mlp()
    terms = warmed(model, steps=4)
    for step in range(6):
        left = max(0.0, 1 - step / 4)
        terms.begin()
        torch.testing.assert_close(model(x), by_hand(twin, x, GAMMA * left))
        terms.end()
        assert torch.equal(model(x), plain)
        assert untouched(model)
        assert terms.advance() == (["1"] if step == 3 else [])
        assert terms.sites == (["1"] if step < 3 else [])


def test_the_anneal_is_linear_and_ends_at_zero():
    assert [offset_left(step, 5) for step in range(7)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0])
    assert offset_left(0, 1) == 1
    assert offset_left(1, 1) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 10])
def test_the_ramp_rises_to_its_value_and_falls_to_zero(size):
    heights = [slope_share(step, size) for step in range(size)]
    assert heights == heights[::-1]
    assert max(heights) == 1
    assert all(0 < height <= 1 for height in heights)
    rises = [b - a for a, b in itertools.pairwise(heights)]
    assert all(abs(abs(rise) - rises[0]) < 1e-12 or rise == 0 for rise in rises)
    assert slope_share(size, size) == slope_share(size + 3, size) == 0


@pytest.mark.parametrize(
    ("layer", "shape", "dim"),
    [(nn.Conv2d(2, 5, 3), (3, 2, 6, 6), -3), (nn.Conv1d(2, 5, 3), (3, 2, 6), -2), (nn.Linear(2, 5), (3, 4, 2), -1)],
)
def test_units_have_channels_of_their_own(layer, shape, dim):
    """Three units, which are the channels 4, 0 and 2 of five."""
    model, x = nn.Sequential(layer, nn.ReLU()), torch.randn(shape)
    plain, terms = layer(x), scheduled(model, offset(torch.tensor([1.0, 2.0, 3.0]), 2, channels=[4, 0, 2], dim=dim))
    terms.begin()
    out = layer(x)
    terms.end()
    added = {4: 1.0, 0: 2.0, 2: 3.0}
    for channel in range(5):
        expected = plain.select(dim, channel) + added.get(channel, 0.0)
        torch.testing.assert_close(out.select(dim, channel), expected)


def test_dtypes_stay_under_autocast_and_in_double_precision():
    model, x = mlp(), torch.randn(3, 4)
    terms = warmed(model)
    terms.begin()
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](x).dtype == torch.bfloat16
    terms.end()
    model = mlp().double()
    terms = warmed(model, steps=3, gamma=GAMMA.double() / 3)
    terms.advance()
    assert torch.equal(terms.offsets["1"].value, GAMMA.double() / 3 * (1 - 1 / 3))
    terms.begin()
    assert model(x.double()).dtype == torch.float64
    assert torch.equal(model[0](x.double()) * 0, torch.zeros(3, 6, dtype=torch.float64))
    terms.end()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_inputs_are_seen_beside_a_large_term(dtype):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU()).to(dtype), torch.randn(5, 4).to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(0.01)
        inputs = model[0].bias.zero_() + model[0](x)
    terms, watch = scheduled(model, offset(torch.full((6,), 50.0), 9)), Watch(model)
    with watch.probe:
        model(x)
    watch.liveness.reset()
    terms.begin()
    watch.offsets = {0: terms.offsets["1"]}
    with watch.probe:
        model(x)
    terms.end()
    totals = watch.liveness.totals()
    assert torch.equal(totals.fired, (inputs > 0).sum(0))
    assert torch.equal(totals.peak, inputs.amax(0).to(totals.peak.dtype))
    assert terms.offsets["1"].before(inputs) is None  # and nothing of the batch is held


def test_the_offset_is_what_is_added():
    model = mlp()
    terms = warmed(model, steps=3)
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    for _ in range(3):
        terms.begin()
        assert torch.equal(model[0](torch.zeros(1, 4))[0], terms.offsets["1"].value)
        terms.end()
        terms.advance()
    assert terms.offsets == ramped(model).offsets == {}


def test_the_site_stays_the_same_and_its_input_is_seen_with_the_term():
    for act in (nn.ReLU(), nn.ReLU(inplace=True)):
        model, x = mlp(act), torch.randn(9, 4)
        watch = Watch(model, rules=Rules(1))
        with watch.probe:
            model(x)
        before = watch.sites
        watch.liveness.flush()
        terms = warmed(model, gamma=torch.full((6,), 100.0))
        terms.begin()
        other = Watch(model, rules=Rules(1))
        with other.probe:
            model(x)
        terms.end()
        assert other.sites == before
        expected = (model[0](x) + 100).amax(0)
        torch.testing.assert_close(other.liveness.report().sites[0].peak, expected)


def test_outputs_that_are_no_tensor_are_left_alone():
    model = nn.Sequential(nn.LSTM(4, 6))
    terms = scheduled(model, offset(GAMMA, 2))
    x = torch.randn(2, 3, 4)
    plain = model(x)[0]
    terms.begin()
    assert torch.equal(model(x)[0], plain)
    terms.end()


# -- the ramp --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_a_ramp_comes_and_goes(inplace):
    model, x = mlp(nn.ReLU(inplace=inplace)), torch.randn(7, 4)
    original, plain = model[1], model(x)
    terms = ramped(model, steps=4)
    for height in (0.5, 1.0, 1.0, 0.5):
        terms.begin()
        assert isinstance(model[1], LeakyUnits)
        torch.testing.assert_close(model(x), by_hand(model, x, slope=GAMMA / 10 * height))
        assert not records(model)
        terms.end()
        assert model[1] is original
        assert torch.equal(model(x), plain)
        done = terms.advance()
    assert done == ["1"]
    terms.begin()
    assert model[1] is original
    assert list(model.state_dict()) == list(mlp().state_dict())


def test_a_ramp_keeps_mode_hooks_and_all_places():
    shared, seen = nn.ReLU(), []
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 6), shared), "b": nn.Sequential(shared)})
    terms = scheduled(model, ramp(GAMMA, 4, path="a.1"))
    handle = shared.register_forward_hook(lambda *args: seen.append(1))
    shared.eval()
    terms.begin()
    assert model["a"][1] is model["b"][0] is not shared
    assert not model["a"][1].training
    model["a"](torch.randn(2, 4))
    model.train()
    late = model["b"][0].register_forward_hook(lambda *args: seen.append(2))
    terms.end()
    assert model["a"][1] is model["b"][0] is shared
    assert shared.training
    model["a"](torch.randn(2, 4))
    assert seen == [1, 1, 2]
    handle.remove(), late.remove()
    assert untouched(model)


def test_what_others_put_in_the_place_meanwhile_stays():
    model = mlp()
    terms = ramped(model)
    substitute_(model, "1", "gelu")
    terms.begin()
    terms.end()
    assert type(model[1]) is nn.GELU
    terms = ramped(model)  # a substitute may be ramped too, and comes back
    terms.begin()
    assert isinstance(model[1], LeakyUnits)
    terms.end()
    assert type(model[1]) is nn.GELU


def test_a_ramp_is_judged_as_the_rectifier():
    model, x = mlp(nn.ReLU(inplace=True)), torch.randn(9, 4)
    watch = Watch(model, rules=Rules(1))
    with watch.probe:
        model(x)
    terms = ramped(model, steps=2)
    while terms.sites:
        watch.substitutes = {**rectifiers(model), **terms.rectifiers}
        terms.begin()
        with watch.probe:
            model(x)
        terms.end()
        terms.advance()
    watch.substitutes = {**rectifiers(model), **terms.rectifiers}
    with watch.probe:
        model(x)
    assert watch.probe.failure is None
    assert len(watch.sites) == 1
    fired = (model[0](x) > 0).sum(0) * 4
    assert torch.equal(watch.liveness.totals().fired.long(), fired)


# -- when they are there ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [warmed, ramped])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_sees_what_the_forward_saw(make, reentrant):
    x = torch.randn(5, 4, requires_grad=True)
    grads = []
    for recompute in (False, True):
        model = mlp()
        terms = make(model)
        terms.advance()
        terms.begin()
        out = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        out.square().sum().backward()
        terms.end()
        grads.append([x.grad, *[parameter.grad for parameter in model.parameters()]])
        x.grad = None
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("make", [warmed, ramped])
def test_copies_are_the_model_itself(make):
    model, x = mlp(), torch.randn(5, 4)
    plain = model(x)
    terms = make(model)
    file = io.BytesIO()
    terms.begin()
    assert not torch.equal(model(x), plain)
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    terms.end()
    for other in copies:
        assert torch.equal(other(x), plain)
        assert type(other[1]) is nn.ReLU
    assert torch.equal(copy.deepcopy(model)(x), plain)
    assert untouched(copy.deepcopy(model))


@pytest.mark.parametrize("make", [warmed, ramped])
def test_between_batches_the_model_can_be_exported(make):
    model, x = mlp(), torch.randn(5, 4)
    plain = model(x)
    terms = make(model)
    terms.begin()
    terms.end()
    assert torch.equal(torch.jit.script(model)(x), plain)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), plain)


@pytest.mark.parametrize("make", [warmed, ramped])
def test_calls_may_be_repeated(make):
    model, x = mlp(), torch.randn(5, 4)
    terms = make(model)
    terms.begin()
    once = model(x)
    terms.begin()
    assert torch.equal(model(x), once)
    for _ in range(2):
        terms.end()
        assert untouched(model)
    terms.begin()
    assert [edit.site for edit in terms.drop(terms.sites)] == ["1"]
    assert untouched(model)
    assert terms.drop(terms.sites) == []
    terms.begin(), terms.end()
    assert terms.advance() == []


def test_two_sites_behind_one_layer():
    model = mlp()
    terms = scheduled(model, offset(GAMMA, 4), offset(torch.ones(2), 2, site="other", channels=[0, 2]))
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    terms.begin()
    assert torch.equal(model[0](torch.zeros(4)), GAMMA + torch.tensor([1.0, 0, 1, 0, 0, 0]))
    assert [edit.site for edit in terms.drop(terms.sites)] == ["1", "other"]
    assert untouched(model)


@pytest.mark.parametrize("make", [warmed, ramped])
def test_the_model_is_not_kept_alive(make):
    model = mlp()
    terms = make(model)
    terms.begin()
    hooks = list(model[0]._forward_hooks.values())
    module = model[1]
    terms.end()
    terms.drop(terms.sites)
    gone = weakref.ref(model)
    del model, terms
    gc.collect()
    assert gone() is None
    assert len(hooks) + isinstance(module, LeakyUnits) == 1  # what entered the model still lives, and holds it not


def test_a_constant_fades_also_where_the_calls_of_rectifiers_cannot_be_followed(monkeypatch):
    def fails(self):
        raise RuntimeError("the calls of rectifiers could not be followed")

    monkeypatch.setattr(PushProbe, "check", fails)
    schedule = warmed(mlp(), steps=2)
    for left in (0.5, 0.0):
        value = schedule.offsets["1"]
        with pytest.raises(RuntimeError, match="could not be followed"):
            schedule.advance()
        assert torch.equal(value.value, GAMMA * left)
    assert schedule.sites == []


def test_a_place_that_is_not_there():
    terms = EditSchedule(mlp())
    with pytest.raises(ValueError, match="A term of `a` goes to the module `nowhere`, which this model does not have"):
        terms.add(offset(GAMMA, 2, site="a", path="nowhere"))
    with pytest.raises(ValueError, match="goes to the module `nowhere`"):
        terms.add(ramp(GAMMA, 2, path="nowhere"))
    with pytest.raises(ValueError, match="goes to one of torch's rectifiers, and `0` is a `Linear`"):
        terms.add(ramp(GAMMA, 2, path="0"))
    assert terms.sites == []


# -- saved and resumed -----------------------------------------------------------------------------------


def both(model: nn.Module) -> EditSchedule:
    gamma = torch.rand(6, generator=torch.Generator().manual_seed(3))
    return scheduled(model, offset(gamma, 7), ramp(GAMMA / 3, 9, site="again"))


def trained(model: nn.Module, terms: EditSchedule, steps: range) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        terms.begin()
        model(x).square().mean().backward()
        terms.end()
        optimizer.step()
        optimizer.zero_grad()
        terms.advance()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("cut", range(1, 10))
def test_resumed_is_uninterrupted(cut):
    model = mlp()
    expected = trained(model, both(model), range(12))
    first = mlp()
    terms = both(first)
    trained(first, terms, range(cut))
    saved = through_a_file({"weights": first.state_dict(), "terms": encode(terms.state)})
    second = mlp()
    second.load_state_dict(saved["weights"])
    other = EditSchedule(second)
    other.restore(decode(ScheduleState, saved["terms"]))
    assert other.sites == terms.sites
    assert torch.equal(trained(second, other, range(cut, 12)), expected)
    assert other.sites == []


def test_what_was_saved_does_not_change_with_the_run():
    model = mlp()
    terms = both(model)
    saved = encode(terms.state)
    trained(model, terms, range(3))
    assert [what["step"] for kind in saved.values() for what in kind] == [0, 0]
    other = EditSchedule(model)
    other.restore(decode(ScheduleState, saved))
    other.advance()
    assert [what["step"] for kind in saved.values() for what in kind] == [0, 0]


def test_a_state_replaces_what_is_in_flight():
    model = mlp()
    terms = both(model)
    terms.begin()
    terms.restore(ScheduleState())
    assert untouched(model)
    assert terms.sites == []
    state = warmed(model).state
    with pytest.raises(ValueError, match="which this model does not have"):
        EditSchedule(nn.Sequential(nn.Identity(), nn.ReLU())[1:]).restore(state)


# -- in a Trainer ----------------------------------------------------------------------------------------


class Warms(Callback):
    """Adds terms in the first batch, and looks at the model between batches."""

    def __init__(self, fail_at: int | None = None, error: type[BaseException] = KeyError) -> None:
        self.fail_at, self.error = fail_at, error
        self.clean: list[bool] = []

    def on_train_start(self, trainer, pl_module):
        edits = offset(torch.ones(8), 6, site="a", path="net.0"), ramp(torch.ones(6), 6, site="b", path="net.3")
        self.terms = scheduled(pl_module, *edits)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.terms.begin()

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.fail_at:
            raise self.error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.terms.end()
        self.terms.advance()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.clean.append(untouched(pl_module))

    def on_exception(self, trainer, pl_module, exception):
        self.terms.drop(self.terms.sites)


def test_validation_never_sees_them():
    model, warms = Trained(), Warms()
    fit(model, batches(4), warms, val=batches(1), val_check_interval=1)
    assert len(warms.clean) >= 4
    assert all(warms.clean)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_nothing_stays_after_an_error(error):
    model, warms = Trained(), Warms(fail_at=2, error=error)
    with pytest.raises((error, SystemExit)):
        fit(model, batches(4), warms)
    assert untouched(model)
    assert warms.terms.sites == []


def test_averaged_copies_never_see_them():
    """The copy is averaged from weights alone, also if it is made while a batch runs."""
    model = mlp()
    terms = both(model)
    terms.begin()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    model(torch.randn(5, 4)).sum().backward()
    averaged.update_parameters(model)
    terms.end()
    x = torch.randn(5, 4)
    assert torch.equal(averaged(x), model(x))


# -- compiled --------------------------------------------------------------------------------------------


def test_a_ramp_is_noticed_by_compiled_code():
    model = nn.Sequential(mlp())
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled, x = torch.compile(model, backend=backend), torch.randn(7, 4)
    plain = compiled(x)
    terms = scheduled(model, ramp(GAMMA / 10, 12, path="0.1"))
    for step in range(12):
        terms.begin()
        out = compiled(x)
        expected = by_hand(model[0], x, slope=GAMMA / 10 * slope_share(step, 12))
        torch.testing.assert_close(out, expected)
        terms.end()
        assert torch.equal(compiled(x), plain)
        terms.advance()
    assert len(graphs) == 2


def test_a_schedule_is_restored_whole_or_not_at_all():
    """Else what was restored before the error would go on in a run whose monitor has ended."""
    schedule = EditSchedule(mlp())
    there, elsewhere = offset(GAMMA, 4), offset(GAMMA, 4, site="9", path="9")
    with pytest.raises(ValueError, match="goes to the module `9`, which this model does not have"):
        schedule.restore(ScheduleState(offsets=[there, elsewhere]))
    assert schedule.sites == []
