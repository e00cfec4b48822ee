"""From the counts of a window to verdicts and their evidence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_deadrelu.model.sites import Site, names_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, np.dtype[Any]]

_RARE = 0.01
_SUMS = ("fired", "samples", "elements", "magnitude")
# what the third and fourth row of Totals.maxima hold
UNKNOWN, CONSTANT, VARIES = 0, 1, 2
FINITE, INFINITE, NAN = 0, 1, 2


def narrowed(numbers: Tensor) -> Tensor:
    """Copy whole numbers into the smallest type that holds them all; truth values stay what they are.

    Example:
        >>> narrowed(torch.tensor([-1, 300]))
        tensor([ -1, 300], dtype=torch.int16)
    """
    if numbers.dtype == torch.bool or not numbers.numel():
        return numbers.clone()
    low, high = map(int, numbers.aminmax())
    limits = ((dtype, torch.iinfo(dtype)) for dtype in (torch.int8, torch.int16, torch.int32))
    return numbers.to(next((dtype for dtype, it in limits if it.min <= low and high <= it.max), torch.int64), copy=True)


@dataclass(frozen=True)
class Rules:
    """What a verdict asks for.

    Args:
        min_samples: A silent unit is dead from this age on.
        tau: A unit is dormant if its mean output is at most this share of its layer's mean.
    """

    min_samples: int = 299
    tau: float = 0.025


@dataclass(frozen=True, eq=False)
class Totals:
    """The counts of one window; see :class:`UnitLiveness`.

    Args:
        fired: Elements that fired, shape ``(units,)``, int64; merges by sum.
        samples: Samples by site and observation, shape ``(sites, window)``, int64; merges by sum.
        elements: Elements per unit by site, shape ``(sites,)``, int64; merges by sum.
        magnitude: Sum of the absolute output, shape ``(units,)``; merges by sum.
        maxima: Shape ``(6, units)``; merges by maximum. The rows: peak; last observation that fired, or -1; 2
            where the output varied, 1 where it was constant, 0 where a single element says nothing; 0 where the
            input was finite, 1 where infinite, 2 where not a number; observations begun when a gradient last proved
            that the unit fired, or -1; 1 where there was a gradient in a batch that was observed.
    """

    fired: Tensor
    samples: Tensor
    elements: Tensor
    magnitude: Tensor
    maxima: Tensor

    def to_host(self) -> Totals:
        """Bring to the CPU in one transfer; what is there already is not copied."""
        return self.to_host_with()[0]

    def to_host_with(self, *beside: Tensor) -> tuple[Totals, list[Tensor]]:
        """Bring to the CPU, and other tensors along, in one transfer: as bytes, so that no count is rounded.

        Args:
            *beside: The widest numbers first, so that all lie where their type may lie.
        """
        if self.maxima.device.type == "cpu":
            return self, list(beside)
        own = fields(self)
        parts = [*(getattr(self, f.name) for f in own), *beside]
        host = torch.cat([part.flatten().view(torch.uint8) for part in parts]).cpu()
        flat = host.split([part.numel() * part.element_size() for part in parts])
        copies = [raw.view(part.dtype).view(part.shape) for raw, part in zip(flat, parts, strict=True)]
        return Totals(*copies[: len(own)]), copies[len(own) :]

    def sums(self) -> Tensor:
        """Lay what merges by sum end to end, as float64, which holds counts exactly up to 2^53."""
        return torch.cat([getattr(self, name).flatten().double() for name in _SUMS])

    def saved(self) -> dict[str, Any]:
        """Return copies that take little room."""
        whole = {name: narrowed(getattr(self, name)) for name in ("fired", "samples", "elements")}
        marks = [narrowed(row.long()) for row in self.maxima[1:]]
        return whole | {"magnitude": self.magnitude.clone(), "peak": self.maxima[0].clone(), "marks": marks}

    @classmethod
    def loaded(cls, state: Mapping[str, Any]) -> Totals:
        """Put together what :meth:`saved` returned."""
        whole = {name: state[name].long() for name in ("fired", "samples", "elements")}
        maxima = torch.stack([state["peak"], *(row.to(state["peak"].dtype) for row in state["marks"])])
        return cls(**whole, magnitude=state["magnitude"], maxima=maxima)

    def merged(self, sums: Tensor, maxima: Tensor) -> Totals:
        """Put merged values in place of this rank's."""
        own = [getattr(self, name) for name in _SUMS]
        parts = sums.split([mine.numel() for mine in own])
        pairs = zip(_SUMS, own, parts, strict=True)
        return Totals(**{name: part.to(mine.dtype).view(mine.shape) for name, mine, part in pairs}, maxima=maxima)


