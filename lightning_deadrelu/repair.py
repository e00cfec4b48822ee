"""Carry remedies out: from verdict to request, from confirmation to edit. Says when and in which order, not how."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deadrelu import ranks
from lightning_deadrelu.activations import apply_record, no_module, substitute_
from lightning_deadrelu.attribution import merged
from lightning_deadrelu.confirmation import Confirmation, Evidence
from lightning_deadrelu.ladder import Event, Ladder, Loss, Request
from lightning_deadrelu.optimizer_state import unknown_state
from lightning_deadrelu.remedies import Edits, Law, Remedy, SiteView
from lightning_deadrelu.sites import names_of
from lightning_deadrelu.slices import Attribution
from lightning_deadrelu.statistics import LivenessReport, SiteReport
from lightning_deadrelu.terms import Terms, is_compiled
from lightning_deadrelu.watch import Watch
from lightning_deadrelu.writing import tensors_of, write_

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
    """

    watch: Watch
    model: nn.Module
    optimizers: Sequence[Optimizer]
    outer: nn.Module
    joint: bool


class Repair:
    """Repair what a monitor finds.

    Args:
        rungs: The remedies, the first to be tried first.
        threshold: A site is treated while more than this share of its units is dead.
        min_samples: What the monitor asks of a verdict.
        tell: Called with each event.
    """

    def __init__(
        self, rungs: Sequence[Remedy], threshold: float, min_samples: int, tell: Callable[[Event], None]
    ) -> None:
        self._tell = tell
        self.ladder = Ladder(rungs, threshold, min_samples)
        self.terms = Terms()
        self.events: deque[Event] = deque()
        self.edited_units = 0
        """Units edited since the last report."""
        self.refusal = ""
        """Why nothing can be repaired here; empty if it can."""
        self._laws: dict[str, Law] = {}
        self.records: list[dict[str, Any]] = []
        """What was put in the place of rectifiers for good."""
        self._requests: list[Request] = []
        self._report: LivenessReport | None = None  # the verdict behind the requests
        self._confirmation: Confirmation | None = None
        self._waiting: set[str] = set()  # sites that were said to wait
        self._losses: Tensor | None = None  # number, sum and sum of squares over the open window, on the device
        self._loss: Loss | None = None  # over the window behind the requests

    # -- a training batch --------------------------------------------------------------------------------

    def begin(self, patient: Patient, observed: bool) -> None:
        """Let terms in flight enter the forward; look again at the units asked about, if this batch is observed."""
        watch = patient.watch
        if observed and not watch.attributions:
            watch.trace()
        if not self.terms.sites and not self._requests:
            return
        self.terms.begin()
        names = names_of(watch.sites)
        watch.offsets = {
            names.index(name): term for name in self.terms.sites if (term := self.terms.offset(name)) is not None
        }
        if observed and self._requests and self._confirmation is None:
            asked = {names.index(request.site): request.units for request in self._requests}
            self._confirmation = watch.confirmation = Confirmation(asked, watch.device)
            watch.trace()

    def end(self, patient: Patient, last: bool) -> None:
        """Take terms out again; after the last batch of an accumulated one go on with the anneal."""
        self.terms.end()
        patient.watch.offsets = {}
        if last:
            self.terms.advance()

    def note_loss(self, loss: Tensor | None) -> None:
        """Add up the losses of observed batches, without looking at them."""
        if isinstance(loss, Tensor) and loss.is_floating_point():
            mean = loss.detach().float().mean()
            sums = torch.stack([torch.ones_like(mean), mean, mean * mean])
            self._losses = sums if self._losses is None else self._losses + sums

    # -- the end of a window -----------------------------------------------------------------------------

    def decide(self, patient: Patient, report: LivenessReport) -> None:
        """Judge earlier edits, and ask for new ones."""
        losses, self._losses = self._losses, None
        if self.refusal or not self._concerned(report):
            return
        self._loss = _over_ranks(losses, patient)
        self._requests, events = self.ladder.decide(report, self._loss, self.terms.sites)
        self._report = report if self._requests else None
        self._note(events)

    def _concerned(self, report: LivenessReport) -> bool:
        """Whether there is anything to repair or to judge; if not, nothing is fetched or exchanged."""
        return bool(report.total("silent") or any(progress.trial for progress in self.ladder.sites.values()))

    # -- the batch after ---------------------------------------------------------------------------------

    def confirm(self, patient: Patient, failed: bool = False) -> None:
        """Edit the units asked about that were silent once more; every rank has to come here."""
        if not self._requests or not (self._confirmation or failed):
            return
        requests, confirmation = self._requests, self._confirmation
        self._requests, self._confirmation, patient.watch.confirmation = [], None, None
        units = sum(int(request.units.sum()) for request in requests)
        own = confirmation.evidence if confirmation else Evidence.nothing(units, patient.watch.device)
        evidence = ranks.confirm(own, failed) if patient.joint else own
        if evidence is None or failed or confirmation is None or self._report is None:
            return
        attributions = self._agreed(requests, patient)
        names = names_of(patient.watch.sites)
        for request in requests:
            if self.ladder.may(request.rung, self._report.step):
                seen = confirmation.of(names.index(request.site), evidence)
                self._treat(request, seen, attributions, patient)

    def _agreed(self, requests: Iterable[Request], patient: Patient) -> dict[str, Attribution]:
        """Join what all ranks know of who feeds and reads whom; they may have run different layers."""
        own = dict(
            zip(names_of(patient.watch.sites), map(patient.watch.attribution_of, patient.watch.sites), strict=True)
        )
        if not patient.joint:
            return own
        digest = hashlib.sha256(repr([(name, _plain(one)) for name, one in own.items()]).encode()).digest()
        if len(set(ranks.gather(digest))) == 1:
            return own
        theirs = ranks.gather(own)
        return {name: merged([attributions[name] for attributions in theirs]) for name in own}

    def _treat(
        self, request: Request, seen: Evidence, attributions: Mapping[str, Attribution], patient: Patient
    ) -> None:
        assert self._report is not None
        remedy, site = self.ladder.rungs[request.rung], self._report[request.site]
        attribution = attributions[request.site]
        if reason := self._reason_against(remedy, site, attribution, patient):
            self._note(self.ladder.refused(request, reason, self._report.step))
            return
        units, quantiles = _confirmed(request, site, seen)
        units &= ~self._waits(site, attributions, patient)
        if units.any():
            view = SiteView(
                site, units, attribution, tensors_of(patient.model), self._laws, quantiles, self._report.step
            )
            if not remedy.dry_run:
                self._apply(remedy.propose(view, _generator(remedy, view)), remedy, view, patient)
            self._note([self.ladder.edited(request, units, self._report, self._loss)])

    def _reason_against(self, remedy: Remedy, site: SiteReport, attribution: Attribution, patient: Patient) -> str:
        """Say why a remedy cannot be applied to a site; empty if it can."""
        names = names_of(patient.watch.sites)
        own = patient.watch.sites[names.index(site.name)]
        reasons = {
            "incoming": attribution.no_incoming,
            "outgoing": attribution.no_outgoing,
            "outlet": attribution.no_outlet or _compiled(attribution, patient),
            "module": no_module(patient.model, own, patient.watch.sites),
        }
        edited = {
            one.name for need in ("incoming", "outgoing") if need in remedy.needs for one in getattr(attribution, need)
        }
        found = [reasons[need] for need in sorted(remedy.needs) if reasons[need]]
        return "; ".join(found) or unknown_state(patient.optimizers, tensors_of(patient.model), sorted(edited))

    def _waits(self, site: SiteReport, attributions: Mapping[str, Attribution], patient: Patient) -> Tensor:
        """Mark the units that see nothing but constants: what they would do is settled by the sites before."""
        assert self._report is not None
        varies = {one.name: ~one.silent & ~one.frozen for one in self._report.sites if not one.smooth}
        waits = behind_constants(site.name, attributions, varies, tensors_of(patient.model))
        if waits.all() and site.name not in self._waiting:
            self._waiting.add(site.name)
            why = "its inputs are constant, because a site before it is dead"
            self._note([Event(self._report.step, site.name, "waits", "", reason=why)])
        return waits

    def _apply(self, edits: Edits, remedy: Remedy, view: SiteView, patient: Patient) -> None:
        write_(edits.writes, patient.model, patient.optimizers)
        watch = patient.watch
        number = names_of(watch.sites).index(view.report.name)
        site, dims = watch.sites[number], watch.dims[number]
        if edits.warmth and view.attribution.outlet:
            self.terms.warm(patient.model, view.report.name, view.attribution.outlet, edits.warmth)
        if edits.activation and edits.activation.steps:
            self.terms.ramp(patient.model, view.report.name, site, edits.activation, dims)
        elif edits.activation:
            self.records.append(substitute_(patient.model, site, edits.activation, dims))
            watch.judge_as(self.records)
        if remedy.check_ranks and patient.joint:
            self._check_ranks(edits, patient)
        self.edited_units += int(view.units.sum())

    def _check_ranks(self, edits: Edits, patient: Patient) -> None:
        tensors = tensors_of(patient.model)
        sums = [float(write.slice.read(tensors[write.slice.name]).double().sum()) for write in edits.writes]
        if len({str(one) for one in ranks.gather(sums)}) > 1:
            raise RuntimeError("the edited parameters differ between ranks")

    def _note(self, events: Iterable[Event]) -> None:
        for event in events:
            self.events.append(event)
            self._tell(event)
        while len(self.events) > _MOST_EVENTS or sum(len(e.units) for e in self.events) > _MOST_UNITS_IN_EVENTS:
            self.events.popleft()

    # -- from start to end -------------------------------------------------------------------------------

    def start(self, model: nn.Module) -> None:
        """Note what the parameters were drawn from, before they are trained."""
        self._laws = {name: Law.of(tensor) for name, tensor in tensors_of(model).items() if tensor.is_floating_point()}

    def stop(self, step: int) -> None:
        """Take out of the model what was there for a time; harmless when there is nothing."""
        dropped = self.terms.clear()
        self._note(
            [
                Event(step, name, "dropped", "", reason="training ended before its term was annealed away")
                for name in dropped
            ]
        )

    def state_dict(self, patient: Patient) -> dict[str, Any]:
        """Return all that a resumed run needs, as plain values and tensors; every rank has to call it.

        From then on rank 0 holds the losses of all.
        """
        if patient.joint:
            sums = self._losses if self._losses is not None else torch.zeros(3, device=patient.watch.device)
            self._losses = ranks.total(sums) if ranks.rank() == 0 else torch.zeros_like(ranks.total(sums))
        return {
            "ladder": self.ladder.state_dict(),
            "terms": self.terms.state_dict(),
            "laws": {name: list(law) for name, law in self._laws.items()},
            "requests": [list(request) for request in self._requests],
            "sites": [dict(vars(site)) for site in self._report.sites] if self._report else [],
            "step": self._report.step if self._report else 0,
            "losses": self._losses,
            "loss": list(self._loss) if self._loss else None,
            "waiting": sorted(self._waiting),
            "edited_units": self.edited_units,
            "events": [list(event) for event in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any], records: list[dict[str, Any]], patient: Patient) -> None:
        """Go on from what was saved."""
        self.ladder.load_state_dict(state["ladder"])
        self.records = records
        for record in records:
            apply_record(patient.model, record)
        patient.watch.judge_as(records)
        self.terms.load_state_dict(state["terms"], patient.model)
        self._laws = {name: Law(*law) for name, law in state["laws"].items()}
        self._requests = [Request(*request) for request in state["requests"]]
        if self._requests:
            self._report = LivenessReport(tuple(SiteReport(**site) for site in state["sites"]), state["step"])
        if state["losses"] is not None and (not patient.joint or ranks.rank() == 0):
            self._losses = state["losses"].to(patient.watch.device)
        self._loss = Loss(*state["loss"]) if state["loss"] else None
        self._waiting = set(state["waiting"])
        self.edited_units = state["edited_units"]
        self.events = deque(Event(*event[:4], tuple(event[4]), *event[5:]) for event in state["events"])


