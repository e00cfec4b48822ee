"""Where units go, against brute force: an index tensor that knows which unit each element belongs to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_deadrelu.model.torch_calls import Call, dimension_runs, function_name, plain_name
from lightning_deadrelu.observe.probe import Probe
from lightning_deadrelu.observe.provenance import (
    Provenance,
    _permuted,
    _reshaped,
    follow,
    of_module,
    parameter,
)

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=5)
quick = settings(max_examples=300)


def labels(shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """Write into each element which unit it belongs to."""
    units = torch.zeros(tuple(shape), dtype=torch.long)
    for dim in sorted(d % len(shape) for d in dims):
        steps = torch.arange(shape[dim]).view(-1, *[1] * (len(shape) - dim - 1))
        units = units * shape[dim] + steps
    return units


def carries(units: Tensor, dims: Sequence[int] | None) -> bool:
    """Whether the elements that share a place along ``dims`` all belong to one unit."""
    assert dims is not None
    kept = [d % units.ndim for d in dims]
    over = [d for d in range(units.ndim) if d not in kept]
    rows = units.permute(*kept, *over).reshape(math.prod(units.shape[d] for d in kept), -1)
    return bool((rows == rows[:, :1]).all())


@st.composite
def with_dims(draw: Any) -> tuple[list[int], tuple[int, ...]]:
    shape = draw(SHAPES)
    dims = draw(st.sets(st.integers(-len(shape), -1), min_size=1, max_size=2))
    return shape, tuple(sorted(dims))


def factors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def reshapes(draw: Any) -> tuple[list[int], tuple[int, ...], list[int]]:
    shape, dims = draw(with_dims())
    left, new = math.prod(shape), []
    while left > 1 and len(new) < 4:
        new.append(draw(st.sampled_from(factors(left))))
        left //= new[-1]
    return shape, dims, [*new, left]


@quick
@given(reshapes())
def test_reshaped(case: tuple[list[int], tuple[int, ...], list[int]]) -> None:
    shape, dims, new = case
    found = _reshaped(tuple(shape), tuple(new), dims)
    if found is None:
        assert math.prod(shape[d] for d in dims) == 1
        return
    assert all(-len(new) <= dim < 0 for dim in found)
    assert carries(labels(shape, dims).reshape(new), found)


@pytest.mark.parametrize(
    ("old", "new", "dims", "expected"),
    [
        ((2, 3, 8), (6, 8), (-1,), (-1,)),
        ((6, 8), (2, 3, 8), (-1,), (-1,)),
        ((2, 3, 8), (2, 3, 2, 4), (-1,), (-2, -1)),
        ((2, 3, 2, 4), (2, 3, 8), (-2, -1), (-1,)),
        ((2, 8, 5, 5), (2, 8, 25), (-3,), (-2,)),
        ((2, 8, 1, 1), (2, 8), (-3,), (-1,)),
        ((2, 8), (2, 8, 1, 1), (-1,), (-3,)),
        ((2, 8, 3, 3), (2, 72), (-3,), (-1,)),
        ((2, 1, 8), (2, 8), (-1,), (-1,)),
        ((8,), (1, 8), (-1,), (-1,)),
        ((2, 1), (2,), (-1,), None),
    ],
)
def test_reshapes_of_old(
    old: tuple[int, ...], new: tuple[int, ...], dims: tuple[int, ...], expected: tuple[int, ...] | None
) -> None:
    assert _reshaped(old, new, dims) == expected


@quick
@given(reshapes())
def test_blocks_pair_equal_products(case: tuple[list[int], tuple[int, ...], list[int]]) -> None:
    old, _, new = case
    blocks = dimension_runs(tuple(old), tuple(new))
    assert [i for sources, _ in blocks for i in sources] == list(range(len(old)))
    assert [j for _, targets in blocks for j in targets] == list(range(len(new)))
    for sources, targets in blocks:
        assert math.prod(old[i] for i in sources) == math.prod(new[j] for j in targets)


PERMUTES: dict[str, Callable[[Any, int], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "permute": lambda draw, n: ((draw(st.permutations(range(n))),), {}),
    "transpose": lambda draw, n: ((draw(st.integers(-n, n - 1)), draw(st.integers(-n, n - 1))), {}),
    "swapaxes": lambda draw, n: ((), {"axis0": draw(st.integers(-n, n - 1)), "axis1": draw(st.integers(-n, n - 1))}),
    "movedim": lambda draw, n: ((draw(st.integers(-n, n - 1)), draw(st.integers(-n, n - 1))), {}),
    "transpose_": lambda draw, n: ((draw(st.integers(-n, n - 1)), draw(st.integers(-n, n - 1))), {}),
}


@quick
@given(with_dims(), st.sampled_from(sorted(PERMUTES)), st.data())
def test_permuted(case: tuple[list[int], tuple[int, ...]], name: str, data: st.DataObject) -> None:
    shape, dims = case
    args, kwargs = PERMUTES[name](data.draw, len(shape))
    moved = getattr(labels(shape, dims), name)(*args, **kwargs)
    x = torch.empty(shape)
    found = _permuted(Call(plain_name(name), (x, *args), kwargs, [torch.empty(moved.shape)]), x.ndim, dims)
    assert found is not None
    assert len(found) == len(dims)
    assert carries(moved, found)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "x[0]": lambda x: x[0],
    "x[:, 0]": lambda x: x[:, 0],
    "x[..., -1]": lambda x: x[..., -1],
    "x[None]": lambda x: x[None],
    "x[..., None]": lambda x: x[..., None],
    "x[:, 0, :2]": lambda x: x[:, 0, :2],
    "x[:, None, 0]": lambda x: x[:, None, 0],
    "select": lambda x: x.select(1, 1),
    "unbind": lambda x: x.unbind(1)[1],
    "amax": lambda x: x.amax(1),
    "amax of two": lambda x: x.amax((0, -1)),
    "max": lambda x: x.max(-1).values,
    "max by name": lambda x: torch.max(x, dim=0).values,
    "amin, kept": lambda x: x.amin(1, keepdim=True),
    "stack": lambda x: torch.stack([x, x], -1),
    "stack in front": lambda x: torch.stack([x, x], dim=0),
    "expand": lambda x: x.expand(2, *x.shape),
}


@pytest.mark.parametrize("dim", [-1, -2, -3])
@pytest.mark.parametrize("change", CHANGES)
def test_dimensions_come_and_go(change: str, dim: int) -> None:
    """Each unit holds its own number, so that any selection or maximum over another dimension keeps it."""
    units = labels((4, 3, 5), (dim,)).float()
    calls: list[Provenance] = []

    class Follow(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if not calls and not isinstance(out, torch.Size):
                several = not isinstance(out, Tensor)
                name = plain_name(function_name(func))
                call = Call(name, args, kwargs or {}, out if several else [out], 1 if name == "unbind" else 0)
                calls.append(follow(call, [(units, Provenance(frozenset({"w"}), (dim,)))]))
            return out

    with Follow():
        result = CHANGES[change](units)
    (found,) = calls
    if found.dims is None:
        assert len(result.unique()) == 1 or "max" in change
    else:
        assert carries(result, found.dims)
        assert math.prod(result.shape[d] for d in found.dims) == len(result.unique())


def run(func: Callable[..., Tensor], *args: Any, known: dict[int, Provenance], **kwargs: Any) -> Provenance:
    """Follow a real call; ``known`` gives the lineage of arguments by place."""
    output = func(*args, **kwargs)
    pairs = [(args[place], lineage) for place, lineage in known.items()]
    return follow(Call(plain_name(function_name(func)), args, kwargs, [output]), pairs)


W, DATA = parameter("w"), Provenance(frozenset({"v"}), (-1,))
DIMS: list[tuple[str, Callable[..., Tensor], tuple[Any, ...], dict[int, Provenance], tuple[int, ...] | None]] = [
    ("linear", torch.nn.functional.linear, (torch.ones(5, 3), torch.ones(4, 3)), {1: W}, (-1,)),
    ("linear on a row", torch.nn.functional.linear, (torch.ones(3), torch.ones(4, 3)), {1: W}, (-1,)),
    ("matmul, right", torch.matmul, (torch.ones(2, 5, 3), torch.ones(3, 4)), {1: W}, (-1,)),
    ("matmul, left", torch.matmul, (torch.ones(4, 3), torch.ones(3, 5)), {0: W}, (-2,)),
    ("matmul, stack of one", torch.matmul, (torch.ones(5, 3), torch.ones(1, 3, 4)), {1: W}, (-1,)),
    ("bmm", torch.bmm, (torch.ones(2, 5, 3), torch.ones(2, 3, 4)), {1: W}, (-3, -1)),
    ("baddbmm", torch.baddbmm, (torch.ones(2, 1, 4), torch.ones(2, 5, 3), torch.ones(2, 3, 4)), {0: W, 2: W}, (-3, -1)),
    ("addmm", torch.addmm, (torch.ones(4), torch.ones(5, 3), torch.ones(3, 4)), {0: W, 2: W}, (-1,)),
    ("addmm, left", torch.addmm, (torch.ones(4, 5), torch.ones(4, 3), torch.ones(3, 5)), {1: W}, (-2,)),
    (
        "einsum, units before dots",
        torch.einsum,
        ("fd,...d->f...", torch.ones(4, 3), torch.ones(5, 2, 3)),
        {1: W},
        (-3,),
    ),
    ("einsum", torch.einsum, ("bd,df->bf", torch.ones(5, 3), torch.ones(3, 4)), {2: W}, (-1,)),
    ("einsum, heads", torch.einsum, ("btd,hdf->bhtf", torch.ones(2, 5, 3), torch.ones(2, 3, 4)), {2: W}, (-3, -1)),
    ("einsum, units first", torch.einsum, ("bd,fd->fb", torch.ones(5, 3), torch.ones(4, 3)), {2: W}, (-2,)),
    ("einsum, ellipsis", torch.einsum, ("...d,df->...f", torch.ones(2, 5, 3), torch.ones(3, 4)), {2: W}, (-1,)),
    ("einsum, blanks", torch.einsum, ("b d, d f -> b f", torch.ones(5, 3), torch.ones(3, 4)), {2: W}, (-1,)),
    ("conv1d", torch.conv1d, (torch.ones(2, 3, 5), torch.ones(4, 3, 1)), {1: W}, (-2,)),
    ("conv2d", torch.conv2d, (torch.ones(2, 3, 5, 5), torch.ones(4, 3, 1, 1)), {1: W}, (-3,)),
    ("conv2d, no batch", torch.conv2d, (torch.ones(3, 5, 5), torch.ones(4, 3, 1, 1)), {1: W}, (-3,)),
    ("conv3d", torch.conv3d, (torch.ones(2, 3, 5, 5, 5), torch.ones(4, 3, 1, 1, 1)), {1: W}, (-4,)),
    ("conv_transpose2d", torch.conv_transpose2d, (torch.ones(2, 3, 5, 5), torch.ones(3, 4, 1, 1)), {1: W}, (-3,)),
    ("embedding", torch.nn.functional.embedding, (torch.ones(2, 3).long(), torch.ones(5, 4)), {1: W}, (-1,)),
    ("scores", torch.matmul, (torch.ones(2, 5, 3), torch.ones(2, 3, 5)), {0: DATA, 1: DATA._replace(dims=(-2,))}, None),
    ("values", torch.matmul, (torch.ones(2, 5, 5), torch.ones(2, 5, 3)), {1: DATA}, (-1,)),
    ("sum over tokens", torch.sum, (torch.ones(2, 5, 3), 1), {0: DATA}, (-1,)),
    ("add", torch.add, (torch.ones(5, 3), torch.ones(5, 3)), {0: DATA}, (-1,)),
    ("flip", torch.flip, (torch.ones(5, 3), (0,)), {0: DATA}, (-1,)),
]


@pytest.mark.parametrize(("func", "args", "known", "expected"), [case[1:] for case in DIMS], ids=[c[0] for c in DIMS])
def test_dims(
    func: Callable[..., Tensor],
    args: tuple[Any, ...],
    known: dict[int, Provenance],
    expected: tuple[int, ...] | None,
) -> None:
    assert run(func, *args, known=known).dims == expected


def test_a_layer_starts_anew() -> None:
    found = run(torch.nn.functional.linear, torch.ones(5, 3), torch.ones(4, 3), known={0: DATA, 1: W})
    assert found.producers == {"w"}
    assert not found.weight


ADJACENCY = torch.rand(5, 5, generator=torch.Generator().manual_seed(1))
MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "adjacency on the left": lambda h: ADJACENCY @ h,
    "adjacency on the right": lambda h: (h.T @ ADJACENCY).T,
    "bmm": lambda h: torch.bmm(h.T[None], ADJACENCY[None]).transpose(1, 2)[0],
    "einsum, adjacency last": lambda h: torch.einsum("vc,wv->wc", h, ADJACENCY),
    "image attention": lambda h: (h.T[None] @ (h @ h.T).softmax(-1)).reshape(6, 5).permute(1, 0),
    "concatenated": lambda h: torch.cat([ADJACENCY @ h, h], 0),
    "concatenated, scores first": lambda h: torch.cat([torch.ones(5, 5) @ h * (h @ h.T).mean(), ADJACENCY @ h]),
    "attention": lambda h: torch.nn.functional.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "scattered": lambda h: torch.zeros(5, 6).index_add_(0, torch.tensor([1, 2, 0, 0, 4]), h),
}


@pytest.mark.parametrize("name", MIXES)
def test_units_are_followed_through_products_of_activations(name: str) -> None:
    seen: list[Any] = []
    model = Net(lambda model, x: MIXES[name](model.a(x)).relu(), a=torch.nn.Linear(4, 6))
    with Probe(model, lambda site, rectifier, x, out, dims: seen.append((site.units, dims, site.source))):
        model(torch.randn(5, 4))
    ((units, dims, source),) = seen
    assert (units, dims) == (6, (-1,))
    assert set(source) == {"a.weight", "a.bias"}


def test_the_nearest_producers_count() -> None:
    far = DATA._replace(producers=frozenset({"far"}), passed=1)
    found = run(torch.add, torch.ones(5, 3), torch.ones(5, 3), known={0: far, 1: DATA})
    assert (found.producers, found.passed) == ({"v"}, 0)


def test_a_norm_on_a_joined_stream_stands_for_itself() -> None:
    joined = DATA._replace(joined=True)
    args = torch.ones(5, 3), (3,), torch.ones(3), torch.ones(3)
    found = run(torch.nn.functional.layer_norm, *args, known={0: joined, 2: W})
    assert (found.producers, found.joined) == ({"w"}, False)
    found = run(torch.nn.functional.layer_norm, *args, known={0: DATA, 2: W})
    assert found.producers == {"v", "w"}


def test_an_index_is_no_producer() -> None:
    index = torch.tensor([1, 0])
    found = run(
        Tensor.__getitem__, torch.ones(5, 3), index, known={0: DATA, 1: DATA._replace(producers=frozenset("r"))}
    )
    assert found.producers == {"v"}


PARTS: list[tuple[str, Callable[[Tensor], Sequence[Tensor]], bool]] = [
    ("the two halves", lambda z: z.chunk(2, -1), False),
    ("two slices", lambda z: (z[:, :2], z[:, 2:]), False),
    ("even and odd", lambda z: (z[:, ::2], z[:, 1::2]), False),
    ("a slice and itself", lambda z: (z[:, :2], z[:, :2]), True),
    ("z and -z", lambda z: (z, -z), False),
    ("z and -(-z)", lambda z: (z, z.neg().neg()), True),
    ("rows", lambda z: (z[:2], z[2:]), True),
    ("z and z + 1", lambda z: (z, z + 1), True),
    ("z and 1 - z", lambda z: (z, 1 - z), False),
]


@pytest.mark.parametrize(("make", "same"), [case[1:] for case in PARTS], ids=[case[0] for case in PARTS])
def test_parts(make: Callable[[Tensor], Sequence[Tensor]], same: bool) -> None:
    model, sites = Net(lambda m, x: [part.relu() for part in make(m.fc(x))], fc=torch.nn.Linear(4, 4)), []
    with Probe(model, lambda site, rectifier, x, out, dims: sites.append(site)) as probe:
        model(torch.randn(4, 4))
    assert probe.failure is None
    assert len(sites) == 2
    assert (sites[0] == sites[1]) is same


@pytest.mark.parametrize(
    ("weight", "output", "expected"),
    [
        ((4, 3), (5, 4), (-1,)),
        ((4, 3), (5, 2, 4), (-1,)),
        ((4, 3, 3, 3), (5, 4, 6, 6), (-3,)),
        ((4, 3, 3), (5, 4, 6), (-2,)),
        ((4, 3), (4, 5, 6), (-3,)),
        ((4,), (5, 4), (-1,)),
        ((7, 3), (5, 4), ()),
    ],
)
def test_of_module(weight: tuple[int, ...], output: tuple[int, ...], expected: tuple[int, ...]) -> None:
    found = of_module([("fc.weight", torch.zeros(weight)), ("fc.bias", torch.zeros(4))], torch.zeros(output))
    assert found
    if output != (4, 5, 6):
        assert found.dims == expected
    assert found.producers == {"fc.weight", "fc.bias"}


def test_of_module_without_parameters_or_dimensions() -> None:
    assert of_module([], torch.zeros(3)) is None
    assert of_module([("w", torch.zeros(3))], torch.zeros(())) is None
