"""Put another activation in the place of a rectifier module, and say so, so that it can be done again."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site, clean, matches
from lightning_deadrelu.remedies.site_remedies import PRELU
from lightning_deadrelu.repair.substitute_modules import MARK, SUBSTITUTES, Original, build, original_of

RESTORING = "who loads weights without the monitor calls `restore_activations(model, path)` before"
"""What activations ask for that were exchanged for good."""

_EXACT = ("relu", "relu6", "hardtanh", "threshold")
# shared rather than copied, so that the handles that users hold go on working
_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def no_module(model: nn.Module, site: Site, sites: Iterable[Site]) -> str:
    """Say why another activation cannot take the place of a site's; empty if it can.

    Example:
        >>> no_module(nn.Sequential(nn.ReLU()), Site("", True, "relu", ("fc.weight",), 3), [])
        'its rectifier is called as a function in the model; write it as an `nn.ReLU` module of its own'
    """
    if site.functional:
        where = f"`{site.owner}`" if site.owner else "the model"
        return f"its rectifier is called as a function in {where}; write it as an `nn.ReLU` module of its own"
    places = {other for other in sites if other.owner == site.owner and not other.functional} | {site}
    if len(places) > 1:
        return f"`{site.owner}` is called at {len(places)} places; give each its own `nn.ReLU`"
    return _not_exchangeable(model, site.owner)


def _not_exchangeable(model: nn.Module, path: str) -> str:
    """Say why the module of a path cannot be exchanged, whatever calls it."""
    if not path or (module := find_module(model, path)) is None:
        return f"the model has no module `{path}`" if path else "it is the model itself; put it into an `nn.Sequential`"
    for parent, _ in places_of(model, module):
        if reason := _fused(parent, path):
            return reason
    if original_of(module) is None:
        return f"`{path}` is of class `{type(module).__name__}`; only torch's own rectifiers are exchanged"
    return ""


def _fused(parent: nn.Module, path: str) -> str:
    """Tell modules that compute their activation without calling it."""
    if type(parent).__name__ == "OptimizedModule":
        return f"`{path}` is compiled by itself; compile the model around it instead"
    fused = any(base.__module__.startswith("torch.ao.") for base in type(parent).__mro__)
    if fused or isinstance(parent, nn.TransformerEncoderLayer):
        return f"`{path}` belongs to a `{type(parent).__name__}`, which fuses it away in evaluation"
    return ""


def substitute_(
    model: nn.Module, path: str, kind: str, slopes: Tensor | None = None, dims: Sequence[int] = (-1,)
) -> dict[str, Any]:
    """Put another activation in the place of a rectifier module, wherever the model holds that module.

    The substitute takes over the module's mode (training or not) and shares its hooks, whose handles go on working. It
    writes into its input where the rectifier did so, and keeps its cap. A substitute can be substituted again.

    Args:
        model: The model, changed in place.
        path: Of the module, without the prefixes of wrappers.
        kind: ``"leaky_relu"``, ``"rrelu"``, ``"elu"``, ``"selu"``, ``"gelu"`` or ``"silu"``.
        slopes: For ``"leaky_relu"``: of each unit, shape ``(units,)``, 0 where nothing is to change; None for torch's
            0.01.
        dims: The dimensions that hold the units, counted from the end.

    Returns:
        The record, as :func:`records` lists it.

    Raises:
        ValueError: If there is no such kind, or no such rectifier module.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> record = substitute_(model, "1", "gelu")
        >>> model[1], record["original"]["kind"]
        (GELU(approximate='none'), 'relu')
    """
    if reason := _no_kind(kind, slopes) or _not_exchangeable(model, path):
        raise ValueError(f"`{path}` cannot become `{kind}`: {reason}.")
    old = find_module(model, path)
    assert old is not None
    original = original_of(old)
    assert original is not None
    slopes = None if slopes is None else slopes.detach().cpu().clone()
    new = build(kind, slopes, dims, original)
    first = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.empty(0))
    # of a half-precision model too the slopes stay exact; they are rounded where they are used
    _replace(model, old, new.to(first.device))
    mark = {"kind": kind, "slopes": slopes, "dims": list(dims), "original": original._asdict()}
    setattr(new, MARK, mark)
    return {"path": path, **mark}


def _no_kind(kind: str, slopes: Tensor | None) -> str:
    if kind == "prelu":
        return PRELU
    if kind not in SUBSTITUTES:
        return f"there is no such kind; choose one of {', '.join(sorted(SUBSTITUTES))}"
    return "`slopes` go with `leaky_relu` alone; drop them" if slopes is not None and kind != "leaky_relu" else ""


def rectifiers(model: nn.Module) -> dict[str, Rectifier]:
    """Tell, by path, which rectifiers the substitutes in a model stand for."""
    return {path: Original(**mark["original"]).rectifier for path, mark in _marks(model)}


def records(model: nn.Module) -> list[dict[str, Any]]:
    """List what was substituted in a model, in plain types that ``torch.load(weights_only=True)`` reads.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> _ = substitute_(model, "1", "leaky_relu", torch.tensor([0.0, 0.5]))
        >>> [(record["path"], record["kind"], record["slopes"]) for record in records(model)]
        [('1', 'leaky_relu', tensor([0.0000, 0.5000]))]
    """
    return [{"path": path, **mark} for path, mark in _marks(model)]


def _marks(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in model.named_modules():
        if (mark := vars(module).get(MARK)) is not None:
            yield clean(name), mark


def reinstate_(model: nn.Module, keep: Container[str] = ()) -> None:
    """Put rectifiers back in the place of what was substituted for them.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> _ = substitute_(model, "1", "gelu")
        >>> reinstate_(model)
        >>> model[1]
        ReLU()
    """
    for path, mark in list(_marks(model)):
        old = find_module(model, path)
        if path not in keep and old is not None:
            _replace(model, old, Original(**mark["original"]).module())


def swap_activations_(
    model: nn.Module, factory: Callable[[], nn.Module], include: Sequence[str] = (), kinds: Sequence[str] = _EXACT
) -> list[str]:
    """Put modules of your own in the place of a model's rectifier modules, before it is trained.

    To be called in ``__init__`` or ``configure_model``, where the optimizer still learns of what parameters they bring.
    They are nobody's substitutes: they are judged as what they are.

    Args:
        model: The model, changed in place.
        factory: Makes one; called once for each module, so that shared ones stay shared.
        include: Shell patterns over paths; empty for all.
        kinds: Which rectifiers.

    Returns:
        The paths of the modules exchanged.

    Raises:
        TypeError: If ``include`` or ``kinds`` is a string, or ``factory`` makes no module.
        ValueError: If there is nothing to exchange, or it cannot be exchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
        >>> swap_activations_(model, nn.PReLU, include=["3"])
        ['3']
        >>> model[3]
        PReLU(num_parameters=1)
    """
    for argument, given in {"include": include, "kinds": kinds}.items():
        if isinstance(given, str):
            raise TypeError(f"`{argument}={given!r}`: it takes a list. Try `{argument}={[given]}`.")
    found = {clean(name): module for name, module in model.named_modules() if _kind_of(module) in kinds}
    chosen = [path for path in found if not include or any(matches(path, pattern) for pattern in include)]
    _check_chosen(model, include, kinds, found, chosen)
    for path in chosen:
        _replace(model, found[path], _made(factory, model))
    return chosen


def _kind_of(module: nn.Module) -> str:
    original = original_of(module)
    return original.kind if original else ""


def _check_chosen(
    model: nn.Module, include: Sequence[str], kinds: Sequence[str], found: Iterable[str], chosen: list[str]
) -> None:
    if not chosen:
        known = ", ".join(f"`{path}`" for path in found) or "none"
        raise ValueError(
            f"`swap_activations_(include={list(include)}, kinds={list(kinds)})` matches no module. The modules of these"
            f" kinds: {known}. What a forward calls as a function (`F.relu`) is no module: write it as one."
        )
    if reason := next(filter(None, (_not_exchangeable(model, path) for path in chosen)), ""):
        raise ValueError(f"`swap_activations_`: {reason}. Leave it out with `include`.")


def _made(factory: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    new = factory()
    if not isinstance(new, nn.Module):
        raise TypeError(
            f"`swap_activations_(model, {factory!r})`: it made a `{type(new).__name__}`, not a module. Try `nn.PReLU`,"
            " or `lambda: nn.LeakyReLU(0.1)`."
        )
    first = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), None)
    return new if first is None else new.to(first.device, first.dtype)


def find_module(model: nn.Module, path: str) -> nn.Module | None:
    """Find a module by its path without prefixes; behind a wrapper, what is wrapped."""
    return {clean(name): module for name, module in model.named_modules(remove_duplicate=False)}.get(path)


def places_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """List where a model holds a module: under which names of which parents."""
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    take_over(old, new)
    for parent, name in places_of(model, old):
        setattr(parent, name, new)


def take_over(old: nn.Module, new: nn.Module) -> None:
    """Give a module the mode of another, and its hooks, which both share from then on.

    Example:
        >>> new = nn.GELU()
        >>> take_over(nn.ReLU().eval(), new)
        >>> new.training
        False
    """
    new.train(old.training)
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
