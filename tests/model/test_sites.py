"""What counts as a rectifier, and how sites are named and chosen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FORMS, MODULES, MyReLU
from torch import Tensor, nn

from lightning_deadrelu.model.sites import (
    Rectifier,
    Site,
    clean,
    count_units,
    guess_dims,
    is_rectifier_module,
    is_selected,
    names_of,
    rectifier_of,
    unmatched,
)

X, ZERO = torch.randn(3), torch.zeros(3)


def is_zero(value: Any) -> bool:
    return value is ZERO


RECTIFIERS: list[tuple[str, tuple[Any, ...], dict[str, Any], tuple[str, float, float] | None]] = [
    ("relu", (X,), {}, ("relu", 0, math.inf)),
    ("relu_", (X,), {}, ("relu", 0, math.inf)),
    ("relu6", (X,), {}, ("relu6", 0, 6)),
    ("hardtanh", (X, 0.0, 6.0), {}, ("relu6", 0, 6)),
    ("hardtanh", (X,), {"min_val": 0, "max_val": 1}, ("hardtanh", 0, 1)),
    ("hardtanh_", (X, 0, 2.5), {}, ("hardtanh", 0, 2.5)),
    ("hardtanh", (X,), {}, None),
    ("threshold", (X, 0.5, 0.0), {}, ("threshold", 0.5, math.inf)),
    ("threshold", (X, -1, 5), {}, ("threshold", -1, math.inf)),
    ("clamp", (X, 0), {}, ("clamp", 0, math.inf)),
    ("clamp", (X,), {"min": 0.0}, ("clamp", 0, math.inf)),
    ("clip_", (X, 0, None), {}, ("clamp", 0, math.inf)),
    ("clamp_min", (X, 0), {}, ("clamp", 0, math.inf)),
    ("clamp", (X, 0, 1), {}, None),
    ("clamp", (X,), {"max": 0}, None),
    ("clamp", (X, 1e-6), {}, None),
    ("clamp", (X, ZERO), {}, None),
    ("maximum", (X, ZERO), {}, ("maximum", 0, math.inf)),
    ("maximum", (ZERO, X), {}, ("maximum", 0, math.inf)),
    ("max", (X,), {"other": ZERO}, ("maximum", 0, math.inf)),
    ("fmax", (), {"input": X, "other": ZERO}, ("maximum", 0, math.inf)),
    ("maximum", (X, X), {}, None),
    ("max", (X,), {}, None),
    ("max", (ZERO,), {}, None),
    ("max", (ZERO, 0), {}, None),
    ("hardswish", (X,), {}, ("hardswish", -3, math.inf)),
    ("leaky_relu", (X, 0.0), {}, ("relu", 0, math.inf)),
    ("rnn_relu", (X,), {}, ("rnn_relu", 0, math.inf)),
    ("linear", (X, X), {}, None),
    ("", (), {}, None),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "expected"), RECTIFIERS)
def test_rectifier_of(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], expected: tuple[str, float, float] | None
) -> None:
    found = rectifier_of(name, args, kwargs, is_zero)
    assert (found and (found.kind, found.hinge, found.cap)) == expected
    assert found is None or not found.smooth


@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "elu", "elu_", "celu", "selu", "softplus", "leaky_relu"])
def test_smooth_activations_have_no_hinge(name: str) -> None:
    found = rectifier_of(name, (X,), {})
    assert found
    assert found.smooth
    assert not found.plain


@pytest.mark.parametrize("name", FORMS)
def test_a_plain_rectifier_shows_in_its_output_who_fired(name: str) -> None:
    kind, form = FORMS[name]
    x = torch.tensor([-4.0, -1.0, -0.0, 0.0, 0.05, 0.5, 7.0])[:6]
    if kind in ("relu", "clamp", "maximum", "relu6", "hardtanh"):
        assert torch.equal(form(x.clone()) > 0, x > 0)


@pytest.mark.parametrize("name", MODULES)
def test_is_rectifier_module(name: str) -> None:
    assert is_rectifier_module(MODULES[name]())


def test_what_is_no_rectifier_module() -> None:
    assert is_rectifier_module(MyReLU())
    assert not any(map(is_rectifier_module, (nn.Sequential(nn.ReLU()), nn.Dropout(), nn.Sigmoid(), nn.Identity())))


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


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
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


def test_a_rectifier_is_plain_data() -> None:
    assert Rectifier("relu") == Rectifier("relu", 0.0, math.inf)
