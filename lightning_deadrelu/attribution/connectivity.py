"""What was seen of all sites, and the attribution that follows from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.attribution.labels import (
    OUTLET,
    Flow,
    Origin,
    Outcome,
    Read,
    Stream,
    UnaccountedRead,
    distinct,
    pairs,
)
from lightning_deadrelu.attribution.result import Attribution, Outlet
from lightning_deadrelu.model.sites import Site, own_name
from lightning_deadrelu.model.slices import Slice

_NORM_ROLES = frozenset({"scale", "shift", "mean", "variance"})
_UNFED = "no layer was seen to feed it directly"
_UNREAD = "nothing was seen to read it"
_MIXED = "`{}` also multiplies other things"


class _Index(NamedTuple):
    """What is asked of each site, found without a look at all others.

    Args:
        sites: Which sites an origin feeds.
        readers: Which rows read a site.
        outlets: The outlets met, by name.
    """

    sites: Mapping[Origin, list[Site]]
    readers: Mapping[Site, list[Origin]]
    outlets: Mapping[str, set[Origin]]


@dataclass(eq=False)
class Connectivity:
    """Collects who feeds and reads whom, over any number of calls and batches; holds no activations.

    A checkpoint holds all of it: a run that goes on must not forget readers that take turns.

    Args:
        fed: What arrives at a site, as pairs of a row and a unit.
        why: Why not all is known of what feeds a site.
        nonzero_when_silent: Why a silent unit of a site puts out something; empty if it does not.
        unaccounted_rows: Which rows are read where it cannot be accounted for, by reason.
        unaccounted_units: Which units are.
        other_uses: What else uses a parameter.
        sharded: Parameters that are split over ranks.
        sharing: Parameters and buffers that share memory, each with another one.
        views: The ways in which a parameter is used.
        reads: What reads the same rows.
        frozen: Readers that were not trained.
        reached: Readers of whose output a loss has heard.
        multiplied: Sites that are multiplied with other activations.
    """

    fed: dict[Site, dict[Origin, Tensor]] = field(default_factory=dict)
    why: dict[Site, str] = field(default_factory=dict)
    nonzero_when_silent: dict[Site, str] = field(default_factory=dict)
    unaccounted_rows: dict[Origin, dict[str, Tensor]] = field(default_factory=dict)
    unaccounted_units: dict[Site, dict[str, Tensor]] = field(default_factory=dict)
    other_uses: dict[str, str] = field(default_factory=dict)
    sharded: set[str] = field(default_factory=set)
    sharing: dict[str, str] = field(default_factory=dict)
    views: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = field(default_factory=dict)
    reads: dict[Origin, list[Read]] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    multiplied: set[Site] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.name_of: Callable[[Site], str] = own_name
        """Names a site in reasons; what is saved does not hold it."""

    # -- what was seen

    def note_unaccounted(self, unaccounted: Iterable[UnaccountedRead]) -> None:
        """Note what was read where it cannot be accounted for."""
        for read in unaccounted:
            if isinstance(read.origin, str):
                self.other_uses.setdefault(read.origin, read.reason)
            elif isinstance(read.origin, Site):
                _mark(self.unaccounted_units.setdefault(read.origin, {}), read, read.origin.units)
            else:
                _mark(self.unaccounted_rows.setdefault(read.origin, {}), read, read.origin.rows)

    def note(self, outcome: Outcome) -> None:
        """Note what a call read, and which entries it used."""
        for origin in (*outcome.uses, *_rows_in(outcome)):
            self.views.setdefault(origin.name, set()).add((origin.dims, origin.shape))
        self.multiplied.update(outcome.multiplied)
        for read in outcome.reads:
            known = self.reads.setdefault(read.rows, [])
            if not any(_is_same_read(read, other) for other in known):
                known.append(read)

    def note_gradient(self, name: str, gradient: Tensor) -> None:
        """Note that what a weight puts out reaches a loss."""
        self.reached.add(name)

    def feed(self, site: Site, flow: Flow, units: Tensor) -> None:
        """Note what arrives at a site."""
        self._note_outlets(site, flow)
        fed = self.fed.setdefault(site, {})
        for origin, labels in flow.before:
            assert isinstance(origin, Origin)
            new = pairs(labels, units)
            if origin.role == OUTLET and bool((labels < 0).any()):
                part = f"only a part of each unit of `{self.name_of(site)}`"
                self.note_unaccounted([UnaccountedRead(origin, labels, part)])
            fed[origin] = distinct(torch.cat([fed[origin], new])) if origin in fed else new
        why = flow.why or flow.indirect or ("" if flow.before else _UNFED)
        if flow.behind:
            other = flow.behind[0].origin
            assert isinstance(other, Site)
            why = f"it rectifies what `{self.name_of(other)}` puts out"
        if why and not self.why.get(site):
            self.why[site] = why

    def _note_outlets(self, site: Site, flow: Flow) -> None:
        """Give up the outlets through which not all calls of a site go."""
        ends = {stream.origin for stream in flow.streams if stream.is_outlet}
        known = {origin for origin in self.fed.get(site, ()) if origin.role == OUTLET}
        for end in ends ^ known if site in self.fed else ():
            assert isinstance(end, Origin)
            part = f"some calls of `{self.name_of(site)}` alone"
            self.note_unaccounted([UnaccountedRead(end, torch.arange(end.rows, device="cpu"), part)])

    def is_refused(self, stream: Stream) -> bool:
        """Whether a stream was read where it cannot be accounted for, so that following it further brings nothing."""
        if isinstance(stream.origin, Site):
            return stream.origin in self.unaccounted_units
        reasons = self.unaccounted_rows.get(stream.origin, {})
        return bool(reasons) and bool(_any(reasons)[stream.labels[stream.labels >= 0]].all())

    def refusal_of(self, stream: Stream) -> str:
        """Say why a stream is followed no further."""
        assert isinstance(stream.origin, Origin)
        return f"`{stream.origin.name}` also feeds {next(iter(self.unaccounted_rows[stream.origin]))}"

    # -- what follows

    @property
    def used(self) -> frozenset[str]:
        """Names of the parameters and buffers in use, whatever for."""
        others = {one.name for one in self.unaccounted_rows if one.role != OUTLET}
        return frozenset(self.views) | frozenset(self.other_uses) | others

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the parameters and buffers of layers and norms, in the order of their first use."""
        return tuple(self.views)

    def other_readers(self, name: str) -> frozenset[str]:
        """Name the functions that read what a layer's weight puts out, where they read it not unit by unit."""
        mine = (reasons for one, reasons in self.unaccounted_rows.items() if one.name == name)
        return frozenset[str]().union(*mine)

    def attributions(self) -> dict[Site, Attribution]:
        """Attribute every site met."""
        index = self._index()
        return {site: self._attribution(site, index) for site in self.fed}

    def _index(self) -> _Index:
        index = _Index(defaultdict(list), defaultdict(list), defaultdict(set))
        for site, fed in self.fed.items():
            for origin in fed:
                index.sites[origin].append(site)
        for rows, reads in self.reads.items():
            for site in dict.fromkeys(site for read in reads for site, units in read.sites.items() if units):
                index.readers[site].append(rows)
        for one in (*self.unaccounted_rows, *index.sites):
            if one.role == OUTLET:
                index.outlets[one.name].add(one)
        return index

    def _attribution(self, site: Site, index: _Index) -> Attribution:
        incoming, no_incoming = self._incoming(site, index)
        outgoing, no_outgoing = self._outgoing(site, index.readers[site])
        outlet, no_outlet = self._outlet(site, index)
        reasons, multiplied = (no_incoming, no_outgoing, no_outlet), site in self.multiplied
        return Attribution(incoming, outgoing, outlet, *reasons, multiplied=multiplied)

    def sole_readers(self) -> dict[Site, tuple[Slice, ...]]:
        """List for every site met what feeds it and nothing else, so that all gradient comes through the site.

        The last bias or shift is enough; where there is none, or it does not feed all units, others are listed too.
        """
        index = self._index()
        return {site: self._read_by(site, index) for site in self.fed}

    def _read_by(self, site: Site, index: _Index) -> tuple[Slice, ...]:
        added = [origin for origin in self.fed[site] if origin.role in ("bias", "shift")]
        multiplied = [origin for origin in self.fed[site] if origin.role in ("weight", "scale")]
        missing, chosen = torch.ones(site.units, dtype=torch.bool, device="cpu"), []
        for origin in (*reversed(added), *reversed(multiplied)):
            units = self.fed[site][origin][:, 1]
            if missing[units].any() and not self._refusal(site, origin, index):
                missing[units] = False
                chosen.append(origin)
        return self._slices(site, chosen)

    def _incoming(self, site: Site, index: _Index) -> tuple[tuple[Slice, ...], str]:
        fed = [origin for origin in self.fed[site] if origin.role != OUTLET]
        refusals = {origin: self._refusal(site, origin, index) for origin in fed}
        refused = next(filter(None, refusals.values()), "") or ("" if fed else _UNFED)
        if self.why.get(site) or not refused:
            return self._slices(site, [] if self.why.get(site) else fed), self.why.get(site, "")
        norm = _last_norm(fed)
        if norm and not any(refusals[origin] for origin in norm):
            return self._slices(site, norm), ""
        return (), refused

    def _slices(self, site: Site, origins: Iterable[Origin]) -> tuple[Slice, ...]:
        return tuple(_slice(origin, *self.fed[site][origin].unbind(1)) for origin in origins)

    def _refusal(self, site: Site, origin: Origin, index: _Index) -> str:
        """Say why the entries that feed a site are not its own."""
        rows = self.fed[site][origin][:, 0]
        if len(rows.unique()) < len(rows):
            return f"a slice of `{origin.name}` feeds several units"
        for reason, mask in self.unaccounted_rows.get(origin, {}).items():
            if mask[rows].any():
                return f"`{origin.name}` also feeds {reason}"
        for other in index.sites[origin]:
            if other != site and torch.isin(rows, self.fed[other][origin][:, 0]).any():
                return f"`{origin.name}` also feeds `{self.name_of(other)}`"
        return self._conflict(origin.name)

    def _conflict(self, name: str) -> str:
        if name in self.sharded:
            return "its parameters are sharded"
        if name in self.sharing:
            return f"`{name}` shares memory with `{self.sharing[name]}`"
        if name in self.other_uses:
            return f"`{name}` is also used by {self.other_uses[name]}"
        if len(self.views.get(name, ())) > 1:
            return f"`{name}` is used in several ways (tied weights)"
        return ""

    def _outgoing(self, site: Site, readers: list[Origin]) -> tuple[tuple[Slice, ...], str]:
        if refused := self.nonzero_when_silent.get(site) or next(iter(self.unaccounted_units.get(site, ())), ""):
            return (), refused
        slices, idle = [], self._idle({rows.name for rows in readers})
        for rows in readers:
            if rows.name in idle:
                continue
            mine = [read.sites.get(site, ()) for read in self.reads[rows]]
            if refused := self._conflict(rows.name):
                return (), refused
            if not all(_same_units(mine[0], other) for other in mine[1:]):
                return (), _MIXED.format(rows.name)
            slices.append(_reader(rows, mine[0]))
        return tuple(slices), "" if slices else _UNREAD

    def _idle(self, names: set[str]) -> set[str]:
        """Pick the frozen weights that read a site for nothing: no loss hears of them, and of others one does."""
        return names & self.frozen - self.reached if names & self.reached else set()

    def _outlet(self, site: Site, index: _Index) -> tuple[Outlet | None, str]:
        ends = [origin for origin in self.fed[site] if origin.role == OUTLET]
        if not ends:
            weights = [origin.name for origin in self.fed[site] if origin.role not in ("mean", "variance")]
            return None, _no_outlet(weights[-1]) if weights else self.why.get(site, _UNFED)
        refusals = [
            self._refusal(site, end, index)
            or _no_place(site, self.fed[site][end])
            or _other_layout(end, index.outlets[end.name])
            for end in ends
        ]
        good = [end for end, refusal in zip(ends, refusals, strict=True) if not refusal]
        if not good:
            return None, refusals[-1]
        rows, units = self.fed[site][good[-1]].unbind(1)
        return Outlet(good[-1].name, rows[units.argsort()], good[-1].dims[0]), ""


