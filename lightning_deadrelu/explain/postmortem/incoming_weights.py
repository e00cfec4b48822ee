"""Track the biases and weights that feed each unit: at the start, now, and when the unit last fired."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deadrelu.explain.postmortem.subsample import subsample
from lightning_deadrelu.model.optimizer_groups import ParameterGroup, holder_of
from lightning_deadrelu.model.sites import Site, clean
from lightning_deadrelu.statistics.totals import host_copies

_WEIGHTS = 1024  # of a layer, which tell their size: each takes a line of the cache
_WINDOWS = 100
_SHIFTS = frozenset({"bias", "beta", "shift", "b"})
_SCALES = frozenset({"weight", "scale", "gamma", "g"})  # a vector of this name is a norm's


class Incoming(NamedTuple):
    """The parameters that feed a site, each where there is just one.

    Args:
        units: Units of the site.
        bias: The bias, or BatchNorm's beta.
        weight: The matrix or kernel, whichever of its dimensions is the units'; without one, BatchNorm's gamma.
        normed: Whether a norm follows, which takes the size of the weights out again.
    """

    units: int
    bias: Tensor | None = None
    weight: Tensor | None = None
    normed: bool = False

    @property
    def fan_in(self) -> int:
        """Weights per unit; 0 where it is not known, or says nothing."""
        if self.weight is None or self.weight.ndim < 2 or self.normed or not self.units:
            return 0
        return self.weight.numel() // self.units

    @property
    def dim(self) -> int | None:
        """The dimension of a matrix or kernel that the units lie along; None without one."""
        if self.weight is None or self.weight.ndim < 2:
            return None
        return next((dim for dim, size in enumerate(self.weight.shape) if size == self.units), None)


@dataclass
class IncomingWeightsState:
    """What a checkpoint holds of :class:`IncomingWeights`.

    Args:
        biases: At the start, of the window before, and when each unit fired last, shape ``(3, units)``.
        weights: Mean square and mean of the weights at the start, shape ``(2, sites)``.
        squares: The last step of each window, and the mean square of the weights of each site at its end.
    """

    biases: Tensor = field(default_factory=lambda: torch.empty(3, 0))
    weights: Tensor = field(default_factory=lambda: torch.empty(2, 0))
    squares: list[tuple[int, list[float]]] = field(default_factory=list)


class IncomingWeights:
    """Keep the biases of all units, on the device, and how large the weights of each site are.

    Of a unit three biases are kept, those at the start of training, of the window, and of the window in which it fired
    last: 12 bytes. Of the weights of a layer 1,024 evenly strided entries are read at a window's end.
    """

    def __init__(self) -> None:
        self.state = IncomingWeightsState()
        """What a checkpoint has to hold."""
        self._first: dict[Site, tuple[Tensor, Tensor]] = {}  # bias and weights of sites that have no place yet

    @torch.no_grad()
    def meet(self, sites: Sequence[Site], sources: Sequence[Incoming]) -> None:
        """Note what feeds new sites, before their first step."""
        for site, source in list(zip(sites, sources, strict=True))[self.state.weights.shape[1] :]:
            if site not in self._first:
                self._first[site] = _bias(source, site.units).clone(), _moments(source)

    @torch.no_grad()
    def read(self, sites: Sequence[Site], sources: Sequence[Incoming], device: torch.device) -> Tensor:
        """Measure the weights, and make room for new units.

        Returns:
            Mean square and mean of the weights, those at the start first, shape ``(2, 2, sites)``.
        """
        self.meet(sites, sources)
        self._grow(sites, device)
        now = [_moments(source).to(device) for source in sources]
        return torch.stack([self.state.weights, torch.stack(now, 1) if now else self.state.weights])

    @torch.inference_mode(False)  # what is changed in place later may be no inference tensor
    def _grow(self, sites: Sequence[Site], device: torch.device) -> None:
        state = self.state
        state.biases, state.weights = state.biases.to(device), state.weights.to(device)
        fresh = [self._first[site] for site in sites[state.weights.shape[1] :]]
        if fresh:
            biases = torch.cat([bias.to(device) for bias, _ in fresh])
            weights = torch.stack([weights.to(device) for _, weights in fresh], 1)
            state.biases = torch.cat([state.biases, biases.expand(3, -1)], 1)
            state.weights = torch.cat([state.weights, weights], 1)
        self._first.clear()

    def biases(
        self, places: Sequence[slice], sources: Sequence[Incoming], units: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Bring biases of some sites to the host, in one transfer; NaN where there is none.

        Args:
            places: Where the sites' units lie.
            sources: What feeds the sites.
            units: Numbers of the units in question, for each site.

        Returns:
            For each site the biases of all units at the start, and those of the units in question when these were last
            alive, and now.
        """
        parts: list[Tensor] = []
        for place, source, numbers in zip(places, sources, units, strict=True):
            first, _, alive = self.state.biases[:, place]
            chosen = numbers.to(first.device)
            parts += [first, alive[chosen], _bias(source, len(first)).to(first.device)[chosen]]
        host = iter(parts if self.state.biases.device.type == "cpu" else host_copies(parts))
        return list(zip(host, host, host, strict=True))

    def squares(self, site: int, steps: Tensor, start: float) -> Tensor:
        """Say how large the weights of a site were at the start of the windows in which some steps were.

        Returns:
            Mean squares, of the same shape.
        """
        known = [(step, squares[site]) for step, squares in self.state.squares if site < len(squares)]
        ends = torch.tensor([step for step, _ in known], dtype=torch.int64)
        return torch.tensor([start, *(square for _, square in known)])[torch.searchsorted(ends, steps)]

    @torch.no_grad()
    def close(
        self, fired: Tensor, places: Sequence[slice], sources: Sequence[Incoming], weights: Tensor, step: int
    ) -> None:
        """End a window."""
        _, before, alive = self.state.biases
        torch.where(fired.to(before.device), before, alive, out=alive)
        for place, source in zip(places, sources, strict=True):
            if source.bias is not None:
                before[place].copy_(source.bias.detach().flatten())
        self.state.squares = [*self.state.squares, (step, weights[1, 0].tolist())][-_WINDOWS:]

    @torch.inference_mode(False)
    def restore(self, state: IncomingWeightsState) -> None:
        """Go on from a saved state."""
        self.state = IncomingWeightsState(state.biases.clone(), state.weights.clone(), list(state.squares))


