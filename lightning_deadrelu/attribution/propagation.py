"""What a torch function does to what is known of its inputs. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_deadrelu.attribution import layers, products, reshaping
from lightning_deadrelu.attribution.labels import (
    Flow,
    NotFollowable,
    Origin,
    Outcome,
    Stream,
    TracedCall,
    UnaccountedRead,
    grown,
    over,
    unaccounted_reads,
)
from lightning_deadrelu.model.torch_calls import ACTIVATION_PRODUCTS, JOINS, NORMS, SCATTERS, SUMS, ZERO_TO_ZERO

NEGATED = "its input is negated on the way"


def follow(call: TracedCall) -> Outcome:
    """Follow a call; what is not understood reads all of its inputs."""
    if _is_update(call):
        return Outcome((Flow(),) * len(call.outputs))
    if not layers.is_layer(call.name) and (derived := _derived(call)) is not None:
        return Outcome((derived,) * len(call.outputs))
    rule = _rule(call)
    if rule is None:
        return _unknown(call, f"`{call.name}`")
    try:
        return rule(call)
    except NotFollowable as misfit:
        return _unknown(call, f"`{call.name}` ({misfit})")
    except Exception as error:  # one call that is not understood is no reason to give up on all others
        return _unknown(call, f"`{call.name}` (it could not be followed: {type(error).__name__})")


def _rule(call: TracedCall) -> Callable[[TracedCall], Outcome] | None:
    name = call.name
    if name in ACTIVATION_PRODUCTS and not any(call.look(tensor).learned for tensor in call.operands):
        return products.multiply
    if layers.is_layer(name):
        return layers.apply
    if name in SCATTERS:
        return products.scatter
    if name in NORMS:
        return layers.normalise
    if name in SUMS:
        return _add
    if name in ("mul", "div"):
        return _multiply
    if name in JOINS:
        return _join
    if name == "neg":
        return _negate
    if reshaping.mover(name) is not None:
        return _move
    return _silent if name in {*ZERO_TO_ZERO, "pow", "clamp", "hardtanh", "masked_fill"} else None


def _is_update(call: TracedCall) -> bool:
    """Whether a parameter is changed in place, as an optimizer or a moving average does."""
    return not torch.is_grad_enabled() and any(
        out is operand and call.look(operand).weight is not None
        for out in call.outputs
        for operand in call.operands[:1]
    )


def _derived(call: TracedCall) -> Flow | None:
    """Keep what is computed from parameters alone apart: as a penalty it concerns no unit."""
    flows = [call.look(tensor) for tensor in call.operands]
    learned = frozenset[str]().union(*(flow.learned for flow in flows))
    shapes = [tensor.shape for tensor, flow in zip(call.operands, flows, strict=True) if flow.learned]
    others = [(tensor, flow) for tensor, flow in zip(call.operands, flows, strict=True) if not flow.learned]
    if not learned or any(
        flow.streams or (tensor.shape not in shapes and not flow.constant) for tensor, flow in others
    ):
        return None
    weight = _same_weight(call, flows[0]) if len(flows) == 1 else None
    return Flow(constant=True, weight=weight) if weight else Flow(constant=True, derived=learned)


def _same_weight(call: TracedCall, flow: Flow) -> Any:
    """Recognise a parameter that was only cast, detached or transposed."""
    weight = flow.weight
    if weight is None or len(call.outputs) != 1:
        return None
    if reshaping.mover(call.name) is reshaping._same and call.output.shape == call.operands[0].shape:
        return weight
    turned = reshaping.mover(call.name) is reshaping._permuted and len(weight.shape) == 2
    if turned and call.output.shape == call.operands[0].shape[::-1] and call.name not in ("permute", "movedim"):
        return weight._replace(flipped=not weight.flipped)
    return None


def _unknown(call: TracedCall, reader: str) -> Outcome:
    flows = [call.look(tensor) for tensor in call.operands]
    unaccounted = [read for flow in flows for read in unaccounted_reads(flow, reader, f"{reader} reads it")]
    why = next((flow.why for flow in flows if flow.why), "")
    if any(flow.streams or flow.learned for flow in flows):
        why = f"what feeds it passes through {reader}"
    constant = all(flow.constant for flow in flows)
    return Outcome((Flow(why=why, constant=constant),) * len(call.outputs), tuple(unaccounted))


# -- one input -------------------------------------------------------------------------------------------


def _move(call: TracedCall) -> Outcome:
    mover = reshaping.mover(call.name)
    assert mover is not None
    main, *others = call.operands[:1] if call.name.endswith("_as") else call.operands
    flow = call.look(main)
    unaccounted = [
        read
        for other in others
        for read in unaccounted_reads(call.look(other), f"`{call.name}`", f"`{call.name}` reads it")
    ]
    if call.name == "pad" and call.argument(3, "value") and call.argument(2, "mode", "constant") == "constant":
        unaccounted += unaccounted_reads(Flow(tuple(flow.behind)), "", "`pad` puts something in the place of nothing")
        flow = flow._replace(streams=tuple(flow.before))
    moved: list[list[Stream]] = [[] for _ in call.outputs]
    passing, lost = _passing(call, flow)
    for stream in passing:
        for place, labels in zip(moved, mover(call, main, stream.labels), strict=True):
            place.append(stream._replace(labels=labels))
    flows = (flow._replace(streams=tuple(streams), weight=None, derived=flow.learned) for streams in moved)
    return Outcome(tuple(flows), (*unaccounted, *lost))


def _passing(call: TracedCall, flow: Flow) -> tuple[list[Stream], list[UnaccountedRead]]:
    """Give up the outlets where a constant added before the call is another one behind it."""
    if reshaping.keeps_sums(call):
        return list(flow.streams), []
    lost = tuple(stream for stream in flow.streams if stream.is_outlet)
    kept = [stream for stream in flow.streams if not stream.is_outlet]
    return kept, list(unaccounted_reads(Flow(lost), f"`{call.name}`", ""))


def _negate(call: TracedCall) -> Outcome:
    flow = call.look(call.operands[0])
    passing, lost = _passing(call, flow)
    return Outcome((flow._replace(why=flow.why or NEGATED, streams=tuple(passing)),), tuple(lost))


def _silent(call: TracedCall) -> Outcome:
    """Follow a function of each element: from a site to its readers only if zero stays zero."""
    flow = call.look(call.operands[0])
    others = [call.look(tensor) for tensor in call.operands[1:]]
    reader = f"`{call.name}`"
    unaccounted = [read for other in others for read in unaccounted_reads(other, reader, f"{reader} reads it")]
    if not _keeps_zero(call):
        raise NotFollowable("it makes something of nothing")
    kept = flow.behind
    if call.name == "masked_fill":
        kept, lost = _passing(call, flow)
        unaccounted += [*lost, *unaccounted_reads(flow._replace(streams=()), reader, "")]
    else:
        unaccounted += unaccounted_reads(flow._replace(streams=tuple(flow.before)), reader, "")
    why = flow.why or ("" if len(kept) == len(flow.streams) else f"what feeds it passes through {reader}")
    return Outcome((Flow(tuple(kept), why, constant=flow.constant),), tuple(unaccounted))


def _keeps_zero(call: TracedCall) -> bool:
    if call.name == "pow":
        exponent = call.argument(1, "exponent")
        return isinstance(exponent, (int, float)) and exponent > 0
    if call.name == "masked_fill":
        value = call.argument(2, "value")
        return (isinstance(value, (int, float)) and value == 0) or not call.look(call.operands[0]).behind
    if call.name in ("clamp", "hardtanh"):
        words, free = (("min", "max"), None) if call.name == "clamp" else (("min_val", "max_val"), -1.0)
        low, high = call.argument(1, words[0], free), call.argument(2, words[1], None if free is None else 1.0)
        plain_numbers = not isinstance(low, Tensor) and not isinstance(high, Tensor)
        return plain_numbers and (low is None or low <= 0) and (high is None or high >= 0)
    return True


# -- several inputs --------------------------------------------------------------------------------------


def _join(call: TracedCall) -> Outcome:
    flows = [call.look(tensor) for tensor in call.operands]
    names = [read for flow in flows for read in unaccounted_reads(flow._replace(streams=()), f"`{call.name}`", "")]
    streams = [
        Stream(
            origin,
            reshaping.joined(call, [(tensor, _labels(flow, origin, place)) for tensor, flow in _zip(call, flows)]),
        )
        for origin, place in _numbered(flows)
    ]
    why = next((flow.why for flow in flows if flow.why), "")
    return Outcome((Flow(tuple(streams), why, constant=all(flow.constant for flow in flows)),), tuple(names))


def _zip(call: TracedCall, flows: list[Flow]) -> list[tuple[Tensor, Flow]]:
    return list(zip(call.operands, flows, strict=True))


def _numbered(flows: list[Flow]) -> list[tuple[Any, int]]:
    """List the origins of all flows; one that a flow holds several times, as often."""
    most: dict[Any, int] = {}
    for flow in flows:
        origins = [stream.origin for stream in flow.streams]
        for origin in origins:
            most[origin] = max(most.get(origin, 0), origins.count(origin))
    return [(origin, place) for origin, count in most.items() for place in range(count)]


def _labels(flow: Flow, origin: Any, place: int) -> Tensor | None:
    mine = [stream.labels for stream in flow.streams if stream.origin == origin]
    return mine[place] if place < len(mine) else None


def _add(call: TracedCall) -> Outcome:
    """Add layers up; a site's output must not be added to anything."""
    if call.kwargs.get("alpha", 1) != 1:
        raise NotFollowable("it is weighted")
    streams: list[Stream] = []
    unaccounted: list[UnaccountedRead] = []
    why = ""
    negated = _subtracted(call)
    reader = f"`{call.name}`"
    rows = [_as_row(call, tensor, "bias") for tensor in call.operands]
    outlets = [stream.origin for row in rows for stream in row.streams if stream.is_outlet]
    for tensor, flow in zip(call.operands, rows, strict=True):
        ndim = call.output.ndim
        lost = [one for one in flow.streams if one.is_outlet and (tensor is negated or outlets.count(one.origin) > 1)]
        kept = [stream for stream in flow.before if not any(stream is other for other in lost)]
        streams += [stream._replace(labels=grown(stream.labels, ndim)) for stream in kept]
        rest = flow._replace(streams=(*flow.behind, *lost))
        unaccounted += unaccounted_reads(rest, reader, f"{reader} reads it (an identity path)")
        foreign = not flow.before and not flow.constant and _may_be_activation(tensor, call.output)
        why = why or flow.why or (layers.JOINED if foreign or flow.behind else "")
        why = why or (NEGATED if tensor is negated and flow.streams else "")
    constant = all(call.look(tensor).constant for tensor in call.operands)
    return Outcome((Flow(tuple(streams), why, constant=constant),), tuple(unaccounted))


