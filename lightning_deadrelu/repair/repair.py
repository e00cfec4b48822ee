"""Carry remedies out: from verdict to request, from confirmation to edit. Says when and in which order, not how."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.attribution import joined_over_ranks, plain
from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.model.sharding import reshard_
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.model.trainable import Gradients
from lightning_deadrelu.observe import ranks
from lightning_deadrelu.observe.watch import NOT_TRACED, Watch
from lightning_deadrelu.remedies import Activation, Edits, InitDistribution, Remedy, SiteView
from lightning_deadrelu.repair.activation_swap import no_module, records, rectifiers, reinstate_, substitute_
from lightning_deadrelu.repair.forward_edits import ForwardEdits, is_compiled
from lightning_deadrelu.repair.lift import Lifts
from lightning_deadrelu.repair.optimizer_state import left_alone
from lightning_deadrelu.repair.policy import EscalationPolicy, Event, Loss, Request
from lightning_deadrelu.repair.proposals import Case, confirmed, digest, fed_by_linear, fires_now, generator_of
from lightning_deadrelu.repair.writer import check_writes, laws_of, tensors_of, values_of, why_not, write_
from lightning_deadrelu.statistics import LivenessReport, SiteReport
from lightning_deadrelu.statistics.confirmation import MOST_ROWS, Confirmation, SilenceSample

_MOST_TRACES = 10  # at the start, while some weights have not been met
_MOST_EVENTS = 1000
_MOST_UNITS_IN_EVENTS = 100_000


class Patient(NamedTuple):
    """What is repaired.

    Args:
        watch: What watches it.
        model: Whose parameters are edited.
        optimizers: What trains it.
        outer: What the Trainer calls, for instance a compiled model around it.
        joint: Whether other ranks do the same.
        gradients: Tells which parameters never get any.
    """

    watch: Watch
    model: nn.Module
    optimizers: Sequence[Optimizer]
    outer: nn.Module
    joint: bool
    gradients: Gradients

    @property
    def trained(self) -> set[int]:
        """The ``id`` of each parameter that is trained."""
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        return (held - self.gradients.never) or held


class Diverged(RuntimeError):
    """Ranks hold different weights from now on; the one failure that has to end the run."""


class Repair:
    """Repair what a monitor finds.

    Args:
        rungs: The remedies, the first to be tried first.
        threshold: A site is treated while more than this share of its units is dead.
        min_samples: What the monitor asks of a verdict.
        tell: Called with each event.
        trace: Whether the first batches are traced in any case, not only where there is a remedy.
    """

    def __init__(
        self,
        rungs: Sequence[Remedy],
        threshold: float,
        min_samples: int,
        tell: Callable[[Event], None],
        trace: bool = False,
    ) -> None:
        self._tell = tell
        self.traces = trace or bool(rungs)
        """Whether it is traced what feeds and reads each site."""
        self.ladder = EscalationPolicy(rungs, threshold, min_samples)
        self.terms = ForwardEdits()
        self._lifts = Lifts()
        self.events: deque[Event] = deque()
        self.edited: dict[str, list[int]] = {}
        """Units edited since the last report, by site."""
        self.refusal = ""
        """Why nothing can be repaired here; empty if it can."""
        self._laws: dict[str, InitDistribution] = {}
        self._requests: list[Request] = []
        self._layers: dict[str, str] = {}  # by site asked about, the linear module that feeds it
        self._report: LivenessReport | None = None  # the verdict behind the requests
        self._confirmation: Confirmation | None = None
        self._handles: list[RemovableHandle] = []  # of what the confirmation subscribes to
        self._traces = 0  # batches traced, but for those before an edit
        self._unmet: frozenset[str] = frozenset()  # weights that no rank has met while tracing
        self.losses = torch.zeros(3, dtype=torch.float64)
        """Number, sum and sum of squares of the open window's losses, on the device."""
        self._loss: Loss | None = None  # over the window behind the requests

    # -- a training batch --------------------------------------------------------------------------------

    def begin(self, patient: Patient, observed: bool) -> None:
        """Let terms in flight enter the forward; look again at the units asked about, if this batch is observed."""
        watch = patient.watch
        if observed and self.traces and self._traces < _MOST_TRACES:
            self._trace(patient)
        if not self.terms.sites and not self._requests:
            return
        self.terms.begin()
        layout = watch.layout
        terms = {name: self.terms.offset(name) for name in self.terms.sites if name in layout}
        watch.offsets = {layout.number(name): term for name, term in terms.items() if term is not None}
        if observed and self._requests and self._confirmation is None:
            asked = {layout.number(request.site): request.units for request in self._requests}
            self._confirmation = Confirmation(asked, watch.device)
            self._handles = [watch.subscribe(self._confirmation)]
            self._handles += [
                watch.probe.subscribe_input(path, partial(_listen, self._confirmation, layout.number(site), watch))
                for site, path in self._layers.items()
            ]
            watch.trace()

    def _trace(self, patient: Patient) -> None:
        """Trace the first observed batch, and some more while there are weights that were not met."""
        if self._traces and not _unmet(patient):
            self._traces = _MOST_TRACES  # all is known: look no more
            return
        self._traces += 1
        patient.watch.trace()

    def end(self, patient: Patient, last: bool) -> None:
        """Take terms out again; after the last batch of an accumulated one go on with anneals and lifts."""
        self.terms.end()
        patient.watch.offsets = {}
        if last and self._lifts.sites:
            self._advance_lifts(patient)
        if last and self.terms.advance():
            patient.watch.substitutes = rectifiers(patient.model) | self.terms.rectifiers

    def _advance_lifts(self, patient: Patient) -> None:
        reshard_(patient.model)
        with _ends_run(patient.joint):
            self._lifts.advance(tensors_of(patient.model))

    def note_loss(self, loss: Tensor | None) -> None:
        """Add up the losses of observed batches, without looking at them."""
        if self.ladder.rungs and isinstance(loss, Tensor) and loss.is_floating_point():
            mean = loss.detach().mean().to(self.losses.dtype)
            self.losses = self.losses + torch.stack([torch.ones_like(mean), mean, mean * mean])

    # -- the end of a window -----------------------------------------------------------------------------

    def decide(self, patient: Patient, report: LivenessReport, losses: Tensor) -> None:
        """Judge earlier edits, and ask for new ones.

        Args:
            patient: What is repaired.
            report: The verdict on a whole window, the same on all ranks.
            losses: As :attr:`losses`, over all ranks.
        """
        self.losses = torch.zeros_like(self.losses)
        if self.refusal or not self.ladder.rungs:
            return
        self._loss = Loss.of(losses)
        self._requests, events = self.ladder.decide(report, self._loss, [*self.terms.sites, *self._lifts.sites])
        self._take_back([event.site for event in events if event.action == "escalated"], patient)
        self._report = report if self._requests else None
        self._layers = self._linear_layers(patient) if self._requests else {}
        self._note(events)

    def _linear_layers(self, patient: Patient) -> dict[str, str]:
        """Name the linear modules that feed sites asked about: their inputs are to be kept in the next observation."""
        attributions, tensors = patient.watch.attributions, tensors_of(patient.model)
        layers = {one.site: fed_by_linear(attributions[one.site], tensors) for one in self._requests}
        return {site: path for site, path in layers.items() if path}

    def _take_back(self, sites: Sequence[str], patient: Patient) -> None:
        """Put the rectifiers back where another activation did not help, and the next remedy is in turn."""
        if not sites:
            return
        paths = {patient.watch.layout.site(site).owner for site in sites}
        keep = {record["path"] for record in records(patient.model)} - paths
        reinstate_(patient.model, keep)
        patient.watch.substitutes = rectifiers(patient.model) | self.terms.rectifiers

    # -- the batch after ---------------------------------------------------------------------------------

    def confirm(self, patient: Patient, step: int, failed: bool = False) -> None:
        """Edit the units asked about that were silent once more; every rank has to come here, also one that failed."""
        requests, confirmation = self._requests, self._confirmation
        self.forget(patient)
        if not requests:
            return
        units = sum(int(request.units.sum()) for request in requests)
        own = confirmation.evidence if confirmation else SilenceSample.nothing(units, patient.watch.device)
        evidence = ranks.confirm(own, failed) if patient.joint else own
        if failed or evidence is None or confirmation is None:
            return
        reshard_(patient.model)
        cases = self._cases(requests, confirmation, evidence.to_host(), patient, step)
        proposals = [self._proposed(case, patient) for case in cases]
        if patient.joint and len(set(ranks.gather(digest(cases, proposals)))) > 1:
            proposals = ["the ranks propose different edits, or hold different weights" for _ in cases]
        for case, proposal in zip(cases, proposals, strict=True):
            self._settle(case, proposal, patient, step)

    def _cases(
        self,
        requests: Sequence[Request],
        confirmation: Confirmation,
        evidence: SilenceSample,
        patient: Patient,
        step: int,
    ) -> list[Case]:
        """Lay out all that is known of each site asked about; all that ranks have to exchange is exchanged here."""
        assert self._report is not None
        attributions = self._agreed(patient)
        cases = []
        for request in requests:
            site, attribution = self._report[request.site], attributions[request.site]
            number = patient.watch.layout.number(request.site)
            hinge = patient.watch.hinges.get(number, 0.0)
            inputs = self._inputs(attribution, confirmation.rows(number), patient)
            units, quantiles = confirmed(request, site, confirmation.of(number, evidence))
            parts = (*attribution.incoming, *attribution.outgoing) if units.any() else ()
            values = values_of(patient.model, [one.name for one in parts])
            if units.any() and inputs is not None:
                units &= site.frozen | ~fires_now(inputs, attribution, values, hinge)
            view = SiteView(site, units, attribution, values, self._laws, quantiles, step, inputs, hinge)
            cases.append(Case(request, view))
        return cases

    def _proposed(self, case: Case, patient: Patient) -> Edits | str | None:
        """Ask the remedy; a text says why it cannot be applied, None that it has to wait."""
        remedy, view = self.ladder.rungs[case.request.rung], case.view
        if not view.units.any() or view.attribution.no_incoming == NOT_TRACED:
            return None
        if reason := self._reason_against(remedy, view.report, view.attribution, patient):
            return reason
        if "outgoing" in remedy.needs and self._unmet and self._traces < _MOST_TRACES:
            return None  # they may be readers that run in other batches
        try:
            edits = remedy.propose(view, generator_of(remedy, view))
            rises = edits.lift.rises if edits.lift else ()
            reason = check_writes((*edits.writes, *rises), patient.model, patient.optimizers)
            if edits.warmth and not reason:
                reason = view.attribution.no_outlet or _compiled(view.attribution, patient)
        except Exception as error:
            return f"its `propose` failed: {type(error).__name__}: {error}"
        return reason or (edits if edits != Edits() else "it proposes nothing for these units")

    def _settle(self, case: Case, proposal: Edits | str | None, patient: Patient, step: int) -> None:
        """Carry a proposal out, or turn to the next remedy."""
        request, view = case
        remedy = self.ladder.rungs[request.rung]
        if isinstance(proposal, str):
            self._note(self.ladder.refused(request, proposal, step))
        elif proposal is not None and self.ladder.may(request.rung, step):
            if not remedy.dry_run:
                self._apply(proposal, view, patient)
            kept = left_alone(patient.optimizers, tensors_of(patient.model), _edited_names(remedy, view.attribution))
            request = request._replace(reason="; ".join(filter(None, [request.reason, kept])))
            self._note([self.ladder.edited(request, view.units, view.report.dead_fraction, self._loss, step)])

    def forget(self, patient: Patient) -> None:
        """Ask no more about the units asked about."""
        self._requests, self._confirmation = [], None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _inputs(self, attribution: Attribution, rows: Tensor | None, patient: Patient) -> Tensor | None:
        """Bring together what all ranks kept of a layer's input."""
        tensors = tensors_of(patient.model)
        if not fed_by_linear(attribution, tensors):
            return None
        if patient.joint:
            features = tensors[attribution.incoming[0].name].shape[1]
            rows = ranks.share(rows, features, MOST_ROWS, patient.watch.device)
        return None if rows is None else rows.cpu()

    def _agreed(self, patient: Patient) -> Mapping[str, Attribution]:
        """Join what all ranks know of who feeds and reads whom; they may have run different layers."""
        own, self._unmet = patient.watch.attributions, _unmet(patient)
        if not patient.joint:
            return own
        self._unmet = frozenset.intersection(*ranks.gather(self._unmet))
        digest = hashlib.sha256(repr([(name, plain(one)) for name, one in own.items()]).encode()).digest()
        if len(set(ranks.gather(digest))) == 1:
            return own
        return joined_over_ranks(ranks.gather(own), NOT_TRACED)

    def _reason_against(self, remedy: Remedy, site: SiteReport, attribution: Attribution, patient: Patient) -> str:
        """Say why a remedy cannot be applied to a site; empty if it can."""
        own = patient.watch.layout.site(site.name)
        untraced = "" if attribution.incoming else "what feeds it could not be traced"
        reasons = {
            "incoming": attribution.no_incoming or untraced,
            "outgoing": attribution.no_outgoing,
            "outlet": attribution.no_outlet or _compiled(attribution, patient),
            "module": no_module(patient.model, own, patient.watch.sites),
        }
        found = [reasons[need] for need in sorted(remedy.needs) if reasons[need]]
        names_edited = _edited_names(remedy, attribution)
        return "; ".join(dict.fromkeys(found)) or why_not(
            patient.model, patient.optimizers, names_edited, patient.trained
        )

    def _apply(self, edits: Edits, view: SiteView, patient: Patient) -> None:
        alive = ~view.report.silent & ~view.report.frozen
        live = [one.of(alive) for one in (*view.attribution.incoming, *view.attribution.outgoing)]
        with _ends_run(patient.joint):
            write_(edits.writes, patient.model, patient.optimizers, live)
        if edits.lift:
            self._lifts.add(view.report.name, edits.lift)
        watch = patient.watch
        number = watch.layout.number(view.report.name)
        site, dims = watch.sites[number], watch.dims[number]
        if edits.warmth and view.attribution.outlet:
            self.terms.warm(patient.model, view.report.name, view.attribution.outlet, edits.warmth)
        if edits.activation:
            self._exchange(edits.activation, view.report.name, site.owner, dims, patient.model)
        watch.substitutes = rectifiers(patient.model) | self.terms.rectifiers
        self.edited.setdefault(view.report.name, []).extend(view.units.nonzero().flatten().tolist())

    def _exchange(self, activation: Activation, name: str, path: str, dims: tuple[int, ...], model: nn.Module) -> None:
        kind, slopes, steps = activation
        if steps and slopes is not None:
            self.terms.ramp(model, name, path, slopes, dims, steps)
            return
        earlier = next((one["slopes"] for one in records(model) if one["path"] == path), None)
        if slopes is not None and isinstance(earlier, Tensor):
            slopes = slopes.maximum(earlier)  # units that were treated before keep theirs
        substitute_(model, path, kind, slopes, dims)

    def _note(self, events: Iterable[Event]) -> None:
        for event in events:
            self.events.append(event)
            self._tell(event)
        while len(self.events) > _MOST_EVENTS or sum(len(e.units) for e in self.events) > _MOST_UNITS_IN_EVENTS:
            self.events.popleft()

    # -- from start to end -------------------------------------------------------------------------------

    def start(self, model: nn.Module) -> None:
        """Note what the parameters were drawn from, before they are trained."""
        reshard_(model)
        self._laws = laws_of(model) if self.ladder.rungs else {}

    def stop(self, step: int) -> None:
        """Take out of the model what was there for a time; harmless when there is nothing."""
        sites = dict.fromkeys([*self.terms.clear(), *self._lifts.clear()])
        self._note([self.ladder.dropped(site, step) for site in sites])

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as plain values and tensors."""
        return {
            "ladder": self.ladder.state_dict(),
            "terms": self.terms.state_dict(),
            "lifts": self._lifts.state_dict(),
            "laws": {name: list(law) for name, law in self._laws.items()},
            "requests": [list(request) for request in self._requests],
            "sites": [encode(site) for site in self._report.sites] if self._report else [],
            "step": self._report.step if self._report else 0,
            "layers": dict(self._layers),
            "losses": self.losses,
            "loss": list(self._loss) if self._loss else None,
            "edited": dict(self.edited),
            "events": [list(event) for event in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any], patient: Patient) -> None:
        """Go on from what was saved."""
        self.ladder.load_state_dict(state["ladder"])
        if self.ladder.rungs:
            self.terms.load_state_dict(state["terms"], patient.model)
            self._lifts.load_state_dict(state["lifts"])
        patient.watch.substitutes = rectifiers(patient.model) | self.terms.rectifiers
        self._laws = {name: InitDistribution(*law) for name, law in state["laws"].items()} or self._laws
        asked = [Request(*request) for request in state["requests"]]
        self._requests = [request for request in asked if request.rung < len(self.ladder.rungs)]
        if self._requests:
            self._report = LivenessReport(tuple(decode(SiteReport, site) for site in state["sites"]), state["step"])
        if not patient.joint or ranks.rank() == 0:  # it holds the losses of all ranks
            self.losses = state["losses"].to(self.losses)
        self._layers = dict(state["layers"])
        self._loss = Loss(*state["loss"]) if state["loss"] else None
        self.edited = dict(state["edited"])
        self.events = deque(Event._make([*event[:4], tuple(event[4]), *event[5:]]) for event in state["events"])


@contextmanager
def _ends_run(joint: bool) -> Iterator[None]:
    """Have an error end the run where other ranks have written what this one could not."""
    try:
        yield
    except Exception as error:
        if joint:
            raise Diverged(f"an edit failed on this rank, which now differs from the others: {error!r}") from error
        raise


def _edited_names(remedy: Remedy, attribution: Attribution) -> list[str]:
    parts = [need for need in ("incoming", "outgoing") if need in remedy.needs]
    return sorted({one.name for part in parts for one in getattr(attribution, part)})


def _unmet(patient: Patient) -> frozenset[str]:
    """Name the weights in training that no traced batch has used: they may belong to readers that take turns."""
    weights = {clean(name) for name, p in patient.model.named_parameters() if p.requires_grad and p.ndim > 1}
    return frozenset(weights - patient.watch.used)


def _listen(confirmation: Confirmation, number: int, watch: Watch, x: Tensor) -> None:
    confirmation.listen(number, x, watch.valid)


def _compiled(attribution: Attribution, patient: Patient) -> str:
    if attribution.outlet and is_compiled(patient.outer, attribution.outlet.path):
        return "the model is compiled, and a compiler does not see a term that is added later"
    return ""
