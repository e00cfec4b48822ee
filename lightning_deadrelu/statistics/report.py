"""Verdicts and their evidence, as users see them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_deadrelu.statistics.redundancy import duplicates
from lightning_deadrelu.statistics.report_table import plot_report, report_html, report_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


_COUNTS = ("fired", "fired_ever", "seen", "projection")  # told as rates, and as duplicates
_RATES = ("firing_rate", "usual_rate", "dead_fraction", "rate_bound", "duplicate")


@dataclass(frozen=True, eq=False, repr=False)
class SiteReport:
    """The verdicts on the units of one site, and their evidence.

    All tensors have shape ``(units,)`` and live on the CPU.

    Args:
        name: The module's path; ``-relu`` is appended where a function was called, ``-1`` for a second site.
        kind: ``"relu"``, ``"relu6"``, ``"hardtanh"``, ...
        units: How many units there are.
        samples: Samples observed in the window, on all ranks.
        elements: Inputs per unit of the observations whose rates were read: the window's first and last. Rare, always
            on and dormant are judged by these, frozen by the last of them; 0 if the site ran in neither.
        blind_fraction: Share of these observations' samples on which no unit fires, 0 to 1: there the layer puts out
            one value, whatever its input. None where it was not counted, as by default.
        trainable: Whether an optimizer trains what feeds it; frozen sites stay out of the headlines.
        smooth: Whether no input is exactly dead, as with GELU: only dormancy is judged.
        dead: Silent in the window, and for at least ``min_samples`` samples; the last verdict, where the site did not
            run. Bool.
        silent: Never fired in the observed batches of the window, whatever gradients prove. Bool.
        rare: Fired, or was proved to by a gradient, but on less than 1 % of the elements. Bool.
        always_on: Fired on all elements: the unit is linear. Bool.
        frozen: Fired, but put out one value whatever the input: it is downstream of a dead layer. Bool.
        dormant: Dormancy at most ``tau``. Bool.
        nonfinite: Met an infinity or a value that is not a number; what is infinitely low is noticed with the rates
            alone. Bool.
        judged: Whether the evidence suffices: it lives, or its age reached ``min_samples``. Bool.
        born_dead: Dead, and has never fired, nor been proved to. Bool.
        newly_dead: Dead, and was not at the verdict before. Bool.
        revived: Lives (fires, or was proved to and is not dead), and was dead when last judged. Bool.
        redied: Newly dead, and had come back to life before. Bool.
        peak: Largest input, measured from the hinge.
        dormancy: Mean absolute output, divided by its mean over the site (Sokar et al. 2023, arXiv 2302.12902).
        age: Samples observed since the unit last fired, or a gradient proved that it did, int64.
        last_fired: The step of the last observation in which the unit fired, int32; -1 if it never did.
        fired: Elements that fired, whole numbers.
        fired_ever: Elements that fired since the start of fit, int64.
        seen: Elements up to the end of the last window in which the unit fired, int64.
        projection: Weighted sum of the absolute output, by which multiples of another unit are told.

    Example:
        >>> from lightning_deadrelu import find_dead_units
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
        >>> _ = model[0].bias.data.copy_(torch.tensor([5.0, -5.0, 5.0]))
        >>> site = find_dead_units(model, [torch.rand(300, 2)])["1"]
        >>> site.dead, site.age, site.always_on
        (tensor([False,  True, False]), tensor([  0, 300,   0]), tensor([ True, False,  True]))
    """

    name: str
    kind: str
    units: int
    samples: int
    elements: int
    blind_fraction: float | None
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
    peak: Tensor
    dormancy: Tensor
    age: Tensor
    last_fired: Tensor
    fired: Tensor
    fired_ever: Tensor
    seen: Tensor
    projection: Tensor

    @cached_property
    def duplicate(self) -> Tensor:
        """Fires, and its output was the same multiple of that of a unit before it on all these elements, bool.

        In half precision multiples other than 1 are rounded, and mostly missed. By default they are not looked for.
        """
        if self.blind_fraction is None:
            return torch.zeros_like(self.frozen)
        return duplicates(self.fired, self.dormancy, self.projection, self.peak) & ~self.frozen

    @cached_property
    def firing_rate(self) -> Tensor:
        """Share of the elements that fired, float64."""
        return self.fired.double() / max(self.elements, 1)

    @property
    def log_density(self) -> Tensor:
        """Firing rate as a power of ten, -10 for what was silent, as histograms of sparse autoencoders show it."""
        return (self.firing_rate + 1e-10).log10()

    @property
    def l0(self) -> float:
        """How many units fire on an element, on average; NaN where no rates were read."""
        return float(self.fired.sum()) / self.elements if self.elements else math.nan

    @cached_property
    def usual_rate(self) -> Tensor:
        """Share of all elements so far that fired, without the windows since the unit last did; 0 if it never did."""
        return self.fired_ever.double() / self.seen.clamp(min=1)

    def _columns(self) -> dict[str, Any]:
        """Lay the units out as columns."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        rates = {name: getattr(self, name) for name in ("firing_rate", "usual_rate", "rate_bound", "duplicate")}
        columns = {name: value.numpy() for name, value in (tensors | rates).items()}
        return {"site": self.name, "unit": range(self.units), **columns}

    @property
    def rate_bound(self) -> Tensor:
        """Upper 95 % confidence bound of the firing rate, given silence for ``age`` samples; 1 at age 0."""
        return 1 - 0.05 ** (1 / self.age.double())

    @property
    def used_fraction(self) -> float:
        """Share of the units that fired in the window, 0 to 1."""
        return _number((self.peak > 0) | (self.fired > 0)) / self.units  # beside a NaN there is no peak

    @property
    def perplexity(self) -> float:
        """How many units are in use, weighed by how often; 0 if none fires.

        The exponential of the entropy of who fires, from 1 to the number of units, as VQ-VAE reports of its codebook.
        """
        shares = self.fired.double() / max(int(self.fired.sum()), 1)
        return float(torch.special.entr(shares).sum().exp()) if self.fired.any() else 0.0

    @property
    def largest_violation(self) -> float:
        """How far the busiest unit is above the mean, over the mean; 0 where all fire alike, NaN if none fires.

        Source: MaxVio of Wang et al. 2024, arXiv 2408.15664, for the load of experts.
        """
        mean = float(self.fired.double().mean())
        return float(self.fired.max()) / mean - 1 if mean else math.nan

    @cached_property
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
        for name in (*(f.name for f in fields(self) if f.name not in _COUNTS), *_RATES):
            value = getattr(self, name)
            plain[name] = _plain(value) if isinstance(value, Tensor) else value
        return plain

    def __repr__(self) -> str:
        marks = ("dead", "rare", "always_on", "frozen", "dormant", "nonfinite", "duplicate")
        told = (f"{count} {mark}" for mark in marks if (count := _number(getattr(self, mark))))
        return f"SiteReport({self.name!r}, {self.kind}, {', '.join([f'{self.units} units', *told])})"


