"""How sites are named and chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_deadrelu.model.sites import Site, clean, count_units, guess_dims, is_selected, names_of, unmatched


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", ""),
        ("_orig_mod", ""),
        ("_orig_mod.net.0", "net.0"),
        ("net._orig_mod", "net"),
        ("net._orig_mod._orig_mod.act", "net.act"),
        ("_fsdp_wrapped_module.a._checkpoint_wrapped_module.b.weight", "a.b.weight"),
        ("my_orig_mod.act", "my_orig_mod.act"),
        ("_orig_model.act", "_orig_model.act"),
    ],
)
def test_clean(path: str, expected: str) -> None:
    assert clean(path) == expected
    assert clean(clean(path)) == expected


SITES = st.builds(
    Site,
    owner=st.sampled_from(["", "a", "a-1", "a.b", "a-relu", "relu", "relu-1", "ä b/c"]),
    functional=st.booleans(),
    kind=st.sampled_from(["relu", "relu6"]),
    source=st.tuples(st.sampled_from(["#0", "#1", "w"])),
    units=st.integers(0, 2),
)


@settings(max_examples=200)
@given(st.lists(SITES, unique=True, max_size=12), st.integers(0, 12))
def test_names_are_unique_and_do_not_depend_on_what_comes_later(sites: list[Site], length: int) -> None:
    names = names_of(sites)
    assert len(set(names)) == len(sites)
    assert names_of(sites[:length]) == names[:length]
    assert all(name and not set(name) & set(" /:*[]") for name in names)


def test_left_out_sites_keep_their_names() -> None:
    sites = [Site("a", False, "relu", (letter,), 3) for letter in "xyz"]
    assert names_of([site._replace(units=0) for site in sites]) == names_of(sites) == ["a", "a-1", "a-2"]


SELECTIONS: list[tuple[str, str, list[str], list[str], bool]] = [
    ("a.act", "relu", [], [], True),
    ("a.act", "relu", ["a.*"], [], True),
    ("a.act", "relu", ["b.*"], [], False),
    ("a.act", "relu", ["relu"], [], True),
    ("a.act", "relu6", ["relu"], [], False),
    ("a.act", "relu", ["rel"], [], False),
    ("a.act", "relu", [], ["a.*"], False),
    ("a.act", "relu", ["a.*"], ["relu"], False),
    ("a.act", "relu", ["gelu"], [], True),
    ("a.act", "relu", ["gelu", "b.*"], [], False),
    ("a.act", "gelu", [], [], False),
    ("a.act", "gelu", ["a.act"], [], False),
    ("a.act", "gelu", ["gelu"], [], True),
    ("a.act", "gelu", ["gelu"], ["a.*"], False),
]


@pytest.mark.parametrize(("name", "kind", "include", "exclude", "expected"), SELECTIONS)
def test_is_selected(name: str, kind: str, include: list[str], exclude: list[str], expected: bool) -> None:
    assert is_selected(name, kind, kind == "gelu", include, exclude) is expected


def test_unmatched() -> None:
    assert unmatched(["a.*", "b", "relu", "gelu"], ["a.act"], ["relu"]) == ["b", "gelu"]
    assert unmatched([], [], []) == []


@pytest.mark.parametrize(("ndim", "expected"), [(1, (-1,)), (2, (-1,)), (3, (-1,)), (4, (-3,)), (5, (-4,))])
def test_guess_dims(ndim: int, expected: tuple[int, ...]) -> None:
    assert guess_dims(ndim) == expected


def test_count_units() -> None:
    x: Tensor = torch.zeros(2, 3, 4, 5)
    assert [count_units(x, dims) for dims in ((-1,), (-3,), (-3, -1))] == [5, 3, 15]
