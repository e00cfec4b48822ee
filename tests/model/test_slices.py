"""Rows of a parameter that belong to units, against a loop over every entry."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.model.slices import Slice


@st.composite
def slices(draw):
    """Draw a tensor, viewed in another shape or not, and rows of it along some dimensions in any order."""
    view = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    dims = draw(st.permutations(range(len(view))))[: draw(st.integers(1, len(view)))]
    places = list(itertools.product(*(range(view[dim]) for dim in dims)))
    places = draw(st.lists(st.sampled_from(places), max_size=6, unique=True))
    units = draw(st.lists(st.integers(0, 3), min_size=len(places), max_size=len(places)))
    flat = draw(st.booleans())
    tensor = torch.arange(float(torch.tensor(view).prod()))
    index = torch.tensor(places, dtype=torch.int64).reshape(len(places), len(dims))
    shape = tuple(view) if flat else ()
    return Slice("w", "weight", torch.tensor(units, dtype=torch.int64), index, tuple(dims), shape), (
        tensor if flat else tensor.view(view)
    )


def entries(one: Slice, tensor: torch.Tensor, row: int) -> list[tuple[int, ...]]:
    """List the places of the view that a row speaks of, in order."""
    view = one.shape or tuple(tensor.shape)
    fixed = dict(zip(one.dims, one.index[row].tolist(), strict=True))
    return [
        place
        for place in itertools.product(*map(range, view))
        if all(place[dim] == value for dim, value in fixed.items())
    ]


@given(slices())
def test_reading_takes_the_entries_of_each_row(drawn):
    one, tensor = drawn
    viewed = tensor.view(one.shape) if one.shape else tensor
    read = one.read(tensor)
    assert len(read) == len(one.units)
    for row, found in enumerate(read):
        assert found.flatten().tolist() == [viewed[place].item() for place in entries(one, tensor, row)]


@given(slices())
def test_writing_changes_these_entries_and_no_others(drawn):
    one, tensor = drawn
    new, view = tensor.clone(), one.shape or tuple(tensor.shape)
    one.write_(new, -one.read(tensor) - 1)
    written = {place for row in range(len(one.units)) for place in entries(one, tensor, row)}
    for place in itertools.product(*map(range, view)):
        value = tensor.view(view)[place].item()
        assert new.view(view)[place].item() == (-value - 1 if place in written else value)


@given(slices(), st.lists(st.booleans(), min_size=4, max_size=4))
def test_of_some_units_their_rows_are_kept(drawn, wanted):
    one, tensor = drawn
    kept = one.of(torch.tensor(wanted))
    rows = [row for row, unit in enumerate(one.units.tolist()) if wanted[unit]]
    assert kept.units.tolist() == [one.units[row].item() for row in rows]
    assert torch.equal(kept.read(tensor), one.read(tensor)[rows])
    assert (kept.name, kept.role, kept.dims, kept.shape) == (one.name, one.role, one.dims, one.shape)


def test_writing_casts_and_leaves_the_graph_alone():
    weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    one = Slice("w", "weight", torch.tensor([1]), torch.tensor([[1]]), (0,))
    one.write_(weight, torch.tensor([[0.5, 2.0]], dtype=torch.float64))
    assert weight.tolist() == [[0, 0], [0.5, 2.0], [0, 0]]
    one.write_(weight, 3.0)
    assert weight.tolist() == [[0, 0], [3, 3], [0, 0]]
    assert weight.grad_fn is None
    assert weight.requires_grad