def _mark(reasons: dict[str, Tensor], read: UnaccountedRead, count: int) -> None:
    mask = reasons.setdefault(read.reason, torch.zeros(count, dtype=torch.bool, device="cpu"))
    mask[read.labels[read.labels >= 0].flatten()] = True


def _any(reasons: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(reasons.values())).any(0)


def _no_outlet(name: str) -> str:
    return f"`{name}` is used by a function, or the output of its module is changed before it gets here"


def _other_layout(end: Origin, known: set[Origin]) -> str:
    """Say so where a module's output has its channels elsewhere in another call."""
    return f"the output of `{end.name}` has several shapes" if known != {end} else ""


def _no_place(site: Site, places: Tensor) -> str:
    units = places[:, 1].unique()
    return "" if len(units) == len(places) == site.units else "a unit has no place of its own in the layer's output"


def _last_norm(fed: list[Origin]) -> list[Origin]:
    """List what the last norm before a site adds; empty where none can be edited."""
    last = len(fed)
    while last and fed[last - 1].role in _NORM_ROLES:
        last -= 1
    norm = fed[last:]
    return norm if any(origin.role in ("scale", "shift") for origin in norm) else []


def _slice(origin: Origin, rows: Tensor, units: Tensor) -> Slice:
    order = units.argsort(stable=True)
    return Slice(origin.name, origin.role, units[order], origin.places(rows[order]), origin.dims, origin.shape)


