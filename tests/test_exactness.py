"""Sites and masks against what the dispatcher saw, for every family of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from models import CASES, Case
from recorder import Recorder, Rectified, fires, no_fast_path
from torch import Tensor, nn

from lightning_deadrelu.probe import Probe
from lightning_deadrelu.sites import Rectifier, Site, names_of
from lightning_deadrelu.statistics import count


class Seen(NamedTuple):
    """One call as the probe reports it."""

    site: Site
    x: Tensor
    dims: tuple[int, ...]
    fired: Tensor


def watched(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Seen], Probe, Any]:
    """Run under a probe; each call as it was at that moment."""
    seen: list[Seen] = []

    def sink(site: Site, rectifier: Rectifier, x: Tensor, out: Tensor, dims: tuple[int, ...]) -> None:
        if not rectifier.smooth:
            seen.append(Seen(site, x.clone(), dims, count(x, out, dims, rectifier).fired > 0))

    probe = Probe(model, sink)
    with probe:
        result = run()
    assert probe.failure is None
    assert probe.tracing_error is None
    return seen, probe, result


def recorded(run: Callable[[], Any]) -> tuple[list[Rectified], Any]:
    """Run under the dispatcher's recorder."""
    with Recorder() as recorder:
        result = run()
    return recorder.calls, result


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    return case.inputs() if callable(case.inputs) else tuple(torch.randn(shape) for shape in case.inputs)


def step(case: Case) -> tuple[nn.Module, Callable[[], Any]]:
    """Build a case and one training step of it, both the same at each call."""
    torch.manual_seed(0)
    model, inputs = case.build(), inputs_of(case)
    with torch.no_grad():
        case.run(model, *inputs) if any(map(nn.parameter.is_lazy, model.parameters())) else None

    def run() -> Any:
        torch.manual_seed(1)
        result = case.run(model, *inputs)
        first = result[0] if isinstance(result, (list, tuple)) else result
        if first.requires_grad:
            first.sum().backward()
        return [first.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return model, run


@pytest.fixture(autouse=True)
def _one_thread_and_no_fast_path() -> Any:
    torch.set_num_threads(1)
    with no_fast_path():
        yield


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(torch.equal(x.as_subclass(Tensor), y.as_subclass(Tensor)) for x, y in zip(a, b))


@pytest.mark.parametrize("name", CASES)
def test_zoo(name: str) -> None:
    case = CASES[name]
    truth, expected_result = recorded(step(case)[1])
    seen, probe, result = watched(*step(case))
    assert same(result, expected_result)

    words = case.calls.split()
    assert len(truth) == len(words)
    expected = [(word, call) for word, call in zip(words, truth) if word[0] not in "-?"]
    sites = list(dict.fromkeys(call.site for call in seen))
    spell = dict(zip(sites, names_of(sites)))
    assert [f"{spell[call.site]}@{','.join(map(str, call.dims))}" for call in seen] == [word for word, _ in expected]
    assert same([call.x for call in seen], [call.x for _, call in expected])
    for mine, (_, true) in zip(seen, expected):
        assert torch.equal(mine.fired, fires(true.x, true.hinge, mine.dims))
    assert set(probe.unwatched) == {word[1:] for word in words if word[0] == "?"}
