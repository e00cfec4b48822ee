"""Which entries of which named tensors belong to which units. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slice:
    """Entries of one parameter or buffer, in groups that each belong to one unit of a site.

    Row ``r`` speaks of the entries of ``tensor.view(shape)`` at ``index[r]`` along ``dims``, and of all of the other
    dimensions. Row ``i`` of a linear layer's weight is ``dims=(0,)``, ``index=[[i]]``; behind a flattening, several
    rows belong to one unit; for grouped convolutions ``shape`` splits off the groups.

    Args:
        name: Of the parameter or buffer, in its model.
        role: ``"weight"`` and ``"bias"`` of a layer that feeds the site, ``"scale"``, ``"shift"``, ``"mean"`` and
            ``"variance"`` of a norm on the way, ``"reader"`` for the weight of a layer that reads it.
        units: The unit of each row, shape ``(rows,)``, int64.
        index: Where, along ``dims``; shape ``(rows, len(dims))``, int64.
        dims: Dimensions of the view, counted from the start.
        shape: The view; empty for the tensor's own shape.

    Example:
        >>> rows = Slice("fc.weight", "weight", torch.arange(3), torch.arange(3)[:, None], (0,))
        >>> rows.of(torch.tensor([False, True, False])).read(torch.eye(3))
        tensor([[0., 1., 0.]])
    """

    name: str
    role: str
    units: Tensor
    index: Tensor
    dims: tuple[int, ...]
    shape: tuple[int, ...] = ()

    def of(self, units: Tensor) -> Slice:
        """Keep the rows of some units.

        Args:
            units: Which, boolean, shape ``(units,)``.
        """
        rows = units[self.units]
        return replace(self, units=self.units[rows], index=self.index[rows])

    def read(self, tensor: Tensor) -> Tensor:
        """Copy the entries out, shape ``(rows, ...)``."""
        return self._front(tensor)[self._place(tensor)]

    def write_(self, tensor: Tensor, values: Tensor | float) -> None:
        """Put values in, of the shape that :meth:`read` returns, or one for all.

        Args:
            tensor: What to change, in place.
            values: On any device, of any dtype.
        """
        with torch.no_grad():
            new = torch.as_tensor(values, dtype=tensor.dtype, device=tensor.device)
            self._front(tensor)[self._place(tensor)] = new

    def _front(self, tensor: Tensor) -> Tensor:
        whole = tensor.detach().view(self.shape) if self.shape else tensor.detach()
        return whole.movedim(self.dims, tuple(range(len(self.dims))))

    def _place(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return self.index.to(tensor.device).unbind(1)
