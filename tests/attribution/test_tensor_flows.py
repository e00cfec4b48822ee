"""What a traced batch costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from counting import calls_of
from torch import Tensor, nn

from lightning_deadrelu.observe.watch import Watch

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda h: h,
    "a view": lambda h: h.view(4, 8),
    "detached": lambda h: h.detach(),
    "its data": lambda h: h.data,
}


class Rewritten(nn.Module):
    """Writes many times to one memory, through tensors that all stay alive."""

    def __init__(self, writes: int, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)
        self.writes, self.view = writes, view

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x)).clone()
        views = [self.view(h) for _ in range(self.writes)]
        for view in views:
            view.mul_(0.5)
        return self.b(h)


class Joined(nn.Module):
    """Joins what many rectifiers put out."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 8) for _ in range(parts))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x).relu() for layer in self.layers], -1)


def work(model: nn.Module) -> int:
    watch = Watch(model)
    watch.trace()
    with watch.probe:
        count = calls_of(lambda: model(torch.ones(4, 4)))
    assert watch.probe.failure is None
    return count


@pytest.mark.parametrize("name", VIEWS)
def test_the_work_of_writes_to_one_memory_grows_with_their_number(name: str) -> None:
    models = (Rewritten(writes, VIEWS[name]) for writes in (1, 50, 100, 200))
    _, few, some, many = map(work, models)  # the first fills caches
    assert many - some < 2.2 * (some - few)


def test_the_work_of_a_join_grows_with_the_number_of_its_parts() -> None:
    _, few, some, many = (work(Joined(parts)) for parts in (1, 25, 50, 100))
    assert many - some < 2.2 * (some - few)
