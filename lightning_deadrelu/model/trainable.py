"""Which sites are being trained. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deadrelu.model.optimizer_groups import parameters_of
from lightning_deadrelu.model.sharding import reshard_
from lightning_deadrelu.model.sites import Site, clean, plain_parameter


class Gradients:
    """Find the parameters that an optimizer holds and that yet never get a gradient, as a teacher's under ``no_grad``.

    Example:
        >>> import torch
        >>> student, teacher = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=0.1)
        >>> student(torch.ones(1, 2)).sum().backward()
        >>> gradients = Gradients()
        >>> gradients.note(optimizer)
        >>> gradients.never == {id(parameter) for parameter in teacher.parameters()}
        True
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[Tensor]] = {}

    def note(self, optimizer: Optimizer) -> None:
        """Look who has a gradient, before a step; after the first only those are asked that had none."""
        key = id(optimizer)
        if key not in self._waiting:
            self._waiting[key] = list(parameters_of(optimizer))
        if waiting := self._waiting[key]:
            self._waiting[key] = [p for p in waiting if p.grad is None and p.numel()]

    @property
    def never(self) -> set[int]:
        """The ``id`` of each parameter that was stepped without a gradient every time."""
        return {id(p) for waiting in self._waiting.values() for p in waiting}

    def save(self, model: nn.Module) -> list[str] | None:
        """Name the parameters of :attr:`never`; None before the first step."""
        never = self.never
        reshard_(model)  # optimizers hold the shards
        return [name for name, p in model.named_parameters() if id(p) in never] if self._waiting else None

    def load(self, names: Sequence[str] | None, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Go on from what was saved."""
        if names is not None:
            reshard_(model)
            never = {id(p) for name, p in model.named_parameters() if name in names}
            self._waiting = {id(one): [p for p in parameters_of(one) if id(p) in never] for one in optimizers}


def trainable_sites(
    sites: Sequence[Site], model: nn.Module, optimizers: Sequence[Optimizer], never: AbstractSet[int] = frozenset()
) -> list[bool]:
    """Tell for each site whether an optimizer trains what feeds it.

    A site whose producers are unknown goes by the parameters of the nearest module around it.

    Args:
        sites: The sites.
        model: Their model.
        optimizers: What trains it; none means that every parameter with a gradient counts.
        never: The ``id`` of parameters that never get a gradient. If that is all of them, gradients are kept
            elsewhere, and it says nothing.
    """
    reshard_(model)
    held = set(map(id, parameters_of(*optimizers)))
    trained = (held - never) or held
    learns: dict[str, bool] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        plain = plain_parameter(clean(name))
        learns[plain] = learns.get(plain, False) or (p.requires_grad and (not trained or id(p) in trained))
    return [_learns(site, learns) for site in sites]


def _learns(site: Site, learns: Mapping[str, bool]) -> bool:
    if site.traced:
        return any(learns.get(name, False) for name in site.source)
    path = site.owner
    while path:
        path = path.rpartition(".")[0]
        around = [value for name, value in learns.items() if name.startswith(f"{path}." if path else "")]
        if around:
            return any(around)
    return any(learns.values())
