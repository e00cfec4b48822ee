"""What flows in each tensor of a batch: labels of those that were seen, and what code out of sight has read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_deadrelu.attribution.connectivity import Connectivity
from lightning_deadrelu.attribution.labels import Flow, TracedCall, Weight, unaccounted_reads
from lightning_deadrelu.attribution.storage import Memory, lifetime, storage_of
from lightning_deadrelu.model.parameters import ParameterNames
from lightning_deadrelu.model.sharding import is_sharded
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.model.torch_calls import TensorTable, node_number

_MOST_NODES = 10_000
_OUT_OF_SIGHT = "code out of sight"
_IN_SIGHT = frozenset({"CheckpointFunctionBackward", "RegisterPostBackwardFunctionBackward"})  # checkpoints, and FSDP2


@dataclass(slots=True)
class _Contents:
    """What a storage holds, in whatever tensors, also in those that are gone.

    Args:
        lifetime: As long as it is held, no other storage has the same number.
        version: Another number after each write in sight, and no other storage's.
        flows: What flows in it, but for what was given up.
    """

    lifetime: Any
    version: int
    flows: list[Flow] = field(default_factory=list)


class _Known(NamedTuple):
    """What was known of a tensor when it was last made or written to in sight.

    Args:
        flow: What flows in it.
        made_plainly: Whether autograd did not know of it then.
        version: Of what its storage holds.
    """

    flow: Flow
    made_plainly: bool
    version: int


class TensorFlows:
    """The flow of each tensor that a batch has made so far.

    Args:
        model: Its parameters and buffers are known from the start.
        connectivity: Is told what was read where it cannot be accounted for.
    """

    def __init__(self, model: nn.Module, connectivity: Connectivity) -> None:
        self._model, self._connectivity = model, connectivity
        self._names = ParameterNames(model)
        self._buffers: dict[int, tuple[Tensor, Flow]] = {}
        self._known: TensorTable[_Known] = TensorTable()
        self._contents: dict[int, _Contents] = {}
        self._versions = itertools.count()
        self._nodes: dict[int, list[Flow]] = {}
        self._memory = Memory()
        self._first_node = 0

    def begin(self) -> None:
        """Look at the model's tensors before a batch."""
        self._first_node = _next_node()
        for name, buffer in self._model.named_buffers():
            self._buffers[id(buffer)] = buffer, Flow(constant=True, buffer=clean(name))
            self._memory.add(clean(name), buffer)
        self._names = ParameterNames(self._model)
        self._name_parameters()

    def _name_parameters(self) -> None:
        for name, tensor in self._names.look():
            self._memory.add(name, tensor)
        self._connectivity.sharing.update(self._memory.sharing())

    def end(self) -> None:
        """Let go of the batch, but for what the model keeps of it."""
        for name, buffer in self._model.named_buffers() if self._known else ():
            if (known := self._known.get(buffer)) is not None:  # it was assigned, not written to
                self._note_kept(known.flow, clean(name))
        self._buffers.clear()
        self._names.forget()
        self._known.clear()
        self._contents.clear()
        self._nodes.clear()
        self._memory = Memory()

    def look(self, tensor: Tensor, changed: set[int]) -> Flow:
        """Tell what flows in a tensor.

        Args:
            tensor: The tensor.
            changed: By ``id``, what the call that is looked at has written to.
        """
        if (named := self._named(tensor)) is not None:
            return named
        if (known := self._known.get(tensor)) is None:
            return self._found(tensor)
        is_changed = id(tensor) in changed  # by this call, which writes to it once at most
        if self._known.writes_to(tensor) > is_changed or known.version != self._contents_of(tensor).version:
            return self._changed(tensor, known.flow)
        if known.made_plainly and not is_changed and _is_made_out_of_sight(tensor):
            return self._emerged(tensor, known.flow)
        return known.flow

    def _named(self, tensor: Tensor) -> Flow | None:
        """Look for a tensor among the model's own."""
        if (name := self._names.find(tensor)) is not None:
            if is_sharded(tensor) and torch.is_grad_enabled():  # and no optimizer's step
                self._connectivity.sharded.add(name)
            return Flow(constant=True, weight=Weight(name, tuple(tensor.shape), tuple(range(tensor.ndim))))
        buffer = self._buffers.get(id(tensor))
        return buffer[1] if buffer is not None and buffer[0] is tensor else None

    def _changed(self, tensor: Tensor, flow: Flow) -> Flow:
        """Give up on what was changed through another view of the same memory."""
        self._give_up(self._contents_of(tensor), flow)
        return self._lost(tensor, "it is changed in place")

    def _give_up(self, contents: _Contents, *others: Flow) -> None:
        """Count all that a storage holds as read: its place may be another's by now."""
        for flow in (*others, *contents.flows):
            self._note_read(flow, "a change in place", "a view of it is read")
        contents.flows.clear()

    def _contents_of(self, tensor: Tensor) -> _Contents:
        """Look at what a tensor's storage holds."""
        place = storage_of(tensor)
        if (contents := self._contents.get(place)) is None:
            contents = self._contents[place] = _Contents(lifetime(tensor), next(self._versions))
        return contents

    def _found(self, tensor: Tensor) -> Flow:
        """Meet a tensor that no seen function returned: an input, or the work of code out of sight."""
        self._give_up(self._contents_of(tensor))
        node = _node_of(tensor)
        if self._names.is_gathered(tensor):
            self._name_parameters()
            if (named := self._named(tensor)) is not None:
                return named
        if node is None:
            return Flow(constant=True, derived=names) if (names := self._memory.names(tensor)) else Flow()
        if self._is_old(node):
            return Flow()
        if (flows := self._nodes.get(node_number(node))) is not None:
            return self._lost(tensor, "it was unpacked out of sight", flows)
        self._walk(node)
        return self._lost(tensor, "what feeds it is computed out of sight")

    def _emerged(self, tensor: Tensor, flow: Flow) -> Flow:
        """Meet what a custom autograd function puts out: calls in it were seen, but who knows whether all were."""
        self._walk(_node_of(tensor))
        return self._lost(tensor, "what feeds it is computed out of sight", [flow])

    def _lost(self, tensor: Tensor, why: str, read: Sequence[Flow] = ()) -> Flow:
        """Follow a tensor no further, and count what code out of sight has read."""
        self._note_hidden(read)
        found = Flow(why=why)
        self.remember(tensor, found)
        return found

    def _note_hidden(self, flows: Sequence[Flow]) -> None:
        for flow in flows:
            self._note_read(flow, _OUT_OF_SIGHT, f"{_OUT_OF_SIGHT} reads it")

    def _walk(self, node: Any) -> None:
        """Find what code out of sight has read, along the graph of the gradients."""
        left, seen = [node], {node}
        while left:
            node = left.pop()
            if hasattr(node, "variable"):
                self._note_hidden([self.look(node.variable, {id(node.variable)})])
                continue
            known = self._nodes.get(node_number(node))
            self._note_hidden(known or ())
            new = [] if known is not None else [one for one, _ in node.next_functions if one not in seen]
            new = [one for one in new if one is not None and not self._is_old(one)]
            left += new
            seen.update(new)
            if len(seen) > _MOST_NODES:
                raise RuntimeError("too much is computed out of sight")

    def _is_old(self, node: Any) -> bool:
        """Whether a node was there before the batch (a loss that is kept): it can have read nothing of the batch."""
        return node_number(node) < self._first_node

    def remember(self, tensor: Tensor, flow: Flow) -> None:
        """Note what flows in a tensor; in another network's parameter nothing does, whatever is copied into it."""
        if type(tensor) is nn.Parameter:
            flow = Flow(constant=True)
        contents, node = self._contents_of(tensor), _node_of(tensor)
        self._known.put(tensor, _Known(flow, node is None, contents.version))
        if flow.streams or flow.pending:
            contents.flows.append(flow)
        if node is not None:
            self._nodes.setdefault(node_number(node), []).append(flow)

    def written(self, outputs: Sequence[Tensor], in_place: bool) -> list[Tensor]:
        """List what a call has written to.

        Args:
            outputs: What it returned, before anything of the call is looked at.
            in_place: Whether it is known to write to that; else a tensor's own count of changes tells.
        """
        return [one for one in outputs if in_place or self._is_written(one)]

    def _is_written(self, tensor: Tensor) -> bool:
        return self._known.get(tensor) is not None and self._known.writes_to(tensor) > 0

    def write(self, call: TracedCall, written: Sequence[Tensor]) -> None:
        """Count changes in place, also for what shares the memory and does not count them, as behind ``.data``.

        What is written to the model's own memory is given up: there it outlives the batch, out of sight.

        Args:
            call: The call; all that it read was looked at.
            written: What it has written to.
        """
        names = sorted(frozenset[str]().union(*map(self._memory.names, written)))
        for tensor in call.operands if names else ():
            self._note_kept(call.look(tensor), names[0])
        for tensor in written:
            self._contents_of(tensor).version = next(self._versions)

    def _note_kept(self, flow: Flow, name: str) -> None:
        """Count what a tensor of the model holds of activations as read."""
        kept = Flow(flow.streams, pending=flow.pending)
        self._note_read(kept, f"the tensor `{name}`", f"the tensor `{name}` keeps it")

    def _note_read(self, flow: Flow, before: str, behind: str) -> None:
        """Count all of a flow as read where it cannot be accounted for."""
        self._connectivity.note_unaccounted((*unaccounted_reads(flow, before, behind), *flow.pending))


def _next_node() -> int:
    """Number the next node of autograd's graph, at the cost of one that is dropped."""
    with torch.enable_grad():
        return node_number(torch.zeros((), requires_grad=True, device="cpu").view(()).grad_fn) + 1


def _node_of(tensor: Tensor) -> Any:
    """Return the node of autograd's graph that made a tensor.

    None also for a view made without gradients of what was written to since (``bias[:3] -= 1`` behind a step), of which
    torch refuses to tell it.
    """
    with suppress(RuntimeError):
        return tensor.grad_fn
    return None


def _is_made_out_of_sight(tensor: Tensor) -> bool:
    """Whether a function of autograd, made by hand, returned it; those of torch run what is seen, or nothing."""
    node = _node_of(tensor)
    return node is not None and type(node).__name__ not in _IN_SIGHT
