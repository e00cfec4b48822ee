"""Describe units that died together in a sentence, and merge events that belong together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.statistics import LivenessReport

Kind = Literal["born dead", "shock", "drift", "upstream"]

_UNITS = 3
_MOST_DESCRIBED = 5
_CLOSE = 10  # steps; an estimate is no closer
_UNNAMED = ("unknown", "born_dead")


@dataclass(frozen=True)
class DeathEvent:
    """Units that died together, and why.

    Args:
        kind: ``"born dead"``, ``"shock"`` (within the resolution), ``"drift"`` (over many windows) or ``"upstream"``.
        cause: One word, as in :class:`~lightning_deadrelu.explain.finding.Finding`; ``"unknown"`` where none is
            certain.
        sites: Where.
        units: How many at each.
        first_step: The last observation at which one of them fired; for those born dead, the first of all.
        last_step: The first observation from which on all were silent.
        measured: What was measured, in words.
        moved: Median change of the biases; None where it is not known.
        finding: The cause with its remedy; None where it is unknown.
        estimated_step: The step from which on they had no gradient, in the median, as the optimizer's momentum tells to
            a few steps; None where that does not tell.

    Example:
        >>> print(DeathEvent("shock", "gradient_spike", ("fc2",), (142,), 120, 130, "as gradients rose 80-fold", -4.1))
        142 units of `fc2` died between steps 120 and 130, as gradients rose 80-fold; bias moved by -4.1
    """

    kind: Kind
    cause: str
    sites: tuple[str, ...]
    units: tuple[int, ...]
    first_step: int
    last_step: int
    measured: str
    moved: float | None = None
    finding: Finding | None = None
    estimated_step: int | None = None

    def __str__(self) -> str:
        total = sum(self.units)
        who = f"{total:,} unit{'s' * (total > 1)} of {self._where}"
        moved = "" if self.moved is None else f"; bias moved by {self.moved:+.2g}"
        when = f"between steps {self.first_step:,} and {self.last_step:,}"
        if self.estimated_step is not None and self.last_step - self.first_step > _CLOSE:
            when += f" (about step {self.estimated_step:,}, by the optimizer's momentum)"
        if self.kind == "born dead":
            return f"{who} {'were' if total > 1 else 'was'} born dead, {self.measured}"
        done = "fell silent" if self.kind == "drift" else "died"
        return f"{who} {done} {when}, {self.measured}{moved}"

    @property
    def is_large(self) -> bool:
        """Whether it is worth a line of its own."""
        return sum(self.units) >= (_UNITS if self.finding else 2 * _UNITS)

    @property
    def _where(self) -> str:
        if len(self.sites) == 1:
            return f"`{self.sites[0]}`"
        most = self.units.index(max(self.units))
        return f"{len(self.sites)} layers (most in `{self.sites[most]}`, {self.units[most]:,})"

    @property
    def evidence(self) -> str:
        """The former name of :attr:`measured`."""
        return self.measured

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain values that ``json.dumps`` takes; ``"evidence"`` is ``"measured"`` by its former name."""
        plain = {"kind": self.kind, "cause": self.cause, "sites": list(self.sites), "units": list(self.units)}
        steps: dict[str, int | None] = {"first_step": self.first_step, "last_step": self.last_step}
        text = {"measured": self.measured, "evidence": self.measured}
        finding = self.finding.to_dict() if self.finding else None
        steps["estimated_step"] = self.estimated_step
        return plain | steps | text | {"moved": self.moved, "finding": finding, "sentence": str(self)}


def merged(deaths: Sequence[DeathEvent]) -> list[DeathEvent]:
    """Merge events that are alike in kind and cause and follow each other without a gap.

    Returns:
        Events in the order of their first step; of the same step, those that others follow from come first.
    """
    groups: list[list[DeathEvent]] = []
    for death in sorted((_adopted(death, deaths) for death in deaths), key=lambda death: death.first_step):
        alike = (group for group in groups if (group[0].kind, group[0].cause) == (death.kind, death.cause))
        group = next((group for group in alike if _go_on(group, death)), None)
        if group is None:
            groups.append([death])
        else:
            group.append(death)
    return sorted(map(_one, groups), key=_in_time)