def behind_constants(
    name: str, attributions: Mapping[str, Attribution], varies: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Tensor:
    """Mark the units of a site whose every input is a unit that puts out a constant, shape ``(units,)``.

    Args:
        name: Of the site.
        attributions: Of all sites.
        varies: Which units of each site put out more than one value, boolean, by name.
        tensors: The model's parameters.
    """
    waits = torch.ones_like(varies[name])
    weights = [one for one in attributions[name].incoming if one.role == "weight"]
    for weight in weights:
        marks = torch.zeros(tensors[weight.name].shape, dtype=torch.uint8)
        readers = [
            (one, varies[other]) for other in varies for one in attributions[other].outgoing if one.name == weight.name
        ]
        for reader, varying in readers:
            reader.of(~varying).write_(marks, 1)
        for reader, varying in readers:
            reader.of(varying).write_(marks, 2)
        waits[weight.units] &= (weight.read(marks).flatten(1) == 1).all(1)
    return waits if weights else torch.zeros_like(waits)


def _confirmed(request: Request, site: SiteReport, seen: Evidence) -> tuple[Tensor, Tensor]:
    """Keep the units that were silent, or constant, once more; and spread their quantiles over all units."""
    quantiles = torch.full((len(seen.sums), len(request.units)), float("nan"), dtype=torch.float64)
    quantiles[:, request.units] = seen.quantiles
    still = torch.zeros_like(request.units)
    still[request.units] = (seen.fired == 0) & (seen.calls > 0)
    constant = site.frozen & (quantiles[0] == quantiles[-1])
    return still & site.silent | constant & request.units, quantiles


def _over_ranks(sums: Tensor | None, patient: Patient) -> Loss | None:
    if patient.joint:
        sums = ranks.total(torch.zeros(3, device=patient.watch.device) if sums is None else sums.clone())
    if sums is None:
        return None
    number, total, squares = sums.tolist()
    if not number:
        return None
    mean = total / number
    return Loss(mean, max(squares / number - mean * mean, 0.0) ** 0.5)


def _compiled(attribution: Attribution, patient: Patient) -> str:
    if attribution.outlet and is_compiled(patient.outer, attribution.outlet.path):
        return "the model is compiled, and a compiler does not see a term that is added later"
    return ""


def _generator(remedy: Remedy, view: SiteView) -> torch.Generator:
    """Seed alike on all ranks, and anew for each edit."""
    text = f"{remedy.seed} {type(remedy).__name__} {view.step} {view.report.name}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def _plain(attribution: Attribution) -> Any:
    """Turn into plain values that are equal where the attributions are."""
    slices = [
        (one.name, one.role, one.units.tolist(), one.index.tolist(), one.dims, one.shape)
        for one in (*attribution.incoming, *attribution.outgoing)
    ]
    return slices, attribution.no_incoming, attribution.no_outgoing, attribution.no_outlet
