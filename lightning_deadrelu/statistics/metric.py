"""Counting for all sites in one flat state, as a metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.rectifiers import SELECTIONS, WATCHPOINT, Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.statistics.accumulators import Accumulators
from lightning_deadrelu.statistics.counts import RELU, Counts, FlatCounts, count
from lightning_deadrelu.statistics.judge import Rules, judge
from lightning_deadrelu.statistics.report import LivenessReport
from lightning_deadrelu.statistics.totals import FINITE, INFINITE, NAN, NOTHING, Totals, UnitHistory

_UNIT_DIM = {"maxima": 1}
_RATED = SELECTIONS | {WATCHPOINT}  # which fire so seldom that every observation counts
_OF_SITES = ("samples", "elements", "blind")
_LATEST = slice(3, 5)  # the rows of the maxima that hold the last observation alone
_WAITING = 2**20  # peaks that are held back, of 16 observations at most: to add them up takes a fraction of the time


class UnitLiveness(Metric):
    """Count, for all sites in one flat state, who fired, how often, how strongly and when last.

    Counts are int64; ranks, calls and batches merge by sum and maximum. Sites are known from the start or
    added as they are met with :meth:`add_site`.

    Args:
        sites: Number of units by name, where they are known.
        window: How many observations fit in before :meth:`reset`; ``observation`` numbers the current one.
        rules: What a verdict asks for.
        dtype: Of the sums that are no counts; float32 where a device has no float64.
        peak_dtype: Of the maxima; float32 is exact unless a model computes in float64. By default as ``dtype``.
        **kwargs: See :class:`torchmetrics.Metric`.

    Example:
        >>> metric = UnitLiveness({"relu": 3}, rules=Rules(min_samples=2))
        >>> metric.update(torch.tensor([[1.0, 0.0, -2.0], [0.5, 0.0, 3.0]]))
        >>> metric.compute()
        {'relu': tensor([False,  True, False])}
    """

    full_state_update = False
    fired: Tensor
    magnitude: Tensor
    maxima: Tensor
    samples: Tensor
    elements: Tensor
    blind: Tensor
    projection: Tensor

    def __init__(
        self,
        sites: Mapping[str, int] | None = None,
        *,
        window: int = 1,
        rules: Rules = Rules(),
        dtype: torch.dtype = torch.float64,
        peak_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"compute_with_cache": False, **kwargs})
        self.rules, self.layout = rules, Layout()
        self._last_of_window = window - 1
        self._number(0)
        self._latest = -1  # the observation that the rows of the last one hold
        self._pending: dict[int, dict[int, Counts]] = {}  # calls by observation and site
        self.accumulators = Accumulators()  # where kernels add calls up, until the next flush
        self._running: dict[int, Counts] | None = None  # calls of a batch that may not come to its end
        self.add_state("fired", torch.zeros(0, dtype=torch.int64), "sum")
        self.add_state("maxima", torch.zeros(len(NOTHING), 0, dtype=peak_dtype or dtype), "max")
        for name in ("magnitude", "projection"):
            self.add_state(name, torch.zeros(0, dtype=dtype), "sum")
        for name in _OF_SITES:
            self.add_state(name, torch.zeros(0, window, dtype=torch.int64), "sum")
        for name, units in (sites or {}).items():
            self.add_site(Site(name, False, "relu", (), units))
        self.make_room()

    @property
    def observation(self) -> int:
        """Number of the observation that is being counted, from 0 to ``window``."""
        return self._observation

    @observation.setter
    def observation(self, number: int) -> None:
        if number != self._observation:
            waiting = number - min(self._pending, default=number)
            few = 0 <= waiting * max(self.layout.units, _WAITING // 16) < _WAITING
            if not few or _rated(self._pending.get(self._observation, {})):
                self.flush()
            self._begin_latest()  # nothing ran in the one that ends
        self._number(number)

    def _number(self, observation: int) -> None:
        self._observation = observation
        # a window's first, so that there are rates whenever a verdict is asked for, and its last, so that they are of
        # the latest weights; by the number alone, so that all ranks read the same
        self._rates_all = observation in (0, self._last_of_window) or self.rules.all_rates
        self.wants_redundancy = self._rates_all and self.rules.redundancy
        """Whether what concerns whole layers is to be read in the present observation."""

    def add_site(self, site: Site) -> int:
        """Append a site and return its number."""
        self.layout = Layout((*self.layout, site))
        return len(self.layout) - 1

    @torch.inference_mode(False)  # what is counted in place later may be no inference tensor
    def make_room(self) -> None:
        """Extend the state by the sites added since: by all at once, because each time everything is copied."""
        new = self.layout.sites[len(self.samples) :]
        if not new:
            return
        asked = [name for name in self._defaults if name != "projection" or self.rules.redundancy]
        for name in asked:  # the defaults stay empty: they would double the memory
            state = getattr(self, name)
            setattr(self, name, torch.cat([state, _fresh(name, state, new)], dim=_UNIT_DIM.get(name, 0)))

    def update(
        self,
        x: Tensor,
        out: Tensor | None = None,
        site: int = 0,
        dims: tuple[int, ...] = (-1,),
        rectifier: Rectifier = RELU,
        valid: Tensor | None = None,
    ) -> None:
        """Count one call of a rectifier.

        Args:
            x: Its input, any shape; an empty one changes nothing.
            out: Its output; computed where it is None.
            site: Number of the site.
            dims: The dimensions that hold the units, counted from the end.
            rectifier: What it is.
            valid: Boolean, True for data and False for padding, of the shape of ``x`` without the units.
        """
        self.make_room()
        if x.numel():
            out = x.clamp(min=0) if out is None else out
            self.add(site, count(x, out, dims, rectifier, valid, self.wants_rates(site), self.rules.redundancy))
            self.flush()

    def wants_rates(self, site: int) -> bool:
        """Tell whether more than the peaks of a site is to be read in the present observation.

        Of a watchpoint it always is: how often a latent or a code is chosen is what is asked there, and it may be
        seldom.
        """
        return self._rates_all or self.layout.sites[site].kind in _RATED

    def add(self, site: int, counts: Counts) -> None:
        """Add a call to the present observation, which :meth:`flush` ends; cheaper than :meth:`update` per call."""
        if counts.peak.device != self.maxima.device:  # a model spread over several devices
            counts = Counts._make(None if v is None else torch.as_tensor(v).to(self.maxima.device) for v in counts)
        if counts.magnitude is not None and not self.wants_rates(site):
            counts = counts.without_rates
        calls = self._pending.setdefault(self._observation, {}) if self._running is None else self._running
        calls[site] = calls[site].joined(counts) if site in calls else counts

    def begin_batch(self) -> None:
        """Hold back what is added from now on until :meth:`end_batch`: an interrupted batch will be run again."""
        self._running = {}

    def end_batch(self) -> None:
        """Add what was held back. Harmless when nothing was."""
        running, self._running = self._running or {}, None
        for site, counts in running.items():
            self.add(site, counts)

    def drop_batch(self) -> None:
        """Forget what was held back."""
        self._running = None

    def take_batch(self, other: UnitLiveness, places: Sequence[int]) -> None:
        """Go on holding back what another metric does.

        Args:
            other: It counts in another layout.
            places: For each of its sites, the number here.
        """
        running = other._running
        self._running = None if running is None else {places[site]: counts for site, counts in running.items()}

    def flush(self) -> None:
        """Take what was added since the last flush into the state. Harmless when there is nothing."""
        self.make_room()
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        numbers = range(min(pending), max(pending) + 1)
        observations = [pending.get(number, {}) for number in numbers]
        _raise_to(self.maxima[:3], *_peak_rows(FlatCounts(self.layout, observations, self.maxima), numbers))
        for name in ("samples", "elements"):
            sizes = [{n: getattr(counts, name) for n, counts in calls.items()} for calls in observations]
            _add_sizes(getattr(self, name)[:, numbers.start : numbers.stop], sizes)
        if rated := _rated(observations[-1]):
            self._add_rates(FlatCounts(self.layout, [rated], self.maxima))
        self.accumulators.release(reuse=not self._running)

    def _add_rates(self, flat: FlatCounts) -> None:
        """Add up what the present observation, which did not wait, has more than peaks."""
        for name in ("fired", "magnitude", "projection"):
            state, value = getattr(self, name), flat.of(name, 0)
            if value is not None:
                state.add_(value[0].to(state.dtype))
        if self.rules.redundancy:
            self.blind[:, self._observation].add_(flat.of_sites("blind")[0])
        self._begin_latest()
        _raise_to(self.maxima[_LATEST], *_latest_rows(flat))

    def record_gradient_proof(self, found: Tensor) -> None:
        """Take in what gradients say.

        Args:
            found: :attr:`Totals.proved` and :attr:`Totals.moved`, shape ``(2, units)``.
        """
        self.make_room()
        _raise_to(self.maxima[-2:], *found)

    def _begin_latest(self) -> None:
        """Forget the inputs of the rates before, unless the present observation has none or was begun."""
        if self._rates_all and self._latest != self._observation:
            self.maxima[_LATEST].fill_(-math.inf)
            self._latest = self._observation

    def copy_site(self, other: UnitLiveness, theirs: int, ours: int) -> None:
        """Take over the counts of one site of another metric."""
        self.make_room()
        self._latest = other._latest
        for name in _OF_SITES:
            getattr(self, name)[ours] = getattr(other, name)[theirs]
        for name in ("fired", "magnitude", "projection", "maxima"):
            getattr(self, name)[..., self.layout.place(ours)] = getattr(other, name)[..., other.layout.place(theirs)]

    def compute(self) -> dict[str, Tensor]:
        """Return the dead units of each site by name, boolean, shape ``(units,)``."""
        return {site.name: site.dead for site in self.report().sites}

    def report(self) -> LivenessReport:
        """Judge what was counted since the last :meth:`reset`, on this rank alone."""
        return judge(self.totals().to_host(), UnitHistory.empty(), self.layout, self.rules)[0]

    def totals(self) -> Totals:
        """Return the counts as they stand, on the device."""
        self.flush()
        return Totals(*(getattr(self, f.name) for f in fields(Totals)))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Count one call of a rectifier, as :meth:`update` does, and return the dead units by this call alone."""
        alone = self.clone()
        alone.reset()
        alone.update(*args, **kwargs)
        self.update(*args, **kwargs)
        return dict(alone.compute())

    def load(self, totals: Totals) -> None:
        """Put counts in place of the present ones."""
        self.make_room()
        self._pending = {}
        for f in fields(Totals):
            getattr(self, f.name).copy_(getattr(totals, f.name))

    def reset(self) -> None:
        """Forget all counts, in place, and start at observation 0; the sites stay."""
        states = {name: getattr(self, name) for name in self._defaults}
        super().reset()
        for name, state in states.items():
            setattr(self, name, _cleared(name, state))
        self._pending, self._latest = {}, -1
        self._number(0)


