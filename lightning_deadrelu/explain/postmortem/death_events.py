"""Units that died together: told in a sentence, and joined where they belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_deadrelu.explain.finding import Finding

Kind = Literal["born dead", "shock", "drift", "upstream"]

_UNITS = 3
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
        evidence: What was measured.
        moved: Median change of the biases; None where it is not known.
        finding: The cause with its remedy; None where it is unknown.

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
    evidence: str
    moved: float | None = None
    finding: Finding | None = None

    def __str__(self) -> str:
        total = sum(self.units)
        who = f"{total:,} unit{'s' * (total > 1)} of {self._where}"
        moved = "" if self.moved is None else f"; bias moved by {self.moved:+.2g}"
        when = f"between steps {self.first_step:,} and {self.last_step:,}"
        if self.kind == "born dead":
            return f"{who} {'were' if total > 1 else 'was'} born dead: {self.evidence}"
        done = "sank into silence" if self.kind == "drift" else "died"
        return f"{who} {done} {when}, {self.evidence}{moved}"

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

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain values that ``json.dumps`` takes."""
        plain = {"kind": self.kind, "cause": self.cause, "sites": list(self.sites), "units": list(self.units)}
        steps = {"first_step": self.first_step, "last_step": self.last_step, "evidence": self.evidence}
        finding = self.finding.to_dict() if self.finding else None
        return plain | steps | {"moved": self.moved, "finding": finding, "sentence": str(self)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> DeathEvent:
        """Turn back what :meth:`to_dict` returned."""
        values = {key: value for key, value in plain.items() if key != "sentence"}
        finding = Finding(**values["finding"]) if values["finding"] else None
        return cls(**values | {"sites": tuple(values["sites"]), "units": tuple(values["units"]), "finding": finding})


def joined(waves: Sequence[DeathEvent]) -> list[DeathEvent]:
    """Join what is alike in kind and cause, and goes on in time.

    Args:
        waves: In any order.

    Returns:
        Waves in the order of their first step; of the same step, those that others follow from come first.
    """
    groups: list[list[DeathEvent]] = []
    for wave in sorted((_adopted(wave, waves) for wave in waves), key=lambda wave: wave.first_step):
        alike = (group for group in groups if (group[0].kind, group[0].cause) == (wave.kind, wave.cause))
        group = next((group for group in alike if _go_on(group, wave)), None)
        if group is None:
            groups.append([wave])
        else:
            group.append(wave)
    return sorted(map(_one, groups), key=lambda wave: (wave.first_step, wave.cause == "upstream_death"))


def _adopted(wave: DeathEvent, others: Sequence[DeathEvent]) -> DeathEvent:
    """Give the few of one site the cause that many at another, at the same time, died of."""
    if wave.cause not in _UNNAMED or wave.kind not in ("born dead", "shock"):
        return wave
    named = (one for one in others if one.kind == wave.kind and one.cause not in (*_UNNAMED, "upstream_death"))
    cause = next((one for one in named if _overlap(one, wave)), wave)
    return replace(wave, cause=cause.cause, evidence=cause.evidence, finding=cause.finding)


def _overlap(one: DeathEvent, other: DeathEvent) -> bool:
    same = one.first_step < other.last_step and other.first_step < one.last_step
    return same or one.kind == "born dead"


def _go_on(group: Sequence[DeathEvent], wave: DeathEvent) -> bool:
    lasting = wave.kind == "born dead" or wave.cause == "bias_decay"
    return lasting or wave.first_step <= max(one.last_step for one in group)


def _one(group: Sequence[DeathEvent]) -> DeathEvent:
    counts: dict[str, int] = {}
    for wave in group:
        for site, number in zip(wave.sites, wave.units, strict=True):
            counts[site] = counts.get(site, 0) + number
    largest = max(group, key=lambda wave: sum(wave.units))
    first, last = min(wave.first_step for wave in group), max(wave.last_step for wave in group)
    where, units = tuple(counts), tuple(counts.values())
    return DeathEvent(
        largest.kind, largest.cause, where, units, first, last, largest.evidence, largest.moved, largest.finding
    )


def most_telling(waves: Sequence[DeathEvent], most: int) -> list[DeathEvent]:
    """Keep so many waves, in their order: those of many units, and of the others the latest.

    Args:
        waves: In the order of time.
        most: How many.
    """
    order = sorted(
        range(len(waves)), key=lambda at: (waves[at].is_large, waves[at].is_large * sum(waves[at].units), at)
    )
    return [waves[at] for at in sorted(order[-most:])]


def told(waves: Sequence[DeathEvent], most: int = 5) -> str:
    """Tell of the largest waves, with what mends their causes, in the order of time; empty if there were none.

    Args:
        waves: All of them.
        most: How many to tell of.

    Example:
        >>> told(())
        ''
    """
    large = sorted((wave for wave in waves if wave.is_large), key=lambda wave: (wave.finding is None, -sum(wave.units)))
    shown = sorted(large[:most], key=lambda wave: wave.first_step)
    lines: list[str] = []
    for wave in shown:
        lines += [f"{wave}.", *(advice for advice in _advice(wave) if advice not in lines)]
    left = sum(sum(wave.units) for wave in waves if wave not in shown)
    if left:
        lines.append(f"{left:,} more unit{'s' * (left > 1)} died; see `monitor.deaths`.")
    return "\n".join(lines)


def _advice(wave: DeathEvent) -> list[str]:
    found = wave.finding
    return [f"  {found.cause} ({found.confidence}): try `{found.edit}` [{found.source}]"] if found else []
