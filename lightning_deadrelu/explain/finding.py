"""A finding: one cause of dead units, with its measurements, its remedy and its source. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Confidence = Literal["certain", "likely", "possible"]
_ORDER: tuple[Confidence, ...] = ("certain", "likely", "possible")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Why units die, or are going to: the cause, where it is, what was measured, how sure it is and what to change.

    Args:
        cause: One word for it, the same wherever it is found.
        where: The site, module or parameter group, by name.
        measured: What was measured, with its figures.
        confidence: How sure it is.
        edit: The smallest edit of code that mends it; empty where it has been made.
        source: A paper, or a formula.

    Example:
        >>> print(Finding(cause="bias_decay", where="net.0.bias", measured="weight_decay is 0.1", confidence="likely",
        ...               edit="AdamW(decay_groups(model, 0.1))", source="He 2019"))
        bias_decay at `net.0.bias` (likely): weight_decay is 0.1. Try `AdamW(decay_groups(model, 0.1))`. [He 2019]
    """

    cause: str
    where: str
    measured: str
    confidence: Confidence
    edit: str
    source: str

    def __str__(self) -> str:
        mend = f" Try `{self.edit}`." if self.edit else ""
        return f"{self.cause} at `{self.where}` ({self.confidence}): {self.measured}.{mend} [{self.source}]"

    @property
    def evidence(self) -> str:
        """The former name of :attr:`measured`."""
        return self.measured

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain values that ``json.dumps`` takes; ``"evidence"`` is ``"measured"`` by its former name."""
        return asdict(self) | {"evidence": self.measured}


def ranked(findings: list[Finding]) -> tuple[Finding, ...]:
    """Put the surest first; equally sure ones stay in their order."""
    return tuple(sorted(findings, key=lambda one: _ORDER.index(one.confidence)))
