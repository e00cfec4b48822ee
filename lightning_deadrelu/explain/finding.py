"""What a cause of death is called, what mends it, and who says so. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Confidence = Literal["certain", "likely", "possible"]
_ORDER: tuple[Confidence, ...] = ("certain", "likely", "possible")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Why units die, or are going to: what, where, on which evidence, how sure, and what to change.

    Args:
        cause: One word for it, the same wherever it is found.
        where: The site, module or parameter group, by name.
        evidence: What was measured, with its figures.
        confidence: How sure it is.
        edit: The smallest edit of code that mends it.
        source: A paper, or a formula.

    Example:
        >>> print(Finding(cause="bias_decay", where="net.0.bias", evidence="weight_decay is 0.1", confidence="likely",
        ...               edit="AdamW(decay_groups(model, 0.1))", source="He 2019"))
        bias_decay at `net.0.bias` (likely): weight_decay is 0.1. Try `AdamW(decay_groups(model, 0.1))`. [He 2019]
    """

    cause: str
    where: str
    evidence: str
    confidence: Confidence
    edit: str
    source: str

    def __str__(self) -> str:
        return (
            f"{self.cause} at `{self.where}` ({self.confidence}): {self.evidence}. Try `{self.edit}`. [{self.source}]"
        )

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain values that ``json.dumps`` takes."""
        return asdict(self)


def ranked(findings: list[Finding]) -> tuple[Finding, ...]:
    """Put the surest first; equally sure ones stay in their order."""
    return tuple(sorted(findings, key=lambda one: _ORDER.index(one.confidence)))
