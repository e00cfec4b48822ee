"""The probe comes and goes without a trace, never disturbs the model, and sees compiled models too."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import BasicBlock, Checkpointed, Mlp, MoE, Net, keep_matmuls, resnet
from recorder import Recorder
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode, _len_torch_function_stack
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_deadrelu.model.sites import names_of
from lightning_deadrelu.observe.probe import Probe


class Log:
    """A sink that remembers what it was given, by name of the site."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, site: Any, rectifier: Any, x: Tensor, out: Tensor, dims: tuple[int, ...]) -> None:
        assert not x.requires_grad
        assert not out.requires_grad
        over = [dim for dim in range(-x.ndim, 0) if dim not in dims]
        self.calls.append((site, dims, (x > rectifier.hinge).sum(over)))

    @property
    def names(self) -> list[str]:
        sites = list(dict.fromkeys(call[0] for call in self.calls))
        spell = dict(zip(sites, names_of(sites), strict=True))
        return [spell[call[0]] for call in self.calls]

    def equals(self, other: Log) -> bool:
        same = [a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(self.calls, other.calls, strict=True)]
        return bool(same) and all(same)


def nowhere(*args: Any) -> None:
    """Take what the probe sees and drop it."""


def hook_counts() -> list[int]:
    return [len(value) for name, value in vars(hooks).items() if name.startswith("_global_") and "hooks" in name]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = _len_torch_function_stack(), hook_counts(), list(warnings.filters)
    yield
    assert (_len_torch_function_stack(), hook_counts(), list(warnings.filters)) == before
    torch.compiler.reset()


def mlp() -> nn.Module:
    return Mlp()


def test_arm_and_disarm_twice() -> None:
    log, model, x = Log(), mlp(), torch.randn(5, 4)
    probe = Probe(model, log)
    probe.disarm()
    for _ in range(2):
        probe.arm()
        probe.arm()
        assert probe.armed
        model(x)
        probe.disarm()
        probe.disarm()
        assert not probe.armed
        model(x)
    assert log.names == ["act", "act"]


def test_the_model_is_untouched() -> None:
    def picture(model: nn.Module) -> list[Any]:
        return [
            (name, sorted(vars(module)), type(module), id(module.forward.__func__), len(module._forward_hooks))
            for name, module in model.named_modules()
        ]

    model = resnet(BasicBlock(4, 6, 2))()
    model(torch.randn(2, 3, 16, 16))
    before, keys = picture(model), list(model.state_dict())
    with Probe(model, nowhere):
        model(torch.randn(2, 3, 16, 16)).sum().backward()
        assert picture(model) == before
    assert picture(model) == before
    assert list(model.state_dict()) == keys


COPIES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "deepcopy": lambda model, x: copy.deepcopy(model)(x),
    "pickle": lambda model, x: pickle.loads(pickle.dumps(model))(x),
    "torch.save": lambda model, x: torch.save(model, io.BytesIO()) or model(x),
    "trace": lambda model, x: torch.jit.trace(model, x)(x),
    "script": lambda model, x: torch.jit.script(model)(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
}


@pytest.mark.parametrize("way", COPIES)
def test_the_model_can_be_copied_between_batches(way: str) -> None:
    model, x = mlp(), torch.randn(5, 4)
    log = Log()
    probe = Probe(model, log)
    with probe:
        expected = model(x)
    assert torch.equal(COPIES[way](model, x), expected)
    with probe:
        model(x)
    assert log.names == ["act", "act"]
    assert probe.failure is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_the_model_can_be_copied_while_armed(way: str) -> None:
    model, x, log = mlp(), torch.randn(5, 4), Log()
    with Probe(model, log) as probe:
        expected = model(x)
        assert torch.equal(COPIES[way](model, x), expected)
    assert probe.failure is None


def test_a_copy_is_not_counted_as_the_model() -> None:
    model, x, log = mlp(), torch.randn(5, 4), Log()
    average = copy.deepcopy(model)
    with Probe(model, log):
        model(x)
        average(x)
    assert log.names == ["act"]


def test_an_error_in_the_sink_stops_the_probe_and_not_the_model() -> None:
    said: list[str] = []

    def sink(*args: Any) -> None:
        said.append("full" if not said else "called again")
        raise RuntimeError(said[-1])

    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.ReLU()), torch.randn(5, 4)
    expected = model(x)
    probe = Probe(model, sink)
    with probe:
        assert torch.equal(model(x), expected)
    assert str(probe.failure) == "full"
    assert said == ["full"]
    probe.arm()
    assert not probe.armed