def _rated(calls: Mapping[int, Counts]) -> dict[int, Counts]:
    """Choose the sites of which more than peaks was read, which are added up at once."""
    return {site: counts for site, counts in calls.items() if counts.magnitude is not None}


def _peak_rows(flat: FlatCounts, observations: range) -> tuple[Tensor, Tensor, Tensor]:
    """Tell of each unit its peak, the last observation it fired in, and how finite its inputs were."""
    peak, trough, fired = flat.of("peak", -math.inf), flat.of("trough", math.inf), flat.of("fired", 0)
    assert peak is not None
    fires = peak > 0
    if fired is not None:  # beside a NaN, what was counted tells who fired
        fires |= fired > 0
    numbers = torch.arange(observations.start, observations.stop, dtype=torch.float32, device=peak.device)
    last = torch.where(fires, numbers[:, None], -1).amax(0)
    extreme = (peak if trough is None else peak.maximum(-trough)).amax(0)
    nonfinite = torch.where(extreme.isnan(), NAN, torch.where(extreme.isposinf(), INFINITE, FINITE))
    return peak.nan_to_num(-math.inf, math.inf, -math.inf).amax(0), last, nonfinite


def _latest_rows(flat: FlatCounts) -> tuple[Tensor, Tensor]:
    """Tell of each unit its largest input, and the smallest with the sign changed; beside a NaN it is not constant."""
    peak, trough = flat.of("peak", -math.inf), flat.of("trough", math.inf)
    assert peak is not None
    assert trough is not None
    return peak[0].nan_to_num(-math.inf, math.inf, -math.inf), (-trough[0]).nan_to_num(math.inf, math.inf, -math.inf)


