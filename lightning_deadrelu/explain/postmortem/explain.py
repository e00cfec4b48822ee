"""Why units died: from what was noted before to a sentence and a cause."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.explain.postmortem.born_dead import bad_init, narrow, negative_bias, uncentred
from lightning_deadrelu.explain.postmortem.causes import UNKNOWN, Cause, large_steps, shifted, spiked
from lightning_deadrelu.explain.postmortem.death_events import DeathEvent, Kind, joined
from lightning_deadrelu.explain.postmortem.dying_units import (
    SHARE,
    UNITS,
    DyingUnits,
    are_many,
    decayed,
    drifted,
    median,
    together,
)
from lightning_deadrelu.explain.postmortem.step_log import Rows

_EARLY = 100  # steps


def explain(
    victims: Sequence[DyingUnits], rows: Rows, *, off_centre: float = math.nan, sites: int = 1
) -> tuple[DeathEvent, ...]:
    """Gather the newly dead into waves, and say of each what came just before.

    Args:
        victims: The newly dead, by site, in the order of execution.
        rows: What was noted at each step.
        off_centre: Size of the inputs' mean over that of their deviation.
        sites: How many sites there are.

    Returns:
        The waves; of the same kind, cause and time they are one, over all sites.
    """
    waves: list[DeathEvent] = []
    for one in victims:
        upstream = one.constant & bool(one.upstream)
        born = one.born & ~upstream
        leaked = decayed(one) & ~born & ~upstream
        sunk = drifted(one.peaks) & ~born & ~upstream & ~leaked
        waves += [_upstream(one.of(part)) for part in (upstream & one.born, upstream & ~one.born) if part.any()]
        waves += [_born(one.of(born), off_centre, sites)] if born.any() else []
        waves += [_decay(one.of(leaked))] if leaked.any() else []
        waves += [_drift(one.of(sunk), rows)] if sunk.any() else []
        rest = one.of(~(upstream | born | sunk | leaked))
        waves += [_shock(part, rows, off_centre) for part in together(rest)]
    return tuple(joined(waves))


def _wave(kind: Kind, victims: DyingUnits, cause: Cause, moved: bool = True, where: str = "") -> DeathEvent:
    known = moved and math.isfinite(victims.moved) and victims.moved != 0
    finding = None
    if cause.name != "unknown":
        finding = Finding(
            cause=cause.name,
            where=where or victims.site,
            evidence=cause.evidence,
            confidence=cause.confidence,
            edit=cause.edit,
            source=cause.source,
        )
    first, last = int(victims.last_fired.min()), int(victims.silent_from.max())
    change = float(f"{victims.moved:.4g}") if known else None
    units = (len(victims.units),)
    return DeathEvent(kind, cause.name, (victims.site,), units, first, last, cause.evidence, change, finding)


def _upstream(victims: DyingUnits) -> DeathEvent:
    born = bool(victims.born.all())
    evidence = f"{'never fired, ' if born else ''}their input being constant since `{victims.upstream}` is dead"
    source = "a layer without a live unit puts out its next layer's bias, whatever the input"
    cause = Cause("upstream_death", evidence, "certain", 'DeadReLUMonitor(remedy="reset")', source)
    return _wave("born dead" if born else "upstream", victims, cause, moved=False, where=victims.upstream)


def _drift(victims: DyingUnits, rows: Rows) -> DeathEvent:
    sunk = f"their largest input having sunk from {median(victims.peaks.amax(0)):.2g} over {len(victims.peaks)} windows"
    cause = UNKNOWN._replace(evidence=sunk)
    if are_many(victims):
        cause = large_steps(victims, rows, sunk) or cause
    return _wave("drift", victims, cause)


def _decay(victims: DyingUnits) -> DeathEvent:
    start, now = median(victims.start.bias[victims.units]), median(victims.now.bias)
    evidence = f"while a weight decay of {victims.decay:g} took their biases from {start:.2g} to {now:.2g}"
    edit = f"AdamW(decay_groups(model, {victims.decay:g}))"
    source = "He et al. 2019, arXiv 1812.01187: no decay of biases"
    return _wave("drift", victims, Cause("bias_decay", evidence, "likely", edit, source), moved=False)


def _shock(victims: DyingUnits, rows: Rows, off_centre: float) -> DeathEvent:
    cause = UNKNOWN
    if are_many(victims):
        early = int(victims.last_fired.min()) < _EARLY
        cause = (
            spiked(victims, rows)
            or (bad_init(victims) if early else None)
            or shifted(victims, rows)
            or large_steps(victims, rows)
            or (uncentred(victims, off_centre) if early else None)
            or cause
        )
    return _wave("shock", victims, cause)


def _born(victims: DyingUnits, off_centre: float, sites: int) -> DeathEvent:
    few = UNKNOWN._replace(evidence="they have fired on no sample since the first step")
    if len(victims.units) < max(UNITS, 2 * SHARE * victims.size):
        return _wave("born dead", victims, few, moved=False)
    options = (
        negative_bias(victims),
        uncentred(victims, off_centre),
        bad_init(victims),
        narrow(victims, sites),
    )
    plain = Cause(
        "born_dead", few.evidence, "possible", 'DeadReLUMonitor(remedy="reset")', "Lu et al. 2019, arXiv 1903.06733"
    )
    return _wave("born dead", victims, next(filter(None, options), plain), moved=False)