def test_an_error_in_the_model_passes_through() -> None:
    def fail(model: Any, x: Tensor) -> Tensor:
        if x.sum() > 0:
            raise KeyError("of the model")
        return model.mlp(x)

    model, log = Net(fail, mlp=mlp()), Log()
    probe = Probe(model, log)
    with pytest.raises(KeyError, match="of the model"), probe:
        model(torch.ones(5, 4))
    assert not probe.armed
    with probe:
        with pytest.raises(KeyError):
            model(torch.ones(5, 4))
        model(-torch.ones(5, 4))
    assert log.names == ["mlp.act"]
    assert probe.failure is None


def test_an_error_that_the_model_catches_leaves_no_frame_open() -> None:
    def fail(model: Any, x: Tensor) -> Tensor:
        raise KeyError("of the child")

    def forward(model: Any, x: Tensor) -> Tensor:
        with suppress(KeyError):
            model.child(x)
        return F.relu(model.fc(x))

    model, log = Net(forward, child=Net(fail), fc=nn.Linear(4, 6)), Log()
    with Probe(model, log):
        model(torch.randn(5, 4))
    assert log.names == ["relu"]


@pytest.mark.parametrize("foreach", [False, True])
def test_a_step_between_two_forwards_changes_no_site(foreach: bool) -> None:
    model, x, log = mlp(), torch.randn(5, 4), Log()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    with Probe(model, log):
        model(x).sum().backward()
        optimizer.step()
        model(x)
    assert log.names == ["act", "act"]


def test_weights_gathered_for_one_forward_are_known() -> None:
    model, log = Net(lambda m, x: F.relu(m.fc(x)), fc=nn.Linear(4, 6)), Log()

    def gather(module: Any, args: Any) -> None:
        module._parameters["weight"] = nn.Parameter(module.weight.detach().clone())

    with Probe(model, log):
        model(torch.randn(5, 4))
        model.fc.register_forward_pre_hook(gather)
        model(torch.randn(5, 4))
    assert [call[0].source for call in log.calls] == [("fc.bias", "fc.weight")] * 2


def test_modes_may_come_and_go_in_any_order() -> None:
    class Other(BaseTorchFunctionMode):
        pass

    model, x, log = mlp(), torch.randn(5, 4), Log()
    probe, other = Probe(model, log), Other()
    probe.arm()
    other.__enter__()
    model(x)
    probe.disarm()
    assert torch.overrides._get_current_function_mode_stack() == [other]
    model(x)
    other.__exit__(None, None, None)
    with Other():
        probe.arm()
        model(x)
        with Other():
            model(x)
        probe.disarm()
    assert log.names == ["act"] * 3


def test_two_probes_see_the_same() -> None:
    model, x, one, two = mlp(), torch.randn(5, 4), Log(), Log()
    with Probe(model, one), Probe(model, two):
        model(x)
    assert one.equals(two)


