"""Warnings that a model raises go by the model's own lines, watched or not."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_deadrelu.observe.probe import Probe


def from_python(x):
    return F.softmax(x)  # written in Python, which warns for its caller


def from_two_arguments(x):
    return F.mse_loss(x, x[:, :1])


def from_cpp(x):
    return x.view(1, *x.shape).T  # which is repeated to follow units, and warns in C++, for whichever line Python is at


def from_cpp_by_a_function(x):
    return torch.range(0, 3) + x.sum()


def from_a_property(x):
    return (x * 2).grad  # of a tensor that is no leaf


def from_what_the_probe_ignores(x):
    (x * Warns.apply(x)).sum().backward()
    return x


class Warns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        warnings.warn("from the backward", stacklevel=1)
        return gradient


FORWARDS = [
    from_python,
    from_two_arguments,
    from_cpp,
    from_cpp_by_a_function,
    from_a_property,
    from_what_the_probe_ignores,
]


class Model(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.layer, self.act, self.run = nn.Linear(4, 4), nn.ReLU(), run

    def forward(self, x):
        self.run(self.act(self.layer(x)))


@pytest.fixture(autouse=True)
def _each_time():
    torch.set_warn_always(True)  # C++ would warn once in a process
    yield
    torch.set_warn_always(False)


def told(model, *, watched):
    """List where warnings come from."""
    probe = Probe(model, lambda *call: None)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        if watched:
            with probe:
                model(torch.rand(3, 4))
        else:
            model(torch.rand(3, 4))
    assert probe.failure is None
    return [(warning.filename, warning.lineno, str(warning.message)) for warning in record]


@pytest.mark.parametrize("run", FORWARDS, ids=lambda run: run.__name__)
def test_a_warning_goes_by_the_same_line_watched_or_not(run):
    expected = told(Model(run), watched=False)
    assert expected
    assert told(Model(run), watched=True) == expected


@pytest.mark.parametrize("run", [from_python, from_two_arguments, from_cpp], ids=lambda run: run.__name__)
def test_a_filter_by_module_goes_on_matching(run):
    model = Model(run)
    with warnings.catch_warnings(), Probe(model, lambda *call: None):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r".*test_attributed_call")
        model(torch.rand(3, 4))


def test_a_warning_is_shown_once_for_each_line():
    model = Model(lambda x: [from_python(x) for _ in range(3)])
    for watched in (False, True):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("default")
            globals().pop("__warningregistry__", None)
            if watched:
                with Probe(model, lambda *call: None):
                    model(torch.rand(3, 4))
            else:
                model(torch.rand(3, 4))
        assert len(record) == 1
