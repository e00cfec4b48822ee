"""Bring a saved model and its optimizers back, from whatever made the file."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_deadrelu.checkpoint import read_checkpoint
from lightning_deadrelu.render.names import listed
from lightning_deadrelu.repair.restore_activations import restore_activations

_STATES = ("optimizer_states", "optimizer_state_dict", "optimizer")  # in which checkpoints have it; Lightning's first


def load_weights(model: nn.Module, path: Path, trust: bool) -> None:
    """Exchange the activations that training did, then load the weights; the model may be a part of the trained one."""
    checkpoint = read_checkpoint(path, f"--checkpoint {path}", "add `--trust`", weights_only=not trust)
    weights = checkpoint.get("state_dict", checkpoint)
    if "callbacks" in checkpoint:
        restore_activations(model, checkpoint)
    elif "state_dict" in checkpoint:
        warnings.warn(f"`{path}` does not tell which activations were exchanged: the rest was not saved.", stacklevel=2)
    prefix = _prefix(list(model.state_dict()), list(weights), path)
    missing, unexpected = model.load_state_dict(
        {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}, strict=False
    )
    if missing:
        raise ValueError(f"`--checkpoint {path}` lacks {listed(missing)}. Give the model that was trained.")
    if unexpected:
        warnings.warn(f"`{path}` holds what the model has not: {listed(unexpected)}.", stacklevel=2)


def _prefix(ours: Sequence[str], theirs: Sequence[str], path: Path) -> str:
    """Find under which name the checkpoint holds the model: none, or that of the attribute it was."""
    names = [key[: -len(ours[0])] for key in theirs if ours and f".{key}".endswith(f".{ours[0]}")] or [""]
    held = set(theirs)
    fitting = [name for name in names if all(name + key in held for key in ours)]
    if len(fitting) == 1 or "" in fitting:
        return "" if "" in fitting else fitting[0]
    if fitting:
        raise ValueError(
            f"`--checkpoint {path}` holds the model {len(fitting)} times, as {listed(fitting)}. Give a file that holds"
            " it once, or name the whole model that was trained."
        )
    missing = [key for key in ours if names[0] + key not in held]
    raise ValueError(
        f"`--checkpoint {path}` does not fit the model: it lacks {listed(missing)}, and has {listed(theirs)}. Let"
        " MODEL_FACTORY build the model that was trained."
    )


def saved_optimizers(model: nn.Module, checkpoint: Mapping[str, Any], path: Path) -> list[Optimizer]:
    """Bring the state of the optimizers back, for the parameters that it belongs to."""
    held = next((checkpoint[key] for key in _STATES if checkpoint.get(key)), None)
    if held is None:
        raise ValueError(
            f"`{path}` holds no state of an optimizer, which tells the dates. Give a checkpoint that a Trainer saved"
            " with `save_weights_only=False`, or save `optimizer.state_dict()` as `optimizer_state_dict`."
        )
    saved: list[dict[str, Any]] = held if isinstance(held, list) else [held]
    optimizers = _configured(model)
    if len(optimizers) != len(saved):
        optimizers = _grouped_alike(model, saved)
    try:
        for optimizer, state in zip(optimizers, saved, strict=True):
            optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise _misfit(path) from error
    if not all(map(_fits, optimizers)):
        raise _misfit(path)
    return optimizers


def _misfit(path: Path) -> ValueError:
    return ValueError(
        f"`{path}` holds the optimizer of a model with other parameters, or with these in another order. Let `--model`"
        " name the LightningModule that was trained: its `configure_optimizers` tells the order."
    )


def _fits(optimizer: Optimizer) -> bool:
    """Whether each momentum has a number for each of its parameter's."""
    states = ((state.get(key), p) for p, state in optimizer.state.items() for key in ("exp_avg", "momentum_buffer"))
    return all(momentum is None or momentum.shape == p.shape for momentum, p in states)


def _configured(model: nn.Module) -> list[Optimizer]:
    """Ask a LightningModule for its optimizers; none where it cannot tell them without a Trainer."""
    try:
        return _found_in(model.configure_optimizers())  # type: ignore[operator]
    except Exception:
        return []


def _found_in(configured: Any) -> list[Optimizer]:
    if isinstance(configured, Mapping):
        configured = configured.get("optimizer")
    if isinstance(configured, (list, tuple)):
        return [optimizer for one in configured for optimizer in _found_in(one)]
    return [configured] if isinstance(configured, Optimizer) else []


def _grouped_alike(model: nn.Module, saved: Sequence[Mapping[str, Any]]) -> list[Optimizer]:
    """Share the parameters of a model among as many groups as were saved, in their order."""
    parameters = iter([parameter for parameter in model.parameters() if parameter.requires_grad])
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in saved]
    groups = [[list(itertools.islice(parameters, size)) for size in one] for one in sizes]
    return [Optimizer([{"params": group} for group in one], {}) for one in groups]