class Calls:
    """Notes the names of all calls that a probe hands on."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def begin(self) -> None:
        self.names.clear()

    def see(self, name: str, *call: Any) -> None:
        self.names.append(name)

    def end(self) -> None:
        """Keep what was noted."""


@pytest.mark.parametrize("counting", ["by another probe, before", "by another probe, behind", "in a module's hook"])
def test_what_is_counted_is_not_taken_for_the_models(counting: str) -> None:
    def sink(site: Any, rectifier: Any, x: Tensor, out: Tensor, dims: Any) -> None:
        x.amin()

    model, x, calls = mlp(), torch.randn(3, 4), Calls()
    probe, other = Probe(model, nowhere), Probe(model, sink)
    probe.router.subscribe_calls(calls)
    with probe:
        model(x)
    alone = list(calls.names)
    probe.router.subscribe_calls(calls)
    if counting == "in a module's hook":
        other.router.subscribe_input("0", lambda x: None)
        probe.router.subscribe_input("0", lambda x: x.amin())
    first, second = (other, probe) if counting.endswith("before") else (probe, other)
    with first, second:
        model(x)
    assert calls.names == alone
    assert {"linear", "relu"} <= set(alone)
    assert probe.failure is other.failure is None


def test_nothing_is_kept_alive() -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Keep(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                kept.append(weakref.ref(out))
            return out

    model = mlp()
    probe = Probe(model, nowhere)
    with Keep(), probe:
        model(torch.randn(5, 4)).sum().backward()
        gc.collect()
        assert kept
        assert not any(ref() is not None for ref in kept)
    reference = weakref.ref(model)
    del model, probe
    gc.collect()
    assert reference() is None


WAITS = {"_local_scalar_dense", "item", "_to_copy", "nonzero", "is_nonzero", "equal"}


@pytest.mark.parametrize("build", [mlp, lambda: resnet(BasicBlock(4, 6, 2))()], ids=["mlp", "resnet"])
def test_the_probe_runs_no_operation_of_its_own(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    x = torch.randn(5, 4) if isinstance(model, Mlp) else torch.randn(2, 3, 16, 16)
    model(x)
    with Recorder() as without:
        model(x)
    with Probe(model, nowhere), Recorder() as watched:
        model(x)
    assert not WAITS & set(watched.ops)
    own = [op for op in watched.ops if op not in ("detach", "clone")]  # a clone before a call in place
    assert own == [op for op in without.ops if op not in ("detach", "clone")]


def backward(loss: Tensor) -> None:
    """As ``loss.backward()``, but modes stay in force, as they did for ``torch.autograd.backward`` of old."""
    ones = torch.ones_like(loss)
    run = torch.autograd.Variable._execution_engine.run_backward
    run((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


@pytest.mark.parametrize("how", [{"use_reentrant": False}, {"use_reentrant": True}, {"selective": True}], ids=str)
def test_gradients_through_checkpoints_are_the_same_bits(how: dict[str, Any]) -> None:
    if how.pop("selective", False):
        how = {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(keep_matmuls)}
    model, x, log = Checkpointed(**how), torch.randn(5, 4), Log()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        backward(model(x).square().sum())
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    with Probe(model, log) as probe:
        observed = gradients()
    assert all(map(torch.equal, observed, expected))
    assert log.names == ["mlp.act"]
    assert probe.failure is None


def test_selective_checkpoints_do_not_save_what_the_sink_computes() -> None:
    def save_all(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    def gradient() -> Tensor:
        model.zero_grad()
        contexts = partial(create_selective_checkpoint_contexts, save_all)
        checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
        return model[0].weight.grad.clone()

    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()), torch.randn(5, 4)
    expected = gradient()
    with Probe(model, lambda site, rectifier, x, out, dims: torch.relu(x + 1)) as probe:
        assert torch.equal(gradient(), expected)
    assert probe.failure is None


def whole(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def a_part(model: nn.Module, backend: str) -> nn.Module:
    model.layer1.compile(backend=backend)
    return model


def a_wrapped_part(model: Any, backend: str) -> nn.Module:
    model.layer1 = torch.compile(model.layer1, backend=backend)
    return model


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("compiled", [whole, in_place, a_part, a_wrapped_part])
def test_compiled_models_are_seen_as_if_they_were_not(
    compiled: Callable[[nn.Module, str], nn.Module], backend: str, called_before: bool
) -> None:
    model = Net(lambda m, x: F.relu(m.layer1(x)), layer1=Mlp())
    x, eager, log = torch.randn(5, 4), Log(), Log()
    with Probe(model, eager):
        expected = model(x)
    fast = compiled(model, backend)
    if called_before:
        fast(x)
    probe = Probe(fast, log)
    for _ in range(2):
        log.calls.clear()
        with probe:
            result = fast(x)
        assert torch.allclose(result, expected)
        assert log.equals(eager)
        fast(x)
    assert probe.failure is None


def test_two_probes_at_once_leave_the_compiler_as_it_was() -> None:
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph

    first, second, x = Probe(mlp(), nowhere), Probe(mlp(), nowhere), torch.randn(5, 4)
    model = torch.compile(mlp(), backend=backend)
    first.arm()
    second.arm()
    first.disarm()
    model(x)
    assert not compilations
    second.disarm()
    model(x)
    assert len(compilations) == 1


def test_compiled_code_is_not_compiled_again_after_an_observation() -> None:
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph

    model, x = torch.compile(mlp(), backend=backend), torch.randn(5, 4)
    model(x)
    probe = Probe(model, nowhere)
    for _ in range(3):
        with probe:
            model(x)
        model(x)
    assert len(compilations) == 1


def test_layers_left_out_are_no_error() -> None:
    model, log = MoE(), Log()
    with Probe(model, log) as probe:
        model(torch.randn(2, 3, 4))
        model(torch.randn(0, 3, 4))
    assert log.names == ["experts.0.act", "experts.1.act"]
    assert probe.failure is None


def test_a_failure_to_trace_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("lost")

    monkeypatch.setattr("lightning_deadrelu.observe.tensor_origins.follow", fail)
    model, log = mlp(), Log()
    with pytest.warns(UserWarning, match=r"could not be followed \(ValueError: lost\)"), Probe(model, log) as probe:
        model(torch.randn(5, 4))
    assert log.names == ["act"]
    with probe:  # said once
        model(torch.randn(5, 4))
    assert probe.failure is None


def test_fused_recurrence_is_told_by_its_output() -> None:
    seen = []
    model = nn.RNN(4, 6, nonlinearity="relu", batch_first=True)
    with Probe(model, lambda site, rectifier, x, out, dims: seen.append((site, x, out, dims))) as probe:
        output = model(torch.randn(2, 3, 4))[0]
    assert probe.failure is None
    assert [(site.kind, site.units, dims) for site, _, _, dims in seen] == [("rnn_relu", 6, (-1,))]
    assert torch.equal(seen[0][2], output)


def test_recurrent_cell() -> None:
    model, log = nn.RNNCell(4, 6, nonlinearity="relu"), Log()
    with Probe(model, log):
        model(torch.randn(2, 4), model(torch.randn(2, 4)))
    assert [(name, call[0].units) for name, call in zip(log.names, log.calls, strict=True)] == [("rnn_relu", 6)] * 2


def test_a_changing_width_is_given_up_with_a_reason() -> None:
    model, log = Net(lambda m, x: m.act(x), act=nn.ReLU()), Log()
    with Probe(model, log) as probe:
        for width in range(2, 12):
            model(torch.randn(3, width))
    assert len({call[0] for call in log.calls}) <= 4
    assert "changes from call to call" in probe.unwatched["act"]


def test_unit_dims_are_the_users_word() -> None:
    model, log = Net(lambda m, x: m.act(x), act=nn.ReLU()), Log()
    with Probe(model, log, {"a*": 1}):
        model(torch.randn(2, 5, 3))
    assert [(call[0].units, call[1]) for call in log.calls] == [(5, (-2,))]


@pytest.mark.parametrize("x", [torch.zeros(0, 4), torch.randn(1, 4)], ids=["no row", "one row"])
def test_small_batches(x: Tensor) -> None:
    model, log = mlp(), Log()
    with Probe(model, log) as probe:
        model(x)
    assert len(log.calls) == (len(x) > 0)
    assert probe.failure is None


def test_vmap_and_grad_are_left_alone() -> None:
    model, x = mlp(), torch.randn(5, 4)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, row[None]).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    expected = per_sample(parameters, x)
    with Probe(model, nowhere) as probe:
        observed = per_sample(parameters, x)
    assert probe.failure is None
    assert list(probe.unwatched) == ["act"]
    assert all(torch.equal(observed[name], expected[name]) for name in parameters)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_listed_as_unwatched(layout: torch.layout) -> None:
    model, log = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), Log()
    with Probe(model, log) as probe:
        model(torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout))
    assert probe.failure is None
    assert not log.calls
    assert "plain tensor" in probe.unwatched["1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision(dtype: torch.dtype) -> None:
    model, log = mlp().to(dtype), Log()
    with Probe(model, log) as probe:
        model(torch.randn(5, 4, dtype=dtype))
    assert log.names == ["act"]
    assert probe.failure is None


def test_autocast() -> None:
    model, log = mlp(), Log()
    with torch.autocast("cpu", torch.bfloat16), Probe(model, log) as probe:
        model(torch.randn(5, 4))
    assert [call[0].source for call in log.calls] == [("fc1.bias", "fc1.weight")]
    assert probe.failure is None


def test_zeros_that_were_filled_are_no_hinge() -> None:
    class Maxout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
            self.register_buffer("floor", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros(len(x), 4)
            z[:] = self.a(x)
            return torch.maximum(torch.maximum(z, self.b(x)), self.floor)

    model, seen = Maxout(), []
    probe = Probe(model, lambda site, *rest: seen.append(site.kind))
    for sites in (["maximum"], []):
        seen.clear()
        with probe:
            model(torch.ones(2, 3))
        assert seen == sites
        model.floor.fill_(-50)


def test_looking_does_not_repeat_warnings() -> None:
    pytest.importorskip("torch._dynamo")
    probe = Probe(nn.ReLU(), lambda *call: None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            with probe:
                warnings.warn("once", stacklevel=1)
    assert len(told) == 1


def test_another_thread_is_not_looked_at() -> None:
    model, seen = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), []
    probe = Probe(model, lambda site, *rest: seen.append(site.owner))
    with probe:
        thread = threading.Thread(target=model, args=(torch.ones(1, 2),))
        thread.start()
        thread.join()
        assert not probe.entered
    assert seen == []


def test_recompute_of_a_compiled_block_is_eager_too() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    block.compile(backend="aot_eager")
    probe = Probe(block, lambda *call: None)
    for look in (True, False):
        if look:
            probe.arm()
        out = checkpoint(block, torch.randn(3, 4, requires_grad=True), use_reentrant=False)
        probe.pause()
        out.sum().backward()
        probe.disarm()
        assert probe.failure is None


@pytest.mark.parametrize("keep_fused", [True, False])
def test_fused_encoder_layers_round_as_without_the_probe(keep_fused: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 4), nn.ReLU()).eval()
    x, log = torch.randn(5, 7, 16), Log()
    probe = Probe(model, log, keep_fused=keep_fused)
    with torch.no_grad():
        alone = model(x)
        with probe:
            watched = model(x)
    assert torch.equal(alone, watched) == keep_fused
    assert log.names == (["2"] if keep_fused else ["0.layers.0-relu", "0.layers.1-relu", "2"])
    assert set(probe.unwatched) == ({"0"} if keep_fused else set())
    assert _len_torch_function_stack() == 0
