"""Carry edits out, and take them back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_deadrelu.model.parameters import tensors_of
from lightning_deadrelu.remedies import Activation, Edits, SiteView
from lightning_deadrelu.repair.activation_swap import records, rectifiers, reinstate_, substitute_
from lightning_deadrelu.repair.bias_offset import BiasOffset
from lightning_deadrelu.repair.edit_schedule import EditSchedule, ScheduleState
from lightning_deadrelu.repair.lift import ScheduledLift
from lightning_deadrelu.repair.restore_activations import apply_record
from lightning_deadrelu.repair.scheduled_edit import ScheduledEdit
from lightning_deadrelu.repair.slope_ramp import SlopeRamp
from lightning_deadrelu.repair.training_context import TrainingContext
from lightning_deadrelu.repair.wake_up import PushProbe, ScheduledPush
from lightning_deadrelu.repair.writer import Overwritten, write_
from lightning_deadrelu.statistics import LivenessReport


@dataclass
class EditorState:
    """What a resumed editor needs.

    Args:
        schedule: Edits under way.
        earlier: By site whose activation the last edit exchanged, what stood in the place of its rectifier before, as
            :func:`~lightning_deadrelu.repair.activation_swap.records` lists it; None for the rectifier itself.
    """

    schedule: ScheduleState = field(default_factory=ScheduleState)
    earlier: dict[str, Any] = field(default_factory=dict)


class Editor:
    """Write what remedies propose into a model, its optimizers and its forward."""

    def __init__(self, context: TrainingContext) -> None:
        self._context = context
        probe = context.watch.probe
        push_probe = PushProbe(context.model, probe.unit_dims, lambda: probe.router.observes())
        self.schedule = EditSchedule(context.model, push_probe)
        """Edits under way."""
        self._earlier: dict[str, Any] = {}

    def apply(self, edits: Edits, view: SiteView) -> Overwritten:
        """Carry out what is proposed for a site; all of it, or nothing.

        Returns:
            What was overwritten.
        """
        context, name = self._context, view.report.name
        alive = ~view.report.silent & ~view.report.frozen
        live = [one.of(alive) for one in (*view.attribution.incoming, *view.attribution.outgoing)]
        overwritten = write_(edits.writes, context.model, context.optimizers, live)
        try:
            self._earlier.pop(name, None)
            for edit in self._scheduled(edits, view):
                self.schedule.add(edit)
            if edits.activation and edits.activation.is_for_good:
                self._exchange(edits.activation, name)
            self.mark_substitutes()
        except Exception:
            overwritten.put_back()
            self.take_back(name)
            raise
        return overwritten

    def _scheduled(self, edits: Edits, view: SiteView) -> Iterator[ScheduledEdit]:
        """Make the edits that take many batches."""
        name, outlet = view.report.name, view.attribution.outlet
        if edits.lift:
            yield ScheduledLift(site=name, steps=edits.lift.steps, rises=edits.lift.rises)
        if edits.push:
            yield ScheduledPush(site=name, steps=edits.push.steps, push=edits.push, place=self._context.site(name))
        if edits.warmth and outlet:
            gamma, steps = edits.warmth
            yield BiasOffset(
                site=name, steps=steps, path=outlet.path, values=gamma, channels=outlet.channels, dim=outlet.dim
            )
        ramp = edits.activation
        if ramp and ramp.slopes is not None and not ramp.is_for_good:
            path, dims = self._context.site(name).owner, self._dims(name)
            yield SlopeRamp(site=name, steps=ramp.steps, path=path, values=ramp.slopes, dims=dims)

    def _dims(self, site: str) -> tuple[int, ...]:
        return self._context.watch.dims[self._context.number(site)]

    def _exchange(self, activation: Activation, name: str) -> None:
        """Exchange an activation for good."""
        model, path, slopes = self._context.model, self._context.site(name).owner, activation.slopes
        self._earlier[name] = earlier = next((one for one in records(model) if one["path"] == path), None)
        if slopes is not None and earlier and earlier["slopes"] is not None:
            slopes = slopes.maximum(earlier["slopes"])  # units that were edited before keep theirs
        substitute_(model, path, activation.kind, slopes, self._dims(name))

    def end_woken_pushes(self, report: LivenessReport) -> None:
        """Let go of sites that fire as they are meant to."""
        busy = self.schedule.sites
        self.schedule.end_pushes({site.name: site.firing_rate for site in report.sites if site.name in busy})

    def advance(self) -> None:
        """Go on with all that takes many batches, behind an optimizer step."""
        if self.schedule.advance():
            self.mark_substitutes()

    def broadcast_lifted(self) -> None:
        """Have on all ranks what rank 0 has lifted, after some rank could not do so."""
        tensors = tensors_of(self._context.model)
        for name in self._context.ranks.union(self.schedule.unsettled):
            states = (optimizer.state.get(tensors[name], {}) for optimizer in self._context.optimizers)
            held = (value for state in states for value in state.values())
            alike = (one for one in held if isinstance(one, Tensor) and one.shape == tensors[name].shape)
            self._context.ranks.share([tensors[name], *alike])

    def take_back(self, site: str) -> str:
        """Undo what the last edit of a site put into the forward.

        Returns:
            What was taken back, in words; empty where there was nothing.
        """
        undone = [edit.undone for edit in self.schedule.drop([site])]
        if site in self._earlier:
            earlier = self._earlier.pop(site)
            self.reinstate(site)
            if earlier is not None:
                apply_record(self._context.model, earlier)
            undone.append("the activation before was put back")
        self.mark_substitutes()
        return " and ".join(dict.fromkeys(undone))

    def reinstate(self, site: str) -> None:
        """Put the rectifier of a site back where another activation stands."""
        path = self._context.site(site).owner
        reinstate_(self._context.model, {record["path"] for record in records(self._context.model)} - {path})
        self._earlier.pop(site, None)
        self.mark_substitutes()

    def mark_substitutes(self) -> None:
        """Have the modules judged by what they stand for."""
        self._context.watch.substitutes = rectifiers(self._context.model) | self.schedule.rectifiers

    @property
    def state(self) -> EditorState:
        """What is under way, and what may have to be taken back."""
        return EditorState(self.schedule.state, dict(self._earlier))

    def restore(self, state: EditorState) -> None:
        """Go on where :attr:`state` was read."""
        self.schedule.restore(state.schedule)
        self._earlier = dict(state.earlier)
        self.mark_substitutes()
