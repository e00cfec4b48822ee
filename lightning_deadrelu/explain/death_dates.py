"""Tell from an optimizer's momentum for how many steps units have had no gradient. Pure.

Where a gradient is exactly zero, momentum fades by a known factor at each step: Adam's by beta1, and the root of its
second moment by beta2 ** 0.5. How far the momentum of a unit has fallen below that of live ones says for how long.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_deadrelu.model.optimizer_groups import ParameterGroup, holder_of

_ENTRIES = 256  # of each unit's weights
_ALIKE = 25.0  # steps; live units scatter by 2 to 5
_GONE = 100.0  # steps below what gradients of mere noise leave: no unit of the layer lives
_COARSE = 64.0  # multiples of the smallest number: below, rounding stops the fading
_LEAST = 5.0  # steps; no estimate is better


class Momentum(NamedTuple):
    """The momentum of a layer's units; tensors of shape ``(units,)``, float64, on the CPU.

    Args:
        sizes: Logarithm of its size, Adam's in units of the root of the second moment; ``-inf`` where it is zero.
        squares: Logarithm of the mean second moment, ``-inf`` where there never was a gradient; NaN for SGD.
        faint: Where it is so small that it fades no further, bool.
        decay: Its factor at each step.
        square_decay: That of the second moment; 1 for SGD.
        steps: How many steps were made; 0 where the optimizer does not count them.
    """

    sizes: Tensor
    squares: Tensor
    faint: Tensor
    decay: float
    square_decay: float = 1.0
    steps: int = 0

    @property
    def fading(self) -> float:
        """What a step without gradient adds to the sizes; below 0."""
        return math.log(self.decay) - math.log(self.square_decay) / 2

    @property
    def reach(self) -> int:
        """After how many such steps a number of 32 bits has faded to the smallest there is."""
        return math.ceil(-110 / self.fading)

    @property
    def is_adaptive(self) -> bool:
        """Whether there is a second moment."""
        return self.square_decay < 1


def momentum_of(
    optimizers: Iterable[Optimizer], parameter: Tensor, dim: int = 0, units: Tensor | None = None
) -> Momentum | None:
    """Read the momentum of a weight's units.

    Args:
        optimizers: One of them holds the weight.
        parameter: The weight.
        dim: The dimension that the units lie along.
        units: Numbers of those that are asked for; by default all.

    Returns:
        The momentum; None where it would not fade without gradients, as with weight decay inside the gradient, where
        the optimizer keeps none, and before the first step.

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> momentum_of([optimizer], layer.weight).sizes.exp()
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    held = holder_of(optimizers, parameter)
    if held is None:
        return None
    optimizer, group = held
    how = ParameterGroup.of(optimizer, group)
    if how.weight_decay and not how.decoupled:
        return None
    return _momentum(optimizer.state.get(parameter, {}), group, parameter, dim, units)


def _momentum(
    state: Mapping[str, Any], group: Mapping[str, Any], parameter: Tensor, dim: int, units: Tensor | None
) -> Momentum | None:
    first, second = state.get("exp_avg", state.get("momentum_buffer")), state.get("exp_avg_sq")
    decays = group.get("betas") if second is not None else (group.get("momentum"), 1.0)
    if not isinstance(decays, (tuple, list)) or not all(isinstance(decay, float) for decay in decays):
        return None
    if not _is_like(first, parameter) or not (second is None or _is_like(second, parameter)):
        return None
    if len(decays) != 2 or not 0 < decays[0] < decays[1] ** 0.5:
        return None
    moments = _rows(first, dim, units)
    smallest = torch.finfo(first.dtype).tiny * torch.finfo(first.dtype).eps
    faint = moments.abs().amax(1) < _COARSE * smallest
    if second is None:
        sizes = moments.square().mean(1).log() / 2
        return Momentum(sizes, torch.full_like(sizes, math.nan), faint, decays[0])
    squares = _rows(second, dim, units)
    ratios = torch.where(squares > 0, moments.square() / squares, math.nan)
    sizes = ratios.nanmean(1).log() / 2
    return Momentum(sizes, squares.mean(1).log(), faint, decays[0], decays[1], int(state.get("step", 0)))


def _is_like(moment: Any, parameter: Tensor) -> bool:
    """Whether it has a number for each of the parameter's; of a sharded one, each rank has but some."""
    is_tensor = isinstance(moment, Tensor) and moment.shape == parameter.shape and moment.is_floating_point()
    return is_tensor and not hasattr(moment, "to_local")


def _rows(moment: Tensor, dim: int, units: Tensor | None) -> Tensor:
    """Read some entries of each unit, shape ``(units, entries)``."""
    rows = moment.detach().movedim(dim, 0).flatten(1)
    rows = rows[:, :: math.ceil(rows.shape[1] / _ENTRIES)]
    return (rows if units is None else rows[units.to(rows.device)]).cpu().double()


def live_units(momentum: Momentum) -> Tensor:
    """Guess who has gradients, where nothing else tells: the units with the most momentum, which lie together.

    Returns:
        Bool, shape ``(units,)``; nobody where even the most is less than what noise leaves.

    Example:
        >>> live_units(Momentum(torch.tensor([0.0, 0.1, -9.0]), torch.zeros(3), torch.zeros(3) > 0, 0.9))
        tensor([ True,  True, False])
    """
    sizes, alike = momentum.sizes, -_ALIKE * momentum.fading
    known = sizes.isfinite() & ~momentum.faint
    live = known & (sizes >= sizes[known].max() - 2 * alike) if known.any() else known
    for _ in range(3):
        live = known & (sizes >= sizes[live].median() - alike) if live.any() else live
    noise = expected_sizes(momentum)[-1] + _GONE * momentum.fading
    gone = momentum.is_adaptive and live.any() and sizes[live].median() < noise
    return live & ~torch.tensor(bool(gone))


