"""Carry remedies out: from verdict to question, from second look to edit. Says when and in which order, not how."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from lightning_deadrelu.model.parameters import tensors_of
from lightning_deadrelu.model.sharding import reshard_
from lightning_deadrelu.observe.ranks import RankFailure
from lightning_deadrelu.remedies import Edits, InitDistribution, Remedy, SiteView
from lightning_deadrelu.repair.activation_swap import RESTORING
from lightning_deadrelu.repair.editor import Editor, EditorState
from lightning_deadrelu.repair.event import Event, Loss
from lightning_deadrelu.repair.optimizer_state import left_alone
from lightning_deadrelu.repair.policy import EscalationPolicy, PolicyState
from lightning_deadrelu.repair.proposals import Proposal
from lightning_deadrelu.repair.second_look import Question, SecondLook
from lightning_deadrelu.repair.subject import Subject, edited_names
from lightning_deadrelu.repair.usefulness import TaylorShares
from lightning_deadrelu.repair.writer import Overwritten, init_distributions
from lightning_deadrelu.statistics import LivenessReport

_MOST_TRACES = 10  # at the start, while some weights have not been met
_MOST_EVENTS = 1000
_MOST_UNITS_IN_EVENTS = 100_000


@dataclass
class RepairState:
    """What a resumed repair needs.

    Args:
        policy: How far each site has come.
        editor: What is under way in the forward.
        init: What parameters were drawn from when training began, by name.
        question: The units asked about.
        sums: Over the open window; see :attr:`Repair.sums`.
        measured: Of how many units it is measured how much they matter, by site.
        loss: Over the last window.
        edited: Units edited since the last report, by site.
        events: What was done.
        traces: Batches traced.
    """

    policy: PolicyState
    editor: EditorState
    init: dict[str, InitDistribution]
    question: Question | None
    sums: Tensor
    measured: dict[str, int]
    loss: Loss | None
    edited: dict[str, list[int]]
    events: list[Event]
    traces: int = 0


class Repair:
    """Repair what a monitor finds; :meth:`attach` tells what, and comes first.

    Args:
        remedies: The first to be tried first.
        threshold: A site is repaired while more than this share of its units is dead.
        min_samples: What the monitor asks of a verdict.
        log_event: Called with each event.
        trace: Whether the first batches are traced in any case, not only where there is a remedy.
    """

    def __init__(
        self,
        remedies: Sequence[Remedy],
        threshold: float,
        min_samples: int,
        log_event: Callable[[Event], None],
        trace: bool = False,
    ) -> None:
        self._log_event = log_event
        self.remedies = tuple(remedies)
        self.traces = trace or bool(remedies)
        """Whether it is traced what feeds and reads each site."""
        self.policy = EscalationPolicy(remedies, threshold, min_samples)
        self.events: deque[Event] = deque()
        self.edited: dict[str, list[int]] = {}
        """Units edited since the last report, by site."""
        self.refusal = ""
        """Why nothing can be repaired here; empty if it can."""
        self.sums = torch.zeros(3, dtype=torch.float64)
        """Over the open window: number, sum and sum of squares of the losses, then Taylor shares of sites in review."""
        self._subject: Subject | None = None
        self._init: dict[str, InitDistribution] = {}
        self._question: Question | None = None  # the units asked about
        self._second_look: SecondLook | None = None
        self._measured: dict[str, int] = {}  # units of the sites in review, by name
        self._traces = 0  # batches traced, but for those before an edit
        self._tracing = False  # whether the present one is
        self._loss: Loss | None = None  # over the window behind the question

    def attach(self, subject: Subject) -> None:
        """Take up what is to be repaired, before it is trained."""
        self._subject, self._editor = subject, Editor(subject)
        self.sums = self.sums.to(subject.watch.liveness.magnitude)
        reshard_(subject.model)
        self._init = init_distributions(subject.model) if self.remedies else {}

    @property
    def subject(self) -> Subject:
        """What is repaired."""
        assert self._subject is not None
        return self._subject

    @property
    def asks(self) -> bool:
        """Whether units are to be looked at once more in the next observed batch."""
        return self._question is not None

    # -- a training batch --------------------------------------------------------------------------------

    def begin(self, observed: bool) -> None:
        """Let edits under way into the forward; look again at the units asked about, if this batch is observed."""
        watch, forward = self.subject.watch, self._editor.forward
        if observed and self.traces and self._traces < _MOST_TRACES:
            self._trace()
        if observed and self._measured:
            places = {watch.layout.site(name): at for name, at in self._places().items() if name in watch.layout}
            watch.probe.router.subscribe_calls(TaylorShares(self.sums[3:], places))
        if not self._editor.busy and not self._question:
            return
        self._editor.begin()
        known = ((site, one) for site, one in forward.offsets.items() if site in watch.layout)
        watch.offsets = {watch.layout.number(site): one for site, one in known}
        if observed and self._question and self._second_look is None:
            self._second_look = SecondLook(self.subject, self._question)
            self._second_look.begin()

    def _places(self) -> dict[str, slice]:
        """Tell where the units of the sites in review are among the sums behind those of the losses."""
        ends = accumulate(self._measured.values())
        return {name: slice(end - self._measured[name], end) for name, end in zip(self._measured, ends, strict=True)}

    def _trace(self) -> None:
        """Trace the first observed batch, and some more while there are weights that were not met."""
        if self._traces and not self.subject.unmet:
            self._traces = _MOST_TRACES  # all is known: look no more
            return
        self._tracing = True
        self.subject.watch.trace()

    def end(self, last: bool) -> None:
        """Take edits out of the forward; after the last batch of an accumulated one go on with them."""
        self.pause()
        self._traces, self._tracing = self._traces + self._tracing, False
        self.subject.watch.offsets = {}
        if last:
            self._editor.advance()

    def pause(self) -> None:
        """Take edits out of the forward, wherever a batch may have ended; harmless when they are out."""
        if self._subject is not None:
            self._editor.pause()

    def before_backward(self) -> None:
        """Note that the forward is over, and that the weights change before there is another."""
        self._editor.wake_ups.pause()

    def note_loss(self, loss: Tensor | None) -> None:
        """Add up the losses of observed batches, without looking at them."""
        if self.remedies and isinstance(loss, Tensor) and loss.is_floating_point():
            mean = loss.detach().mean().to(self.sums.dtype)
            self.sums[:3] += torch.stack([torch.ones_like(mean), mean, mean * mean])

    # -- the end of a window -----------------------------------------------------------------------------

    def decide(self, report: LivenessReport, sums: Tensor) -> None:
        """Judge earlier edits, and ask for new ones.

        Args:
            report: The verdict on a whole window, the same on all ranks.
            sums: As :attr:`sums`, over all ranks.
        """
        places, self._measured = self._places(), {}
        self.sums = torch.zeros_like(self.sums[:3])
        if self.refusal or not self.remedies:
            return
        self._loss = Loss.of(sums[:3])
        shares = {name: sums[3:][place] for name, place in places.items()}
        self._editor.settle(report)
        requests, events = self.policy.decide(report, self._loss, self._editor.busy, shares)
        self._measured = {name: self.subject.site(name).units for name in self.policy.in_review}
        self.sums = self.sums.new_zeros(3 + sum(self._measured.values()))
        self._question = Question.of(requests, report, self.subject) if requests else None
        self._record([self._taken_back(event) for event in events])

    def _taken_back(self, event: Event) -> Event:
        """Undo an edit that did harm, and activations that did not help where the next remedy is in turn."""
        if event.action == "escalated":
            self._editor.reinstate(event.site)
        what = self._editor.take_back(event.site) if event.action == "harmed" else ""
        return event._replace(reason=f"{event.reason}; {what}") if what else event

    # -- the batch after ---------------------------------------------------------------------------------

    def confirm(self, step: int, batch: int) -> None:
        """Edit the units asked about that were silent once more; every rank has to come here, also one that failed.

        Args:
            step: The training batch, as loggers count.
            batch: The number of training batches before it; unlike the step it is the same in a run that goes on.

        Raises:
            RankFailure: On all ranks, if one has failed; then nothing is edited.
        """
        question, second_look = self._question, self._second_look
        self.forget()
        if question is None:
            return
        ranks = self.subject.ranks
        look = ranks.attempt(lambda: second_look or SecondLook(self.subject, question))
        all_met = self._traces >= _MOST_TRACES
        for proposal in look.conclude(self.remedies, self._init, step, batch, all_met=all_met):
            self._settle(proposal, step)

    def forget(self) -> None:
        """Ask no more about the units asked about."""
        if self._second_look is not None:
            self._second_look.end()
        self._question = self._second_look = None

    def _settle(self, proposal: Proposal, step: int) -> None:
        """Carry a proposal out, or turn to the next remedy."""
        request, view, edits, reason = proposal
        remedy = self.remedies[request.index]
        if reason:  # units that fire need no other remedy
            self._record([] if request.blind else self.policy.refused(request, reason, step))
        elif edits is not None and self.policy.may_act(request.index, step):
            if not remedy.dry_run:
                self._apply(edits, view)
            names, tensors = edited_names(remedy, view.attribution), tensors_of(self.subject.model)
            kept = left_alone(self.subject.optimizers, tensors, names)
            for_good = RESTORING if edits.activation and not edits.activation.steps else ""
            request = replace(request, reason="; ".join(filter(None, [request.reason, kept, for_good])))
            self._record([self.policy.edited(request, view.units, view.report.dead_fraction, self._loss, step)])

    def _apply(self, edits: Edits, view: SiteView) -> None:
        """Edit on all ranks, or on none."""
        done: list[Overwritten] = []
        try:
            self.subject.ranks.attempt(lambda: done.append(self._editor.apply(edits, view)))
        except RankFailure:
            for overwritten in done:
                overwritten.put_back()
                self._editor.take_back(view.report.name)
            raise
        self.edited.setdefault(view.report.name, []).extend(view.units.nonzero().flatten().tolist())

    def _record(self, events: Iterable[Event]) -> None:
        for event in events:
            self.events.append(event)
            self._log_event(event)
        while len(self.events) > _MOST_EVENTS or sum(len(e.units) for e in self.events) > _MOST_UNITS_IN_EVENTS:
            self.events.popleft()

    def settle(self) -> None:
        """Note that all ranks have come to a window's end without a failure."""
        self._editor.lifts.settle()

    def reunite(self) -> None:
        """Have equal parameters on all ranks again, once all know that one has failed, and lift nothing any more."""
        if self._subject is not None:
            self._editor.share_lifted()
            self._editor.lifts.drop(self._editor.lifts.sites)

    def stop(self, step: int) -> None:
        """Take out of the model what was there for a time; harmless when there is nothing."""
        if self._subject is not None:
            self._record([self.policy.dropped(site, step) for site in self._editor.stop()])

    @property
    def state(self) -> RepairState:
        """All that a resumed run needs."""
        return RepairState(
            self.policy.state,
            self._editor.state,
            self._init,
            self._question,
            self.sums,
            self._measured,
            self._loss,
            self.edited,
            list(self.events),
            self._traces,
        )

    def restore(self, state: RepairState) -> None:
        """Go on where :attr:`state` was read."""
        self.policy.restore(state.policy)
        if self.remedies:
            self._editor.restore(state.editor)
        self._editor.mark_substitutes()
        self._init, self._traces = state.init or self._init, state.traces
        asked = state.question.requests if state.question else []
        known = [request for request in asked if request.index < len(self.remedies)]
        self._question = replace(state.question, requests=known) if state.question and known else None
        self._measured = state.measured
        sums = state.sums.to(self.sums)
        self.sums = sums if self.subject.ranks.holds_merged else torch.zeros_like(sums)
        self._loss, self.edited, self.events = state.loss, state.edited, deque(state.events)
