"""Raise parameters little by little, after each optimizer step, until what was asked for has been added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_deadrelu.model.sharding import whole
from lightning_deadrelu.remedies import Lift, Write


@dataclass
class Lifting:
    """One site's lift, and how far it has come.

    Args:
        lift: What is added in all.
        step: Optimizer steps after which a part was added.
        rest: For each of the lift's writes, what rounding kept from being added so far; empty before the first step.
    """

    lift: Lift
    step: int = 0
    rest: list[Tensor] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether all has been added."""
        return self.step >= self.lift.steps

    def advance(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the next part to the parameters."""
        self.rest = self.rest or [torch.zeros(()) for _ in self.lift.rises]
        self.rest = [self._add(*pair, tensors) for pair in zip(self.lift.rises, self.rest, strict=True)]
        self.step += 1

    def _add(self, rise: Write, rest: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        with whole(tensors[rise.slice.name]) as full:
            return add_(full, rise, rest, self.lift.steps)


class Lifts:
    """The lifts under way, by site.

    What is added follows from what was decided when a lift began, and from nothing since: no forward has to be seen
    between two verdicts, and ranks that began with equal parameters stay equal to the last bit. The optimizer and its
    state are left alone: through them a lift would be bound by the learning rate, and pass under Adam for a gradient.

    Example:
        >>> from lightning_deadrelu.model.slices import Slice
        >>> bias, lifts = torch.zeros(2), Lifts()
        >>> row = Slice("bias", "bias", torch.tensor([1]), torch.tensor([[1]]), (0,))
        >>> lifts.add("act", Lift((Write(row, torch.tensor([3.0])),), steps=2))
        >>> lifts.advance({"bias": bias}), bias
        ([], tensor([0.0000, 1.5000]))
        >>> lifts.advance({"bias": bias}), bias
        (['act'], tensor([0., 3.]))
    """

    def __init__(self) -> None:
        self._liftings: dict[str, Lifting] = {}
        self.unsettled: set[str] = set()
        """Names of the parameters that were lifted since all ranks last met without a failure."""

    @property
    def sites(self) -> list[str]:
        """The names of the sites whose units are being lifted."""
        return list(self._liftings)

    def add(self, site: str, lift: Lift) -> None:
        """Begin to lift units of a site, in place of what was left of an earlier lift."""
        self._liftings[site] = Lifting(lift)
        self.unsettled |= _names_in(lift)

    def settle(self) -> None:
        """Note that no rank has failed so far, so that all have lifted alike."""
        self.unsettled = set().union(*(_names_in(lifting.lift) for lifting in self._liftings.values()))

    def advance(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Add the next part to all that is being lifted; to be called after each optimizer step, on every rank.

        Args:
            tensors: The model's parameters, by name.

        Returns:
            The names of the sites whose lift is over.
        """
        for lifting in self._liftings.values():
            lifting.advance(tensors)
        return self.drop([site for site, lifting in self._liftings.items() if lifting.over])

    def drop(self, sites: Iterable[str]) -> list[str]:
        """Stop the lifts of some sites where they are; harmless where there are none.

        Returns:
            The names of the sites that had one.
        """
        return [site for site in sites if self._liftings.pop(site, None) is not None]

    @property
    def state(self) -> dict[str, Lifting]:
        """What is under way, by site."""
        return dict(self._liftings)

    def restore(self, state: Mapping[str, Lifting]) -> None:
        """Go on where :attr:`state` was read."""
        self._liftings = dict(state)
        self.settle()


def _names_in(lift: Lift) -> set[str]:
    return {rise.slice.name for rise in lift.rises}


def add_(tensor: Tensor, rise: Write, rest: Tensor, steps: int) -> Tensor:
    """Add one of ``steps`` equal parts of a rise to the entries of a tensor.

    Args:
        tensor: Changed in place, whatever its precision.
        rise: The entries, and what is added to them in all.
        rest: What rounding kept from being added before; without it, parts below half a unit of the last place of a
            half-precision number would be lost, and with them the whole lift.
        steps: The number of parts.

    Returns:
        What rounding kept from being added so far.
    """
    precision = torch.promote_types(tensor.dtype, torch.float32)
    old = rise.slice.read(tensor).to(precision)
    wanted = old + torch.as_tensor(rise.values).to(old) / steps + rest.to(old)
    rise.slice.write_(tensor, wanted)
    return wanted - rise.slice.read(tensor).to(precision)