def _reader(rows: Origin, streams: tuple[Tensor, ...]) -> Slice:
    features = torch.arange(rows.rows, device="cpu")
    return _slice(rows, *distinct(torch.cat([pairs(features, units) for units in streams])).unbind(1))


def _rows_in(outcome: Outcome) -> list[Origin]:
    """List the rows that start in an outcome's streams; the rest are known."""
    streams = [stream for flow in outcome.flows for stream in flow.streams]
    return [stream.origin for stream in streams if isinstance(stream.origin, Origin) and stream.origin.role != OUTLET]


def _is_same_read(read: Read, other: Read) -> bool:
    return read.sites.keys() == other.sites.keys() and all(
        _same_units(units, other.sites[site]) for site, units in read.sites.items()
    )


def _same_units(mine: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return len(mine) == len(other) and all(map(torch.equal, mine, other))


def merged(known: Mapping[Site, Attribution], sites: Iterable[Site], missing: str) -> dict[Site, Attribution]:
    """Answer for all sites, also for those of which nothing is known.

    Args:
        known: What is known.
        sites: All sites.
        missing: Why nothing is known of the rest.
    """
    blank = Attribution(no_incoming=missing, no_outgoing=missing, no_outlet=missing)
    return {site: known.get(site, blank) for site in sites}
