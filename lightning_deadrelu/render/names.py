"""Long names, made short."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence


def shortened_names(names: Sequence[str], longest: int = 44) -> list[str]:
    """Leave out of long names what all have in common, then the middle.

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


def cut_name(name: str, longest: int) -> str:
    """Leave out the middle of a name that is too long, and put a digest of the whole there: it is cut alike each time.

    Example:
        >>> cut_name("encoder.layers.0.activation", 24)
        'encoder_16833c68_ivation'
        >>> cut_name("encoder.act", 24)
        'encoder.act'
    """
    if len(name) <= longest:
        return name
    kept = (longest - 10) // 2
    return f"{name[:kept]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}_{name[-kept:]}"


def listed(names: Sequence[str]) -> str:
    """List names, the first three of many.

    Example:
        >>> listed(["a", "b", "c", "d", "e"])
        '`a`, `b`, `c` and 2 more'
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def _in_common(paths: list[list[str]]) -> int:
    """Count the leading parts that all paths share."""
    return sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
