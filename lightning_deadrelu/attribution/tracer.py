"""Follow one batch from layers to sites and from sites to readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_deadrelu.attribution.connectivity import Connectivity
from lightning_deadrelu.attribution.labels import (
    Flow,
    Outcome,
    Stream,
    TracedCall,
    UnaccountedRead,
    numbered,
    unaccounted_reads,
)
from lightning_deadrelu.attribution.propagation import follow
from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.attribution.tensor_flows import TensorFlows
from lightning_deadrelu.model.rectifiers import COMPETITIONS, SELECTIONS, Rectifier
from lightning_deadrelu.model.sites import Site, own_name
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.model.torch_calls import (
    CHOICES,
    IDENTITIES,
    RESHAPES,
    makes_zeros,
    plain_name,
    tensors_in,
    writes_in_place,
)

_CARRYING_CHOICES = CHOICES | IDENTITIES | RESHAPES | {"relu", "scatter"}
"""Functions between a choice and the call that ends a selection: until then it is open whether it is one."""


class Tracer:
    """Takes every call of a torch function in one batch, and knows afterwards who feeds and reads each unit.

    Labels are kept on the CPU and no value of an activation is looked at, so that nothing waits for the device.

    Numbers that the model takes out of tensors (``item``, ``tolist``, ``numpy``, ``float``, ``bool``) are out of sight,
    and so is what it keeps from one batch to the next outside its parameters and buffers.

    Args:
        model: Whose parameters to name. Its tensors are never changed.

    Example:
        >>> import torch
        >>> from lightning_deadrelu.observe.probe import Probe
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> probe = Probe(model, lambda *call: None)
        >>> tracer = Tracer(model)
        >>> handle = probe.router.subscribe_calls(tracer)
        >>> with probe:
        ...     _ = model(torch.zeros(5, 3))
        >>> (attribution,) = tracer.attributions().values()
        >>> [(one.name, one.role) for one in (*attribution.incoming, *attribution.outgoing)]
        [('0.weight', 'weight'), ('0.bias', 'bias'), ('2.weight', 'reader')]
    """

    def __init__(self, model: nn.Module, name_of: Callable[[Site], str] = own_name) -> None:
        self._model, self._name_of = model, name_of
        self.restore(Connectivity())
        self.error: Exception | None = None
        """What went wrong; nothing is attributed from then on."""
        self.batches = 0
        """Batches begun so far."""

    def begin(self) -> None:
        """Look at the model's tensors before a batch."""
        self.end()
        self.batches += 1
        try:
            self._flows.begin()
        except Exception as error:
            self.error = error

    def end(self) -> None:
        """Let go of the batch, but for what the model keeps of it."""
        self._flows.end()

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
        """Say, for every site met so far, which entries feed and read its units; of none after a failure."""
        return {} if self.failure else self.known.attributions()

    @property
    def state(self) -> Connectivity | None:
        """What is known, for a run that goes on; None where nothing is attributed."""
        return None if self.failure else self.known

    def restore(self, known: Connectivity) -> None:
        """Go on from what was known."""
        known.name_of = self._name_of
        self.known = known
        """What has been seen."""
        self._flows = TensorFlows(self._model, known)

    def sole_readers(self) -> dict[Site, tuple[Slice, ...]]:
        """Say, for every site met so far, which entries feed its units and nothing else."""
        return {} if self.failure else self.known.sole_readers()

    @property
    def failure(self) -> str:
        """Why nothing is attributed, not even a site that was never met; empty if something is."""
        return f"it could not be traced: {type(self.error).__name__}: {self.error}" if self.error is not None else ""

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
        written = self._flows.written(outputs, writes_in_place(name, kwargs))
        changed = {id(one) for one in written}

        looked: dict[int, Flow] = {}

        def look(value: Any) -> Flow:
            if not isinstance(value, Tensor) or nn.parameter.is_lazy(value):  # of which nothing may be asked
                return Flow()
            if (flow := looked.get(id(value))) is None:
                flow = looked[id(value)] = self._flows.look(value, changed)
            return flow

        path, module = frame
        call = TracedCall(plain_name(name), args, kwargs, outputs, func=func, look=look, path=path, module=module)
        outcome = self._rectify(call, *met) if met else self._follow(call)
        trained = any(out.requires_grad for out in outputs) or name == "__setitem__"
        chooses = call.name in CHOICES
        new = [replace(read, chooses=True) for read in outcome.unaccounted] if chooses else outcome.unaccounted
        inherited = [read for tensor in call.operands for read in look(tensor).pending]
        pending = tuple(dict.fromkeys((*inherited, *new)))
        if met and met[1].kind in SELECTIONS:
            pending = tuple(read for read in pending if not read.chooses)
        if trained:
            kept = [read for read in pending if read.chooses] if call.name in _CARRYING_CHOICES else []
            self.known.note_unaccounted(read for read in pending if read not in kept)
            pending = tuple(kept)
        self._flows.write(call, written)
        for out, flow in zip(outputs, outcome.flows, strict=True):
            self._flows.remember(out, self._pruned(flow)._replace(pending=pending))

    def _follow(self, call: TracedCall) -> Outcome:
        is_empty = not any(out.numel() for out in call.outputs)  # an expert without tokens reads nothing
        if is_empty or makes_zeros(call.name, call.args):
            return Outcome((Flow(constant=True, zero=True),) * len(call.outputs))
        if any(operand.is_nested for operand in (*call.operands, *call.outputs)):
            call.name = f"{call.name} of nested tensors"
        outcome = follow(call)
        self.known.note(outcome)
        for read in outcome.reads:
            self._note_reader(read.rows.name, call)
        return outcome

    def _note_reader(self, name: str, call: TracedCall) -> None:
        """Ask whether what a reader puts out gets a gradient; the hook changes none, and goes with the graph."""
        weights = [one for one in call.operands if (weight := call.look(one).weight) and weight.name == name]
        if not any(weight.requires_grad for weight in weights):
            self.known.frozen.add(name)
        if call.output.requires_grad:
            call.output.register_hook(partial(self.known.note_gradient, name))

    def _rectify(self, call: TracedCall, site: Site, rectifier: Rectifier, dims: tuple[int, ...], x: Tensor) -> Outcome:
        """Close what feeds a site, and open what it feeds."""
        units = numbered([call.output.shape[dim] for dim in sorted(dims)], sorted(dims), call.output.ndim)
        flow = call.look(x)
        unaccounted: list[UnaccountedRead] = []
        if rectifier.fused:
            unaccounted = [
                read
                for tensor in call.operands
                for read in unaccounted_reads(call.look(tensor), f"`{call.name}`", f"`{call.name}` reads it")
            ]
            flow = Flow(why="it is fused with its layer")
        else:
            unaccounted += unaccounted_reads(flow._replace(streams=()), f"`{call.name}`", "")
        self.known.feed(site, flow, units)
        nonzero = _nonzero_when_silent(call, rectifier)
        self.known.nonzero_when_silent[site] = nonzero  # a swap may be over by now
        if nonzero:
            unaccounted += unaccounted_reads(flow._replace(streams=tuple(flow.behind)), "", f"`{call.name}` reads it")
        behind = () if nonzero else tuple(flow.behind)
        return Outcome((Flow((*behind, Stream(site, units))),), tuple(unaccounted))

    def _pruned(self, flow: Flow) -> Flow:
        """Follow no further what is refused already."""
        refused = [stream for stream in flow.streams if self.known.is_refused(stream)]
        if not refused:
            return flow
        kept = tuple(stream for stream in flow.streams if not any(stream is other for other in refused))
        lost = [stream for stream in refused if not isinstance(stream.origin, Site) and stream.origin.role != "outlet"]
        return flow._replace(streams=kept, why=flow.why or (self.known.refusal_of(lost[0]) if lost else ""))


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return tensors_in(output) if isinstance(output, (list, tuple)) else []


def _nonzero_when_silent(call: TracedCall, rectifier: Rectifier) -> str:
    """Say why the output changes with a unit that does not fire; empty if it does not."""
    if rectifier.kind in COMPETITIONS:
        return "a unit that is chosen takes the place of another"
    if call.name == "substitute":
        return "a silent unit puts out something since its activation was swapped"
    value = call.argument(2, "value", 0.0) if rectifier.kind == "threshold" else float(rectifier.kind == "softplus")
    return f"a silent unit puts out {value:g}, not 0" if value else ""
