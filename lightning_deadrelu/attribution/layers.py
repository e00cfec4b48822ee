"""Which rows of a layer's weight make its outputs, and which meet its inputs. Pure."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_deadrelu.attribution.labels import (
    OUTLET,
    Flow,
    NotFollowable,
    Origin,
    Outcome,
    Read,
    Stream,
    TracedCall,
    UnaccountedRead,
    Weight,
    along,
    over,
    shrunk,
    unaccounted_reads,
)
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.model.torch_calls import CONVOLUTIONS, LAST_NORMS, MIXING_NORMS, PRODUCTS

JOINED = "an identity path joins before it"
PADDED = "its embedding has a padding row, which stays as it is"
COMPUTED = "its weight is computed from parameters (parametrised, quantised, a low-rank update)"
SHARDED = "its weight stands in for a parameter (sharded, or given to `functional_call`)"


class Layer(NamedTuple):
    """A weight between an input and an output.

    Args:
        x: What it is applied to.
        weight: The tensor in the weight's place.
        bias: Its bias, if any.
        into: The dimension of the input that holds the features, counted from the end.
        out: The dimension of the output that holds the units, counted from the end.
        rows: Given the named weight, the entries that make each unit, and those that meet each feature.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    into: int
    out: int
    rows: Callable[[Weight], tuple[Origin, Origin | None]]


def is_layer(name: str) -> bool:
    """Whether a call may apply a weight."""
    return name in PRODUCTS or name in ("linear", "addmm", "embedding") or name in CONVOLUTIONS


# -- layers ----------------------------------------------------------------------------------------------


def apply(call: TracedCall) -> Outcome:
    """Follow a layer: its output depends on rows of its weight and bias, and it reads what it is applied to.

    Raises:
        Misfit: If no parameter stands in the weight's place.
    """
    layer = _layer(call)
    weight = call.look(layer.weight).weight
    if weight is None:
        return _without_weight(call, layer)
    makes, meets = layer.rows(weight)
    streams = [Stream(makes, along(makes.rows, call.output.ndim, layer.out))]
    unaccounted = list(unaccounted_reads(call.look(layer.x), *_readers(call)))
    reads: tuple[Read, ...] = ()
    if meets is not None:
        reads, unaccounted = _read(call, layer, meets)
    own, more = _bias(call, layer)
    streams += own
    streams += _outlet(call, makes.rows, layer.out)
    why = JOINED if isinstance(layer.bias, Tensor) and layer.bias.ndim > 1 else ""
    if call.name == "embedding" and call.argument(2, "padding_idx") is not None:
        why = PADDED
    return Outcome((Flow(tuple(streams), why),), (*unaccounted, *more), reads, (makes,))


def _layer(call: TracedCall) -> Layer:
    if call.name == "linear":
        x, weight, bias = (call.argument(i, name) for i, name in enumerate(("input", "weight", "bias")))
        return Layer(x, weight, bias, -1, -1, _matrix)
    if call.name == "embedding":
        return Layer(call.argument(0, "input"), call.argument(1, "weight"), None, -1, -1, _table)
    if call.name in CONVOLUTIONS:
        return _convolution(call, "transpose" in call.name, CONVOLUTIONS[call.name])
    return _product(call)


def _matrix(weight: Weight) -> tuple[Origin, Origin]:
    """Take rows for outputs and columns for inputs, or the other way round."""
    if len(weight.shape) != 2:
        raise NotFollowable("its weight is no matrix")
    out, into = (1, 0) if weight.flipped else (0, 1)
    sizes = weight.shape
    return Origin(weight.name, "weight", (out,), (sizes[out],)), Origin(weight.name, "reader", (into,), (sizes[into],))


def _turned(weight: Weight) -> tuple[Origin, Origin]:
    return _matrix(weight._replace(flipped=not weight.flipped))


def _table(weight: Weight) -> tuple[Origin, None]:
    return Origin(weight.name, "weight", (1,), (weight.shape[1],)), None


