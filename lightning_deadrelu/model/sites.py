"""Which calls of rectifiers share one site, and how sites are named and chosen. Pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from lightning_deadrelu.model.rectifiers import SMOOTH_KINDS

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")


@lru_cache(maxsize=2**14)  # all names are cleaned again at each look at a model
def clean(path: str) -> str:
    """Strip the prefixes that ``torch.compile``, FSDP and checkpoint wrappers put into a module path.

    Example:
        >>> clean("_orig_mod.layer1._checkpoint_wrapped_module.conv")
        'layer1.conv'
    """
    return _WRAPPERS.sub("", path).rstrip(".")


_ORIGINALS = re.compile(r"(?:(^|\.)parametrizations\.(\w+)\.original\d*|(\.|^)(weight|bias)_(?:orig|[gv]))$")


def plain_parameter(name: str) -> str:
    """Name the parameter that others stand for: of a pruned, masked or normalised weight the weight.

    Example:
        >>> [plain_parameter(f"fc.{name}") for name in ("weight", "weight_orig", "parametrizations.weight.original0")]
        ['fc.weight', 'fc.weight', 'fc.weight']
    """
    return _ORIGINALS.sub(lambda found: f"{found[1] or found[3] or ''}{found[2] or found[4]}", name)


class Site(NamedTuple):
    """What makes a site itself: two calls with equal fields are one site.

    Args:
        owner: Path of the module whose forward made the call; for an activation module, its own path.
        functional: True where the call was ``F.relu`` and the like, False where it came from a module.
        kind: As :class:`Rectifier` names it.
        source: The producers' parameter names, then what tells apart calls on the same producers (``/1``: a slice
            of their output, ``-``: negated, ``+1``: behind another rectifier); or the number of the call within
            the owner's forward.
        units: How many units the site has.
        smooth: True where only dormancy is judged.
        cap: As in :class:`Rectifier`.
        traced: True if ``source`` names parameters.
    """

    owner: str
    functional: bool
    kind: str
    source: tuple[str, ...]
    units: int
    smooth: bool = False
    cap: float = math.inf
    traced: bool = True


def base_name(owner: str, functional: bool, kind: str) -> str:
    """Name what made a call, before further sites of one module are told apart.

    Example:
        >>> base_name("block", True, "relu"), base_name("block.act", False, "relu"), base_name("", True, "relu")
        ('block-relu', 'block.act', 'relu')
    """
    path = plain_path(owner)
    if not functional:
        return path or kind
    return f"{path}-{kind}" if path else kind


def own_name(site: Site) -> str:
    """Name a site as if its module had no other."""
    return base_name(site.owner, site.functional, site.kind)


def plain_path(path: str) -> str:
    """Write a module's path as names of sites have it, which loggers take for keys.

    Example:
        >>> plain_path("heads.first head.act")
        'heads.first_head.act'
    """
    return re.sub(r"[^\w.-]", "_", path)


def names_of(sites: Iterable[Site]) -> list[str]:
    """Name sites in their order: the module's path, then ``-1``, ``-2`` for further sites of the module.

    Example:
        >>> block = Site("block.relu", False, "relu", ("block.conv1.weight",), 8)
        >>> names_of([block, block._replace(source=("block.conv2.weight",))])
        ['block.relu', 'block.relu-1']
        >>> names_of([Site("block", True, "relu", ("block.fc.weight",), 8)])
        ['block-relu']
    """
    given = SiteNames()
    return [given.add(site) for site in sites]


class SiteNames:
    """Names given to sites one by one, each of which goes by those before it.

    Args:
        sites: The first ones.

    Example:
        >>> given, site = SiteNames(), Site("block", True, "relu", ("block.fc.weight",), 8)
        >>> given.add(site), given.add(site._replace(source=("block.out.weight",)))
        ('block-relu', 'block-relu-1')
    """

    def __init__(self, sites: Iterable[Site] = ()) -> None:
        self._seen: Counter[str] = Counter()
        self._taken: set[str] = set()
        for site in sites:
            self.add(site)

    def add(self, site: Site) -> str:
        """Name a further site."""
        base = own_name(site)
        name = f"{base}-{self._seen[base]}" if self._seen[base] else base
        while name in self._taken:
            self._seen[base] += 1
            name = f"{base}-{self._seen[base]}"
        self._seen[base] += 1
        self._taken.add(name)
        return name


def is_selected(name: str, kind: str, smooth: bool, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Apply ``include`` and ``exclude``: shell patterns over site names, or kinds in full.

    A smooth activation is selected by its kind only, because nothing about it can be exactly dead.

    Example:
        >>> is_selected("encoder.act", "relu", False, ["encoder.*"], [])
        True
        >>> is_selected("encoder.act", "gelu", True, ["encoder.*"], [])
        False
        >>> is_selected("encoder.act", "gelu", True, ["encoder.*", "gelu"], [])
        True
    """
    if _matches(name, kind, exclude):
        return False
    if smooth:
        return kind in include
    names = [pattern for pattern in include if pattern not in SMOOTH_KINDS]
    return not names or _matches(name, kind, names)


def matches(name: str, pattern: str) -> bool:
    """Hold a pattern against a site's name; what a module's own forward calls is inside the module.

    Example:
        >>> matches("encoder.act", "encoder.*"), matches("encoder-relu", "encoder.*"), matches("head", "encoder.*")
        (True, True, False)
        >>> matches("first_head.act", "first head.*")
        True
    """
    pattern = re.sub(r"[^\w.\-*?!\[\]]", "_", pattern)  # as in the name
    return fnmatchcase(name, pattern) or fnmatchcase(name.replace("-", "."), pattern)


def _matches(name: str, kind: str, patterns: Sequence[str]) -> bool:
    return any(kind == pattern or matches(name, pattern) for pattern in patterns)


def unmatched(patterns: Sequence[str], names: Sequence[str], kinds: Iterable[str]) -> list[str]:
    """List the patterns that match neither a site's name nor its kind.

    Example:
        >>> unmatched(["encodr.*", "relu"], ["encoder.act"], ["relu"])
        ['encodr.*']
    """
    known = set(kinds)
    return [p for p in patterns if p not in known and not any(matches(name, p) for name in names)]


def guess_dims(ndim: int) -> tuple[int, ...]:
    """Guess the unit dimension where no producer tells it: 1 from four dimensions on, else the last.

    Example:
        >>> guess_dims(4), guess_dims(2)
        ((-3,), (-1,))
    """
    return (1 - ndim,) if ndim >= 4 else (-1,)


def count_units(x: Tensor, dims: tuple[int, ...]) -> int:
    """Multiply the sizes of the unit dimensions.

    Example:
        >>> import torch
        >>> count_units(torch.zeros(2, 8, 5, 5), (-3,))
        8
    """
    return math.prod(x.shape[dim] for dim in dims)
