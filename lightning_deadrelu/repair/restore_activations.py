"""Exchange activations in a fresh model as a checkpoint's run did: a checkpoint holds weights, and no code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from torch import nn

from lightning_deadrelu.checkpoint import read_checkpoint
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.repair.activation_swap import find_module, substitute_
from lightning_deadrelu.repair.substitute_modules import Original, original_of


def restore_activations(
    model: nn.Module, checkpoint: Mapping[str, Any] | str | PathLike[str], *, weights_only: bool = True
) -> nn.Module:
    """Put the activations into a model that a remedy had put there in the run that wrote a checkpoint.

    ``load_from_checkpoint`` builds the model from its code, which does not know what
    :class:`~lightning_deadrelu.DeadReLUMonitor` exchanged in the run. Fitting, validating and testing with the monitor
    and ``ckpt_path`` restore it by themselves.

    Args:
        model: The model, as its code builds it; changed in place. It may be a part of the one that was trained, or hold
            it as a part.
        checkpoint: A Lightning checkpoint, loaded, or the path to one.
        weights_only: As of ``torch.load``: False for a file that holds more than tensors and plain values, as those of
            many libraries do. It may run any code when it is loaded, so it has to be one that you trust.

    Returns:
        The model.

    Raises:
        ValueError: If the checkpoint is none of a whole run, or the model not the one that was trained.

    Example:
        >>> import torch
        >>> trained = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> state = {"activations": [substitute_(trained, "1", "leaky_relu", torch.tensor([0.0, 0.1]))]}
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> restore_activations(model, {"callbacks": {"DeadReLUMonitor": state}})[1]
        LeakyUnits(relu, units=2, dims=(-1,))
    """
    if not isinstance(checkpoint, Mapping):
        call = f"restore_activations(model, {fspath(checkpoint)!r}"
        trust = f"try `{call}, weights_only=False)`"
        checkpoint = read_checkpoint(checkpoint, f"{call})", trust, weights_only=weights_only)
    if "callbacks" not in checkpoint:
        raise ValueError(
            "`restore_activations`: this checkpoint has no `callbacks`, so it does not tell which activations were"
            " exchanged. Give one that was saved without `save_weights_only=True`."
        )
    return restore(model, _recorded(checkpoint))


def restore(model: nn.Module, records: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Do again all that records tell; see :func:`restore_activations`.

    Returns:
        The model.

    Raises:
        ValueError: If the model is not the one that the records are of.
    """
    for record in _moved(model, records):
        apply_record(model, record)
    return model


def apply_record(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Do again what one record tells; harmless where it has been done.

    Raises:
        ValueError: If the model has another module in that place.
    """
    if not _takes(model, record, record["path"]):
        raise ValueError(
            f"The checkpoint has `{record['kind']}` in the place of `{record['path']}`, a {record['original']['kind']},"
            " which this model does not have. Give the model that was trained."
        )
    substitute_(model, record["path"], record["kind"], record["slopes"], record["dims"])


def _takes(model: nn.Module, record: Mapping[str, Any], path: str) -> bool:
    module = find_module(model, path)
    original = original_of(module) if module is not None else None
    return original is not None and original._replace(inplace=False) == Original(
        **{**record["original"], "inplace": False}
    )


def _recorded(checkpoint: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Collect the records of all monitors; a class derived from ours saves its state under its own name."""
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, Mapping)]
    lists = [state["activations"] for state in states if isinstance(state.get("activations"), list)]
    listed = [record for records in lists for record in records]
    return [record for record in listed if isinstance(record, Mapping) and {"path", "kind", "original"} <= set(record)]


def _moved(model: nn.Module, found: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Find the one place in the model, or the one part of the trained one, that all records fit."""
    if all(_takes(model, record, record["path"]) for record in found):
        return found
    options = [paths for paths in _renamings(model, [record["path"] for record in found]) if _fit(model, found, paths)]
    if len(options) == 1:
        return [{**record, "path": path} for record, path in zip(found, options[0], strict=True)]
    names = ", ".join(f"`{record['path']}`" for record in found)
    many = f"{len(options)} places" if options else "no place"
    raise ValueError(
        f"`restore_activations`: the checkpoint exchanged {names}, for which this model has {many}. Give the model that"
        " was trained, or the part of yours that it is."
    )


def _fit(model: nn.Module, found: Sequence[Mapping[str, Any]], paths: list[str]) -> bool:
    return all(_takes(model, record, path) for record, path in zip(found, paths, strict=True))


def _renamings(model: nn.Module, paths: list[str]) -> Iterator[list[str]]:
    """Spell the paths as in a part of the trained model, then as in a model that holds it."""
    parts = paths[0].split(".")
    for depth in range(1, len(parts)):
        prefix = ".".join(parts[:depth]) + "."
        if all(path.startswith(prefix) for path in paths):
            yield [path.removeprefix(prefix) for path in paths]
    for name in dict.fromkeys(clean(name) for name, _ in model.named_modules()):
        if name:
            yield [f"{name}.{path}" for path in paths]
