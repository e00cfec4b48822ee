"""Where each site stands: its name, its number, and the place of its units in the flat state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

from lightning_deadrelu.model.sites import Site, names_of


class Layout:
    """An immutable list of sites, with their names and places worked out once.

    Args:
        sites: In the order in which they were first met; a site that is left out has 0 units.

    Example:
        >>> layout = Layout([Site("a", False, "relu", ("w",), 3), Site("b", False, "relu", ("v",), 2)])
        >>> layout.names, layout.number("b"), layout.place(1), layout.units
        (('a', 'b'), 1, slice(3, 5, None), 5)
    """

    def __init__(self, sites: Iterable[Site] = ()) -> None:
        self.sites = tuple(sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.sites == other.sites

    def __hash__(self) -> int:
        return hash(self.sites)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The sites' names, in order."""
        return tuple(names_of(self.sites))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        starts = [0]
        for site in self.sites:
            starts.append(starts[-1] + site.units)
        return tuple(starts)

    @property
    def units(self) -> int:
        """Units of all sites."""
        return self._starts[-1]

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """Where the units of each site lie in the flat state."""
        return tuple(self.place(number) for number in range(len(self.sites)))

    def number(self, name: str) -> int:
        """Return the number of a site in the layout.

        Raises:
            KeyError: If no site has this name.
        """
        return self._numbers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def place(self, number: int) -> slice:
        """Return where the units of a site lie in the flat state."""
        return slice(self._starts[number], self._starts[number + 1])

    def site(self, name: str) -> Site:
        """Return a site by its name.

        Raises:
            KeyError: If no site has this name.
        """
        return self.sites[self.number(name)]
