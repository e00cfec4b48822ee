"""What a remedy sees, what it answers, and when it may act."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.statistics import SiteReport
from lightning_deadrelu.statistics.confirmation import LEVELS
from lightning_deadrelu.validation import Argument, check_fields, checked

_NEEDS = frozenset({"incoming", "outgoing", "outlet", "module"})
_MOST_ENTRIES = 100_000  # of a tensor that its law is told from
_UNIFORM_KURTOSIS, _NORMAL_KURTOSIS = 1.8, 3.0


class InitDistribution(NamedTuple):
    """The law that a tensor's entries were drawn from, as far as its moments tell.

    Args:
        mean: Its mean.
        std: Its standard deviation; 0 for a constant.
        uniform: Whether it is flat rather than normal.
    """

    mean: float
    std: float
    uniform: bool

    @classmethod
    def of(cls, tensor: Tensor) -> InitDistribution:
        """Take the moments of a tensor that was just drawn; of a large one, of entries evenly spaced over it.

        Example:
            >>> InitDistribution.of(torch.zeros(5))
            InitDistribution(mean=0.0, std=0.0, uniform=False)
        """
        values = _evenly(tensor.detach()).cpu().double()
        if not len(values) or bool((values == values[0]).all()):  # rounding would give a constant a spread
            return cls(float(values[0]) if len(values) else 0.0, 0.0, False)
        mean, std = values.mean(), values.std(correction=0)
        kurtosis = ((values - mean) / std).pow(4).mean()
        flat = bool(kurtosis < (_UNIFORM_KURTOSIS + _NORMAL_KURTOSIS) / 2)
        return cls(float(mean), float(std), flat)

    def draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw as many numbers as ``like`` has, on the CPU.

        Args:
            like: Gives the shape.
            generator: A CPU generator.
        """
        if self.uniform:
            return (torch.rand(like.shape, generator=generator) * 2 - 1) * math.sqrt(3) * self.std + self.mean
        return torch.randn(like.shape, generator=generator) * self.std + self.mean


def _evenly(tensor: Tensor) -> Tensor:
    """Copy entries that are evenly spaced in the tensor's order, all of them where they are few; alike on all ranks."""
    places = torch.arange(min(tensor.numel(), _MOST_ENTRIES), device=tensor.device)
    places = places * tensor.numel() // max(1, len(places))
    return tensor[torch.unravel_index(places, tensor.shape)] if tensor.ndim else tensor[None]


@dataclass(frozen=True, eq=False)
class SiteView:
    """What a remedy is shown of a site.

    Args:
        report: The verdict.
        units: Which units to treat, boolean, shape ``(units,)``: dead or frozen, and confirmed on a further batch.
        attribution: Which entries feed and read them.
        values: Parameters and buffers of the model by name; of a sharded model, of the parameters only those that feed
            and read the site, in full. To be read only.
        laws: What weights and biases were drawn from, by name, as they were when training began.
        quantiles: Of each treated unit's input in the confirming batch, measured from the hinge, at
            :data:`LEVELS`; shape ``(len(LEVELS), units)``, float64, not a number for other units.
        step: The training batch.
        inputs: Some rows of the input of the linear layer that alone feeds the site, in the confirming batch, shape
            ``(rows, features)``; None where it is fed otherwise.
        hinge: What a unit's input has to exceed to fire.
        no_module: Why another activation cannot take the place of the site's; empty if one can.
    """

    report: SiteReport
    units: Tensor
    attribution: Attribution
    values: Mapping[str, Tensor]
    laws: Mapping[str, InitDistribution]
    quantiles: Tensor
    step: int = 0
    inputs: Tensor | None = None
    hinge: float = 0.0
    no_module: str = ""

    @property
    def depth(self) -> Tensor:
        """How deep below the hinge each unit's largest input lies, shape ``(units,)``; 0 where it is unknown."""
        peak = self.quantile(1.0)  # of the weights as they are; the report's is a window old
        peak = torch.where(peak.isfinite(), peak, self.report.peak.double())
        return (-peak).clamp(min=0).nan_to_num(0.0, posinf=0.0)

    @property
    def spread(self) -> Tensor:
        """How far the middle 80 % of each unit's inputs reach, shape ``(units,)``."""
        return self.quantile(0.9) - self.quantile(0.1)

    def quantile(self, share: float) -> Tensor:
        """Interpolate the quantiles of all units' inputs, shape ``(units,)``.

        Args:
            share: From 0 (the smallest input) to 1 (the largest).
        """
        right = next(place for place, level in enumerate(LEVELS) if level >= share)
        left = max(right - 1, 0)
        width = LEVELS[right] - LEVELS[left]
        weight = (share - LEVELS[left]) / width if width else 0.0
        return torch.lerp(self.quantiles[left], self.quantiles[right], weight)


