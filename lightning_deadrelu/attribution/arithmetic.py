"""Follow functions of single elements, sums and products. Pure.

Whatever is computed of each element by itself, or of elements that depend on the same units, keeps units apart. What is
added to a layer then arrives otherwise behind it, or not at all, until a parameter of its own is added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_deadrelu.attribution import layers, reshaping
from lightning_deadrelu.attribution.labels import (
    Flow,
    NotFollowable,
    Origin,
    Outcome,
    Stream,
    TracedCall,
    UnaccountedRead,
    first_indirect,
    first_reason,
    grown,
    numbered,
    unaccounted_reads,
)
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.model.torch_calls import ZERO_TO_SOMETHING

NEGATED = "its input is negated on the way"


def negate(call: TracedCall) -> Outcome:
    """Turn round: what is added before is taken off behind."""
    flow = call.look(call.operands[0])
    kept, lost = reshaping.passing(call, flow)
    return Outcome((flow._replace(indirect=NEGATED if flow.before else "", streams=tuple(kept)),), tuple(lost))


def elementwise(call: TracedCall) -> Outcome:
    """Follow a function of each element: from a site to its readers only if zero stays zero."""
    main = _sides(call)[0] if call.name == "where" else call.operands[0]
    flow = call.look(main)
    others = [call.look(tensor) for tensor in call.operands if tensor is not main]
    reader = f"`{call.name}`"
    unaccounted = [read for other in others for read in unaccounted_reads(other, reader, f"{reader} reads it")]
    kept, lost = reshaping.passing(call, flow)
    unaccounted += lost
    bent, why = f"what feeds it passes through {reader}", flow.why
    if flow.behind and not _keeps_zero(call):
        loud = f"{reader} (it makes something of nothing) reads it"
        unaccounted += unaccounted_reads(Flow(tuple(flow.behind)), "", loud)
        kept, why = [stream for stream in kept if isinstance(stream.origin, Origin)], why or bent
    indirect = flow.indirect if call.name in ("masked_fill", "where") or not flow.before else bent
    return Outcome((Flow(tuple(kept), why, indirect, constant=flow.constant),), tuple(unaccounted))


def _sides(call: TracedCall) -> tuple[Tensor, Any]:
    """Find what ``where`` keeps a part of, and the constant that it puts elsewhere."""
    sides = [value for value in call.args if not (isinstance(value, Tensor) and value.dtype == torch.bool)]
    kept = [side for side in sides if isinstance(side, Tensor) and not call.look(side).zero]
    if len(sides) != 2 or len(kept) != 1 or kept[0].shape != call.output.shape:
        raise NotFollowable("it chooses between two")
    return kept[0], next(side for side in sides if side is not kept[0])


def _keeps_zero(call: TracedCall) -> bool:
    if call.name in ZERO_TO_SOMETHING:
        return False
    if call.name == "pow":
        exponent = call.argument(1, "exponent")
        return isinstance(exponent, (int, float)) and exponent > 0
    if call.name == "masked_fill":
        value = call.argument(2, "value")
        return isinstance(value, (int, float)) and value == 0
    if call.name == "where":
        return isinstance(other := _sides(call)[1], Tensor) or other == 0
    if call.name in ("clamp", "hardtanh"):
        words, free = (("min", "max"), None) if call.name == "clamp" else (("min_val", "max_val"), -1.0)
        low, high = call.argument(1, words[0], free), call.argument(2, words[1], None if free is None else 1.0)
        plain_numbers = not isinstance(low, Tensor) and not isinstance(high, Tensor)
        return plain_numbers and (low is None or low <= 0) and (high is None or high >= 0)
    return True


def add(call: TracedCall) -> Outcome:
    """Add layers up; a site's output must not be added to anything.

    A parameter that is added, as a norm's shift is, arrives as it is, whatever was done to what it is added to.
    """
    if call.kwargs.get("alpha", 1) != 1:
        raise NotFollowable("it is weighted")
    streams: list[Stream] = []
    unaccounted: list[UnaccountedRead] = []
    why, indirect, shifted = "", "", False
    negated = _subtracted(call)
    reader = f"`{call.name}`"
    operands, ndim = _rows_last(call), call.output.ndim
    flows = [_as_row(call, tensor, "bias") for tensor in operands]
    outlets = [stream.origin for flow in flows for stream in flow.streams if stream.is_outlet]
    for tensor, flow in zip(operands, flows, strict=True):
        lost = [one for one in flow.streams if one.is_outlet and (tensor is negated or outlets.count(one.origin) > 1)]
        kept = [stream for stream in flow.before if not any(stream is other for other in lost)]
        streams += [stream._replace(labels=grown(stream.labels, ndim)) for stream in kept]
        rest = flow._replace(streams=(*flow.behind, *lost))
        unaccounted += unaccounted_reads(rest, reader, f"{reader} reads it (an identity path)")
        foreign = not flow.before and not flow.constant and _may_be_activation(tensor, call.output)
        why = why or flow.why or (layers.JOINED if foreign or flow.behind else "")
        indirect = indirect or flow.indirect or (NEGATED if tensor is negated and flow.streams else "")
        shifted = shifted or (tensor is not negated and _is_row(call.look(tensor), tensor))
    constant = all(call.look(tensor).constant for tensor in call.operands)
    return Outcome((Flow(tuple(streams), why, "" if shifted else indirect, constant=constant),), tuple(unaccounted))


def _may_be_activation(tensor: Tensor, out: Tensor) -> bool:
    """Whether a tensor may differ between samples; what is the same for all is a constant term."""
    return tensor.ndim == out.ndim and tensor.shape[:1] == out.shape[:1]


def _subtracted(call: TracedCall) -> Any:
    """Find what changes its sign."""
    places = {"sub": 1, "rsub": 0}
    return call.argument(places[call.name], "other") if call.name in places else None


def _is_row(flow: Flow, tensor: Tensor) -> bool:
    """Whether a tensor is a named parameter of which each entry can be that of a unit."""
    weight = flow.weight or flow.row
    return weight is not None and not weight.is_permuted and tensor.numel() > 1


def _rows_last(call: TracedCall) -> list[Tensor]:
    """Order what is added or multiplied as it comes about: a parameter's entries join what was there before."""
    return sorted(call.operands, key=lambda tensor: _is_row(call.look(tensor), tensor))