def _number(mask: Tensor) -> int:
    """Count what is True, in a fifth of the time that torch's sum takes on a CPU."""
    return int(np.count_nonzero(mask.numpy()))


def _plain(value: Tensor) -> list[Any]:
    if value.dtype == torch.bool:
        return list(value.nonzero().flatten().tolist())
    return [number if math.isfinite(number) else None for number in value.tolist()]


@dataclass(frozen=True, eq=False, repr=False)
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
        """The sites that are being trained, which all totals count."""
        return tuple(site for site in self.sites if site.in_headline)

    @cached_property
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

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row for each unit of each site; needs pandas.

        Its columns are the site's name and the unit's number, then the masks, rates and counts of
        :class:`SiteReport`.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        try:
            from pandas import DataFrame, concat
        except ImportError as error:
            raise ModuleNotFoundError(
                "`report.to_pandas()` makes a data frame, and pandas is not installed. Try `pip install pandas`, or use"
                " `report.to_dict()`."
            ) from error
        frames = [DataFrame(site._columns()) for site in self.sites]
        return concat(frames, ignore_index=True) if frames else DataFrame({"site": [], "unit": []})

    def __repr__(self) -> str:
        sites = f"{len(self.sites)} sites" if len(self.sites) != 1 else "1 site"
        return f"LivenessReport(step={self.step}, {sites}, {self.dead_units} of {self.units} units dead)"

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the share of dead, rare, always-on and other units of each site; needs matplotlib.

        Args:
            ax: Where to draw; a new figure by default.
        """
        return plot_report(self, ax)

    def __str__(self) -> str:
        return report_text(self)

    def _repr_html_(self) -> str:
        return report_html(self)