def _product(call: TracedCall) -> Layer:
    left, right = call.operands[-2:]
    bias = call.operands[0] if call.name == "addmm" else None
    if call.name == "addmm" and (len(call.operands) != 3 or call.kwargs.get("beta", 1) != 1):
        raise NotFollowable("it scales what it adds")
    if len(call.operands) < 2 or (left.ndim > 2 and right.ndim > 2):
        raise NotFollowable("it multiplies stacks")
    if call.look(right).weight and right.ndim == 2:
        return Layer(left, right, bias, -1, -1, _turned)
    if call.look(left).weight and left.ndim == 2 and bias is None:
        place = -1 if right.ndim == 1 else -2
        return Layer(right, left, None, place, place, _matrix)
    raise NotFollowable("it multiplies activations")


def _convolution(call: TracedCall, transposed: bool, positions: int) -> Layer:
    x, weight, bias = (call.argument(i, name) for i, name in enumerate(("input", "weight", "bias")))
    groups = call.argument(6, "groups", 1)
    place = -positions - 1

    def rows(named: Weight) -> tuple[Origin, Origin]:
        return (_transposed if transposed else _forward)(named, groups)

    return Layer(x, weight, bias, place, place, rows)


def _forward(weight: Weight, groups: int) -> tuple[Origin, Origin]:
    name, (out, into, *kernel) = weight.name, weight.shape
    makes = Origin(name, "weight", (0,), (out,))
    if groups == 1:
        return makes, Origin(name, "reader", (1,), (into,))
    return makes, Origin(name, "reader", (0, 2), (groups, into), (groups, out // groups, into, *kernel))


def _transposed(weight: Weight, groups: int) -> tuple[Origin, Origin]:
    name, (into, out, *kernel) = weight.name, weight.shape
    meets = Origin(name, "reader", (0,), (into,))
    if groups == 1:
        return Origin(name, "weight", (1,), (out,)), meets
    return Origin(name, "weight", (0, 2), (groups, out), (groups, into // groups, out, *kernel)), meets


def _without_weight(call: TracedCall, layer: Layer) -> Outcome:
    """Read all there is; say why nothing is known of the output."""
    learned = call.look(layer.weight)
    own = call.module is not None and any(layer.weight is other for other in call.module._parameters.values())
    why = SHARDED if own else COMPUTED
    flows = [call.look(tensor) for tensor in call.operands]
    before, _ = _readers(call)
    if not learned.learned and not own and not learned.streams:
        why = "its weight is no parameter"
    unaccounted = [read for flow in flows for read in unaccounted_reads(flow, before, f"`{call.name}` reads it: {why}")]
    return Outcome((Flow(why=why),), tuple(unaccounted))


def _readers(call: TracedCall) -> tuple[str, str]:
    return f"`{call.name}`", f"`{call.name}` reads it, and not unit by unit"


def _read(call: TracedCall, layer: Layer, rows: Origin) -> tuple[tuple[Read, ...], list[UnaccountedRead]]:
    """Tell which unit of which site each feature is; what comes straight from layers must not be read."""
    flow = call.look(layer.x)
    if flow.zero:
        return (), []
    mine: dict[Site, tuple[Tensor, ...]] = {}
    unaccounted = list(unaccounted_reads(flow._replace(streams=tuple(flow.before)), *_readers(call)))
    for stream in flow.behind:
        units = _features(layer, stream.labels, rows.rows)
        if units is None:
            unaccounted += unaccounted_reads(Flow((stream,)), *_readers(call))
        else:
            assert isinstance(stream.origin, Site)
            mine[stream.origin] = (*mine.get(stream.origin, ()), units)
    return (Read(rows, mine),), unaccounted


def _features(layer: Layer, labels: Tensor, count: int) -> Tensor | None:
    place = layer.into % labels.ndim
    alike = shrunk(labels, [dim for dim in range(labels.ndim) if dim != place])
    return None if alike is None else alike.flatten().expand(count)


def _bias(call: TracedCall, layer: Layer) -> tuple[list[Stream], tuple[UnaccountedRead, ...]]:
    if not isinstance(layer.bias, Tensor):
        return [], ()
    flow = call.look(layer.bias)
    if flow.weight is None or layer.bias.ndim != 1:
        return [], unaccounted_reads(flow, *_readers(call))
    origin = Origin(flow.weight.name, "bias", (0,), flow.weight.shape)
    return [Stream(origin, along(origin.rows, call.output.ndim, layer.out))], ()


# -- norms -----------------------------------------------------------------------------------------------


def normalise(call: TracedCall) -> Outcome:
    """Follow a norm: per channel it adds its own rows; over units it cuts off what came before."""
    flow = call.look(call.argument(0, "input"))
    own, unaccounted = _own_rows(call)
    learned = any(origin.role in ("scale", "shift") for origin in _origins(own))
    silenced = f"a `{call.name}` behind it makes a constant of a silent unit"
    unaccounted += unaccounted_reads(flow._replace(streams=tuple(flow.behind)), f"`{call.name}`", silenced)
    kept, why = flow.before, flow.why or ("it normalises what another activation puts out" if flow.behind else "")
    if call.name in MIXING_NORMS or (why and learned):
        unaccounted += unaccounted_reads(Flow(tuple(kept)), f"`{call.name}`", silenced)
        kept, why = [], "" if learned else why or f"`{call.name}` mixes the units of the layer before it"
    idle = [stream for stream in kept if _is_idle(call, stream.origin, learned)]
    unaccounted += unaccounted_reads(Flow(tuple(idle)), f"`{call.name}`", "")
    kept = [stream for stream in kept if not _is_idle(call, stream.origin, learned)]
    channels = call.name not in LAST_NORMS
    place = 1 - call.output.ndim if channels else -1
    flat = channels or all(len(origin.sizes) == 1 for origin in _origins(own))
    outlet = _outlet(call, call.output.shape[place], place) if flat else []
    shifted = any(origin.role == "shift" for origin in _origins(own))
    normed = Flow((*kept, *own, *outlet), why, "" if shifted else flow.indirect)
    return Outcome((normed,), tuple(unaccounted), (), tuple(_origins(own)))


def _origins(streams: list[Stream]) -> list[Origin]:
    return [stream.origin for stream in streams if isinstance(stream.origin, Origin)]


def _is_idle(call: TracedCall, origin: Any, learned: bool) -> bool:
    """Whether a norm makes an outlet the wrong place, or a bias idle that it subtracts again."""
    batch_wise = bool(call.argument(5, "training", call.kwargs.get("use_input_stats")))
    return origin.role == OUTLET or (origin.role == "bias" and batch_wise and not learned)


def _own_rows(call: TracedCall) -> tuple[list[Stream], list[UnaccountedRead]]:
    """Follow a norm's scale and shift, and its running statistics."""
    own: list[Stream] = []
    unaccounted: list[UnaccountedRead] = []
    for role, (place, word) in _places(call.name).items():
        tensor = call.argument(place, word)
        if not isinstance(tensor, Tensor):
            continue
        flow, ndim = call.look(tensor), call.output.ndim
        name = flow.weight.name if flow.weight else flow.buffer
        if not name:
            unaccounted += unaccounted_reads(flow, f"`{call.name}`", "")
            continue
        origin = Origin(name, role, tuple(range(tensor.ndim)), tuple(tensor.shape))
        last = call.name in LAST_NORMS
        own.append(Stream(origin, over(tensor.shape, ndim) if last else along(origin.rows, ndim, 1)))
    return own, unaccounted


def _places(name: str) -> dict[str, tuple[int, str]]:
    if name == "rms_norm":
        return {"scale": (2, "weight")}
    if name in MIXING_NORMS:
        return {"scale": (2, "weight"), "shift": (3, "bias")}
    statistics = {"mean": (1, "running_mean"), "variance": (2, "running_var")}
    return {"scale": (3, "weight"), "shift": (4, "bias"), **statistics}


# -- outlets ---------------------------------------------------------------------------------------------

_OUTLETS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
)
_OUTLETS += (getattr(nn, "RMSNorm", nn.LayerNorm),)


def _outlet(call: TracedCall, count: int, dim: int) -> list[Stream]:
    """Start a stream at a module's output, if it is one."""
    if not isinstance(call.module, _OUTLETS) or not _is_plain(call.module):
        return []
    origin = Origin(call.path, OUTLET, (dim,), (count,))
    return [Stream(origin, along(count, call.output.ndim, dim))]


def _is_plain(module: nn.Module) -> bool:
    return str(inspect.unwrap(type(module).forward).__module__).startswith("torch.nn.modules.")
