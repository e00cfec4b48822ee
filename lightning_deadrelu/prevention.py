"""Keep units from being born dead, and from being decayed to death: initialisation and parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.observe.audit import trace
from lightning_deadrelu.statistics.born_dead import born_dead_bounds

__all__ = ["born_dead_bounds", "decay_groups", "init_for_relu_", "randomized_asymmetric_init_"]

_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, getattr(nn, "RMSNorm", nn.LayerNorm))
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Threshold)
_PASSING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_SPREAD = 0.6007  # with one coordinate from Beta(2, 1), a layer keeps the second moment of what it is given


def init_for_relu_(
    model: nn.Module,
    batch: Any = None,
    *,
    bias: float = 0.01,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[str, ...]:
    """Initialise what feeds the rectifiers of a model: He-normal weights and a small positive bias.

    Weights are drawn from N(0, 2 / fan_in). With a norm before the rectifier, the bias is the norm's, and its scale
    stays as it is. Which layers these are is seen on one batch, which runs in the mode the model is in, and leaves
    buffers, modes and random numbers as they were. Left alone are frozen parameters, embeddings, shared and tied
    weights, and layers behind which an identity path joins. To be done before training, and before the model is
    wrapped or sharded (He et al. 2015, arXiv 1502.01852).

    Args:
        model: Any module.
        batch: One batch, as for :func:`find_dead_units`. A model that is made of ``nn.Sequential`` and layers of
            ``torch.nn`` needs none.
        bias: The bias of each unit.
        forward: Called as ``forward(model, batch)``, as for :func:`find_dead_units`.
        generator: Draws the weights; by default torch's own for the CPU.

    Returns:
        The names of the parameters that were written.

    Raises:
        ValueError: If there is no batch, and the model does not tell the order of its layers.
        RuntimeError: If the batch could not be traced.

    Example:
        >>> model = nn.Sequential(nn.Linear(50, 400), nn.ReLU(), nn.Linear(400, 1))
        >>> init_for_relu_(model)
        ('0.weight', '0.bias')
        >>> round(model[0].weight.std().item(), 1), round(model[0].bias[0].item(), 2)
        (0.2, 0.01)
    """
    known = _in_order(model) if batch is None else trace(model, batch, forward).attributions.values()
    modules = {clean(name): module for name, module in model.named_modules()}
    trained = {clean(n): p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    written: dict[str, None] = {}
    for attribution in known:
        last = attribution.bias
        for one in attribution.incoming:
            owner = modules.get(one.name.rpartition(".")[0])
            if one.name not in trained or isinstance(owner, nn.Embedding):
                continue
            if one.role == "weight":
                one.write_(trained[one.name], _he(one.read(trained[one.name]), owner, generator))
            elif one is last:
                one.write_(trained[one.name], bias)
            else:
                continue
            written[one.name] = None
    return tuple(written)


def fan_in(rows: Tensor, layer: nn.Module | None) -> float:
    """Count the inputs that one unit adds up.

    Args:
        rows: The weights of each unit, shape ``(units, ...)``.
        layer: Their module; a transposed convolution spreads each weight over the positions of its stride.

    Example:
        >>> fan_in(torch.zeros(8, 4, 3, 3), None)
        36.0
    """
    strides = math.prod(layer.stride) if isinstance(layer, _TRANSPOSED) else 1
    return rows[0].numel() / strides


def _he(rows: Tensor, layer: nn.Module | None, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator else None
    return torch.randn(rows.shape, generator=generator, device=device) * math.sqrt(2 / fan_in(rows, layer))


def _in_order(model: nn.Module) -> Iterator[Attribution]:
    """Tell what feeds each rectifier where modules are called one after the other and nothing else happens.

    Raises:
        ValueError: If a module has a forward of its own.
    """
    feeding: list[Slice] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Sequential:
            continue
        if next(module.children(), None) or not type(module).__module__.startswith("torch.nn.modules."):
            raise ValueError(
                f"`init_for_relu_({type(model).__name__}(...))`: which layers feed its rectifiers is decided by"
                f" `{type(module).__name__}.forward`, and seen only when it runs. Try `init_for_relu_(model, batch)`."
            )
        if isinstance(module, _RECTIFIERS):
            yield Attribution(tuple(feeding))
        if isinstance(module, _LAYERS):
            feeding = [_rows(name, module, "weight"), *_bias(name, module, "bias")]
        elif isinstance(module, _NORMS):
            feeding += _bias(name, module, "shift")
        elif not isinstance(module, _PASSING):
            feeding = []


def _rows(name: str, layer: nn.Module, role: str) -> Slice:
    tensor = layer.bias if role != "weight" else layer.weight
    assert isinstance(tensor, Tensor)
    out = 1 if isinstance(layer, _TRANSPOSED) and role == "weight" else 0
    rows = torch.arange(tensor.shape[out])
    return Slice(clean(f"{name}.{'weight' if role == 'weight' else 'bias'}"), role, rows, rows[:, None], (out,))


def _bias(name: str, layer: nn.Module, role: str) -> list[Slice]:
    return [] if getattr(layer, "bias", None) is None else [_rows(name, layer, role)]


def randomized_asymmetric_init_(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw weights and biases so that narrow and deep nets are seldom born dead: one entry of each unit is positive.

    Weights and bias of a unit come from N(0, 0.6007^2 / fan_in); then one of them, chosen uniformly, from Beta(2, 1)
    (Lu et al. 2020, arXiv 1903.06733). Meant for inputs of either sign and ReLU; in wide nets it gains nothing.

    Args:
        module: A layer or a model; all its linear layers and convolutions are drawn anew.
        generator: Draws the numbers; by default torch's own for the CPU.

    Raises:
        ValueError: If a layer has no bias, or there is no layer.

    Example:
        >>> layer = nn.Linear(3, 1000)
        >>> randomized_asymmetric_init_(layer)
        >>> ((layer.weight > 0).any(1) | (layer.bias > 0)).all().item()
        True
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _LAYERS)}
    if not layers:
        raise ValueError(
            f"`{type(module).__name__}` has no linear layer and no convolution. Pass the model, or a layer."
        )
    for name, layer in layers.items():
        if layer.bias is None:
            raise ValueError(f"the layer `{name}` has no bias, which is drawn with its weights. Try `bias=True` there.")
    for layer in layers.values():
        assert layer.bias is not None
        weight = _rows("", layer, "weight")
        rows = weight.read(layer.weight)
        drawn = _asymmetric(rows[0].numel(), len(rows), generator)
        weight.write_(layer.weight, drawn[:, 1:].view(rows.shape))
        _rows("", layer, "bias").write_(layer.bias, drawn[:, 0])


def _asymmetric(inputs: int, units: int, generator: torch.Generator | None) -> Tensor:
    """Draw bias and weights of each unit, shape ``(units, 1 + inputs)``."""
    device = generator.device if generator else None
    drawn = torch.randn(units, 1 + inputs, generator=generator, device=device) * (_SPREAD / math.sqrt(inputs))
    place = torch.randint(1 + inputs, (units, 1), generator=generator, device=device)
    beta = torch.rand(units, 1, generator=generator, device=device).sqrt()  # the inverse of F(x) = x^2
    return drawn.scatter_(1, place, beta)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort the parameters of a model into two groups for an optimizer: weights that decay, and the rest that does not.

    Biases, the parameters of norms, and all others of less than two dimensions do not decay: a decaying shift moves
    the hinge of a unit, and nothing brings it back once the unit is silent. Frozen parameters are left out; tied ones
    come once, and do not decay if they are a bias or a norm's anywhere.

    Args:
        model: The model.
        weight_decay: For the weights.

    Returns:
        What an optimizer takes in place of ``model.parameters()``; a group without parameters is left out.

    Raises:
        ValueError: If ``weight_decay`` is negative, or the model has no parameter that is trained.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU())
        >>> [(len(group["params"]), group["weight_decay"]) for group in decay_groups(model, 0.1)]
        [(1, 0.1), (3, 0.0)]
    """
    if weight_decay < 0:
        raise ValueError(f"`weight_decay={weight_decay}`: it would make weights grow. Try `weight_decay=0.01`.")
    owned = [
        (parameter, is_shift(name, parameter, module))
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.requires_grad
    ]
    if not owned:
        raise ValueError(f"`{type(model).__name__}` has no parameter that is trained. Set `requires_grad_(True)`.")
    plain = {parameter for parameter, shift in owned if shift}
    decayed = dict.fromkeys(parameter for parameter, _ in owned if parameter not in plain)
    kept = dict.fromkeys(parameter for parameter, _ in owned if parameter in plain)
    groups = [{"params": list(decayed), "weight_decay": weight_decay}, {"params": list(kept), "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def is_shift(name: str, parameter: Tensor, owner: nn.Module) -> bool:
    """Whether a parameter is a bias, a norm's, or another one that should not decay.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> is_shift("weight", norm.weight, norm)
        True
    """
    return parameter.ndim < 2 or "bias" in name or isinstance(owner, _NORMS) or type(owner).__name__.endswith("Norm")
