"""Carry edits out, and take them back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_deadrelu.model.parameters import tensors_of
from lightning_deadrelu.model.sharding import reshard_
from lightning_deadrelu.remedies import Activation, Edits, SiteView
from lightning_deadrelu.repair.activation_swap import records, rectifiers, reinstate_, substitute_
from lightning_deadrelu.repair.forward_edits import ForwardEdits, ForwardEditsState
from lightning_deadrelu.repair.lift import Lifting, Lifts
from lightning_deadrelu.repair.restore_activations import apply_record
from lightning_deadrelu.repair.subject import Subject
from lightning_deadrelu.repair.wake_up import WakeUps, Waking
from lightning_deadrelu.repair.writer import Overwritten, write_
from lightning_deadrelu.statistics import LivenessReport


@dataclass
class EditorState:
    """What a resumed editor needs.

    Args:
        forward: Edits of the forward that are under way.
        lifts: Lifts that are under way, by site.
        wake_ups: Pushes that are under way, by site.
        earlier: By site whose activation the last edit exchanged, what stood in the place of its rectifier before, as
            :func:`~lightning_deadrelu.repair.activation_swap.records` lists it; None for the rectifier itself.
    """

    forward: ForwardEditsState
    lifts: dict[str, Lifting] = field(default_factory=dict)
    wake_ups: dict[str, Waking] = field(default_factory=dict)
    earlier: dict[str, Any] = field(default_factory=dict)


class Editor:
    """Write what remedies propose into a model, its optimizers and its forward."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.forward = ForwardEdits()
        self.lifts = Lifts()
        self.wake_ups = WakeUps(subject.model, subject.watch.probe.unit_dims)
        self._earlier: dict[str, Any] = {}

    def apply(self, edits: Edits, view: SiteView) -> Overwritten:
        """Carry out what is proposed for a site; all of it, or nothing.

        Returns:
            What was overwritten.
        """
        subject, name = self._subject, view.report.name
        alive = ~view.report.silent & ~view.report.frozen
        live = [one.of(alive) for one in (*view.attribution.incoming, *view.attribution.outgoing)]
        overwritten = write_(edits.writes, subject.model, subject.optimizers, live)
        try:
            self._earlier.pop(name, None)
            if edits.lift:
                self.lifts.add(name, edits.lift)
            if edits.push:
                self.wake_ups.add(name, edits.push)
            if edits.warmth and view.attribution.outlet:
                self.forward.warm(subject.model, name, view.attribution.outlet, edits.warmth)
            if edits.activation:
                self._change_activation(edits.activation, name)
            self.mark_substitutes()
        except Exception:
            overwritten.put_back()
            self.take_back(name)
            raise
        return overwritten

    def _change_activation(self, activation: Activation, name: str) -> None:
        kind, slopes, steps = activation
        model, path = self._subject.model, self._subject.site(name).owner
        dims = self._subject.watch.dims[self._subject.number(name)]
        if steps and slopes is not None:
            self.forward.ramp(model, name, path, slopes, dims, steps)
            return
        self._earlier[name] = earlier = next((one for one in records(model) if one["path"] == path), None)
        if slopes is not None and earlier and isinstance(earlier["slopes"], Tensor):
            slopes = slopes.maximum(earlier["slopes"])  # units that were edited before keep theirs
        substitute_(model, path, kind, slopes, dims)

    @property
    def busy(self) -> list[str]:
        """Names of the sites with an edit under way."""
        return list(dict.fromkeys([*self.forward.sites, *self.lifts.sites, *self.wake_ups.sites]))

    def begin(self) -> None:
        """Let all that is under way into a batch, before its forward."""
        self.forward.begin()
        layout = self._subject.watch.layout
        self.wake_ups.begin(dict(zip(layout.sites, layout.names, strict=True)))

    def pause(self) -> None:
        """Take it out of the model again; harmless when it is out."""
        self.forward.end()
        self.wake_ups.end()

    def settle(self, report: LivenessReport) -> None:
        """Let go of sites that fire as they are meant to."""
        rates = {site.name: site.firing_rate for site in report.sites if site.name in self.wake_ups.sites}
        self.wake_ups.settle(rates)

    def advance(self) -> None:
        """Go on with all that takes many batches, behind an optimizer step."""
        self.wake_ups.advance()
        if self.lifts.sites:
            reshard_(self._subject.model)
            self.lifts.advance(tensors_of(self._subject.model))
        if self.forward.advance():
            self.mark_substitutes()

    def share_lifted(self) -> None:
        """Have on all ranks what rank 0 has lifted, after some rank could not do so."""
        tensors = tensors_of(self._subject.model)
        for name in self._subject.ranks.union(self.lifts.unsettled):
            states = (optimizer.state.get(tensors[name], {}) for optimizer in self._subject.optimizers)
            held = (value for state in states for value in state.values())
            alike = (one for one in held if isinstance(one, Tensor) and one.shape == tensors[name].shape)
            self._subject.ranks.share([tensors[name], *alike])

    def stop(self) -> list[str]:
        """Stop all that is under way where it is, and name the sites that were not done."""
        busy = self.busy
        self.forward.drop(busy)
        self.lifts.drop(busy)
        self.wake_ups.drop(busy)
        return busy

    def take_back(self, site: str) -> str:
        """Undo what the last edit of a site put into the forward.

        Returns:
            What was taken back, in words; empty where there was nothing.
        """
        stopped, dropped = self.lifts.drop([site]), self.forward.drop([site])
        self.wake_ups.drop([site])
        if exchanged := site in self._earlier:
            earlier = self._earlier.pop(site)
            self.reinstate(site)
            if earlier is not None:
                apply_record(self._subject.model, earlier)
        self.mark_substitutes()
        what = {"its lift was stopped": bool(stopped), "its term was dropped": bool(dropped)}
        what["the activation before was put back"] = exchanged
        return " and ".join(words for words, done in what.items() if done)

    def reinstate(self, site: str) -> None:
        """Put the rectifier of a site back where another activation stands."""
        path = self._subject.site(site).owner
        reinstate_(self._subject.model, {record["path"] for record in records(self._subject.model)} - {path})
        self._earlier.pop(site, None)
        self.mark_substitutes()

    def mark_substitutes(self) -> None:
        """Have the modules judged by what they stand for."""
        self._subject.watch.substitutes = rectifiers(self._subject.model) | self.forward.rectifiers

    @property
    def state(self) -> EditorState:
        """What is under way, and what may have to be taken back."""
        return EditorState(self.forward.state, self.lifts.state, self.wake_ups.state, dict(self._earlier))

    def restore(self, state: EditorState) -> None:
        """Go on where :attr:`state` was read."""
        self.forward.restore(state.forward, self._subject.model)
        self.lifts.restore(state.lifts)
        self.wake_ups.restore(state.wake_ups)
        self._earlier = dict(state.earlier)
        self.mark_substitutes()
