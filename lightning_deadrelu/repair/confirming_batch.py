"""Look once more at units before they are edited, and have remedies propose edits on what is seen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.attribution import joined_over_ranks, plain
from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.model.parameters import tensors_of, values_of
from lightning_deadrelu.model.rectifiers import SELECTIONS
from lightning_deadrelu.model.sharding import reshard_
from lightning_deadrelu.observe.watch import NOT_TRACED
from lightning_deadrelu.remedies import InitDistribution, NotApplicable, Remedy, SiteView
from lightning_deadrelu.repair.policy import Request
from lightning_deadrelu.repair.proposals import (
    Proposal,
    confirmed,
    fed_by_linear,
    fingerprint,
    fires_now,
    generator_of,
)
from lightning_deadrelu.repair.training_context import TrainingContext
from lightning_deadrelu.repair.writer import check_writes
from lightning_deadrelu.statistics import LivenessReport
from lightning_deadrelu.statistics.confirmation import MOST_ROWS, Confirmation, SilenceSample


@dataclass(frozen=True, eq=False)
class PendingEdits:
    """Edits that wait to be confirmed.

    Args:
        requests: The units, by site, and what is to be done to them.
        report: The verdict behind the requests.
        layers: By site, the linear module that alone feeds it, if one does: some of its input is kept.
    """

    requests: list[Request]
    report: LivenessReport
    layers: dict[str, str]

    @classmethod
    def of(cls, requests: list[Request], report: LivenessReport, context: TrainingContext) -> PendingEdits:
        """Find out which layers are to be listened to."""
        attributions, tensors = context.watch.attributions, tensors_of(context.model)
        layers = {one.site: fed_by_linear(attributions[one.site], tensors) for one in requests}
        return cls(requests, report, {site: path for site, path in layers.items() if path})


class ConfirmingBatch:
    """One observed batch that shows whether units are silent still, and what follows from it.

    Every rank has to come here, also one that failed: each step that can fail on one rank alone ends in an exchange.
    """

    def __init__(self, context: TrainingContext, pending: PendingEdits) -> None:
        self._context, self._pending = context, pending
        asked = {context.number(request.site): request.units for request in pending.requests}
        self._confirmation = Confirmation(asked, context.watch.device)
        self._handles: list[RemovableHandle] = []

    def begin(self) -> None:
        """Have the next observed batch looked at."""
        watch, number = self._context.watch, self._context.number
        self._handles = [watch.subscribe(self._confirmation)]
        for site, path in self._pending.layers.items():
            listen = partial(self._listen, number(site))
            self._handles.append(watch.probe.router.subscribe_input(path, listen))
        watch.trace()

    def _listen(self, number: int, x: Tensor) -> None:
        self._confirmation.listen(number, x, self._context.watch.valid)

    def end(self) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def conclude(
        self, remedies: Sequence[Remedy], init: Mapping[str, InitDistribution], step: int, batch: int, *, all_met: bool
    ) -> list[Proposal]:
        """Say what is to be done to each site with a pending edit, the same on all ranks.

        Args:
            remedies: As requests number them.
            init: What parameters were drawn from, by name.
            step: The training batch, as loggers count.
            batch: Its number, from which numbers are drawn.
            all_met: Whether weights that no batch has used so far will hardly be used later: they are no readers.

        Raises:
            RankFailure: On all ranks, if one has failed.
        """
        ranks = self._context.ranks
        sample = ranks.merge_sample(lambda: self._confirmation.evidence)
        known = ranks.gather(self._known)
        attributions = self._joined(known)
        all_met = all_met or not frozenset.intersection(*(one.unmet for one in known))

        def propose() -> list[Proposal]:
            views = self._views(sample, known, attributions, init, step)
            return [self._proposal(one, view, remedies[one.index], batch, all_met) for one, view in views]

        proposals = ranks.attempt(propose)
        if len(set(ranks.gather(lambda: fingerprint(proposals)))) == 1:
            return proposals
        why = "the ranks propose different edits, or hold different weights"
        return [one._replace(edits=None, reason=why) for one in proposals]

    def _known(self) -> _Known:
        watch, ranks = self._context.watch, self._context.ranks
        own = watch.attributions
        digest = hashlib.sha256(repr([(name, plain(one)) for name, one in own.items()]).encode()).digest()
        rows = {site: self._confirmation.rows(self._context.number(site)) for site in self._pending.layers}
        few = {site: _few(kept, MOST_ROWS // ranks.size) for site, kept in rows.items() if kept is not None}
        return _Known(self._context.unmet, digest, few)

    def _joined(self, known: Sequence[_Known]) -> Mapping[str, Attribution]:
        """Join what all ranks know of who feeds and reads whom; they may have run different layers."""
        watch, ranks = self._context.watch, self._context.ranks
        if len({one.fingerprint for one in known}) == 1:
            return watch.attributions
        theirs = ranks.gather(lambda: watch.attributions)
        return ranks.attempt(lambda: joined_over_ranks(theirs, NOT_TRACED))

    def _views(
        self,
        sample: SilenceSample,
        known: Sequence[_Known],
        attributions: Mapping[str, Attribution],
        init: Mapping[str, InitDistribution],
        step: int,
    ) -> list[tuple[Request, SiteView]]:
        """Lay out all that is known of each site with a pending edit."""
        context, views = self._context, []
        reshard_(context.model)
        for request in self._pending.requests:
            site, attribution = self._pending.report[request.site], attributions[request.site]
            number = context.number(request.site)
            hinge = context.watch.hinges.get(number, 0.0)
            units, quantiles = confirmed(request, site, self._confirmation.of(number, sample))
            parts = (*attribution.incoming, *attribution.outgoing)
            values = values_of(context.model, [one.name for one in parts])
            inputs = _rows_of(known, request.site) if fed_by_linear(attribution, tensors_of(context.model)) else None
            above = not request.blind and site.kind not in SELECTIONS  # where to be above the hinge is to be alive
            if above and units.any() and inputs is not None:
                units &= site.frozen | ~fires_now(inputs, attribution, values, hinge)
            no_module = context.no_module(request.site)
            view = SiteView(site, units, attribution, values, init, quantiles, step, inputs, hinge, no_module)
            views.append((request, view))
        return views

    def _proposal(self, request: Request, view: SiteView, remedy: Remedy, batch: int, all_met: bool) -> Proposal:
        """Ask the remedy."""
        context, asked = self._context, Proposal(request, view)
        if not view.units.any() or view.attribution.no_incoming == NOT_TRACED:
            return asked
        if reason := context.obstacle(remedy, view.report.name, view.attribution):
            return asked._replace(reason=reason)
        if "outgoing" in remedy.needs and not all_met:
            return asked  # they may be readers that run in other batches
        try:
            if request.blind:
                view = replace(view, units=remedy.to_free(view))
                if not view.units.any():
                    return asked
                asked = asked._replace(view=view)
            edits = remedy.propose(view, generator_of(remedy, request.site, batch))
            rises = edits.lift.rises if edits.lift else ()
            reason = check_writes((*edits.writes, *rises), context.model, context.optimizers)
            if edits.warmth and not reason:
                reason = context.no_outlet(view.attribution)
        except NotApplicable as error:
            return asked._replace(reason=str(error))
        except Exception as error:
            reason = f"its `propose` failed: {type(error).__name__}: {error}"
            return asked._replace(reason=reason)
        reason = reason or ("" if edits else "it proposes nothing for these units")
        return asked._replace(edits=None if reason else edits, reason=reason)


class _Known(NamedTuple):
    """What one rank knows of the sites with pending edits.

    Args:
        unmet: Weights that it has not met while tracing.
        fingerprint: Of its attributions.
        rows: Some rows of the input of the layer before each site, on the CPU.
    """

    unmet: frozenset[str]
    fingerprint: bytes
    rows: dict[str, Tensor]


def _few(rows: Tensor, most: int) -> Tensor:
    """Thin rows out evenly."""
    return rows[:: -(-len(rows) // max(1, most)) or 1].cpu()


def _rows_of(known: Sequence[_Known], site: str) -> Tensor | None:
    """Put the rows of all ranks together, the same on each; None if none has any."""
    rows = [one.rows[site] for one in known if site in one.rows]
    return torch.cat(rows) if rows else None