def steps_without_gradient(momentum: Momentum, live: Tensor, norms: Sequence[float] = ()) -> Tensor:
    """Count the steps that each unit has gone without a gradient.

    An estimate, to some 5 steps where gradients are as large now as when the unit died, or where ``norms`` tell how
    they changed; else it is off by ``log(ratio) / log(decay)``: 22 steps for gradients ten times as large.

    Args:
        momentum: Of the layer.
        live: Who has gradients now, bool, shape ``(units,)``; where nobody has, Adam's tell the time all the same.
        norms: Of the gradients at the last steps, the latest last; by default all alike.

    Returns:
        Whole numbers, float64, shape ``(units,)``; NaN where it cannot be told. Beyond :attr:`Momentum.reach` (some 900
        steps for a decay of 0.9) Adam's second moment tells it coarsely, and SGD's number is the least it can be.

    Example:
        >>> fading = Momentum(torch.tensor([0.0, 0.0, 10 * math.log(0.9)]), torch.zeros(3), torch.zeros(3) > 0, 0.9)
        >>> steps_without_gradient(fading, torch.tensor([True, True, False]))
        tensor([ 0.,  0., 10.], dtype=torch.float64)
    """
    expected = expected_sizes(momentum, norms)
    level = _level(momentum, live, expected)
    ages = _by_sizes(momentum, expected + level)
    if momentum.is_adaptive and live.any():
        ages = torch.where(momentum.faint, ages.maximum(_by_squares(momentum, live)), ages)
    never = momentum.squares == -math.inf
    ages = torch.where(never, float(momentum.steps), ages.clamp(max=momentum.steps or math.inf))
    cleared = ~momentum.sizes.isfinite() & ~never  # by an edit
    return ages.masked_fill(cleared | torch.tensor(math.isnan(level)), math.nan)


def _level(momentum: Momentum, live: Tensor, expected: Tensor) -> float:
    """Say by how much live units are above what is expected; what an Adam's momentum is worth is known without any."""
    if live.any():
        return float(momentum.sizes[live].median() - expected[-1])
    return 0.0 if momentum.is_adaptive else math.nan


def _by_sizes(momentum: Momentum, alive: Tensor) -> Tensor:
    """Find the step since when fading alone explains a unit's size, of those at which a live unit's size is given."""
    last = len(alive) - 1
    since = alive + momentum.fading * torch.arange(last, -1, -1, dtype=torch.float64)
    since = since.cummax(0).values  # where the momentum of the living fades, as after a spike, the first step counts
    ages = last - torch.searchsorted(since, momentum.sizes - 1e-9).clamp(max=last).double()
    earlier = ((momentum.sizes - since[0]) / momentum.fading).round()
    return torch.where(earlier > 0, last + earlier, ages)


def _by_squares(momentum: Momentum, live: Tensor) -> Tensor:
    below = momentum.squares - momentum.squares[live].median()
    return (below / math.log(momentum.square_decay)).round()


def tolerance(momentum: Momentum, live: Tensor) -> float:
    """Tell by how many steps :func:`steps_without_gradient` may be off, as far as the live units show it.

    Twice their spread; and for Adam, how far they are from what gradients of an even size leave: then these change.
    """
    spread, level = 0.0, 0.0
    if live.any():
        middle = momentum.sizes[live].median()
        spread = 1.4826 * float((momentum.sizes[live] - middle).abs().median())
        level = abs(float(middle - expected_sizes(momentum)[-1])) if momentum.is_adaptive else 0.0
    return max(_LEAST, 2 * spread / -momentum.fading, level / -momentum.fading)


def expected_sizes(momentum: Momentum, norms: Sequence[float] = ()) -> Tensor:
    """Follow the size of a momentum, as a logarithm, over steps with gradients of these norms and any direction.

    Args:
        momentum: Whose decays count.
        norms: By step; by default as many as there were, all alike.

    Returns:
        Shape ``(steps,)``, float64.
    """
    length = len(norms) or min(momentum.steps or momentum.reach, momentum.reach)
    from_start = 0 < momentum.steps <= length
    return _followed(tuple(norms) or (1.0,) * length, momentum.decay, momentum.square_decay, from_start)


@lru_cache(maxsize=8)  # layers that are trained alike ask the same
def _followed(norms: tuple[float, ...], decay: float, square_decay: float, from_start: bool) -> Tensor:
    known = torch.tensor(norms, dtype=torch.float64).square()
    known = torch.where(known > 0, known, known[known > 0].median() if (known > 0).any() else 1.0)  # NaN: not seen
    decays = torch.tensor([decay**2, square_decay], dtype=torch.float64)
    shares = torch.tensor([(1 - decay) ** 2, 1 - square_decay], dtype=torch.float64)
    state = [0.0, 0.0] if from_start else (float(known[0]) * shares / (1 - decays).clamp(min=1e-300)).tolist()
    (keep, keep_square), (add, add_square) = decays.tolist(), shares.tolist()
    followed: list[tuple[float, float]] = []
    for square in known.tolist():
        state = [keep * state[0] + add * square, keep_square * state[1] + add_square * square]
        followed.append((state[0], state[1] if square_decay < 1 else 1.0))
    first, second = torch.tensor(followed, dtype=torch.float64).unbind(1)
    return (first.log() - second.log()) / 2
