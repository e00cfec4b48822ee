"""Parameters that are split over ranks (FSDP2's are DTensors between steps): tell them, gather them, write to them.

What gathers is a collective: all ranks have to come to it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, of which a rank may hold a part alone.

    Example:
        >>> is_sharded(torch.zeros(2))
        False
    """
    return hasattr(tensor, "device_mesh")


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor in full; a collective where it is sharded.

    Args:
        tensor: Of any kind; one that is not sharded is returned as it is.
    """
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.detach().full_tensor()
    return full


@contextmanager
def whole(tensor: Tensor) -> Iterator[Tensor]:
    """Hand out a tensor in full, to be changed in place on all ranks alike; afterwards each rank keeps its part.

    An error within leaves it as it was. A collective where the tensor is sharded.

    Args:
        tensor: Of any kind; one that is not sharded is handed out itself.
    """
    full = gathered(tensor)
    yield full
    if is_sharded(tensor):
        with torch.no_grad():
            _local(tensor).copy_(_own_part(full, tensor))


def is_plain_inside(tensor: Tensor) -> bool:
    """Tell whether a tensor, or a rank's part of it, is one of torch's own, whose entries can be written.

    Example:
        >>> is_plain_inside(nn.Parameter(torch.zeros(2)))
        True
    """
    return type(_local(tensor) if is_sharded(tensor) else tensor) in (Tensor, nn.Parameter)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.detach().to_local()
    return local


def _own_part(full: Tensor, like: Any) -> Tensor:
    """Cut out what this rank holds; nobody is asked."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    spread = DTensor.from_local(full, like.device_mesh, everywhere, run_check=False)
    return spread.redistribute(placements=like.placements).to_local()


def reshard_(model: nn.Module) -> None:
    """Have FSDP2 take back what a forward without a backward left gathered: what is written there would be lost.

    Harmless where nothing is gathered, or sharded; to be called between batches.

    Args:
        model: Whose parameters are to be as optimizers know them.
    """
    for module in model.modules():
        if _is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def split_layer(model: nn.Module) -> str:
    """Name a parameter of tensor parallelism, whose layer works on a part of the units; empty if there is none.

    Args:
        model: As it is between batches.

    Example:
        >>> split_layer(nn.Linear(2, 2))
        ''
    """
    modules = dict(model.named_modules())
    full = {name for name, module in modules.items() if _is_fully_sharded(module)}
    return next(
        (
            f"{path}.{name}" if path else name
            for path, module in modules.items()
            for name, one in module._parameters.items()
            if one is not None and is_sharded(one) and _is_split(one, not full.isdisjoint(_above(path)))
        ),
        "",
    )


def _is_split(tensor: Any, fully_sharded: bool) -> bool:
    """Tell tensor parallelism by its placements; those of FSDP2 are one, or a replication and one."""
    first, *rest = tensor.placements
    if fully_sharded:
        return bool(rest) and not first.is_replicate()
    return not all(one.is_replicate() for one in (first, *rest))


def _above(path: str) -> Iterable[str]:
    parts = path.split(".")
    return ("", *(".".join(parts[:depth]) for depth in range(1, len(parts) + 1)))


def _is_fully_sharded(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
