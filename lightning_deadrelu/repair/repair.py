"""Carry remedies out: ask for edits at a verdict, confirm them in a further batch, write. Says when, not how."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_deadrelu.model.parameters import tensors_of
from lightning_deadrelu.model.sharding import reshard_
from lightning_deadrelu.observe.ranks import RankFailure
from lightning_deadrelu.remedies import Edits, InitDistribution, Remedy, SiteView
from lightning_deadrelu.repair.activation_swap import RESTORING
from lightning_deadrelu.repair.confirming_batch import ConfirmingBatch, PendingEdits
from lightning_deadrelu.repair.editor import Editor, EditorState
from lightning_deadrelu.repair.event import Event, Loss
from lightning_deadrelu.repair.optimizer_state import left_alone
from lightning_deadrelu.repair.policy import EscalationPolicy, PolicyState
from lightning_deadrelu.repair.proposals import Proposal
from lightning_deadrelu.repair.training_context import TrainingContext, edited_names
from lightning_deadrelu.repair.usefulness import WindowSums
from lightning_deadrelu.repair.writer import Overwritten, init_distributions
from lightning_deadrelu.statistics import LivenessReport

_MOST_TRACES = 10  # at the start, while some weights have not been met
_MOST_EVENTS = 1000
_MOST_UNITS_IN_EVENTS = 100_000


@dataclass
class RepairState:
    """What a resumed repair needs; see :class:`Repair` for what it means.

    Args:
        init: What parameters were drawn from when training began, by name.
        loss: Over the window behind the edits that are pending.
    """

    policy: PolicyState
    editor: EditorState
    init: dict[str, InitDistribution]
    pending: PendingEdits | None
    sums: WindowSums
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
        self.sums = WindowSums()
        """Over the open window."""
        self._context: TrainingContext | None = None
        self._init: dict[str, InitDistribution] = {}
        self._pending: PendingEdits | None = None  # edits that wait to be confirmed
        self._confirming: ConfirmingBatch | None = None
        self._traces = 0  # batches traced, but for those before an edit
        self._tracing = False  # whether the present one is
        self._loss: Loss | None = None  # over the window behind the edits that are pending

    def attach(self, context: TrainingContext) -> None:
        """Take up what is to be repaired, before it is trained."""
        self._context, self._editor = context, Editor(context)
        self.sums.values = self.sums.values.to(context.watch.liveness.magnitude)
        reshard_(context.model)
        self._init = init_distributions(context.model) if self.remedies else {}

    @property
    def context(self) -> TrainingContext:
        """What is repaired."""
        assert self._context is not None
        return self._context

    @property
    def is_busy(self) -> bool:
        """Whether edits are under way that go on with each batch."""
        return self._context is not None and bool(self._editor.schedule.sites)

    @property
    def is_pending(self) -> bool:
        """Whether edits wait for the next observed batch to confirm them."""
        return self._pending is not None

    # -- a training batch --------------------------------------------------------------------------------

    def begin(self, observed: bool) -> None:
        """Let edits under way into the forward; if this batch is observed, have it confirm those that are pending."""
        watch, schedule = self.context.watch, self._editor.schedule
        if observed and self.traces and self._traces < _MOST_TRACES:
            self._trace()
        if observed and self.sums.units:
            watch.probe.router.subscribe_calls(self.sums.taylor_shares(watch.layout))
        if not schedule.sites and not self._pending:
            return
        schedule.begin()
        known = ((site, one) for site, one in schedule.offsets.items() if site in watch.layout)
        watch.offsets = {watch.layout.number(site): one for site, one in known}
        if observed and self._pending and self._confirming is None:
            self._confirming = ConfirmingBatch(self.context, self._pending)
            self._confirming.begin()

    def _trace(self) -> None:
        """Trace the first observed batch, and some more while there are weights that were not met."""
        if self._traces and not self.context.unmet:
            self._traces = _MOST_TRACES  # all is known: look no more
            return
        self._tracing = True
        self.context.watch.trace()

    def end(self, last: bool) -> None:
        """Take edits out of the forward; after the last batch of an accumulated one go on with them."""
        self.pause()
        self._traces, self._tracing = self._traces + self._tracing, False
        self.context.watch.offsets = {}
        if last:
            self._editor.advance()

    def pause(self) -> None:
        """Take edits out of the forward, wherever a batch may have ended; harmless when they are out."""
        if self._context is not None:
            self._editor.schedule.end()

    def before_backward(self) -> None:
        """Note that the forward is over, and that the weights change before there is another."""
        self._editor.schedule.before_backward()

    def note_loss(self, loss: Tensor | None) -> None:
        """Add up the losses of observed batches, without looking at them."""
        if self.remedies and isinstance(loss, Tensor) and loss.is_floating_point():
            self.sums.note_loss(loss)

    # -- the end of a window -----------------------------------------------------------------------------

    def decide(self, report: LivenessReport, sums: Tensor) -> None:
        """Judge earlier edits, and ask for new ones; :attr:`sums` come as they are over all ranks."""
        loss, shares = self.sums.read(sums)
        self.sums.restart({})
        if self.refusal or not self.remedies:
            return
        self._loss = loss
        if self.context.watch.substitutes:
            self._editor.mark_substitutes()  # others may have exchanged them meanwhile
        self._editor.end_woken_pushes(report)
        requests, events = self.policy.decide(report, self._loss, self._editor.schedule.sites, shares)
        self.sums.restart({name: self.context.site(name).units for name in self.policy.in_review})
        self._pending = PendingEdits.of(requests, report, self.context) if requests else None
        self._record([self._taken_back(event) for event in events])

    def _taken_back(self, event: Event) -> Event:
        """Undo an edit that did harm, and activations that did not help where the next remedy is in turn."""
        if event.action == "escalated":
            self._editor.reinstate(event.site)
        what = self._editor.take_back(event.site) if event.action == "harmed" else ""
        return event._replace(reason=f"{event.reason}; {what}") if what else event

    # -- the batch after ---------------------------------------------------------------------------------

    def confirm(self, step: int, batch: int) -> None:
        """Edit the units that were silent once more; every rank has to come here, also one that failed.

        Args:
            step: The training batch, as loggers count.
            batch: The number of training batches before it; unlike the step it is the same in a run that goes on.

        Raises:
            RankFailure: On all ranks, if one has failed; then nothing is edited.
        """
        pending, confirming = self._pending, self._confirming
        self.forget()
        if pending is None:
            return
        ranks = self.context.ranks
        look = ranks.attempt(lambda: confirming or ConfirmingBatch(self.context, pending))
        all_met = self._traces >= _MOST_TRACES
        for proposal in look.conclude(self.remedies, self._init, step, batch, all_met=all_met):
            self._carry_out(proposal, step)

    def forget(self) -> None:
        """Drop the edits that are pending."""
        if self._confirming is not None:
            self._confirming.end()
        self._pending = self._confirming = None

    def trace_anew(self) -> None:
        """Trace the first batches once more, where what is known of the layers is lost."""
        self._traces = 0

    def _carry_out(self, proposal: Proposal, step: int) -> None:
        """Carry a proposal out, or turn to the next remedy."""
        request, view, edits, reason = proposal
        remedy = self.remedies[request.index]
        if reason:  # units that fire need no other remedy
            self._record([] if request.blind else self.policy.refused(request, reason, step))
        elif edits is not None and self.policy.may_act(request.index, step):
            if not remedy.dry_run:
                self._apply(edits, view)
            names, tensors = edited_names(remedy, view.attribution), tensors_of(self.context.model)
            kept = left_alone(self.context.optimizers, tensors, names)
            for_good = RESTORING if edits.activation and edits.activation.is_for_good else ""
            request = replace(request, reason="; ".join(filter(None, [request.reason, kept, for_good])))
            self._record([self.policy.edited(request, view.units, view.report.dead_fraction, self._loss, step)])

    def _apply(self, edits: Edits, view: SiteView) -> None:
        """Edit on all ranks, or on none."""
        done: list[Overwritten] = []
        try:
            self.context.ranks.attempt(lambda: done.append(self._editor.apply(edits, view)))
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

    def mark_in_step(self) -> None:
        """Note that all ranks have come to a window's end without a failure."""
        self._editor.schedule.mark_in_step()

    def reunite(self) -> None:
        """Have equal parameters on all ranks again, once all know that one has failed, and lift nothing any more."""
        if self._context is not None:
            self._editor.broadcast_lifted()
            self._editor.schedule.drop_lifts()

    def stop(self, step: int) -> None:
        """Take out of the model what was there for a time; harmless when there is nothing."""
        if self._context is not None:
            stopped = {edit.site for edit in self._editor.schedule.drop(self._editor.schedule.sites)}
            self._record([self.policy.dropped(site, step) for site in sorted(stopped)])

    @property
    def state(self) -> RepairState:
        """All that a resumed run needs."""
        return RepairState(
            self.policy.state,
            self._editor.state,
            self._init,
            self._pending,
            self.sums,
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
        asked = state.pending.requests if state.pending else []
        known = [request for request in asked if request.index < len(self.remedies)]
        self._pending = replace(state.pending, requests=known) if state.pending and known else None
        values = state.sums.values.to(self.sums.values)
        self.sums = WindowSums(
            values if self.context.ranks.holds_merged else torch.zeros_like(values), state.sums.units
        )
        self._loss, self.edited, self.events = state.loss, state.edited, deque(state.events)