def _as_row(call: TracedCall, tensor: Tensor, role: str) -> Flow:
    """Take a named parameter for a layer of its own: each of its entries feeds what it is added to."""
    flow = call.look(tensor)
    weight = flow.weight or flow.row
    if weight is None:
        return flow._replace(derived=frozenset()) if call.output.numel() == 1 else flow
    if not _is_row(flow, tensor):
        return Flow(constant=True, derived=flow.learned if tensor.numel() > 1 else frozenset())
    origin = Origin(weight.name, role, tuple(range(len(weight.shape))), weight.shape)
    return Flow((Stream(origin, numbered(tensor.shape, range(-tensor.ndim, 0), call.output.ndim)),))


def scale(call: TracedCall) -> Outcome:
    """Scale: what is silent stays so, whatever it is multiplied by."""
    operands = _rows_last(call)
    flows = [_as_row(call, tensor, "scale") for tensor in operands]
    reader, ndim = f"`{call.name}`", call.output.ndim
    divisor = call.argument(1, "other") if call.name == "div" else None
    streams: list[Stream] = []
    unaccounted: list[UnaccountedRead] = []
    for tensor, flow in zip(operands, flows, strict=True):
        divides = tensor is divisor
        kept = [s for s in flow.streams if not s.is_outlet and not (divides and isinstance(s.origin, Site))]
        gone = [stream for stream in flow.streams if not any(stream is other for other in kept)]
        unaccounted += unaccounted_reads(flow._replace(streams=tuple(gone)), reader, f"{reader} reads it")
        streams += [stream._replace(labels=grown(stream.labels, ndim)) for stream in kept]
    fed = [tensor for tensor in call.operands if call.look(tensor).before]
    bends = len(fed) > 1 or any(flow.behind for flow in flows) or any(tensor is divisor for tensor in fed)
    indirect = (f"what feeds it passes through {reader}" if bends else _sign(call)) if fed else ""
    constant = all(call.look(tensor).constant for tensor in call.operands)
    flow = Flow(tuple(streams), first_reason(flows), first_indirect(flows) or indirect, constant=constant)
    return Outcome((flow,), tuple(unaccounted))


def _sign(call: TracedCall) -> str:
    numbers = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, (int, float))]
    return NEGATED if any(number < 0 for number in numbers) else ""
