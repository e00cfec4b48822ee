"""Follow one batch from layers to sites and from sites to readers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deadrelu.attribution.labels import Flow, Outcome, Stream, TracedCall, UnaccountedRead, Weight, leaks_of
from lightning_deadrelu.attribution.ledger import Connectivity, merged
from lightning_deadrelu.attribution.propagation import follow
from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.attribution.storage import Memory, storage_of
from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sharding import is_sharded
from lightning_deadrelu.model.sites import Site, clean
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.model.torch_calls import (
    ParameterNames,
    TensorTable,
    makes_zeros,
    node_number,
    plain_name,
    tensors_in,
    writes_in_place,
)

_MOST_NODES = 10_000
_OUT_OF_SIGHT = "code out of sight"
_IN_SIGHT = frozenset({"CheckpointFunctionBackward", "RegisterPostBackwardFunctionBackward"})  # checkpoints, and FSDP2


class Tracer:
    """Takes every call of a torch function in one batch, and knows afterwards who feeds and reads each unit.

    Labels are kept on the CPU and no value of an activation is looked at, so that nothing waits for the device.

    Numbers that the model takes out of tensors (``item``, ``tolist``, ``numpy``, ``float``, ``bool``) are out of sight,
    and so is what it keeps from one batch to the next outside its parameters and buffers.

    Args:
        model: Whose parameters to name. Its tensors are never changed.

    Example:
        >>> from lightning_deadrelu.observe.probe import Probe
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> probe = Probe(model, lambda *call: None)
        >>> tracer = Tracer(model)
        >>> handle = probe.subscribe_calls(tracer)
        >>> with probe:
        ...     _ = model(torch.zeros(5, 3))
        >>> (attribution,) = tracer.attributions().values()
        >>> [(one.name, one.role) for one in (*attribution.incoming, *attribution.outgoing)]
        [('0.weight', 'weight'), ('0.bias', 'bias'), ('2.weight', 'reader')]
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._ledger = Connectivity()
        self._names = ParameterNames(model)
        self._buffers: dict[int, tuple[Tensor, Flow]] = {}
        self._known: TensorTable[tuple[Flow, bool]] = TensorTable()  # and whether autograd knew of it then
        self._stored: dict[int, list[tuple[weakref.ref[Tensor], Flow]]] = {}
        self._nodes: dict[int, list[Flow]] = {}
        self._memory = Memory()
        self.error: Exception | None = None
        """What went wrong; nothing is attributed from then on."""
        self.batches = 0
        """Batches begun so far."""

    def begin(self) -> None:
        """Look at the model's tensors before a batch."""
        self.end()
        self.batches += 1
        try:
            self._name_tensors()
        except Exception as error:
            self.error = error

    def _name_tensors(self) -> None:
        for name, buffer in self._model.named_buffers():
            self._buffers[id(buffer)] = buffer, Flow(constant=True, buffer=clean(name))
            self._memory.add(clean(name), buffer)
        self._names = ParameterNames(self._model)
        self._name_parameters()

    def _name_parameters(self) -> None:
        for name, tensor in self._names.look():
            if not nn.parameter.is_lazy(tensor):
                self._memory.add(name, tensor)
        self._ledger.sharing.update(self._memory.sharing())

    def end(self) -> None:
        """Let go of the batch, but for what the model keeps of it."""
        for name, buffer in self._model.named_buffers() if self._known else ():
            if (entry := self._known.get(buffer)) is not None:  # it was assigned, not written to
                self._spill(entry[0], clean(name))
        self._buffers.clear()
        self._names.forget()
        self._known.clear()
        self._stored.clear()
        self._nodes.clear()
        self._memory = Memory()

    def see(
        self,
        name: str,
        func: Callable[..., Any] | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        frame: tuple[str, nn.Module | None] = ("", None),
        met: tuple[Site, Rectifier, tuple[int, ...], Tensor] | None = None,
    ) -> None:
        """Take one call; an error stops the tracing and nothing else.

        Args:
            name: Of the function.
            func: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned.
            frame: The path of the module whose forward is running, and the module.
            met: The site, its rectifier, the dimensions of its units and its input, where the call is a site's.
        """
        if self.error is not None:
            return
        try:
            self._see(name, func, args, kwargs, output, frame, met)
        except Exception as error:
            self.error = error
            self.end()

    def attributions(self) -> dict[Site, Attribution]:
        """Say, for every site met so far, which entries feed and read its units."""
        known = self._ledger.attributions()
        return merged({}, known, self.failure) if self.failure else known

    def sole_readers(self) -> dict[Site, tuple[Slice, ...]]:
        """Say, for every site met so far, which entries feed its units and nothing else."""
        return {} if self.failure else self._ledger.sole_readers()

    @property
    def failure(self) -> str:
        """Why nothing is attributed, not even a site that was never met; empty if something is."""
        return f"it could not be traced: {type(self.error).__name__}: {self.error}" if self.error is not None else ""

    @property
    def used(self) -> frozenset[str]:
        """Names of the parameters and buffers that were seen in use."""
        return self._ledger.used

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the parameters and buffers of layers and norms, in the order of their first use."""
        return self._ledger.order

    def other_readers(self, name: str) -> frozenset[str]:
        """Name the functions that read what a layer's weight puts out, where they read it not unit by unit."""
        return self._ledger.other_readers(name)

    def _see(
        self,
        name: str,
        func: Callable[..., Any] | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        frame: tuple[str, nn.Module | None],
        met: tuple[Site, Rectifier, tuple[int, ...], Tensor] | None,
    ) -> None:
        outputs = [args[0]] if name == "__setitem__" else _tensors(output)
        if not outputs:
            return
        changed = {id(out) for out in outputs}

        def look(value: Any) -> Flow:
            return self._look(value, changed) if isinstance(value, Tensor) else Flow()

        path, module = frame
        call = TracedCall(plain_name(name), args, kwargs, outputs, func=func, look=look, path=path, module=module)
        if writes_in_place(name, kwargs):
            self._keep(call)
        outcome = self._rectify(call, *met) if met else self._follow(call)
        trained = any(out.requires_grad for out in outputs) or name == "__setitem__"
        pending = frozenset[UnaccountedRead]().union(*(look(tensor).pending for tensor in call.operands), outcome.leaks)
        if trained:
            self._ledger.leak(pending)
            pending = frozenset()
        for out, flow in zip(outputs, outcome.flows, strict=True):
            self._remember(out, self._pruned(flow)._replace(pending=pending))

    def _follow(self, call: TracedCall) -> Outcome:
        if makes_zeros(call.name, call.args) or not any(
            out.numel() for out in call.outputs
        ):  # an expert without tokens reads nothing
            return Outcome((Flow(constant=True, zero=True),) * len(call.outputs))
        if any(operand.is_nested for operand in (*call.operands, *call.outputs)):
            call.name = f"{call.name} of nested tensors"
        outcome = follow(call)
        self._ledger.note(outcome)
        return outcome

    def _keep(self, call: TracedCall) -> None:
        """Give up on what is written to the model's own memory: there it outlives the batch, out of sight."""
        names = sorted(frozenset[str]().union(*map(self._memory.names, call.outputs)))
        for tensor in call.operands if names else ():
            self._spill(call.look(tensor), names[0])

    def _spill(self, flow: Flow, name: str) -> None:
        """Count what a tensor of the model holds of activations as read."""
        spilt = leaks_of(Flow(flow.streams), f"the tensor `{name}`", f"the tensor `{name}` keeps it")
        self._ledger.leak((*spilt, *flow.pending))

    def _rectify(self, call: TracedCall, site: Site, rectifier: Rectifier, dims: tuple[int, ...], x: Tensor) -> Outcome:
        """Close what feeds a site, and open what it feeds."""
        units = _units(site, tuple(call.output.shape), dims)
        flow = call.look(x)
        leaks: list[UnaccountedRead] = []
        if rectifier.fused:
            leaks = [
                leak
                for tensor in call.operands
                for leak in leaks_of(call.look(tensor), f"`{call.name}`", f"`{call.name}` reads it")
            ]
            flow = Flow(why="it is fused with its layer")
        else:
            leaks += leaks_of(flow._replace(streams=()), f"`{call.name}`", "")
        self._ledger.feed(site, flow, units)
        mute = self._ledger.mute[site] = _not_mute(call, rectifier)  # a swap may be over by now
        if mute:
            leaks += leaks_of(flow._replace(streams=tuple(flow.behind)), "", f"`{call.name}` reads it")
        behind = () if mute else tuple(flow.behind)
        return Outcome((Flow((*behind, Stream(site, units))),), tuple(leaks))

    # -- tensors

    def _look(self, tensor: Tensor, changed: set[int]) -> Flow:
        if (named := self._named(tensor)) is not None:
            return named
        if (entry := self._known.get(tensor)) is None:
            return self._found(tensor)
        flow, made_plainly = entry
        if id(tensor) not in changed:
            if self._known.is_changed(tensor):
                return self._changed(tensor, flow)
            if made_plainly and _is_made_out_of_sight(tensor):
                return self._emerged(tensor, flow)
        return flow

    def _named(self, tensor: Tensor) -> Flow | None:
        """Look for a tensor among the model's own."""
        if (name := self._names.find(tensor)) is not None:
            if is_sharded(tensor) and torch.is_grad_enabled():  # and no optimizer's step
                self._ledger.sharded.add(name)
            return Flow(constant=True, weight=Weight(name, tuple(tensor.shape)))
        buffer = self._buffers.get(id(tensor))
        return buffer[1] if buffer is not None and buffer[0] is tensor else None

    def _changed(self, tensor: Tensor, flow: Flow) -> Flow:
        """Give up on what was changed through another view of the same memory."""
        held = self._stored.get(storage_of(tensor), ())
        for other in (flow, *(other for ref, other in held if ref() is not None)):  # its place may be another's by now
            self._ledger.leak(leaks_of(other, "a change in place", "a view of it is read"))
        found = Flow(why="it is changed in place")
        self._remember(tensor, found)
        return found

    def _found(self, tensor: Tensor) -> Flow:
        """Meet a tensor that no seen function returned: an input, or the work of code out of sight."""
        node = tensor.grad_fn
        if self._names.is_gathered(tensor):
            self._name_parameters()
            if (named := self._named(tensor)) is not None:
                return named
        if node is None:
            return Flow(constant=True, derived=names) if (names := self._memory.names(tensor)) else Flow()
        if node_number(node) in self._nodes:
            found = Flow(why="it was unpacked out of sight")
            for flow in self._nodes[node_number(node)]:
                self._ledger.leak(leaks_of(flow, _OUT_OF_SIGHT, f"{_OUT_OF_SIGHT} reads it"))
        else:
            self._walk(node)
            found = Flow(why="what feeds it is computed out of sight")
        self._remember(tensor, found)
        return found

    def _emerged(self, tensor: Tensor, flow: Flow) -> Flow:
        """Meet what a custom autograd function puts out: calls in it were seen, but who knows whether all were."""
        self._ledger.leak(leaks_of(flow, _OUT_OF_SIGHT, f"{_OUT_OF_SIGHT} reads it"))
        self._walk(tensor.grad_fn)
        found = Flow(why="what feeds it is computed out of sight")
        self._remember(tensor, found)
        return found

    def _walk(self, node: Any) -> None:
        """Find what code out of sight has read, along the graph of the gradients."""
        left, seen = [node], {node}
        while left:
            node = left.pop()
            if hasattr(node, "variable"):
                self._ledger.leak(leaks_of(self._look(node.variable, {id(node.variable)}), _OUT_OF_SIGHT, ""))
                continue
            known = self._nodes.get(node_number(node))
            for flow in known or ():
                self._ledger.leak(leaks_of(flow, _OUT_OF_SIGHT, f"{_OUT_OF_SIGHT} reads it"))
            new = [] if known is not None else [one for one, _ in node.next_functions if one not in seen]
            new = [one for one in new if one is not None]
            left += new
            seen.update(new)
            if len(seen) > _MOST_NODES:
                raise RuntimeError("too much is computed out of sight")

    def _pruned(self, flow: Flow) -> Flow:
        """Follow no further what is refused already."""
        spent = [stream for stream in flow.streams if self._ledger.is_spent(stream)]
        if not spent:
            return flow
        kept = tuple(stream for stream in flow.streams if not any(stream is other for other in spent))
        lost = [stream for stream in spent if not isinstance(stream.origin, Site) and stream.origin.role != "outlet"]
        return flow._replace(streams=kept, why=flow.why or (self._ledger.spent_reason(lost[0]) if lost else ""))

    def _remember(self, tensor: Tensor, flow: Flow) -> None:
        self._known.put(tensor, (flow, tensor.grad_fn is None))
        if flow.streams:
            self._stored.setdefault(storage_of(tensor), []).append((weakref.ref(tensor), flow))
        if (node := tensor.grad_fn) is not None:
            self._nodes.setdefault(node_number(node), []).append(flow)


def _is_made_out_of_sight(tensor: Tensor) -> bool:
    """Whether a function of autograd, made by hand, returned it; those of torch run what is seen, or nothing."""
    node = tensor.grad_fn
    return node is not None and type(node).__name__ not in _IN_SIGHT


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return tensors_in(output) if isinstance(output, (list, tuple)) else []


def _units(site: Site, shape: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    """Number the units where they are in the site's output."""
    own = {dim % len(shape) for dim in dims}
    sizes = [size if place in own else 1 for place, size in enumerate(shape)]
    return torch.arange(site.units, device="cpu").view(sizes)


def _not_mute(call: TracedCall, rectifier: Rectifier) -> str:
    """Say why a unit that does not fire puts out something all the same; empty if it does not."""
    if call.name == "substitute":
        return "a silent unit puts out something since its activation was swapped"
    value = call.argument(2, "value", 0.0) if rectifier.kind == "threshold" else float(rectifier.kind == "softplus")
    return f"a silent unit puts out {value:g}, not 0" if value else ""