@dataclass(frozen=True, eq=False)
class UnitHistory:
    """What outlives a window, one entry for each unit of all sites.

    Args:
        age: Samples since the unit last gave a sign of life, int64.
        ever: Whether it ever has.
        dead: Whether it was dead when last judged.
        revived: Whether it ever fired again after it had been dead.
        fired: Elements that fired, over all windows in which any did, int64.
        seen: Elements of those windows, int64.
        last_fired: The step of the last observation in which the unit fired, int32; -1 if it never did.
    """

    age: Tensor
    ever: Tensor
    dead: Tensor
    revived: Tensor
    fired: Tensor
    seen: Tensor
    last_fired: Tensor

    @classmethod
    def empty(cls, units: int = 0) -> UnitHistory:
        """Start with units of which nothing is known."""
        none, zero = torch.zeros(units, dtype=torch.bool), torch.zeros(units, dtype=torch.int64)
        never = torch.full((units,), -1, dtype=torch.int32)
        return cls(zero, none, none.clone(), none.clone(), zero.clone(), zero.clone(), never)

    def saved(self) -> dict[str, Tensor]:
        """Return copies that take little room."""
        return {name: narrowed(values) for name, values in vars(self).items()}

    @classmethod
    def loaded(cls, state: Mapping[str, Tensor]) -> UnitHistory:
        """Put together what :meth:`saved` returned."""
        return cls(**{name: state[name].to(like.dtype) for name, like in vars(cls.empty()).items()})

    def extended(self, units: int) -> UnitHistory:
        """Add unknown units at the end, up to ``units``."""
        if units == len(self.age):
            return self
        new = UnitHistory.empty(units - len(self.age))
        return UnitHistory(*(torch.cat([getattr(self, f.name), getattr(new, f.name)]) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class SiteReport:
    """The verdicts on the units of one site, and their evidence.

    All tensors have shape ``(units,)`` and live on the CPU.

    Args:
        name: The module's path; ``-relu`` is appended where a function was called, ``-1`` for a second site.
        kind: ``"relu"``, ``"relu6"``, ``"hardtanh"``, ...
        units: How many units there are.
        samples: Samples observed in the window, on all ranks.
        elements: Inputs observed per unit in the window.
        trainable: Whether an optimizer trains what feeds it; frozen sites stay out of the headlines.
        smooth: Whether no input is exactly dead, as with GELU: only dormancy is judged.
        dead: Silent in the window, and for at least ``min_samples`` samples. Bool.
        silent: Never fired in the observed batches of the window, whatever gradients prove. Bool.
        rare: Fired, or was proved to by a gradient, but on less than 1 % of the elements. Bool.
        always_on: Fired on all elements: the unit is linear. Bool.
        frozen: Fired, but put out one value whatever the input: it is downstream of a dead layer. Bool.
        dormant: Dormancy at most ``tau``. Bool.
        nonfinite: Met an infinity or a value that is not a number. Bool.
        judged: Whether the evidence suffices: it lives, or its age reached ``min_samples``. Bool.
        born_dead: Dead, and has never fired, nor been proved to. Bool.
        newly_dead: Dead, and was not at the verdict before. Bool.
        revived: Lives (fires, or was proved to and is not dead), and was dead when last judged. Bool.
        redied: Newly dead, and had come back to life before. Bool.
        firing_rate: Share of the elements that fired.
        peak: Largest input, measured from the hinge.
        dormancy: Mean absolute output, divided by its mean over the site (Sokar et al. 2023, arXiv 2302.12902).
        age: Samples observed since the unit last fired, or a gradient proved that it did, int64.
        usual_rate: Share of the elements that fired over all windows so far in which the unit fired; 0 if it never did.
        last_fired: The step of the last observation in which the unit fired, int32; -1 if it never did.
        rate_bound: At 95 % confidence the firing rate is below this: ``1 - 0.05 ** (1 / age)``.
    """

    name: str
    kind: str
    units: int
    samples: int
    elements: int
    trainable: bool
    smooth: bool
    dead: Tensor
    silent: Tensor
    rare: Tensor
    always_on: Tensor
    frozen: Tensor
    dormant: Tensor
    nonfinite: Tensor
    judged: Tensor
    born_dead: Tensor
    newly_dead: Tensor
    revived: Tensor
    redied: Tensor
    firing_rate: Tensor
    peak: Tensor
    dormancy: Tensor
    age: Tensor
    usual_rate: Tensor
    last_fired: Tensor

    def __post_init__(self) -> None:
        values = vars(self)
        values["_later"] = {name: values.pop(name) for name in (*values,) if callable(values[name])}

    def __getattr__(self, name: str) -> Any:
        """Work out, when first asked for, a field that was given as a function: no window's end needs it."""
        if name not in (later := vars(self).get("_later", {})):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        values = vars(self)
        values[name] = later[name]()
        return values[name]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def rate_bound(self) -> Tensor:
        """Upper 95 % confidence bound of the firing rate, given silence for ``age`` samples; 1 at age 0."""
        return 1 - 0.05 ** (1 / self.age.double())

    @property
    def dead_fraction(self) -> float:
        """Share of the units that are dead, 0 to 1."""
        return _number(self.dead) / self.units

    @property
    def in_headline(self) -> bool:
        """Whether the site counts in the report's totals."""
        return self.trainable and not self.smooth

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain JSON values; masks become lists of unit numbers."""
        plain: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            plain[f.name] = _plain(value) if isinstance(value, Tensor) else value
        return plain | {"dead_fraction": self.dead_fraction, "rate_bound": _plain(self.rate_bound)}


def _number(mask: Tensor) -> int:
    """Count what is True, in a fifth of the time that torch's sum takes on a CPU."""
    return int(np.count_nonzero(mask.numpy()))


def _plain(value: Tensor) -> list[Any]:
    if value.dtype == torch.bool:
        return list(value.nonzero().flatten().tolist())
    return [number if math.isfinite(number) else None for number in value.tolist()]


@dataclass(frozen=True, eq=False)
class LivenessReport:
    """One verdict over all sites.

    Args:
        sites: The sites in the order of their first execution.
        step: The training batch after which it was made, as loggers count; 0 for an audit.
        unwatched: Why, by name, a rectifier that exists is not among the sites.

    Example:
        >>> from lightning_deadrelu import find_dead_units
        >>> layer = torch.nn.Linear(2, 3)
        >>> _ = layer.bias.data.copy_(torch.tensor([5.0, -5.0, 5.0]))
        >>> report = find_dead_units(torch.nn.Sequential(layer, torch.nn.ReLU()), [torch.rand(300, 2)])
        >>> report["1"].dead, report.dead_units, report.units
        (tensor([False,  True, False]), 1, 3)
    """

    sites: tuple[SiteReport, ...]
    step: int = 0
    unwatched: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> SiteReport:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"{name!r} is no site of this report. Sites: {', '.join(site.name for site in self.sites)}")

    @cached_property
    def headline(self) -> tuple[SiteReport, ...]:
        """The rectifier sites that are being trained: the denominators of all totals."""
        return tuple(site for site in self.sites if site.in_headline)

    @property
    def units(self) -> int:
        """Units of the headline sites."""
        return sum(site.units for site in self.headline)

    @property
    def dead_units(self) -> int:
        """Dead units of the headline sites."""
        return self.total("dead")

    @property
    def dead_fraction(self) -> float:
        """Share of the headline sites' units that are dead, 0 to 1; 0 where there are none."""
        return self.fraction("dead")

    def total(self, mask: str) -> int:
        """Count the units of the headline sites in one of the masks of :class:`SiteReport`."""
        if mask not in self._totals:
            self._totals[mask] = sum(_number(getattr(site, mask)) for site in self.headline)
        return self._totals[mask]

    @cached_property
    def _totals(self) -> dict[str, int]:
        return {}

    def fraction(self, mask: str) -> float:
        """Divide :meth:`total` by the number of units."""
        return self.total(mask) / self.units if self.units else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain values that ``json.dumps`` takes."""
        sites = [site.to_dict() for site in self.sites]
        totals = {"units": self.units, "dead_units": self.dead_units, "dead_fraction": self.dead_fraction}
        return {"step": self.step, **totals, "sites": sites, "unwatched": dict(self.unwatched)}

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the share of dead, rare, always-on and other units of each site; needs matplotlib.

        Args:
            ax: Where to draw; a new figure by default.
        """
        from lightning_deadrelu.report import plot

        return plot(self, ax)

    def __str__(self) -> str:
        from lightning_deadrelu.report import table

        return table(self)

    def _repr_html_(self) -> str:
        from lightning_deadrelu.report import html_table

        return html_table(self)


def judge(
    totals: Totals,
    history: UnitHistory,
    sites: Sequence[Site],
    rules: Rules = Rules(),
    *,
    trainable: Sequence[bool] | None = None,
    step: int = 0,
    steps: Sequence[int] = (),
    unwatched: Mapping[str, str] | None = None,
) -> tuple[LivenessReport, UnitHistory]:
    """Turn the counts of a window into verdicts.

    Args:
        totals: The window's counts on the CPU, merged over ranks; the report shares no memory with them.
        history: What is known from the windows before.
        sites: The layout of the flat tensors.
        rules: What a verdict asks for.
        trainable: For each site, whether an optimizer trains what feeds it; by default all do.
        step: The step the report bears.
        steps: The step of each observation of the window that is done; what is not listed bears ``step``.
        unwatched: What could not be watched, and why.

    Returns:
        The report, and the history for the next window.
    """
    before = history.extended(sum(site.units for site in sites))
    steps = [*steps, *[step] * (totals.samples.shape[1] - len(steps))]  # an observation may be under way
    found, history = _units(totals, before, sites, rules, steps)
    parts = zip(*(values.split([site.units for site in sites]) for values in found.values()), strict=True)
    counted = zip(totals.samples.sum(1).tolist(), totals.elements.tolist(), strict=True)
    learns = [True] * len(sites) if trainable is None else trainable
    reports = [
        SiteReport(name, site.kind, site.units, *sizes, trains, site.smooth, **_rated(found, part, sizes[1]))
        for site, name, sizes, trains, part in zip(sites, names_of(sites), counted, learns, parts, strict=True)
        if site.units  # without, the site was left out and only keeps its place
    ]
    return LivenessReport(tuple(reports), step, dict(unwatched or {})), history


def _rated(names: Iterable[str], part: Sequence[Tensor], elements: int) -> dict[str, Any]:
    """Name the fields of a site, and have the rates be worked out from their counts when they are first asked for."""
    named, rate = dict(zip(names, part, strict=True)), torch.get_default_dtype()
    fired, ever, seen = named.pop("fired"), named.pop("fired_ever"), named.pop("seen")
    rates = {
        "firing_rate": lambda: fired.double() / max(elements, 1),
        "usual_rate": lambda: ever.to(rate) / seen.to(rate).clamp(min=1),
    }
    return named | rates


def _units(
    totals: Totals, before: UnitHistory, sites: Sequence[Site], rules: Rules, steps: Sequence[int]
) -> tuple[dict[str, Tensor], UnitHistory]:
    """Judge the units of all sites end to end: fields of :class:`SiteReport` and counts by name, and the next history.

    In NumPy, whose comparisons take a third of the time that torch's take on a CPU.
    """
    was_dead, ever, returned = before.dead.numpy(), before.ever.numpy(), before.revived.numpy()
    _, last, varied, nonfinite, proved, _ = totals.maxima.numpy()
    fires, sane, proven = last >= 0, nonfinite < NAN, proved >= 0
    shown = fires | proven
    found = _by_site(totals, before, sites, steps, ~shown)
    known, hard = found.pop("known"), found.pop("hard")
    silent = hard & ~fires & sane
    dead = silent & (found["age"] >= rules.min_samples)
    lives = fires | (proven & ~dead)
    newly_dead, revived = dead & ~was_dead, lives & was_dead
    found |= {"dead": dead, "silent": silent, "judged": lives | dead, "newly_dead": newly_dead, "revived": revived}
    found |= {"born_dead": dead & ~(ever | proven), "redied": newly_dead & returned, "nonfinite": nonfinite > FINITE}
    found |= {"rare": lives & found["rare"], "frozen": fires & (varied == CONSTANT)}
    found["dormant"] = known & sane & (found["dormancy"] <= rules.tau)
    found["always_on"] &= known
    units = {key: torch.from_numpy(values) for key, values in found.items()}
    flags = [torch.from_numpy(mask) for mask in (ever | shown, dead | (was_dead & ~lives), returned | revived)]
    units["fired_ever"] = before.fired + totals.fired
    units["peak"] = totals.maxima[0].to(totals.magnitude.dtype, copy=True)
    return units, UnitHistory(units["age"], *flags, *(units[key] for key in ("fired_ever", "seen", "last_fired")))


def _by_site(
    totals: Totals, before: UnitHistory, sites: Sequence[Site], steps: Sequence[int], quiet: Array
) -> dict[str, Array]:
    """Work out what takes numbers of the site, one site at a time, so that a part stays in the cache."""
    magnitude, number = totals.magnitude.numpy(), torch.tensor([-1, *steps], dtype=torch.int32)
    dtypes = {"known": bool, "hard": bool, "always_on": bool, "rare": bool, "dormancy": magnitude.dtype}
    dtypes |= {"age": np.int64, "seen": np.int64, "last_fired": np.int32}
    flat = {key: np.empty(len(quiet), dtype) for key, dtype in dtypes.items()}
    most = int(totals.elements.max()) if len(sites) else 0
    flat["fired"] = totals.fired.numpy().astype(np.int32 if most < 2**31 else np.int64)  # half the bytes to compare
    after, start = _after(totals.samples), 0
    for index, site in enumerate(sites):
        place = slice(start, start := start + site.units)
        known, elements = bool(after[index, 0]), int(totals.elements[index])
        part = {key: values[place] for key, values in flat.items()}
        part["known"][:], part["hard"][:] = known, known and not site.smooth
        _compare(part, before.seen[place].numpy(), elements)
        _dormancy(part["dormancy"], magnitude[place], max(elements, 1))
        behind, proved = totals.maxima[1, place].int().add_(1), totals.maxima[4, place].int()  # observations until then
        torch.index_select(after[index], 0, behind.maximum(proved), out=torch.from_numpy(part["age"]))
        part["age"] += before.age[place].numpy() * quiet[place]
        torch.index_select(number, 0, behind, out=torch.from_numpy(part["last_fired"]))
        np.maximum(part["last_fired"], before.last_fired[place].numpy(), out=part["last_fired"])
    return flat


def _after(samples: Tensor) -> Tensor:
    """Add up, by site, the samples in observation ``k`` and later, and none behind the last one."""
    later = samples.flip(1).cumsum(1).flip(1)
    return torch.cat([later, later.new_zeros(len(later), 1)], 1)


def _compare(part: dict[str, Array], seen: Array, elements: int) -> None:
    """Compare with the site's elements. Windows of silence say nothing of how a unit was alive, and are not added."""
    fired = part["fired"]
    np.equal(fired, elements, out=part["always_on"])
    np.less(fired, _least_usual(elements), out=part["rare"])
    np.add(seen, (fired > 0) * fired.dtype.type(elements), out=part["seen"])


def _least_usual(elements: int) -> int:
    """Say how often a unit has to fire not to be rare; once where that is no less than all rates that are.

    Example:
        >>> _least_usual(10), _least_usual(700)
        (0, 7)
    """
    if not elements or 1 / elements >= _RARE:
        return 0
    first = max(int(_RARE * elements) - 1, 0)
    return next(number for number in itertools.count(first) if number / elements >= _RARE)


def _dormancy(out: Array, magnitude: Array, elements: int) -> None:
    """Do what :func:`dormancy_of` does, in place, and pass over what is no number."""
    np.divide(magnitude, elements, out=out)
    layer = float(torch.from_numpy(out).mean())
    if not math.isfinite(layer):
        np.divide(np.nan_to_num(magnitude, nan=0.0, posinf=0.0), elements, out=out)
        layer = float(torch.from_numpy(out).mean())
    np.divide(out, layer, out=out) if layer > 0 else out.fill(0.0)


def dormancy_of(mean: Tensor) -> Tensor:
    """Divide each unit's mean absolute output by the layer's mean: the ReDo score.

    A layer that puts out nothing at all scores 0 throughout. Source: Sokar et al. 2023, arXiv 2302.12902,
    whose scores average 1.

    Args:
        mean: Mean absolute output, shape ``(units,)``.

    Example:
        >>> dormancy_of(torch.tensor([0.0, 1.0, 3.0, 4.0]))
        tensor([0.0000, 0.5000, 1.5000, 2.0000])
    """
    layer = mean.mean()
    return torch.where(layer > 0, mean / layer, 0.0)
