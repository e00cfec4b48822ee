"""Long names, made short."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def shortened_names(names: Sequence[str], longest: int = 44) -> list[str]:
    """Leave out of long names what all have in common, then the middle.

    Args:
        names: All of them.
        longest: Characters that a name may have.

    Example:
        >>> shortened_names([f"model.encoder_of_images.layers.{i}.feed_forward.activation.relu" for i in range(2)])
        ['…0…', '…1…']
    """
    if max(map(len, names), default=0) <= longest:
        return list(names)
    paths = [name.split(".") for name in names]
    shortest = min(map(len, paths)) - 1
    head = min(_in_common(paths), shortest)
    tail = min(_in_common([path[::-1] for path in paths]), shortest - head)
    short = ["…" * (head > 0) + ".".join(path[head : len(path) - tail]) + "…" * (tail > 0) for path in paths]
    return [
        name if len(name) <= longest else f"{name[: longest // 3]}…{name[longest // 3 - longest :]}" for name in short
    ]


def _in_common(paths: list[list[str]]) -> int:
    """Count the leading parts that all paths share."""
    return sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
