"""What tracing found: which entries feed each unit of a site, and which read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.render.table import Column, text_table


class Outlet(NamedTuple):
    """Where a constant can be added to each unit's input: the output of the last layer before the site.

    Args:
        path: The module's path.
        channels: The place of each unit along ``dim`` of the module's output, shape ``(units,)``, int64.
        dim: Counted from the end.
    """

    path: str
    channels: Tensor
    dim: int


@dataclass(frozen=True, eq=False)
class Attribution:
    """Which entries feed each unit of a site, and which read it.

    Args:
        incoming: What feeds the units, in the order of execution.
        outgoing: What reads them: the weights of all layers behind.
        outlet: Where a term can be added; None where no module's output is the place.
        no_incoming: Why the units' parameters must not be edited; empty if they may.
        no_outgoing: Why the readers are not known; empty if they are.
        no_outlet: Why there is no outlet.
        multiplied: Whether a product with other activations is on the way to the readers.
    """

    incoming: tuple[Slice, ...] = ()
    outgoing: tuple[Slice, ...] = ()
    outlet: Outlet | None = None
    no_incoming: str = ""
    no_outgoing: str = ""
    no_outlet: str = ""
    multiplied: bool = False

    @property
    def bias(self) -> Slice | None:
        """The last entries added to the units: a norm's shift where there is a norm, else the layer's bias."""
        return next((one for one in reversed(self.incoming) if one.role in ("bias", "shift")), None)


class Attributions(Mapping[str, Attribution]):
    """The attribution of each site by the site's name, in the order of execution; prints as a table.

    Args:
        known: The attributions by name.
        used: The names of all parameters that were seen in use, also where no site is concerned.

    Example:
        >>> known = Attributions({"act": Attribution(no_incoming="its parameters are sharded")})
        >>> known["act"].no_incoming, len(known)
        ('its parameters are sharded', 1)
        >>> print(known)
        layer  fed by  bias that counts  read by  refused because
        act    -       -                 -        fed: its parameters are sharded
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
        return text_table(_COLUMNS, [_row(name, known) for name, known in self.items()])


_COLUMNS = tuple(
    Column(title, title, text=True) for title in ("layer", "fed by", "bias that counts", "read by", "refused because")
)


def _row(name: str, known: Attribution) -> dict[str, str]:
    refused = {"fed": known.no_incoming, "read": known.no_outgoing, "outlet": known.no_outlet}
    reasons = "; ".join(f"{what}: {why}" for what, why in refused.items() if why)
    fed, read = (", ".join(dict.fromkeys(one.name for one in parts)) for parts in (known.incoming, known.outgoing))
    bias = known.bias.name if known.bias else ""
    cells = {"fed by": fed, "bias that counts": bias, "read by": read, "refused because": reasons}
    return {"layer": name} | {title: cell or "-" for title, cell in cells.items()}
