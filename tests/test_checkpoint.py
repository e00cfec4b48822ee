import io
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_deadrelu.checkpoint import decode, encode


class Pair(NamedTuple):
    left: int
    right: tuple[str, ...] = ()


@dataclass
class State:
    numbers: dict[str, list[int]]
    pairs: tuple[Pair, ...]
    counts: Tensor
    maybe: float | None = None
    last: deque[int] = field(default_factory=deque)
    names: frozenset[str] = frozenset()
    by_number: dict[int, Pair] = field(default_factory=dict)
    by_pair: dict[Pair, int] = field(default_factory=dict)


text = st.text(max_size=5)
pairs = st.builds(Pair, st.integers(-5, 5), st.lists(text, max_size=3).map(tuple))
tensors = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5).map(lambda it: torch.tensor(it, dtype=torch.int64)),
    st.lists(st.booleans(), max_size=5).map(lambda it: torch.tensor(it, dtype=torch.bool)),
    st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(lambda it: torch.tensor(it, dtype=torch.float32)),
)
states = st.builds(
    State,
    st.dictionaries(text, st.lists(st.integers(), max_size=3), max_size=3),
    st.lists(pairs, max_size=3).map(tuple),
    tensors,
    st.none() | st.floats(allow_nan=False),
    st.lists(st.integers(), max_size=3).map(deque),
    st.frozensets(text, max_size=3),
    st.dictionaries(st.integers(), pairs, max_size=3),
    st.dictionaries(pairs, st.integers(), max_size=3),
)


@given(states)
def test_any_state_makes_the_round_trip_through_a_file_that_only_weights_may_be_in(state):
    file = io.BytesIO()
    torch.save(encode(state), file)
    file.seek(0)
    back = decode(State, torch.load(file, weights_only=True))
    assert back.counts.dtype == state.counts.dtype
    assert torch.equal(back.counts, state.counts)
    back.counts = state.counts
    assert back == state
    assert type(back.last) is deque
    assert all(type(pair) is Pair for pair in back.pairs)


def test_whole_numbers_are_stored_in_the_least_room():
    assert encode(torch.tensor([0, 200]))["narrowed"].dtype == torch.uint8
    assert encode(torch.tensor([-1, 300]))["narrowed"].dtype == torch.int16


def test_what_is_stored_does_not_change_with_what_it_was_made_from():
    counts = torch.zeros(3)
    stored = encode(counts)
    counts += 1
    assert not stored.any()


def test_what_is_restored_shares_no_memory_with_what_was_saved():
    saved = encode({"sums": torch.zeros(2)})
    decode(dict[str, torch.Tensor], saved)["sums"].add_(1)
    assert saved["sums"].tolist() == [0.0, 0.0]


def test_fields_that_an_older_version_did_not_save_take_their_defaults():
    assert decode(Pair, {"left": 3, "unknown": 1}) == Pair(3)


def test_what_no_checkpoint_holds_is_refused():
    with pytest.raises(TypeError, match="cannot hold a object"):
        encode({"it": object()})
