"""Join what ranks know of who feeds and reads each unit: they may have run different layers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_deadrelu.attribution.result import Attribution, Attributions
from lightning_deadrelu.model.slices import Slice

_PARTS = ("incoming", "outgoing", "outlet")
_DIFFER = {"incoming": "ranks differ in what feeds it", "outgoing": "", "outlet": "ranks differ in where its outlet is"}


def joined_over_ranks(theirs: Sequence[Attributions], missing: str) -> dict[str, Attribution]:
    """Say of each site what one process would that had run the layers of all ranks.

    A refusal of one rank is a refusal of all, all readers count, and no rank may use what a site is attributed for
    anything that the others have not seen.

    Args:
        theirs: The attributions on each rank, of the same sites.
        missing: What a rank gives for a reason where a site has not run; it says nothing then.
    """
    return {name: _joined(name, theirs, missing) for name in theirs[0]}


def _joined(name: str, theirs: Sequence[Attributions], missing: str) -> Attribution:
    known = [known[name] for known in theirs if known[name].no_incoming != missing]
    if not known:
        return theirs[0][name]
    why = {part: _refusal(part, name, known, theirs) for part in _PARTS}
    readers = {repr(plain_slice(slice)): slice for one in known for slice in one.outgoing}
    return Attribution(
        () if why["incoming"] else known[0].incoming,
        () if why["outgoing"] else tuple(readers.values()),
        None if why["outlet"] else known[0].outlet,
        **{f"no_{part}": why[part] for part in _PARTS},
        multiplied=any(one.multiplied for one in known),
    )


def _refusal(part: str, name: str, known: Sequence[Attribution], theirs: Sequence[Attributions]) -> str:
    """Say why a part of a site's attribution does not hold on all ranks; empty if it does."""
    if given := next((reason for one in known if (reason := getattr(one, f"no_{part}"))), ""):
        return str(given)
    if _DIFFER[part] and len({repr(plain(one)[part]) for one in known}) > 1:
        return _DIFFER[part]
    for used in dict.fromkeys(used for one in known for used in _uses(part, one)):
        told = {repr(_uses(part, one[name]).get(used)) for one in theirs if _is_used(part, used, one)}
        if len(told) > 1:
            return f"ranks differ in what they use `{used}` for"
    return ""


def _uses(part: str, attribution: Attribution) -> dict[str, list[Any]]:
    """Sort what one part says by the parameter, or the module, of which it says so."""
    if part == "outlet":
        outlet = attribution.outlet
        return {outlet.path: [outlet.channels.tolist(), outlet.dim]} if outlet else {}
    found: dict[str, list[Any]] = {}
    for one in getattr(attribution, part):
        found.setdefault(one.name, []).append(plain_slice(one))
    return found


def _is_used(part: str, used: str, known: Attributions) -> bool:
    if part == "outlet":
        return any(name.rpartition(".")[0] == used for name in known.used)
    return used in known.used


def plain(attribution: Attribution) -> dict[str, Any]:
    """Turn into plain values that are equal where the attributions are."""
    values: dict[str, Any] = {part: list(_uses(part, attribution).items()) for part in _PARTS}
    values["multiplied"] = attribution.multiplied
    return values | {f"no_{part}": getattr(attribution, f"no_{part}") for part in _PARTS}


def plain_slice(one: Slice) -> Any:
    """Turn into plain values that are equal where the slices are."""
    return one.name, one.role, one.units.tolist(), one.index.tolist(), one.dims, one.shape
