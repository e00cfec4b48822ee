"""What tracing has found, as a checkpoint holds it: a run that goes on must not forget readers that take turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lightning_deadrelu.attribution.connectivity import Connectivity
from lightning_deadrelu.attribution.labels import Origin, Read
from lightning_deadrelu.model.sites import Site


class Fed(NamedTuple):
    """What of a parameter arrives at a site, as pairs of a row and a unit."""

    site: Site
    origin: Origin
    pairs: Tensor


class Unaccounted(NamedTuple):
    """What of a parameter, or of a site, is read where it cannot be accounted for; one of the two is None."""

    origin: Origin | None
    site: Site | None
    reason: str
    mask: Tensor


class Features(NamedTuple):
    """Which unit of a site each feature of a read is, one tensor for each stream."""

    site: Site
    streams: tuple[Tensor, ...]


@dataclass
class ConnectivityState:
    """All that a :class:`~lightning_deadrelu.attribution.connectivity.Connectivity` knows, field by field."""

    fed: list[Fed]
    why: list[tuple[Site, str]]
    nonzero_when_silent: list[tuple[Site, str]]
    unaccounted: list[Unaccounted]
    other_uses: dict[str, str]
    sharded: set[str]
    sharing: dict[str, str]
    views: list[tuple[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]]
    reads: list[tuple[Origin, list[Features]]]


def state_of(known: Connectivity) -> ConnectivityState:
    """List what is known.

    Example:
        >>> state_of(Connectivity()).fed
        []
    """
    return ConnectivityState(
        [Fed(site, *pair) for site, fed in known.fed.items() for pair in fed.items()],
        list(known.why.items()),
        list(known.nonzero_when_silent.items()),
        [_unaccounted(of, *pair) for of, reasons in known.unaccounted.items() for pair in reasons.items()],
        known.other_uses,
        known.sharded,
        known.sharing,
        [(name, sorted(ways)) for name, ways in known.views.items()],
        [
            (read.rows, [Features(*pair) for pair in read.sites.items()])
            for reads in known.reads.values()
            for read in reads
        ],
    )


def _unaccounted(of: Origin | Site, reason: str, mask: Tensor) -> Unaccounted:
    return Unaccounted(None, of, reason, mask) if isinstance(of, Site) else Unaccounted(of, None, reason, mask)


def restore_(known: Connectivity, state: ConnectivityState) -> None:
    """Put what was known into a connectivity that knows nothing yet."""
    for site, origin, pairs in state.fed:
        known.fed.setdefault(site, {})[origin] = pairs
    known.why.update(state.why)
    known.nonzero_when_silent.update(state.nonzero_when_silent)
    for one in state.unaccounted:
        if (of := one.origin or one.site) is not None:
            known.unaccounted.setdefault(of, {})[one.reason] = one.mask
    known.other_uses.update(state.other_uses)
    known.sharded.update(state.sharded)
    known.sharing.update(state.sharing)
    known.views.update((name, set(ways)) for name, ways in state.views)
    for rows, features in state.reads:
        known.reads.setdefault(rows, []).append(Read(rows, {one.site: one.streams for one in features}))
