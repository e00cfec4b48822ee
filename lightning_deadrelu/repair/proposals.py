"""What is known of a site with a pending edit, and what is proposed for it. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.remedies import Edits, Remedy, SiteView, Write
from lightning_deadrelu.repair.policy import Request
from lightning_deadrelu.statistics import SiteReport
from lightning_deadrelu.statistics.confirmation import SilenceSample

_LINEAR = (["weight"], ["weight", "bias"])


class Proposal(NamedTuple):
    """What a remedy proposes for a site.

    Args:
        request: What was asked for.
        view: What the remedy was shown.
        edits: What is to be changed; None if nothing can be.
        reason: Why nothing can be; empty where something is missing that later batches may bring.
    """

    request: Request
    view: SiteView
    edits: Edits | None = None
    reason: str = ""


def fed_by_linear(attribution: Attribution, tensors: Mapping[str, Tensor]) -> str:
    """Name the linear module whose output alone is a site's input; empty where it is fed otherwise."""
    layers = attribution.incoming
    if attribution.no_incoming or attribution.outlet is None or [one.role for one in layers] not in _LINEAR:
        return ""
    path, weight = attribution.outlet.path, layers[0]
    names = [f"{path}.{role}" for role in ("weight", "bias")][: len(layers)]
    held = tensors.get(weight.name)  # pruning renames a weight
    plain = not weight.shape and weight.dims == (0,) and held is not None and held.ndim == 2
    return path if plain and [one.name for one in layers] == names else ""


def fires_now(inputs: Tensor, attribution: Attribution, tensors: Mapping[str, Tensor], hinge: float = 0.0) -> Tensor:
    """Tell which units of a site fire on some inputs with the weights as they are, shape ``(units,)``.

    Args:
        inputs: Of the linear layer that feeds it, shape ``(rows, features)``.
        attribution: Of the site.
        tensors: The model's parameters, by name.
        hinge: What has to be exceeded.
    """
    weight, *bias = (one.read(tensors[one.name]).cpu().float() for one in attribution.incoming)
    z = inputs.float() @ weight.T + (bias[0] if bias else 0.0)
    return (z > hinge).any(0)


def confirmed(request: Request, site: SiteReport, seen: SilenceSample) -> tuple[Tensor, Tensor]:
    """Keep the units that were silent, or constant, once more; and spread their quantiles over all units."""
    quantiles = torch.full((len(seen.sums), len(request.units)), float("nan"), dtype=torch.float64)
    quantiles[:, request.units] = seen.quantiles
    if request.blind:
        return request.units, quantiles
    still = torch.zeros_like(request.units)
    still[request.units] = (seen.fired == 0) & (seen.calls > 0)
    constant = site.frozen & (quantiles[0] == quantiles[-1])
    return still & site.silent | constant & request.units, quantiles


def generator_of(remedy: Remedy, site: str, batch: int) -> torch.Generator:
    """Seed alike on all ranks, and anew for each edit."""
    text = f"{remedy.seed} {type(remedy).__name__} {batch} {site}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def fingerprint(proposals: Sequence[Proposal]) -> bytes:
    """Hash what this rank would do, and to which weights."""
    parts: list[Any] = []
    for request, view, edits, reason in proposals:
        parts += [request.site, request.index, view.units.tolist(), reason]
        if edits is not None:
            rises = edits.lift.rises if edits.lift else ()
            parts += [_summarized(write, view.values) for write in (*edits.writes, *rises)]
            parts += [edits.warmth and edits.warmth.gamma.tolist(), repr(edits.push), repr(edits.activation)]
    return hashlib.sha256(repr(parts).encode()).digest()


def _summarized(write: Write, values: Mapping[str, Tensor]) -> Any:
    known = values.get(write.slice.name)  # of a sharded model, no more than what feeds and reads the site
    old = () if known is None else _moments(write.slice.read(known))
    return write.slice.name, *old, *_moments(torch.as_tensor(write.values))


def _moments(values: Tensor) -> tuple[float, float]:
    return float(values.double().sum()), float(values.double().square().sum())
