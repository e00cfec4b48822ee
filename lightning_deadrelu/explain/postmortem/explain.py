"""Explain why units died: from what was logged before to a cause and a sentence. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.explain.postmortem.born_dead import bad_init, narrow, negative_bias, uncentred
from lightning_deadrelu.explain.postmortem.causes import UNKNOWN, Cause, Log, adam_spike, large_steps, shifted, spiked
from lightning_deadrelu.explain.postmortem.death_events import DeathEvent, Kind, merged
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
    dying: Sequence[DyingUnits], rows: Rows, *, off_centre: float = math.nan, widths: Sequence[int] = ()
) -> tuple[DeathEvent, ...]:
    """Group the newly dead into events, and name what came just before each.

    Returns:
        The events; of the same kind, cause and time they are one, over all sites.
    """
    deaths: list[DeathEvent] = []
    log = Log(rows)
    for one in dying:
        upstream = one.constant & bool(one.upstream)
        born = one.born & ~upstream
        leaked = decayed(one) & ~born & ~upstream
        sunk = drifted(one.peaks) & ~born & ~upstream & ~leaked
        deaths += [_upstream(one.of(part)) for part in (upstream & one.born, upstream & ~one.born) if part.any()]
        deaths += [_born(one.of(born), off_centre, widths)] if born.any() else []
        deaths += [_decay(one.of(leaked))] if leaked.any() else []
        deaths += [_drift(one.of(sunk), log)] if sunk.any() else []
        rest = one.of(~(upstream | born | sunk | leaked))
        deaths += [_shock(part, log, off_centre) for part in together(rest)]
    return tuple(merged(deaths))


def _event(kind: Kind, dying: DyingUnits, cause: Cause, moved: bool = True, where: str = "") -> DeathEvent:
    change = dying.moved if moved else math.nan
    finding = None if cause.cause == "unknown" else Finding(where=where or dying.site, **cause._asdict())
    first, last = int(dying.last_fired.min()), int(dying.silent_from.max())
    units = (len(dying.units),)
    died = math.nan if dying.died is None else median(dying.died)
    date = None if math.isnan(died) else int(died)
    told = float(f"{change:.4g}") if math.isfinite(change) and change != 0 else None
    return DeathEvent(kind, cause.cause, (dying.site,), units, first, last, cause.measured, told, finding, date)


def _upstream(dying: DyingUnits) -> DeathEvent:
    born = bool(dying.born.all())
    measured = f"because their input is constant: `{dying.upstream}` is dead"
    source = "a layer without a live unit puts out its next layer's bias, whatever the input"
    cause = Cause("upstream_death", measured, "certain", 'DeadReLUMonitor(remedy="reset")', source)
    return _event("born dead" if born else "upstream", dying, cause, moved=False, where=dying.upstream)


def _drift(dying: DyingUnits, log: Log) -> DeathEvent:
    sunk = f"as their largest input sank from {median(dying.peaks.amax(0)):.2g} over {len(dying.peaks)} windows"
    cause = UNKNOWN._replace(measured=sunk)
    if are_many(dying):
        cause = adam_spike(dying, log) or shifted(dying, log) or large_steps(dying, log, sunk) or cause
    return _event("drift", dying, cause)


def _decay(dying: DyingUnits) -> DeathEvent:
    start, now = median(dying.first_bias[dying.units]), median(dying.bias)
    measured = f"while a weight decay of {dying.decay:g} took their biases from {start:.2g} to {now:.2g}"
    edit = f"AdamW(decay_groups(model, {dying.decay:g}))"
    source = "He et al. 2019, arXiv 1812.01187: no decay of biases"
    return _event("drift", dying, Cause("bias_decay", measured, "likely", edit, source), moved=False)


def _shock(dying: DyingUnits, log: Log, off_centre: float) -> DeathEvent:
    cause = UNKNOWN
    if are_many(dying):
        early = int(dying.last_fired.min()) < _EARLY and not dying.selected
        cause = (
            spiked(dying, log)
            or (bad_init(dying) if early else None)
            or shifted(dying, log)
            or large_steps(dying, log)
            or (uncentred(dying, off_centre) if early else None)
            or cause
        )
    return _event("shock", dying, cause)


def _born(dying: DyingUnits, off_centre: float, widths: Sequence[int]) -> DeathEvent:
    few = UNKNOWN._replace(measured="having never fired")
    if dying.selected or len(dying.units) < max(UNITS, 2 * SHARE * dying.size):
        return _event("born dead", dying, few, moved=False)
    options = (
        negative_bias(dying),
        uncentred(dying, off_centre),
        bad_init(dying),
        narrow(dying, widths),
    )
    plain = Cause(
        "born_dead", few.measured, "possible", 'DeadReLUMonitor(remedy="reset")', "Lu et al. 2019, arXiv 1903.06733"
    )
    return _event("born dead", dying, next(filter(None, options), plain), moved=False)
