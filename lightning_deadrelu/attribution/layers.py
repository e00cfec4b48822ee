"""Which rows of a layer's weight make its outputs, and which meet its inputs. Pure."""

from __future__ import annotations

import inspect
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
    numbered,
    shrunk,
    unaccounted_reads,
)
from lightning_deadrelu.model.contractions import contraction
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.model.torch_calls import CONVOLUTIONS, LAST_NORMS, MIXING_NORMS, PRODUCTS

JOINED = "an identity path joins before it"
PADDED = "its embedding has a padding row, which stays as it is"
COMPUTED = "its weight is computed from parameters (parametrised, quantised, a low-rank update)"
SHARDED = "its weight stands in for a parameter (sharded, or given to `functional_call`)"


class Layer(NamedTuple):
    """What a weight does between an input and an output.

    Args:
        x: What it is applied to.
        bias: Its bias, if any.
        makes: The entries that make each unit of the output.
        out: The dimensions of the output that hold the units, counted from the end.
        meets: The entries that meet each feature of the input; None where the input holds no activations.
        into: The dimensions of the input that hold the features, counted from the end.
    """

    x: Tensor
    bias: Tensor | None
    makes: Origin
    out: tuple[int, ...]
    meets: Origin | None = None
    into: tuple[int, ...] = ()


def is_layer(name: str) -> bool:
    """Whether a call may apply a weight."""
    return name in PRODUCTS or name in ("linear", "embedding") or name in CONVOLUTIONS


# -- layers ----------------------------------------------------------------------------------------------


def apply(call: TracedCall) -> Outcome:
    """Follow a layer: its output depends on rows of its weight and bias, and it reads what it is applied to.

    Raises:
        NotFollowable: If no parameter stands in the weight's place.
    """
    x, weight, bias = _factors(call) if call.name in PRODUCTS else _arguments(call)
    named = call.look(weight).weight
    if named is None:
        return _without_weight(call, weight)
    layer = _layer(call, named, x, weight, bias)
    makes, ndim = layer.makes, call.output.ndim
    unaccounted = list(unaccounted_reads(call.look(x), *_readers(call)))
    reads: tuple[Read, ...] = ()
    if layer.meets is not None:
        reads, unaccounted = _read(call, layer, layer.meets)
    own, more = _bias(call, layer)
    streams = [
        Stream(makes, numbered(_sizes(makes, layer.out), layer.out, ndim)),
        *own,
        *_outlet(call, makes.rows, layer.out[-1]),
    ]
    why = JOINED if isinstance(bias, Tensor) and bias.ndim > 1 else ""
    if call.name == "embedding" and call.argument(2, "padding_idx") is not None:
        why = PADDED
    return Outcome((Flow(tuple(streams), why),), (*unaccounted, *more), reads, (makes,))


def _arguments(call: TracedCall) -> tuple[Tensor, Tensor, Tensor | None]:
    bias = None if call.name == "embedding" else call.argument(2, "bias")
    return call.argument(0, "input"), call.argument(1, "weight"), bias


def _factors(call: TracedCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tell which factor of a product is a weight, the last one if both may be."""
    *added, left, right = call.operands
    if len(added) != (call.name == "addmm"):
        raise NotFollowable("it multiplies several tensors")
    if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1:
        raise NotFollowable("it scales what it adds")
    if left is right:
        raise NotFollowable("it multiplies a tensor by itself")
    if call.look(right).weight:
        return left, right, added[0] if added else None
    if not call.look(left).weight or added:
        raise NotFollowable("it multiplies activations")
    return right, left, None


def _layer(call: TracedCall, named: Weight, x: Tensor, weight: Tensor, bias: Tensor | None) -> Layer:
    if call.name in PRODUCTS or call.name == "linear":
        return _product(call, named, x, weight, bias)
    if named.is_permuted:
        raise NotFollowable("the dimensions of its weight are in another order")
    if call.name == "embedding":
        return Layer(x, bias, Origin(named.name, "weight", (1,), named.shape[1:]), (-1,))
    rows = _transposed if "transpose" in call.name else _forward
    makes, meets = rows(named, call.argument(6, "groups", 1))
    place = (-CONVOLUTIONS[call.name] - 1,)
    return Layer(x, bias, makes, place, meets, place)


def _product(call: TracedCall, named: Weight, x: Tensor, weight: Tensor, bias: Tensor | None) -> Layer:
    """Spell a product in letters: those that the weight has in common with its input, and with the output, count."""
    terms, result = contraction(call) or ([], "")
    letters = {id(tensor): term for tensor, term in terms}
    mine, other = letters.get(id(weight), ""), letters.get(id(x), "")
    wide = zip(mine, weight.shape, named.dims, strict=True)
    places = {letter: dim for letter, size, dim in wide if size > 1 or letter not in other or letter not in result}
    met, made = ([letter for letter in term if letter in places] for term in (other, result))
    if not met or not made or any(len(set(term)) < len(term) for term in (mine, other)):
        raise NotFollowable("its weight is no matrix")

    def rows(role: str, own: list[str]) -> Origin:
        dims = tuple(places[letter] for letter in own)
        return Origin(named.name, role, dims, tuple(named.shape[dim] for dim in dims))

    into, out = (tuple(term.index(one) - len(term) for one in own) for term, own in ((other, met), (result, made)))
    return Layer(x, bias, rows("weight", made), out, rows("reader", met), into)


def _sizes(origin: Origin, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Tell the sizes of the dimensions of a tensor that hold rows: the groups of a convolution lie in one."""
    return origin.sizes if len(dims) == len(origin.sizes) else (origin.rows,)


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


def _without_weight(call: TracedCall, weight: Tensor) -> Outcome:
    """Read all there is; say why nothing is known of the output."""
    learned = call.look(weight)
    own = call.module is not None and any(weight is other for other in call.module._parameters.values())
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
        units = _features(stream.labels, layer.into, _sizes(rows, layer.into))
        if units is None:
            unaccounted += unaccounted_reads(Flow((stream,)), *_readers(call))
        else:
            assert isinstance(stream.origin, Site)
            mine[stream.origin] = (*mine.get(stream.origin, ()), units)
    return (Read(rows, mine),), unaccounted


def _features(labels: Tensor, dims: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor | None:
    """Tell the unit of each feature; None where it differs between samples."""
    places = [dim % labels.ndim for dim in dims]
    alike = shrunk(labels, [dim for dim in range(labels.ndim) if dim not in places])
    return None if alike is None else alike.reshape([alike.shape[dim] for dim in places]).expand(sizes).flatten()


def _bias(call: TracedCall, layer: Layer) -> tuple[list[Stream], tuple[UnaccountedRead, ...]]:
    if not isinstance(layer.bias, Tensor):
        return [], ()
    flow = call.look(layer.bias)
    if flow.weight is None or layer.bias.ndim != 1:
        return [], unaccounted_reads(flow, *_readers(call))
    origin = Origin(flow.weight.name, "bias", (0,), flow.weight.shape)
    return [Stream(origin, numbered([origin.rows], layer.out[-1:], call.output.ndim))], ()


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
        dims = range(-tensor.ndim, 0) if call.name in LAST_NORMS else [1]
        own.append(Stream(origin, numbered(origin.sizes, dims, ndim)))
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
    return [Stream(origin, numbered([count], [dim], call.output.ndim))]


def _is_plain(module: nn.Module) -> bool:
    return str(inspect.unwrap(type(module).forward).__module__).startswith("torch.nn.modules.")
