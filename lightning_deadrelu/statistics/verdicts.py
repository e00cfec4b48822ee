"""From the counts of a window to verdicts and their evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_deadrelu.sites import Site, names_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RARE = 0.01
_SUMS = ("fired", "samples", "elements", "magnitude")
# what the third and fourth row of Totals.maxima hold
UNKNOWN, CONSTANT, VARIES = 0, 1, 2
FINITE, INFINITE, NAN = 0, 1, 2


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
        """Copy to the CPU in one transfer."""
        return self.to_host_with(self.magnitude[:0])[0]

    def to_host_with(self, beside: Tensor) -> tuple[Totals, Tensor]:
        """Copy to the CPU, and another tensor along, in one transfer: as bytes, so that no count is rounded."""
        parts = [*(getattr(self, f.name) for f in fields(self)), beside]
        host = torch.cat([part.flatten().view(torch.uint8) for part in parts]).cpu()
        flat = host.split([part.numel() * part.element_size() for part in parts])
        *own, last = (raw.view(part.dtype).view(part.shape) for raw, part in zip(flat, parts, strict=True))
        return Totals(*own), last

    def sums(self) -> Tensor:
        """Lay what merges by sum end to end, as float64, which holds counts exactly up to 2^53."""
        return torch.cat([getattr(self, name).flatten().double() for name in _SUMS])

    def merged(self, sums: Tensor, maxima: Tensor) -> Totals:
        """Put merged values in place of this rank's."""
        own = [getattr(self, name) for name in _SUMS]
        parts = sums.split([mine.numel() for mine in own])
        pairs = zip(_SUMS, own, parts, strict=True)
        return Totals(**{name: part.to(mine.dtype).view(mine.shape) for name, mine, part in pairs}, maxima=maxima)


@dataclass(frozen=True, eq=False)
class History:
    """What outlives a window, one entry for each unit of all sites.

    Args:
        age: Samples since the unit last gave a sign of life, int64.
        ever: Whether it ever has.
        dead: Whether it was dead when last judged.
        revived: Whether it ever fired again after it had been dead.
        fired: Elements that fired, over all windows in which any did, int64.
        seen: Elements of those windows, int64.
    """

    age: Tensor
    ever: Tensor
    dead: Tensor
    revived: Tensor
    fired: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, units: int = 0) -> History:
        """Start with units of which nothing is known."""
        none, zero = torch.zeros(units, dtype=torch.bool), torch.zeros(units, dtype=torch.int64)
        return cls(zero, none, none.clone(), none.clone(), zero.clone(), zero.clone())

    def extended(self, units: int) -> History:
        """Add unknown units at the end, up to ``units``."""
        new = History.empty(units - len(self.age))
        return History(*(torch.cat([getattr(self, f.name), getattr(new, f.name)]) for f in fields(self)))

    def part(self, place: slice) -> History:
        """Cut one site out."""
        return History(*(getattr(self, f.name)[place] for f in fields(self)))


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

    @property
    def rate_bound(self) -> Tensor:
        """Upper 95 % confidence bound of the firing rate, given silence for ``age`` samples; 1 at age 0."""
        return 1 - 0.05 ** (1 / self.age.double())

    @property
    def dead_fraction(self) -> float:
        """Share of the units that are dead, 0 to 1."""
        return int(self.dead.sum()) / self.units

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

    @property
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
        return sum(int(getattr(site, mask).sum()) for site in self.headline)

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
        from lightning_deadrelu.drawing import plot

        return plot(self, ax)

    def __str__(self) -> str:
        from lightning_deadrelu.drawing import table

        return table(self)

    def _repr_html_(self) -> str:
        from lightning_deadrelu.drawing import html_table

        return html_table(self)


