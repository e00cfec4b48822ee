"""Gradients as a proof of life: what has one at an optimizer step, fired somewhere in that batch.

Where a rectifier is the only reader of its input, the gradient of what is added to that input passes through the
rectifier alone, and is zero for a unit that fired on no sample. A gradient that is not zero therefore clears a unit, on
every training batch and on all ranks at once; one that is zero convicts nobody, as behind a branch that starts at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.parameters import tensors_of
from lightning_deadrelu.model.rectifiers import COMPETITIONS
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics import Totals
from lightning_deadrelu.statistics.totals import NAN

KINDS = frozenset({"relu", "relu6", "hardtanh", "threshold"}) | COMPETITIONS
"""The rectifiers without any gradient at the hinge and below; ``clamp`` and ``maximum`` share it out at a tie.

A ``jumprelu`` may have a derivative of its own there, by which its threshold learns.
"""


class GradientRows(NamedTuple):
    """A parameter, and which of its entries make one row: a bias's entries, or the rows of a weight.

    Args:
        parameter: The parameter.
        dims: As in :class:`~lightning_deadrelu.model.slices.Slice`.
        shape: As there.
        sizes: The sizes of these dimensions.
        nothing: What stands in for a gradient that is not there, shape ``(rows,)``.
    """

    parameter: Tensor
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    nothing: Tensor

    @classmethod
    def of(cls, parameter: Tensor, dims: tuple[int, ...], shape: tuple[int, ...]) -> GradientRows:
        """Take the rows of a slice."""
        sizes = tuple((shape or tuple(parameter.shape))[dim] for dim in dims)
        return cls(parameter, dims, shape, sizes, parameter.detach().new_zeros(math.prod(sizes)))

    def read(self, gradient: Tensor) -> Tensor:
        """Reduce a gradient to the largest absolute value of each row, or any entry where a row has but one."""
        whole = gradient.reshape(self.shape) if self.shape else gradient
        rest = [dim for dim in range(whole.ndim) if dim not in self.dims]
        return (torch.linalg.vector_norm(whole, math.inf, rest) if rest else whole).flatten()

    @property
    def gradient(self) -> Tensor | None:
        """What there is now; None also where it is sparse."""
        gradient = self.parameter.grad
        return gradient if gradient is not None and gradient.layout is torch.strided else None


class Plan:
    """What is read at a step, and which units it speaks of; all of it is on the device.

    Args:
        parts: What is read, which of its rows feed units, and where the units of that site begin.
        device: Where the units are counted.
    """

    def __init__(self, parts: Sequence[tuple[GradientRows, Slice, int]], device: torch.device) -> None:
        self._sources = [source for source, _, _ in parts]
        self._unit, self._row = (one.to(device, non_blocking=True) for one in _pairs(parts))
        rows = sum(len(source.nothing) for source in self._sources)
        self._proved = torch.full((rows,), -1.0, device=device)
        self._moved = torch.zeros(rows, dtype=torch.bool, device=device)
        self._clean: Tensor | None = None  # who had no gradient when the batch began
        self._held: dict[tuple[int, ...], list[bool]] = {}

    def begin(self) -> None:
        """Start a training batch: nobody knows yet what its gradients start from."""
        self._clean = None

    def note_start(self) -> None:
        """Note before a backward who has no gradient: what is there afterwards comes from this batch alone."""
        values = self._read([True] * len(self._sources))
        clean = torch.ones_like(self._moved) if values is None else values == 0
        self._clean = clean if self._clean is None else self._clean | clean

    def step(self, optimizer: Optimizer, since: int, observed: bool) -> None:
        """Ask the gradients of what an optimizer holds, without waiting for the answer.

        Args:
            optimizer: About to step.
            since: Observations begun in the window.
            observed: Whether the forward behind these gradients was observed.
        """
        values = self._read(self._is_held(optimizer))
        if values is None:
            return
        proves = values / values == 1  # neither zero, nor infinite, nor not a number
        self._proved.masked_fill_(proves, since)
        if observed and self._clean is not None:
            self._moved |= proves & self._clean

    def flush(self, units: int) -> Tensor:
        """Return what was found since the last flush, as :meth:`UnitLiveness.record_gradient_proof` takes it.

        Args:
            units: Of all sites together.
        """
        found = torch.stack([self._proved, self._moved.to(self._proved)])[:, self._row]
        self._proved.fill_(-1.0)
        self._moved.zero_()
        return found.new_full((2, units), -1.0).scatter_reduce_(1, self._unit.expand(2, -1), found, "amax")

    @torch.no_grad()  # a gradient may have a graph of its own
    def _read(self, held: Sequence[bool]) -> Tensor | None:
        """Lay the rows of all gradients end to end; None where there are none."""
        gradients = [source.gradient if own else None for source, own in zip(self._sources, held, strict=True)]
        if all(gradient is None for gradient in gradients):
            return None
        pairs = zip(self._sources, gradients, strict=True)
        return torch.cat([source.nothing if grad is None else source.read(grad) for source, grad in pairs])

    def _is_held(self, optimizer: Optimizer) -> list[bool]:
        key = id(optimizer), *(len(group["params"]) for group in optimizer.param_groups)  # groups are added on the way
        if key not in self._held:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._held[key] = [id(source.parameter) in held for source in self._sources]
        return self._held[key]


def _pairs(parts: Sequence[tuple[GradientRows, Slice, int]]) -> Tensor:
    """List which unit each row speaks of, both numbered over all parts, shape ``(2, pairs)``."""
    found, start = [], 0
    for source, entries, first in parts:
        row = torch.zeros_like(entries.units)
        for size, index in zip(source.sizes, entries.index.unbind(1), strict=True):
            row = row * size + index
        found.append(torch.stack([entries.units + first, row + start]))
        start += len(source.nothing)
    return torch.cat(found, 1)


@dataclass
class GradientEvidenceState:
    """What gradient evidence knows between batches; sites go by their number.

    Args:
        slices: What feeds each site traced and nothing else.
        refuted: Whether gradients contradicted the forward at each site.
    """

    slices: dict[int, tuple[Slice, ...]]
    refuted: list[bool]


class GradientEvidence:
    """Ask gradients which units live, at every optimizer step; decide whom not to believe.

    Args:
        tell: Called with what a user has to know.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._plan: Plan | None = None
        self._key: Any = None  # what the plan was made from
        self._slices: dict[Site, tuple[Slice, ...]] = {}
        self._refuted: set[Site] = set()
        self._observed = self._stepped = self._announced = False  # in the present batch
        self._told = False  # whether it was said that there is nobody to ask

    def begin(self, watch: Watch, model: nn.Module, observed: bool, first: bool) -> None:
        """Start a batch: go on with what is traced by now.

        Args:
            watch: What watches the model.
            model: The model.
            observed: Whether this batch is.
            first: Whether it starts anew; False where it adds to the gradients of the batch before.
        """
        altered = frozenset(watch.substitutes), frozenset(watch.offsets)
        key = watch.tracer.batches, id(watch.liveness), len(watch.sites), len(self._refuted), altered
        if key != self._key:
            self.flush(watch)
            self._key, self._plan = key, self._new_plan(watch, model)
        self._observed = observed
        if first:
            self._stepped = self._announced = False
            if self._plan:
                self._plan.begin()

    def _new_plan(self, watch: Watch, model: nn.Module) -> Plan | None:
        self._slices |= watch.tracer.sole_readers()
        tensors, places = tensors_of(model), watch.layout.places
        parts = []
        for number, site in enumerate(watch.sites):
            if site in self._refuted or site.owner in watch.substitutes or number in watch.offsets:
                continue
            for one in self._slices.get(site, ()) if site.kind in KINDS and site.units else ():
                tensor = tensors.get(one.name)
                if tensor is not None and _is_plain(tensor, watch.device):
                    parts.append((GradientRows.of(tensor, one.dims, one.shape), one, places[number].start))
        if self._slices and not parts and not self._refuted:
            self._tell_once(_NOBODY)
        return Plan(parts, watch.device) if parts else None

    def _tell_once(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._tell(text)

    def note_start(self) -> None:
        """See :meth:`Plan.note_start`; to be called before each backward."""
        self._announced = True
        if self._plan and self._observed and not self._stepped:
            self._plan.note_start()

    def step(self, optimizer: Optimizer, since: int, automatic: bool) -> None:
        """See :meth:`Plan.step`; to be called before each step.

        Args:
            optimizer: About to step.
            since: Observations begun in the window.
            automatic: Whether only what comes before the first step is observed: a closure may be called again.
        """
        if self._plan and not self._announced:
            self._tell_once(_UNANNOUNCED)
        elif self._plan:
            self._plan.step(optimizer, since, self._observed and not self._stepped)
            self._stepped = automatic

    def flush(self, watch: Watch) -> None:
        """Hand what was proved to the counts; to be called before they are read, or their layout changes."""
        if self._plan:
            watch.liveness.record_gradient_proof(self._plan.flush(watch.layout.units))

    def without_refuted(self, totals: Totals, layout: Layout) -> Totals:
        """Take out what gradients say of sites where they contradict the forward: there they are never asked again.

        In an observed batch every sample passes the forward. Who had a gradient in one, and yet was silent in the whole
        window, owes it to something else: a penalty on the weights in the loss, or noise that is added to gradients.

        Args:
            totals: The window's counts, merged over ranks, on the CPU.
            layout: Of its sites.
        """
        denied = (totals.last_fired < 0) & (totals.nonfinite < NAN) & (totals.moved > 0)
        seen = totals.samples.sum(1) > 0
        found = [number for number, place in enumerate(layout.places) if seen[number] and denied[place].any()]
        if new := [number for number in found if layout.sites[number] not in self._refuted]:
            self._refuted |= {layout.sites[number] for number in new}
            self._tell(_REFUTED.format(", ".join(f"`{layout.names[number]}`" for number in new)))
        kept = replace(totals, maxima=totals.maxima.clone())
        for site, place in zip(layout, layout.places, strict=True):
            if site in self._refuted:
                kept.proved[place] = -1
        return kept

    def state(self, watch: Watch) -> GradientEvidenceState:
        """Return what a resumed run needs."""
        known = self._slices | watch.tracer.sole_readers()
        slices = {number: known[site] for number, site in enumerate(watch.sites) if site in known}
        return GradientEvidenceState(slices, [site in self._refuted for site in watch.sites])

    def restore(self, state: GradientEvidenceState, sites: Sequence[Site]) -> None:
        """Go on from what was saved.

        Args:
            state: What :meth:`state` returned.
            sites: Those of the watch then, in order.
        """
        self._slices = {sites[number]: found for number, found in state.slices.items()}
        self._refuted = {site for site, refuted in zip(sites, state.refuted, strict=True) if refuted}
        self._key = None


_NOBODY = (
    "`gradient_evidence=True` changes nothing: there is no site whose gradients prove life. It takes a `relu`, `relu6`,"
    " `hardtanh`, `threshold` or `topk` that alone reads what its parameters feed, and parameters that are not sharded."
)
_UNANNOUNCED = (
    "`gradient_evidence=True` takes no gradient for a proof of a backward that it is not told of: what a penalty in the"
    " loss adds could not be noticed. Call `self.manual_backward(loss)` in place of `loss.backward()`."
)
_REFUTED = (
    "gradients contradict the forward at {}: units that fired on no sample of a training batch have one all the same."
    " Something in the loss reads their parameters (an L2 or L1 term, for instance), or something adds to gradients."
    " They prove nothing there, and are not asked again. Use the optimizer's `weight_decay` in place of a term in the"
    " loss, or set `gradient_evidence=False`."
)


def _is_plain(tensor: Tensor, device: torch.device) -> bool:
    """Whether a parameter's gradient is a whole and dense tensor where the units are counted."""
    whole = isinstance(tensor, nn.Parameter) and not hasattr(tensor, "device_mesh")
    return whole and tensor.is_floating_point() and tensor.device == device
