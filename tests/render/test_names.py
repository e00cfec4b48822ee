"""Long names, made short."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.render.names import shortened_names


@given(st.sets(st.integers(0, 999), min_size=2, max_size=30), st.integers(20, 60))
def test_short_names_differ_where_the_names_do(numbers, longest):
    names = [f"model.backbone.encoder.stages.{number}.residual_branch.activation.relu" for number in sorted(numbers)]
    short = shortened_names(names, longest)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= longest


def test_what_is_short_stays():
    assert shortened_names(("net.1", "net.3")) == ["net.1", "net.3"]
    assert shortened_names([]) == []
