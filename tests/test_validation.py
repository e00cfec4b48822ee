import math
from dataclasses import dataclass

import pytest

from lightning_deadrelu.validation import Argument, check_fields, checked


def told(value, check, *args, **options):
    """Return the error that a check raises for a value; empty if there is none."""
    try:
        getattr(Argument("Thing", "size", value), check)(*args, **options)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None, math.nan])
def test_what_is_no_count_is_refused(value):
    written = f"`Thing(size={value!r})`: it has to be a whole number of at least 1. Try `size=5`."
    assert told(value, "check_count", 5) == written


def test_a_count_may_have_another_limit_and_may_be_optional():
    assert told(1, "check_count", 5) == told(0, "check_count", 5, least=0) == ""
    assert told(None, "check_count", 5, optional=True) == ""
    assert "at least 2, or None. Try `size=5`" in told(1, "check_count", 5, least=2, optional=True)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, True, "half", None])
def test_what_is_no_share_is_refused(value):
    assert "it is a share, from 0 to 1. Try `size=0.5`" in told(value, "check_share", 0.5)


@pytest.mark.parametrize("value", [0, 1, 0.5])
def test_a_share_includes_its_ends(value):
    assert told(value, "check_share", 0.5) == ""


@pytest.mark.parametrize("value", [0, 1, 2, math.inf, math.nan, False, "a"])
def test_limits_of_a_number_are_not_allowed_themselves(value):
    assert "it has to be a number above 0 and below 1. Try `size=0.5`" in told(value, "check_number", 0.5, 0, 1)
    assert told(0.3, "check_number", 0.5, 0, 1) == ""


def test_a_number_without_limits_is_finite():
    assert told(-1e9, "check_number", 0.5) == ""
    assert "it has to be a finite number" in told(-math.inf, "check_number", 0.5)


@pytest.mark.parametrize(("value", "example"), [("a.*", "['a.*']"), ([3], "['encoder.*']"), (None, "['encoder.*']")])
def test_what_is_no_list_of_patterns_is_refused(value, example):
    assert f"it takes a list of patterns. Try `size={example}`" in told(value, "check_patterns")


@pytest.mark.parametrize("value", [(), [], ["a", "b"], ("a",)])
def test_lists_of_patterns_are_taken(value):
    assert told(value, "check_patterns") == ""


def test_a_switch_is_true_or_false():
    assert "it is a switch. Try `size=True`" in told(1, "check_flag")
    assert told(False, "check_flag") == ""


@dataclass
class Base:
    steps: int = checked(10, lambda it: it.check_count(10))


@dataclass
class WithAnotherDefault(Base):
    steps: int = 5


def test_a_derived_class_keeps_the_check_of_a_field_whose_default_it_changes():
    check_fields(WithAnotherDefault(), "Thing")
    with pytest.raises(ValueError, match=r"`Thing\(steps=0\)`: .* Try `steps=10`"):
        check_fields(WithAnotherDefault(0), "Thing")
