"""The facts that the rules of a check-up read: of a model, its optimizers and one batch. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.model.optimizer_groups import ParameterGroup
from lightning_deadrelu.model.rectifiers import SELECTIONS
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.statistics import LivenessReport, SiteReport


class ParameterStats(NamedTuple):
    """Figures of one parameter before the first step.

    Args:
        entries: How many numbers it has.
        rms: Their root mean square.
        negative: The share of negative ones.
        gradient: The norm of the gradient; NaN if none is known.
    """

    entries: int
    rms: float
    negative: float
    gradient: float = math.nan


class FirstLayerInput(NamedTuple):
    """The first layer that ran, and what it was given.

    Args:
        path: The layer's path.
        rows: How many rows or positions there were.
        off_centre: ``|mean|^2 / E|x|^2`` of its input, from 0 to 1.
        distinct: How many of the rows are different.
        indicators: The share of features that are 0 or 1 among those that vary.
    """

    path: str
    rows: int
    off_centre: float
    distinct: int
    indicators: float


@dataclass(frozen=True, kw_only=True)
class CheckContext:
    """All that is known when a check-up is made.

    Args:
        report: The verdict on one batch.
        attributions: Which parameters feed and read each site.
        modules: The modules, by path.
        shapes: The shapes of all parameters, by name.
        groups: How each trained parameter is trained, by name; empty without optimizers.
        stats: Figures, by parameter.
        order: The parameters in the order of their first use.
        readers: By weight, the functions that read what it puts out, where no layer does.
        first_input: What the first layer was given, if it was given raw numbers.
        fresh: Whether no step was ever made.
        clipped: Whether gradients are clipped.
        scheduled: Whether there is a learning-rate schedule.
    """

    report: LivenessReport
    attributions: Mapping[str, Attribution]
    modules: Mapping[str, nn.Module] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, ParameterGroup]
    stats: Mapping[str, ParameterStats]
    order: Sequence[str] = ()
    readers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    first_input: FirstLayerInput | None = None
    fresh: bool = True
    clipped: bool = False
    scheduled: bool = False

    @cached_property
    def sites(self) -> list[SiteReport]:
        """The rectifiers that are trained, in the order of execution."""
        hard = (site for site in self.report.sites if site.trainable and not site.smooth)
        return [site for site in hard if site.kind not in SELECTIONS]

    def weights(self, site: SiteReport) -> list[str]:
        """Name the weights that feed a site and that are trained."""
        return [one.name for one in self.attributions[site.name].incoming if one.role == "weight"]

    def normed(self, site: SiteReport) -> bool:
        """Whether a norm comes between the layer and the site."""
        return any(one.role in ("scale", "shift", "mean", "variance") for one in self.attributions[site.name].incoming)

    def bias(self, site: SiteReport) -> str:
        """Name what is added last before the site; empty if nothing is."""
        last = self.attributions[site.name].bias
        return last.name if last else ""

    def scales(self, site: SiteReport) -> list[str]:
        """Name what the norms before a site multiply by."""
        return [one.name for one in self.attributions[site.name].incoming if one.role == "scale"]

    def multiplies(self, site: SiteReport) -> bool:
        """Whether a site's output is multiplied with other activations, as the scores of an attention are."""
        known = self.attributions[site.name]
        return known.multiplied or known.no_outgoing.startswith(
            tuple(f"`{name}`" for name in ("matmul", "bmm", "baddbmm", "einsum"))
        )

    def step(self, name: str) -> float:
        """Divide the first update of some weights by their size; NaN where it is not known.

        That of Adam is the learning rate, whatever the gradient; that of SGD goes on for 1 / (1 - momentum) steps.
        """
        group, known = self.groups.get(name), self.stats.get(name)
        if group is None or known is None or not known.rms:
            return math.nan
        if group.kind == "adam":
            return group.lr / known.rms
        if group.kind != "sgd" or self.clipped:
            return math.nan
        return group.lr * group.memory * known.gradient / (known.rms * math.sqrt(known.entries))

    def layer(self, name: str) -> nn.Module | None:
        """Find the module that owns a parameter."""
        return self.modules.get(name.rpartition(".")[0])

    @cached_property
    def chains(self) -> list[list[SiteReport]]:
        """Rows of sites of which each feeds the next alone, without a norm or a second path."""
        following = {site.name: self._next(site) for site in self.sites}
        heads = [s for s in self.sites if not any(s is other for other in following.values())]
        return [_row(head, following) for head in heads if self.weights(head) and not self.normed(head)]

    def _next(self, site: SiteReport) -> SiteReport | None:
        read = [one for one in self.attributions[site.name].outgoing if self._whole(one.name, one.index, one.dims)]
        if len(self.attributions[site.name].outgoing) != 1 or not read:
            return None
        found = [s for s in self.sites if self.weights(s) == [read[0].name] and not self.normed(s)]
        return found[0] if len(found) == 1 else None

    def _whole(self, name: str, index: Tensor, dims: tuple[int, ...]) -> bool:
        shape = self.shapes.get(name, ())
        return len(dims) == 1 and len(shape) > dims[0] and len(index.unique()) == shape[dims[0]]


def _row(head: SiteReport, following: Mapping[str, SiteReport | None]) -> list[SiteReport]:
    row, after = [head], following[head.name]
    while after is not None and after not in row:
        row.append(after)
        after = following[after.name]
    return row


def groups_of(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, ParameterGroup]:
    """Tell how each parameter is trained, by name."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean(name))
    return {
        name: ParameterGroup.of(optimizer, group, number)
        for number, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for name in names.get(id(parameter), [])
    }


def code(path: str) -> str:
    """Write a path within a model as code.

    Example:
        >>> code("net.0.bias")
        'model.net[0].bias'
    """
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split("."))