def _may_be_activation(tensor: Tensor, out: Tensor) -> bool:
    """Whether a tensor may differ between samples; what is the same for all is a constant term."""
    return tensor.ndim == out.ndim and tensor.shape[:1] == out.shape[:1]


def _subtracted(call: TracedCall) -> Any:
    """Find what changes its sign."""
    places = {"sub": 1, "rsub": 0}
    return call.argument(places[call.name], "other") if call.name in places else None


def _as_row(call: TracedCall, tensor: Tensor, role: str) -> Flow:
    """Take a named parameter for a layer of its own: each of its entries feeds what it is added to."""
    flow = call.look(tensor)
    weight = flow.weight
    if weight is None:
        return flow._replace(derived=frozenset()) if call.output.numel() == 1 else flow
    if weight.flipped or tensor.numel() == 1:
        return Flow(constant=True, derived=flow.learned if tensor.numel() > 1 else frozenset())
    origin = Origin(weight.name, role, tuple(range(tensor.ndim)), weight.shape)
    return Flow((Stream(origin, over(weight.shape, call.output.ndim)),))


def _multiply(call: TracedCall) -> Outcome:
    """Scale: what is silent stays so, whatever it is multiplied by."""
    flows = [_as_row(call, tensor, "scale") for tensor in call.operands]
    reader, ndim = f"`{call.name}`", call.output.ndim
    divisor = call.argument(1, "other")
    gated = sum(bool(_layers_in(call, tensor)) for tensor in call.operands) > 1
    gated = gated or any(flow.behind for flow in flows)
    streams: list[Stream] = []
    unaccounted: list[UnaccountedRead] = []
    for tensor, flow in zip(call.operands, flows, strict=True):
        lost = call.name == "div" and tensor is divisor
        row = call.look(tensor).weight is not None
        before = [] if lost or (gated and not row) else flow.before
        kept = [stream for stream in (*before, *([] if lost else flow.behind)) if not stream.is_outlet]
        gone = [stream for stream in flow.streams if not any(stream is other for other in kept)]
        unaccounted += unaccounted_reads(flow._replace(streams=tuple(gone)), reader, f"{reader} reads it")
        streams += [stream._replace(labels=grown(stream.labels, ndim)) for stream in kept]
    why = next((flow.why for flow in flows if flow.why), "") or _sign(call)
    if gated and not any(isinstance(stream.origin, Origin) for stream in streams):
        why = why or f"what feeds it passes through {reader}"
    constant = all(call.look(tensor).constant for tensor in call.operands)
    return Outcome((Flow(tuple(streams), why, constant=constant),), tuple(unaccounted))


def _layers_in(call: TracedCall, tensor: Tensor) -> list[Stream]:
    return call.look(tensor).before


def _sign(call: TracedCall) -> str:
    numbers = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, (int, float))]
    return NEGATED if any(number < 0 for number in numbers) else ""