class NotApplicable(Exception):
    """Raised by a remedy that cannot be applied to a site; its text says why, and the next remedy is in turn."""


class Write(NamedTuple):
    """New values for some entries; the optimizer's state of those is repaired along.

    Args:
        slice: Which entries, of the treated units alone.
        values: What they become, of the shape that ``slice.read`` returns, or one number for all.
    """

    slice: Slice
    values: Tensor | float


class Warmth(NamedTuple):
    """A term added to the units' inputs in training forwards, and annealed away.

    Args:
        gamma: At the start, shape ``(units,)``; 0 for units that are left alone.
        steps: Training batches until it is 0.
    """

    gamma: Tensor
    steps: int


class Lift(NamedTuple):
    """Amounts that are added to parameters little by little: an equal part after each of some optimizer steps.

    Args:
        rises: What is added in all to which entries, of the treated units alone.
        steps: The number of parts.
    """

    rises: tuple[Write, ...]
    steps: int


class Push(NamedTuple):
    """An upward gradient on the inputs of units, in the backward pass alone.

    Args:
        units: Which, boolean, shape ``(units,)``.
        firing_rate: A unit that fires on this share of a batch is not pushed in it.
        strength: How hard, relative to the gradient of a typical unit.
        steps: Training batches until it ends, if the units do not fire before.
    """

    units: Tensor
    firing_rate: float = 0.2
    strength: float = 1.0
    steps: int = 1000


class Activation(NamedTuple):
    """Another activation for the site's module.

    Args:
        kind: ``"leaky_relu"``, ``"rrelu"``, ``"elu"``, ``"selu"``, ``"gelu"`` or ``"silu"``.
        slopes: Negative slope of each unit, shape ``(units,)``, 0 for a plain rectifier; None where all units change.
        steps: Training batches in which the slopes rise and fall back to 0; 0 if they stay for good.
    """

    kind: str
    slopes: Tensor | None = None
    steps: int = 0

    @property
    def is_for_good(self) -> bool:
        """Whether it stays."""
        return self.slopes is None or not self.steps


@dataclass(frozen=True)
class Edits:
    """What is to be changed.

    Args:
        writes: Entries of parameters and buffers.
        lift: What parameters are to rise by, step by step.
        push: A gradient for a time.
        warmth: A term for a time.
        activation: Another activation.
    """

    writes: tuple[Write, ...] = ()
    lift: Lift | None = None
    push: Push | None = None
    warmth: Warmth | None = None
    activation: Activation | None = None

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return bool(self.writes or self.lift or self.push or self.warmth or self.activation)


class _Derivable:
    """No dataclass: of a pure one, LightningCLI takes no derived classes."""


