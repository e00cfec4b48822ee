"""Repair of optimizer state: exactly the named entries of every optimizer, and no kick afterwards."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.repair.optimizer_state import left_alone, repair_, unknown_state

ROWS, WIDTH, DEAD = 6, 4, (2, 4)
OPTIMIZERS = {
    "adam": (torch.optim.Adam, {}),
    "adam-amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adam-foreach": (torch.optim.Adam, {"foreach": True}),
    "adam-fused": (torch.optim.Adam, {"fused": True}),
    "adam-loop": (torch.optim.Adam, {"foreach": False}),
    "adam-l2": (torch.optim.Adam, {"weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {}),
    "adamw-amsgrad-fused": (torch.optim.AdamW, {"amsgrad": True, "fused": True}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "adamax": (torch.optim.Adamax, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adagrad-fused": (torch.optim.Adagrad, {"fused": True, "initial_accumulator_value": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "rmsprop-centered-momentum": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "sgd-nesterov-fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "fused": True}),
    "rprop": (torch.optim.Rprop, {}),
    "asgd": (torch.optim.ASGD, {"t0": 2, "lambd": 0.1}),
    "adafactor": (torch.optim.Adafactor, {}),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = (torch.optim.Muon, {})
# Their step depends on all entries of a tensor.
COUPLED = {"adafactor", "muon"}

ZERO = {"exp_avg", "momentum_buffer", "grad_avg", "prev"}
TYPICAL = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "variance", "acc_delta", "step_size"}


def rows_of(name, units, rows=None):
    units = torch.as_tensor(units)
    return Slice(name, "weight", units, (units if rows is None else torch.as_tensor(rows))[:, None], (0,))


def grown(kind, steps=8, dtype=torch.float32, dead=DEAD):
    """Make two parameters and train them, some rows without gradient."""
    make, options = OPTIMIZERS[kind]
    generator = torch.Generator().manual_seed(3)
    shapes = [(ROWS, WIDTH)] if kind == "muon" else [(ROWS, WIDTH), (ROWS,)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = make(parameters, **options)
    for _ in range(steps):
        step(optimizer, parameters, generator, dead)
    return parameters, optimizer, generator


def step(optimizer, parameters, generator, dead=()):
    for one in parameters:
        one.grad = torch.randn(one.shape, generator=generator).to(one.dtype)
        one.grad[list(dead)] = 0
    optimizer.step()


def snapshot(parameters, optimizer):
    return copy.deepcopy([(one.detach(), dict(optimizer.state.get(one, {}))) for one in parameters])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def median(values, like):
    """The lower median of what is not 0, place by place, with a loop."""
    flat = values.double().reshape(len(values), -1)
    everything = sorted(x for x in flat.flatten().tolist() if x)
    out = []
    for column in flat.T.tolist():
        known = sorted(x for x in column if x)
        known = known or everything
        out.append(known[(len(known) - 1) // 2])
    return torch.tensor(out, dtype=torch.float64).to(like.dtype).reshape(values.shape[1:])


KINDS = [(kind, dtype) for kind in OPTIMIZERS for dtype in (torch.float32, torch.float64, torch.bfloat16)]


# Muon orthogonalises in bfloat16, and takes no float64
@pytest.mark.parametrize(("kind", "dtype"), [one for one in KINDS if one != ("muon", torch.float64)], ids=str)
def test_exactly_the_named_entries_change(kind, dtype):
    parameters, optimizer, _ = grown(kind, dtype=dtype)
    before = snapshot(parameters, optimizer)
    live = [row for row in range(ROWS) if row not in DEAD]
    for number, one in enumerate(parameters):
        repair_([optimizer], one, rows_of(str(number), DEAD))
    for (old, old_state), (new, new_state) in zip(before, snapshot(parameters, optimizer), strict=True):
        assert torch.equal(old, new)
        assert list(old_state) == list(new_state)
        for key, value in new_state.items():
            if not isinstance(value, torch.Tensor) or key not in ZERO | TYPICAL | {"ax"} or value.shape != old.shape:
                assert same(value, old_state[key]), key
                continue
            assert torch.equal(value[live], old_state[key][live]), key
            for row in DEAD:
                if key in ZERO:
                    assert not value[row].any(), key
                elif key in TYPICAL:
                    assert torch.equal(value[row], median(old_state[key][live], value)), key
                else:
                    assert torch.equal(value[row], old[row])


def test_every_state_of_torchs_optimizers_is_covered():
    """What none of the sets names would be left as it was, without a word."""
    shared = {"step", "mu_product", "eta", "mu", "row_var", "col_var"}
    for kind in OPTIMIZERS:
        parameters, optimizer, _ = grown(kind)
        for one in parameters:
            assert set(optimizer.state.get(one, {})) <= ZERO | TYPICAL | {"ax"} | shared, kind
            assert unknown_state([optimizer], {"w": one}, ["w"]) == ""


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind not in COUPLED])
def test_live_units_go_on_as_if_nothing_had_happened(kind):
    runs = []
    for repaired in (False, True):
        parameters, optimizer, generator = grown(kind)
        if repaired:
            for number, one in enumerate(parameters):
                repair_([optimizer], one, rows_of(str(number), DEAD))
        for _ in range(20):
            step(optimizer, parameters, generator)
        runs.append([one.detach() for one in parameters])
    live = [row for row in range(ROWS) if row not in DEAD]
    for plain, mended in zip(*runs, strict=True):
        assert torch.equal(plain[live], mended[live])


def steps_of(optimizer, one, gradient, count):
    taken = []
    for _ in range(count):
        before = one.detach().clone()
        one.grad = gradient.clone()
        optimizer.step()
        taken.append((before - one.detach())[:, 0])
    return torch.stack(taken)


@pytest.mark.slow
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_does_not_kick(make, amsgrad):
    """Closed form: 0.1 / sqrt(0.001) = 3.16 lr at once, 6.57 lr at the 12th step, where nothing is repaired."""
    lr, taken = 1e-3, {}
    gradient = torch.full((4, 1), 0.3, dtype=torch.float64)
    for repaired in (False, True):
        weight = nn.Parameter(torch.zeros(4, 1, dtype=torch.float64))
        optimizer = make([weight], lr=lr, amsgrad=amsgrad, weight_decay=0.0)
        dead = gradient.clone()
        dead[1] = 0
        steps_of(optimizer, weight, dead, 8000)
        if repaired:
            repair_([optimizer], weight, rows_of("weight", [1]))
        taken[repaired] = steps_of(optimizer, weight, gradient, 60)[:, [0, 1]] / lr
    kick, mended = taken[False][:, 1], taken[True][:, 1]
    assert float(kick[0]) == pytest.approx(0.1 / math.sqrt(0.001), rel=1e-3)
    assert int(kick.argmax()) == 11
    assert float(kick.max()) == pytest.approx(6.57, abs=0.01)
    assert float(mended.max()) < 1.02
    assert float(mended[0]) == pytest.approx(0.1, rel=1e-2)
    assert torch.equal(taken[False][:, 0], taken[True][:, 0])


def test_median_is_taken_place_by_place_and_over_live_units():
    weight = nn.Parameter(torch.zeros(5, 2))
    optimizer = torch.optim.Adam([weight])
    gradient = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [0.0, 0.0], [1e4, 1e4]])
    weight.grad = gradient
    optimizer.step()
    repair_([optimizer], weight, rows_of("w", [3]), live=rows_of("w", [0, 1, 2]))
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"][3], torch.tensor([0.004, 0.4]))


def test_readers_are_columns():
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.arange(12.0).reshape(3, 4)
    optimizer.step()
    before = optimizer.state[weight]["exp_avg_sq"].clone()
    repair_([optimizer], weight, Slice("w", "reader", torch.tensor([1]), torch.tensor([[3]]), (1,)))
    after = optimizer.state[weight]["exp_avg_sq"]
    assert torch.equal(after[:, :3], before[:, :3])
    assert torch.equal(after[:, 3], torch.stack([before[0, 1], before[1, 1], before[2, 1]]))  # the lower of 2 is at 1
    assert not optimizer.state[weight]["exp_avg"][:, 3].any()


@pytest.mark.parametrize("channels_last", [False, True])
def test_groups(channels_last):
    weight = nn.Parameter(torch.randn(4, 2, 3, 3))
    if channels_last:
        weight = nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    before = optimizer.state[weight]["exp_avg"].clone()
    entries = Slice("w", "reader", torch.tensor([3]), torch.tensor([[1, 1]]), (0, 2), (2, 2, 2, 3, 3))
    repair_([optimizer], weight, entries)
    after = optimizer.state[weight]["exp_avg"]
    assert not after[2:, 1].any()
    before[2:, 1] = 0
    assert torch.equal(after, before)


def test_no_live_unit_leaves_what_there_is():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    optimizer.step()
    repair_([optimizer], weight, rows_of("w", [0, 1]))
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], torch.full((2, 2), 0.001))
    untouched = nn.Parameter(torch.zeros(2, 2))
    adagrad = torch.optim.Adagrad([untouched])
    repair_([adagrad], untouched, rows_of("w", [0]))
    assert not adagrad.state[untouched]["sum"].any()


def test_no_state_yet_no_optimizer_and_no_entries():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.Adam([weight])
    repair_([optimizer], weight, rows_of("w", [0]))
    assert not optimizer.state  # a lookup in a defaultdict makes an entry
    repair_([], weight, rows_of("w", [0]))
    repair_([optimizer], nn.Parameter(torch.zeros(2, 2)), rows_of("w", [0]))
    assert unknown_state([optimizer], {"w": weight}, ["w"]) == ""
    assert left_alone([optimizer], {"w": weight}, ["w"]) == ""
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    repair_([optimizer], weight, rows_of("w", []))
    assert optimizer.state[weight]["exp_avg"].all()


def test_several_optimizers_are_all_repaired():
    weight = nn.Parameter(torch.ones(3, 2))
    pair = [torch.optim.SGD([weight], lr=0.1, momentum=0.9), torch.optim.Adam([weight])]
    weight.grad = torch.ones(3, 2)
    for optimizer in pair:
        optimizer.step()
    repair_(pair, weight, rows_of("w", [0]))
    for optimizer, key in zip(pair, ("momentum_buffer", "exp_avg"), strict=True):
        assert optimizer.state[weight][key].any(1).tolist() == [False, True, True]


def test_huge_tensors_are_thinned_evenly():
    weight = nn.Parameter(torch.zeros(2000))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.arange(2000.0)
    optimizer.step()
    repair_([optimizer], weight, rows_of("w", [0]))
    assert float(optimizer.state[weight]["exp_avg_sq"][0]) == pytest.approx(1e-3 * 1000**2, rel=0.02)


def test_adafactors_factors_are_left_alone_and_said():
    weight = nn.Parameter(torch.ones(5, 1))  # whose row factors have the shape of the parameter
    optimizer = torch.optim.Adafactor([weight])
    weight.grad = torch.ones(5, 1)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    repair_([optimizer], weight, rows_of("w", [0]))
    after = optimizer.state_dict()["state"]
    assert all(same(after[0][key], value) for key, value in before[0].items())
    assert "`Adafactor` keeps `row_var`, `col_var`" in left_alone([optimizer], {"w": weight}, ["w"])


class Strange(torch.optim.SGD):
    def __init__(self, params, **state):
        super().__init__(params, lr=0.1)
        self.extra = state

    def step(self, closure=None):
        for group in self.param_groups:
            for one in group["params"]:
                self.state[one].update({key: make(one) for key, make in self.extra.items()})


@pytest.mark.parametrize(
    ("key", "make", "reason"),
    [
        ("slow_weights", torch.zeros_like, "of which it is not known what becomes of it"),
        ("state1", lambda one: torch.zeros_like(one, dtype=torch.uint8), "of which it is not known"),
        ("exp_avg", lambda one: torch.zeros_like(one, dtype=torch.uint8), "cannot be written one by one"),
        ("exp_avg", torch.zeros_like, ""),
        ("factors", lambda one: [torch.eye(2)], "which is not one tensor"),
        ("factors", lambda one: {"left": torch.eye(2)}, "which is not one tensor"),
        ("names", lambda one: ["left"], ""),
        ("preconditioner", lambda one: torch.eye(7), ""),
        ("step", lambda one: 3, ""),
    ],
)
def test_unknown_state_is_refused_by_name(key, make, reason):
    weight, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = Strange([weight], **{key: make})
    optimizer.step()
    tensors = {"fc.weight": weight, "other": other}
    found = unknown_state([optimizer], tensors, ["other", "fc.weight"])
    assert reason in found
    assert bool(found) == bool(reason)
    assert not found or found.startswith(f"`Strange` keeps `{key}` for `fc.weight`")
    assert unknown_state([optimizer], tensors, ["other"]) == ""
    assert ("`preconditioner`" in left_alone([optimizer], tensors, tensors)) == (key == "preconditioner")


def test_flat_history_is_refused():
    weight, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.LBFGS([other, weight])
    assert "`LBFGS` keeps one flat history" in unknown_state([optimizer], {"w": weight}, ["w"])
    assert unknown_state([torch.optim.LBFGS([other])], {"w": weight}, ["w"]) == ""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch knows no ranks")
def test_state_inside_a_zero_redundancy_optimizer_is_found(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weight = nn.Parameter(torch.ones(3, 2))
        optimizer = ZeroRedundancyOptimizer([weight], optimizer_class=torch.optim.Adam, lr=0.1)
        weight.grad = torch.ones(3, 2)
        optimizer.step()
        repair_([optimizer], weight, rows_of("w", [0]))
        assert optimizer.optim.state[weight]["exp_avg"].any(1).tolist() == [False, True, True]
    finally:
        torch.distributed.destroy_process_group()
