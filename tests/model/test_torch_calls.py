"""The vocabulary of tracing: names, tensors among arguments, and what is known of tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_deadrelu.model import torch_calls
from lightning_deadrelu.model.torch_calls import (
    TensorTable,
    function_name,
    makes_zeros,
    plain_name,
    tensors_in,
    writes_in_place,
)


def test_tensors_in() -> None:
    a, b, c = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    assert [id(t) for t in tensors_in([a, 1, (b, "x"), [c], None])] == [id(a), id(b), id(c)]


@pytest.mark.parametrize(
    ("func", "name"),
    [(torch.relu, "relu"), (Tensor.relu_, "relu_"), (Tensor.mT.__get__, "mT"), (torch.nn.functional.linear, "linear")],
)
def test_function_name(func: Callable[..., Any], name: str) -> None:
    assert function_name(func) == name


def test_families_hold_plain_names() -> None:
    families = {name: value for name, value in vars(torch_calls).items() if isinstance(value, (frozenset, dict))}
    names = {
        one
        for family, value in families.items()
        if family.isupper() and family[0] != "_" and family != "IGNORED"
        for one in value
    }
    assert len(names) > 100
    assert {one for one in names if plain_name(one) != one} == set()


@pytest.mark.parametrize("name", sorted(torch_calls.PERMUTES | torch_calls.RESHAPES - {"unsafe_view"}))
def test_families_name_functions_of_torch(name: str) -> None:
    assert hasattr(Tensor, name)


def test_what_is_known_of_a_tensor_goes_with_it() -> None:
    table: TensorTable[str] = TensorTable()
    for _ in range(100):  # ids are used again
        x = torch.ones(1)
        assert table.get(x) is None
        table.put(x, "seen")
        assert table.get(x) == "seen"
        del x
        gc.collect(0)


def test_a_change_in_place_is_noticed() -> None:
    table: TensorTable[str] = TensorTable()
    x = torch.ones(2)
    view = x[:1]
    table.put(x, "ones")
    assert table.writes_to(x) == 0
    view.zero_()
    assert table.writes_to(x) == 1


@pytest.mark.parametrize(
    ("name", "args", "zeros"),
    [("zeros", (3,), True), ("tensor", (0.0,), True), ("tensor", (1.0,), False), ("ones", (3,), False)],
)
def test_makes_zeros(name: str, args: tuple[Any, ...], zeros: bool) -> None:
    assert makes_zeros(name, args) is zeros


def test_writes_in_place() -> None:
    changed = torch.zeros(2)
    assert writes_in_place("add", {"out": changed})
    assert not writes_in_place("__add__", {"out": None})
