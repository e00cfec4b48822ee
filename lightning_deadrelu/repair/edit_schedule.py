"""All edits under way that take many batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from lightning_deadrelu.model.parameters import tensors_of
from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sharding import reshard_
from lightning_deadrelu.repair.bias_offset import BiasOffset
from lightning_deadrelu.repair.lift import ScheduledLift
from lightning_deadrelu.repair.scheduled_edit import ScheduledEdit
from lightning_deadrelu.repair.slope_ramp import SlopeRamp
from lightning_deadrelu.repair.wake_up import PushProbe, ScheduledPush

Kind = TypeVar("Kind", bound=ScheduledEdit)


@dataclass
class ScheduleState:
    """What is under way, by kind."""

    pushes: list[ScheduledPush] = field(default_factory=list)
    lifts: list[ScheduledLift] = field(default_factory=list)
    offsets: list[BiasOffset] = field(default_factory=list)
    ramps: list[SlopeRamp] = field(default_factory=list)


class EditSchedule:
    """Edits of a model that take many batches.

    What enters the forward is there between :meth:`begin` and :meth:`end` alone: what is copied, validated, averaged or
    exported between two training batches is the model itself.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> schedule, gamma = EditSchedule(model), torch.tensor([0.0, 5.0])
        >>> schedule.add(BiasOffset(site="1", steps=2, path="0", values=gamma, channels=torch.arange(2), dim=-1))
        >>> schedule.begin(); schedule.offsets["1"].value; schedule.end(); schedule.advance()
        tensor([0., 5.])
        []
        >>> schedule.offsets["1"].value, schedule.advance()
        (tensor([0.0000, 2.5000]), ['1'])
    """

    def __init__(self, model: nn.Module, push_probe: PushProbe | None = None) -> None:
        self._model = model
        self._push_probe = push_probe or PushProbe(model)
        self._edits: list[ScheduledEdit] = []
        self.unsettled: set[str] = set()
        """Names of the parameters that were lifted since all ranks last met without a failure."""

    @property
    def sites(self) -> list[str]:
        """The names of the sites with an edit under way."""
        return list(dict.fromkeys(edit.site for edit in self._edits))

    def _of_kind(self, kind: type[Kind]) -> list[Kind]:
        return [edit for edit in self._edits if isinstance(edit, kind)]

    @property
    def offsets(self) -> dict[str, BiasOffset]:
        """The constants that are added to units' inputs, by site."""
        return {edit.site: edit for edit in self._of_kind(BiasOffset)}

    @property
    def rectifiers(self) -> dict[str, Rectifier]:
        """By path, what the modules stand for that pass for rectifiers in training batches."""
        return {edit.path: edit.rectifier for edit in self._of_kind(SlopeRamp) if edit.is_in_place}

    def add(self, edit: ScheduledEdit) -> None:
        """Begin an edit of a site that has none of its kind.

        Raises:
            ValueError: The model lacks what it changes.
        """
        edit.attach(self._model)
        self._edits.append(edit)
        if isinstance(edit, ScheduledLift):
            self.unsettled |= edit.names

    def begin(self) -> None:
        """Let all into the forward, before a training batch."""
        for edit in self._edits:
            edit.enter()
        self._push_probe.arm(self._of_kind(ScheduledPush))

    def before_backward(self) -> None:
        """Note that the forward is over."""
        self._push_probe.pause()

    def end(self) -> None:
        """Take all out again, after a training batch; harmless when it is out."""
        with ExitStack() as stack:  # what cannot be taken out keeps no other in
            stack.callback(self._push_probe.disarm)
            for edit in self._edits:
                stack.callback(edit.leave)

    def advance(self) -> list[str]:
        """Go on by one training batch, behind the optimizer step, on every rank.

        Returns:
            The names of the sites with an edit that is over.

        Raises:
            RuntimeError: The calls of rectifiers could not be followed.
        """
        tensors: Mapping[str, Tensor] = {}
        if self._of_kind(ScheduledLift):
            reshard_(self._model)
            tensors = tensors_of(self._model)
        for edit in self._edits:
            edit.advance(tensors)
        over = [edit.site for edit in self._remove(lambda edit: edit.is_over)]
        self._push_probe.check()  # last: what needs no probe goes on all the same
        return over

    def mark_in_step(self) -> None:
        """Note that no rank has failed so far, so that all have lifted alike."""
        self.unsettled = set().union(*(lift.names for lift in self._of_kind(ScheduledLift)))

    def end_pushes(self, firing_rates: Mapping[str, Tensor]) -> list[str]:
        """End the pushes of sites that fire as they are meant to.

        Args:
            firing_rates: Of sites' units, shape ``(units,)``, over a window.

        Returns:
            The names of these sites.
        """
        pushed = [edit for edit in self._of_kind(ScheduledPush) if edit.site in firing_rates]
        woken = [edit for edit in pushed if edit.has_woken(firing_rates[edit.site])]
        return [edit.site for edit in self._remove(lambda edit: edit in woken)]

    def drop(self, sites: Iterable[str]) -> list[ScheduledEdit]:
        """Stop all edits of some sites where they are; harmless where there are none.

        Returns:
            What was stopped.
        """
        named = set(sites)
        return self._remove(lambda edit: edit.site in named)

    def drop_lifts(self) -> None:
        """Stop all lifts where they are."""
        self._remove(lambda edit: isinstance(edit, ScheduledLift))

    def _remove(self, chosen: Callable[[ScheduledEdit], bool]) -> list[ScheduledEdit]:
        removed = [edit for edit in self._edits if chosen(edit)]
        self._edits = [edit for edit in self._edits if edit not in removed]
        for edit in removed:
            edit.leave()
        return removed

    @property
    def state(self) -> ScheduleState:
        """What is under way."""
        of = self._of_kind
        return ScheduleState(of(ScheduledPush), of(ScheduledLift), of(BiasOffset), of(SlopeRamp))

    def restore(self, state: ScheduleState) -> None:
        """Go on where :attr:`state` was read.

        Raises:
            ValueError: The model lacks a module that an edit goes to.
        """
        self.drop(self.sites)
        edits = [*state.pushes, *state.lifts, *state.offsets, *state.ramps]
        for edit in edits:
            edit.attach(self._model)
        self._edits = edits  # all of them or none: the monitor ends where one fails
        self.mark_in_step()