@dataclass(frozen=True, kw_only=True)
class Remedy(_Derivable):
    """What to do about the dead units of a site, and when.

    To make your own, derive a frozen dataclass and write :meth:`propose`: it says which entries get which values; the
    monitor writes them and adjusts the optimizer's state. ``needs`` says what has to be known of a site; other sites
    are left alone. The fields below are inherited; a ``__post_init__`` of your own has to call this one.

    Args:
        patience: Verdicts in a row with a dead fraction above the monitor's ``threshold`` before it acts.
        cooldown: Windows after an edit until its outcome is judged; a site is left alone meanwhile.
        attempts: Failed edits of a site in a row until the next remedy takes over or, after the last, the site is only
            watched.
        max_edits: Edits in a run, over all sites; None for no limit.
        max_edits_per_site: Edits of one site in a run; None for no limit.
        start_step: First training batch at which it may act.
        stop_step: Training batch from which on it acts no more; None for never.
        evidence: Samples for which a unit has to have been silent; None for the monitor's ``min_samples``.
        significance: If given, a unit is repaired once its silence is as improbable as this under its own history,
            whatever its age: self-normalised resets (Farias and Jozefiak 2024, arXiv 2410.20098). Units that have never
            fired go by ``evidence``.
        seed: Of what is drawn; the same edit draws the same numbers on all ranks, and other numbers at another step.
        dry_run: Say what it would do, and do nothing.

    Raises:
        ValueError: What was written, why it cannot work, and the smallest edit that mends it.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Lift(Remedy):
        ...     "Raise the bias of dead units for good, until their largest input is ``height`` above the hinge."
        ...
        ...     height: float = 0.1
        ...
        ...     def propose(self, view, generator):
        ...         if view.attribution.bias is None:
        ...             return Edits()
        ...         bias = view.attribution.bias.of(view.units)
        ...         lift = self.height - view.report.peak[bias.units]
        ...         return Edits(writes=(Write(bias, bias.read(view.values[bias.name]).cpu() + lift),))
        >>> Lift(height=0.5, patience=2).height
        0.5
        >>> Lift(patience=0)
        Traceback (most recent call last):
        ValueError: `Lift(patience=0)`: it has to be a whole number of at least 1. Try `patience=1`.
    """

    patience: int = checked(1, lambda it: it.check_count(1))
    cooldown: int = checked(1, lambda it: it.check_count(2))
    attempts: int | None = checked(3, lambda it: it.check_count(3, optional=True))
    max_edits: int | None = checked(None, lambda it: it.check_count(10, optional=True))
    max_edits_per_site: int | None = checked(None, lambda it: it.check_count(5, optional=True))
    start_step: int = checked(0, lambda it: it.check_count(0, least=0))
    stop_step: int | None = checked(None, lambda it: it.check_count(1000, optional=True))
    evidence: int | None = checked(None, lambda it: it.check_count(2990, optional=True))
    significance: float | None = checked(None, lambda it: it.check_number(0.001, 0, 1, optional=True))
    seed: int = checked(0, lambda it: it.check_count(0, least=0))
    dry_run: bool = checked(False, Argument.check_flag)

    needs: ClassVar[frozenset[str]] = frozenset({"incoming"})
    """What has to be known of a site, of ``"incoming"``, ``"outgoing"``, ``"outlet"`` and ``"module"``."""

    def __post_init__(self) -> None:
        check_fields(self, type(self).__name__)
        if self.stop_step is not None and self.stop_step <= self.start_step:
            why = f"it has to be behind `start_step={self.start_step}`, or it never acts"
            refused = Argument(type(self).__name__, "stop_step", self.stop_step)
            refused.refuse(why, f"stop_step={self.start_step + 1000}")
        if unknown := sorted(set(self.needs) - _NEEDS):
            raise ValueError(
                f"`{type(self).__name__}.needs` names {unknown}, which no site has. Try any of {sorted(_NEEDS)}."
            )

    @property
    def treats_frozen(self) -> bool:
        """Whether units that fire, but put out one value whatever the input, are repaired too."""
        return False

    @property
    def treats_blind(self) -> float | None:
        """The share of samples from which on a layer is repaired if none of its units fires on them; None for never."""
        return None

    def to_free(self, view: SiteView) -> Tensor:
        """Choose units that fire and are repaired nevertheless, because the whole layer is silent on some samples.

        Args:
            view: The site; its units are those that fire.
        """
        return torch.zeros_like(view.units)

    @property
    def is_exact(self) -> bool:
        """Whether an edit leaves the network's output as it is, so that a rise of the loss cannot come from it."""
        return False

    def propose(self, view: SiteView, generator: torch.Generator) -> Edits:
        """Say what is to be changed; pure.

        Args:
            view: The site.
            generator: For random numbers, on the CPU; seeded alike on all ranks.
        """
        raise NotImplementedError  # not abstract: the monitor refuses a remedy without it in words, when it is made