def _bias(source: Incoming, units: int) -> Tensor:
    return torch.full((units,), math.nan) if source.bias is None else source.bias.detach().flatten().float()


def _moments(source: Incoming) -> Tensor:
    """Measure mean square and mean of some entries, shape ``(2,)``; NaN where there are none."""
    if source.weight is None:
        return torch.full((2,), math.nan)
    variance, mean = torch.var_mean(subsample(source.weight.detach(), _WEIGHTS).float(), correction=0)
    return torch.stack([variance + mean.square(), mean])


# -- what feeds a site -----------------------------------------------------------------------------------


def incoming_of(sites: Sequence[Site], model: nn.Module) -> list[Incoming]:
    """Find the bias and the weights that feed each site; where there are several of a kind, none."""
    named = {clean(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    return [_incoming(site, named) for site in sites]


def _incoming(site: Site, named: Mapping[str, Tensor]) -> Incoming:
    if not site.traced or "-" in site.source:  # behind a negation, a bias that rises makes the input fall
        return Incoming(site.units)
    known = {name: named[name] for name in site.source if name in named and not hasattr(named[name], "to_local")}
    rows = {name: p for name, p in known.items() if _is_vector(name, p, site.units)}
    scales = [name for name in rows if name.rpartition(".")[2] in _SCALES]
    norms = {name.rpartition(".")[0] for name in scales}
    biases = [name for name in rows if name not in scales]
    if norms:  # a bias before the norm is lost in it
        biases = [name for name in biases if name.rpartition(".")[0] in norms]
    others = [p for name, p in known.items() if name not in rows and p.ndim > 1]
    weights = _weights_of(site.units, others) or [rows[name] for name in scales]
    bias = rows[biases[0]] if len(biases) == 1 else None
    return Incoming(site.units, bias, weights[0] if len(weights) == 1 else None, bool(norms))


def _is_vector(name: str, p: Tensor, units: int) -> bool:
    """Whether a parameter has one entry for each unit, and is no matrix with a single input."""
    return p.numel() == units and (p.ndim == 1 or name.rpartition(".")[2] in _SHIFTS)


def _weights_of(units: int, candidates: Sequence[Tensor]) -> list[Tensor]:
    """Find the weights of so many units: along the first dimension, or else, as in ``x @ weight``, along another."""
    first = [p for p in candidates if p.shape[0] == units]
    return first or [p for p in candidates if units in (p.shape[1], p.shape[-1])]


def trained(source: Incoming, optimizers: Sequence[Optimizer], travelled: float) -> dict[str, Any]:
    """Tell how the parameters of a site are optimized."""
    tensor = source.weight if source.bias is None else source.bias
    held = None if tensor is None else holder_of(optimizers, tensor)
    how = ParameterGroup.of(*held) if held else ParameterGroup()
    left = math.exp(-how.shrinking * travelled)
    if how.adaptive and how.weight_decay and not how.decoupled:  # Adam divides it by the gradients' size
        left = 0.0
    known = {"adaptive": how.adaptive, "momentum": how.momentum, "decay": how.weight_decay}
    return {"fan_in": source.fan_in, "left": left, **known}