def _add_sizes(total: Tensor, sizes: Sequence[Mapping[int, int | Tensor]]) -> None:
    """Add to the entries of some sites, a column for each observation, without waiting for a device."""
    kinds = {size for column in sizes for size in column.values()}
    if len(kinds) == 1 and all(len(column) == len(total) for column in sizes):
        total.add_(kinds.pop())
    elif any(isinstance(size, Tensor) for size in kinds):
        for place, column in enumerate(sizes):
            for number, size in column.items():
                total[number, place].add_(size)
    else:
        table = torch.tensor([[column.get(n, 0) for column in sizes] for n in range(len(total))], device="cpu")
        total.add_(table.to(total.device, non_blocking=True))


def _raise_to(rows: Tensor, *values: Tensor) -> None:
    """Raise each row where a value is above it, in place."""
    torch.maximum(rows, torch.stack([value.to(rows.dtype) for value in values]), out=rows)


def _fresh(name: str, like: Tensor, sites: Sequence[Site]) -> Tensor:
    """Make the entries of new sites."""
    units, number = sum(site.units for site in sites), len(sites)
    shapes = {"maxima": (len(like), units), **dict.fromkeys(_OF_SITES, (number, *like.shape[1:]))}
    return _cleared(name, like.new_empty(shapes.get(name, (units,))))


def _cleared(name: str, state: Tensor) -> Tensor:
    """Put in what changes nothing when it is merged."""
    if name != "maxima":
        return state.zero_()
    for row, value in zip(state, NOTHING.values(), strict=True):
        row.fill_(value)
    return state
