"""What counts as a rectifier."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import FORMS, MODULES, MyReLU
from torch import nn

from lightning_deadrelu.model.rectifiers import Rectifier, is_rectifier_module, rectifier_of

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


def test_a_rectifier_is_plain_data() -> None:
    assert Rectifier("relu") == Rectifier("relu", 0.0, math.inf)
