"""What a torch function does to what is known of its inputs. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_deadrelu.attribution import arithmetic, layers, products, reshaping
from lightning_deadrelu.attribution.labels import (
    Flow,
    NotFollowable,
    Origin,
    Outcome,
    Stream,
    TracedCall,
    Weight,
    first_indirect,
    first_reason,
    unaccounted_reads,
)
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.model.torch_calls import (
    ACTIVATION_PRODUCTS,
    ELEMENTWISE,
    JOINS,
    NORMS,
    RESHAPES,
    SCATTERS,
    SPREADS,
    SUMS,
)


def follow(call: TracedCall) -> Outcome:
    """Follow a call; what is not understood reads all of its inputs, and so does what makes a single number of them."""
    outcome = _followed(call)
    numbers = [not out.ndim and bool(flow.streams) for out, flow in zip(call.outputs, outcome.flows, strict=True)]
    return _as_numbers(outcome, numbers, f"`{call.name}`") if any(numbers) else outcome


def _as_numbers(outcome: Outcome, numbers: list[bool], reader: str) -> Outcome:
    """Follow no further what has become a single number: a loss may be the next to hear of it."""
    lost = [Flow(flow.streams) for flow, is_number in zip(outcome.flows, numbers, strict=True) if is_number]
    unaccounted = [read for flow in lost for read in unaccounted_reads(flow, reader, f"{reader} reads it")]
    found = Flow(why=f"what feeds it passes through {reader}")
    flows = (found if is_number else flow for flow, is_number in zip(outcome.flows, numbers, strict=True))
    return outcome._replace(flows=tuple(flows), unaccounted=(*outcome.unaccounted, *unaccounted))


def _followed(call: TracedCall) -> Outcome:
    if _is_update(call):
        return Outcome((Flow(),) * len(call.outputs))
    if not _may_be_layer(call) and (derived := _derived(call)) is not None:
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
    if name in _RULES:
        return _RULES[name]
    return _move if reshaping.mover(name) is not None else None


def _may_be_layer(call: TracedCall) -> bool:
    """Whether a call may apply a weight to something; a product of one parameter with itself is a penalty."""
    names = [call.look(tensor).learned for tensor in call.operands]
    return layers.is_layer(call.name) and not (len(names) > 1 and len(names[0]) == 1 and len(set(names)) == 1)


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
    if weight:
        return Flow(constant=True, weight=weight)
    return Flow(constant=True, derived=learned, row=_viewed(call, flows[0]) if len(flows) == 1 else None)


def _same_weight(call: TracedCall, flow: Flow) -> Any:
    """Recognise a parameter that was only cast, detached or permuted."""
    weight = flow.weight
    if weight is None or len(call.outputs) != 1:
        return None
    if reshaping.mover(call.name) is reshaping._same and call.output.shape == call.operands[0].shape:
        return weight
    if reshaping.mover(call.name) is reshaping.permuted:
        return weight._replace(dims=tuple(weight.dims[dim] for dim in reshaping.order(call)))
    return None


def _viewed(call: TracedCall, flow: Flow) -> Weight | None:
    """Recognise a parameter whose dimensions of size 1 were changed, as a norm per channel does."""
    if call.name not in RESHAPES and not (call.name == "getitem" and reshaping.is_plain_index(call)):
        return None
    main, out = ([size for size in one.shape if size != 1] for one in (call.operands[0], call.output))
    return (flow.weight or flow.row) if main == out else None


def _unknown(call: TracedCall, reader: str) -> Outcome:
    flows = [call.look(tensor) for tensor in call.operands]
    unaccounted = [read for flow in flows for read in unaccounted_reads(flow, reader, f"{reader} reads it")]
    why = first_reason(flows)
    if any(flow.streams or flow.learned for flow in flows):
        why = f"what feeds it passes through {reader}"
    constant = all(flow.constant for flow in flows)
    return Outcome((Flow(why=why, constant=constant),) * len(call.outputs), tuple(unaccounted))


def _move(call: TracedCall) -> Outcome:
    mover = reshaping.mover(call.name)
    assert mover is not None
    main, *others = call.operands
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
    kept, lost = reshaping.passing(call, flow)
    for stream in kept:
        for place, labels in zip(moved, mover(call, main, stream.labels), strict=True):
            place.append(stream._replace(labels=labels))
    spread = call.name in SPREADS and flow.before
    indirect = f"what feeds it passes through `{call.name}`" if spread else flow.indirect
    flow = flow._replace(indirect=indirect, weight=None, derived=flow.learned)
    flows = (flow._replace(streams=tuple(streams)) for streams in moved)
    return Outcome(tuple(flows), (*unaccounted, *lost))


def _join(call: TracedCall) -> Outcome:
    flows = [call.look(tensor) for tensor in call.operands]
    names = [read for flow in flows for read in unaccounted_reads(flow._replace(streams=()), f"`{call.name}`", "")]
    held: dict[tuple[Origin | Site, int], dict[int, Tensor]] = {}
    for number, flow in enumerate(flows):
        for key, labels in _by_origin(flow).items():
            held.setdefault(key, {})[number] = labels
    starts = reshaping.starts_of(call)
    streams = (Stream(origin, reshaping.joined(call, starts, labels)) for (origin, _), labels in held.items())
    constant = all(flow.constant for flow in flows)
    return Outcome((Flow(tuple(streams), first_reason(flows), first_indirect(flows), constant=constant),), tuple(names))


def _by_origin(flow: Flow) -> dict[tuple[Origin | Site, int], Tensor]:
    """List the labels by their origin; one that a flow holds several times is numbered."""
    met: Counter[Origin | Site] = Counter()
    found = {}
    for origin, labels in flow.streams:
        found[origin, met[origin]] = labels
        met[origin] += 1
    return found


_RULES: dict[str, Callable[[TracedCall], Outcome]] = {
    **dict.fromkeys(ELEMENTWISE, arithmetic.elementwise),
    **dict.fromkeys(SCATTERS, products.scatter),
    **dict.fromkeys(NORMS, layers.normalise),
    **dict.fromkeys(SUMS, arithmetic.add),
    **dict.fromkeys(("mul", "div"), arithmetic.scale),
    **dict.fromkeys(JOINS, _join),
    "neg": arithmetic.negate,
}
