"""Strided entries meet all of a tensor's columns, and as many of its rows as they can."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.explain.postmortem.subsample import coprime, subsample


@given(st.integers(1, 10**6), st.integers(1, 10**7))
def test_a_stride_meets_all_columns(stride, size):
    found = coprime(stride, size)
    assert 1 <= found <= stride
    assert math.gcd(found, size) == 1


def test_vectors_of_any_size_are_spread():
    assert all(len(subsample(torch.arange(size), 256).unique()) == min(size, 256) for size in range(1, 1100))
