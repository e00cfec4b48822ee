"""Follow labels through sums of products, and through sums over samples. Pure.

Where both operands are activations, an element of the output is a sum over products: what is silent stays so, and a
dimension that only one operand has keeps that operand's units.
"""

from __future__ import annotations

from torch import Tensor

from lightning_deadrelu.attribution.labels import (
    Flow,
    NotFollowable,
    Origin,
    Outcome,
    Stream,
    TracedCall,
    first_indirect,
    first_reason,
    grown,
    shrunk,
    unaccounted_reads,
)
from lightning_deadrelu.model.contractions import contraction
from lightning_deadrelu.model.sites import Site


def multiply(call: TracedCall) -> Outcome:
    """Follow a product of activations, such as attention times values, or an adjacency times features.

    Raises:
        NotFollowable: If an operand is learned, or the call is spelt in a way that is not known.
    """
    found = contraction(call)
    flows = [call.look(tensor) for tensor in call.operands]
    if found is None or any(flow.learned for flow in flows):
        raise NotFollowable("it multiplies activations")
    if len(set(map(id, call.operands))) < len(call.operands):
        raise NotFollowable("it multiplies a tensor by itself")
    terms, result = found
    letters = {id(tensor): term for tensor, term in terms}
    gated = sum(bool(flow.before) for flow in flows) > 1 or any(flow.behind for flow in flows)
    kept: list[Stream] = []
    gone: list[Stream] = []
    for tensor, flow in zip(call.operands, flows, strict=True):
        for stream in flow.streams:
            labels = _carried(stream.labels, letters.get(id(tensor)), result)
            if labels is None or (gated and isinstance(stream.origin, Origin)) or stream.is_outlet:
                gone.append(stream)
            else:
                kept.append(stream._replace(labels=labels))
    why = first_reason(flows)
    if not why and len(kept) < sum(not stream.is_outlet for flow in flows for stream in flow.streams):
        why = f"what feeds it passes through `{call.name}`"
    unaccounted = unaccounted_reads(
        Flow(tuple(gone)), f"`{call.name}`", f"`{call.name}` reads it, and not unit by unit"
    )
    scored = [s.origin for s in kept if isinstance(s.origin, Site)] if len(call.operands) > 1 else []
    flow = Flow(tuple(kept), why, first_indirect(flows), constant=all(flow.constant for flow in flows))
    return Outcome((flow,), unaccounted, multiplied=tuple(scored))


def _carried(labels: Tensor, letters: str | None, result: str) -> Tensor | None:
    """Move labels to where their dimensions are in the result; None if units are summed up."""
    if letters is None or len(set(letters)) < len(letters):
        return None
    alike = shrunk(labels, [place for place, letter in enumerate(letters) if letter not in result])
    if alike is None:
        return None
    kept = [place for place, letter in enumerate(letters) if letter in result]
    order = sorted(kept, key=lambda place: result.index(letters[place]))
    moved = alike.permute([*order, *(place for place in range(len(letters)) if place not in kept)])
    present = [letters[place] for place in order]
    sizes = [moved.shape[present.index(letter)] if letter in present else 1 for letter in result]
    return moved.reshape(sizes)


def scatter(call: TracedCall) -> Outcome:
    """Follow sums (means, maxima) over samples that an index picks, as message passing has them.

    Raises:
        NotFollowable: If they are added to anything but zeros, or units are picked.
    """
    target, source = call.argument(0, "input"), call.argument(3, "source" if "index_" in call.name else "src")
    scaled = call.kwargs.get("alpha", 1) != 1
    if not isinstance(source, Tensor) or not call.look(target).zero or scaled:
        raise NotFollowable("it writes into something")
    flow = call.look(source)
    dim = call.argument(1, "dim") % source.ndim
    kept: list[Stream] = []
    gone: list[Stream] = []
    for stream in flow.streams:
        labels = shrunk(stream.labels, [dim])
        if labels is None or (stream.is_outlet and not _averages(call)):
            gone.append(stream)
        else:
            kept.append(stream._replace(labels=grown(labels, call.output.ndim)))
    others = [call.look(tensor) for tensor in call.operands if tensor is not source]
    lost = [Flow(tuple(gone)), *others]
    unaccounted = [leak for one in lost for leak in unaccounted_reads(one, f"`{call.name}`", f"`{call.name}` reads it")]
    return Outcome((Flow(tuple(kept), flow.why, flow.indirect, constant=flow.constant),), tuple(unaccounted))


def _averages(call: TracedCall) -> bool:
    return call.argument(4, "reduce") in ("mean", "amax", "amin") and not call.kwargs.get("include_self", True)