def judge(
    totals: Totals,
    history: History,
    sites: Sequence[Site],
    rules: Rules = Rules(),
    *,
    trainable: Sequence[bool] | None = None,
    step: int = 0,
    unwatched: Mapping[str, str] | None = None,
) -> tuple[LivenessReport, History]:
    """Turn the counts of a window into verdicts.

    Args:
        totals: The window's counts, merged over ranks.
        history: What is known from the windows before.
        sites: The layout of the flat tensors.
        rules: What a verdict asks for.
        trainable: For each site, whether an optimizer trains what feeds it; by default all do.
        step: The step the report bears.
        unwatched: What could not be watched, and why.

    Returns:
        The report, and the history for the next window.
    """
    history = history.extended(sum(site.units for site in sites))
    reports, parts, start = [], [], 0
    for index, (site, name) in enumerate(zip(sites, names_of(sites), strict=True)):
        place = slice(start, start := start + site.units)
        learns = trainable is None or trainable[index]
        report, part = _judge_site(totals, index, place, history.part(place), site, name, rules, learns)
        if site.units:  # without, the site was left out and only keeps its place
            reports.append(report)
        parts.append(part)
    joined = (
        History(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(History))) if parts else history
    )
    return LivenessReport(tuple(reports), step, dict(unwatched or {})), joined


def _judge_site(
    totals: Totals, index: int, place: slice, before: History, site: Site, name: str, rules: Rules, trainable: bool
) -> tuple[SiteReport, History]:
    samples, elements = int(totals.samples[index].sum()), int(totals.elements[index])
    peak, last, varied, nonfinite, proved, _ = totals.maxima[:, place].unbind()
    fires, known = last >= 0, torch.full((site.units,), samples > 0)
    age = _age(totals.samples[index], torch.where(fires, last + 1, -1).maximum(proved).long(), before.age)
    silent = known & ~fires & (nonfinite < NAN) & (not site.smooth)
    dead = silent & (age >= rules.min_samples)
    lives = fires | ((proved >= 0) & ~dead)
    lifetime = _lifetime(totals.fired[place], elements, before)
    rate = totals.fired[place].double() / max(elements, 1)
    dormancy = dormancy_of(totals.magnitude[place].nan_to_num(0.0, 0.0) / max(elements, 1))
    revived = lives & before.dead
    newly_dead = dead & ~before.dead
    report = SiteReport(
        name,
        site.kind,
        site.units,
        samples,
        elements,
        trainable,
        site.smooth,
        dead=dead,
        silent=silent,
        rare=lives & (rate.clamp(min=1 / max(elements, 1)) < _RARE),
        always_on=known & (totals.fired[place] == elements),
        frozen=fires & (varied == CONSTANT),
        dormant=known & (nonfinite < NAN) & (dormancy <= rules.tau),
        nonfinite=nonfinite > FINITE,
        judged=lives | dead,
        born_dead=dead & ~before.ever & (proved < 0),
        newly_dead=newly_dead,
        revived=revived,
        redied=newly_dead & before.revived,
        firing_rate=rate,
        peak=peak,
        dormancy=dormancy,
        age=age,
        usual_rate=lifetime[0] / lifetime[1].clamp(min=1),
    )
    flags = before.ever | fires | (proved >= 0), dead | (before.dead & ~lives), before.revived | revived
    return report, History(age, *flags, *lifetime)


def _lifetime(fired: Tensor, elements: int, before: History) -> tuple[Tensor, Tensor]:
    """Add up the windows in which each unit fired; those it was silent in say nothing of how it was alive."""
    return before.fired + fired, before.seen + torch.where(fired > 0, elements, 0)


def _age(samples: Tensor, since: Tensor, before: Tensor) -> Tensor:
    """Add up the samples from an observation on: the first after each unit's last sign of life, -1 if it gave none."""
    after = samples.flip(0).cumsum(0).flip(0)  # after[k] = samples in observation k and later
    after = torch.cat([after, after.new_zeros(1)])
    return after[since.clamp(min=0)] + torch.where(since < 0, before, 0)


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