def _in_time(death: DeathEvent) -> tuple[int, bool]:
    return death.first_step, death.cause == "upstream_death"


def _adopted(death: DeathEvent, others: Sequence[DeathEvent]) -> DeathEvent:
    """Give the few of one site the cause that many at another, at the same time, died of."""
    if death.cause not in _UNNAMED or death.kind not in ("born dead", "shock"):
        return death
    named = (one for one in others if one.kind == death.kind and one.cause not in (*_UNNAMED, "upstream_death"))
    cause = next((one for one in named if _overlap(one, death)), death)
    return replace(death, cause=cause.cause, measured=cause.measured, finding=cause.finding)


def _overlap(one: DeathEvent, other: DeathEvent) -> bool:
    same = one.first_step < other.last_step and other.first_step < one.last_step
    return same or one.kind == "born dead"


def _go_on(group: Sequence[DeathEvent], death: DeathEvent) -> bool:
    lasting = death.kind == "born dead" or death.cause == "bias_decay"
    return lasting or death.first_step <= max(one.last_step for one in group)


def _one(group: Sequence[DeathEvent]) -> DeathEvent:
    counts: dict[str, int] = {}
    for death in group:
        for site, number in zip(death.sites, death.units, strict=True):
            counts[site] = counts.get(site, 0) + number
    main = max(group, key=lambda death: sum(death.units))
    first, last = min(death.first_step for death in group), max(death.last_step for death in group)
    where, units = tuple(counts), tuple(counts.values())
    return replace(main, sites=where, units=units, first_step=first, last_step=last)


def largest(deaths: Sequence[DeathEvent], most: int) -> list[DeathEvent]:
    """Keep so many events, in their order: those of many units, and of the others the latest."""
    order = sorted(
        range(len(deaths)), key=lambda at: (deaths[at].is_large, deaths[at].is_large * sum(deaths[at].units), at)
    )
    return [deaths[at] for at in sorted(order[-most:])]


def still_true(
    deaths: Iterable[DeathEvent], report: LivenessReport | None, repairs: bool = False
) -> tuple[DeathEvent, ...]:
    """Keep of those born dead the units that are so still, and of the advice what is not followed already.

    Args:
        deaths: In the order of time.
        report: The latest verdict.
        repairs: Whether a remedy is on.
    """
    left = {site.name: int(site.born_dead.sum()) for site in report.sites} if report else {}
    kept: list[DeathEvent] = []
    for death in deaths:
        if death.kind == "born dead":
            now = {site: min(units, left.get(site, 0)) for site, units in zip(death.sites, death.units, strict=True)}
            left |= {site: left.get(site, 0) - units for site, units in now.items()}
            now = {site: units for site, units in now.items() if units}
            death = replace(death, sites=tuple(now), units=tuple(now.values()))
        if repairs and death.finding and death.finding.edit.startswith("DeadReLUMonitor(remedy="):
            death = replace(death, finding=replace(death.finding, edit=""))
        kept += [death] * bool(death.units)
    return tuple(kept)


def described(deaths: Sequence[DeathEvent]) -> str:
    """Describe the largest events that have a cause, with what mends it, in the order of time, and count the others."""
    large = [death for death in deaths if death.is_large and death.finding]
    large.sort(key=lambda death: -sum(death.units))
    shown = sorted(large[:_MOST_DESCRIBED], key=_in_time)
    lines: list[str] = []
    for death in shown:
        lines += [f"{death}.", *(advice for advice in _advice(death) if advice not in lines)]
    lines += _counted([death for death in deaths if death not in shown], " more" * bool(shown))
    return "\n".join(lines)


def _advice(death: DeathEvent) -> list[str]:
    found = death.finding
    if found is None:
        return []
    mend = f": try `{found.edit}`" if found.edit else ""
    return [f"  {found.cause} ({found.confidence}){mend} [{found.source}]"]


def _counted(deaths: Sequence[DeathEvent], more: str) -> list[str]:
    number = sum(sum(death.units) for death in deaths)
    unknown = "" if any(death.finding for death in deaths) else " without a known cause"
    return [f"{number:,}{more} death{'s' * (number > 1)}{unknown}; see `monitor.deaths`."] if number else []
