"""Attributions by name, for people to look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lightning_deadrelu.model.slices import Attribution


class Attributions(Mapping[str, Attribution]):
    """The attribution of each site by the site's name, in the order of execution; prints as a table.

    Args:
        known: The attributions by name.
        used: The names of all parameters that were seen in use, also where no site is concerned.

    Example:
        >>> known = Attributions({"act": Attribution(no_incoming="its parameters are sharded")})
        >>> known["act"].no_incoming, len(known)
        ('its parameters are sharded', 1)
    """

    def __init__(self, known: Mapping[str, Attribution], used: Iterable[str] = ()) -> None:
        self._known = dict(known)
        slices = (one for known in self._known.values() for one in (*known.incoming, *known.outgoing))
        self.used = frozenset(used) | {one.name for one in slices}
        """Names of the parameters in use."""

    def __getitem__(self, name: str) -> Attribution:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._known)})"

    def __str__(self) -> str:
        from lightning_deadrelu.report import attribution_table

        return attribution_table(self)
