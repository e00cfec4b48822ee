"""What counts as a rectifier, and which of its calls share one site. Pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")


class Rectifier(NamedTuple):
    """One kind of activation.

    Args:
        kind: Its name in lower case, such as ``"relu"``.
        hinge: Inputs at or below it do not fire. Between hinge and cap the unit passes gradient.
        cap: Inputs at or above it are clipped; infinity for none.
        smooth: True where no input is exactly dead (GELU, ELU, ...): only dormancy is judged.
        fused: True where the input is out of sight and the output has to stand in for it.
        plain: True where the output is ``max(input, 0)``, at most clipped: its sign tells who fired.
    """

    kind: str
    hinge: float = 0.0
    cap: float = math.inf
    smooth: bool = False
    fused: bool = False
    plain: bool = False


_RELU = Rectifier("relu", plain=True)
_MODULES: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardtanh, nn.Hardswish, nn.RReLU)
_MODULES += (nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus)

Arguments = Mapping[str, Any]


def _argument(args: Sequence[Any], kwargs: Arguments, place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _hardtanh(args: Sequence[Any], kwargs: Arguments) -> Rectifier | None:
    low, high = _argument(args, kwargs, 1, "min_val", -1.0), _argument(args, kwargs, 2, "max_val", 1.0)
    if low != 0:
        return None
    return Rectifier("relu6" if high == 6 else "hardtanh", cap=float(high), plain=True)


def _threshold(args: Sequence[Any], kwargs: Arguments) -> Rectifier:
    hinge, value = _argument(args, kwargs, 1, "threshold", 0.0), _argument(args, kwargs, 2, "value", 0.0)
    return Rectifier("threshold", hinge=float(hinge), plain=hinge == value == 0)


def _clamp(args: Sequence[Any], kwargs: Arguments) -> Rectifier | None:
    low, high = _argument(args, kwargs, 1, "min", None), _argument(args, kwargs, 2, "max", None)
    if isinstance(low, Tensor) or low != 0 or high is not None:  # with both bounds it limits a range
        return None
    return Rectifier("clamp", plain=True)


def _leaky_relu(args: Sequence[Any], kwargs: Arguments) -> Rectifier:
    slope = _argument(args, kwargs, 1, "negative_slope", 0.01)
    return _RELU if slope == 0 else Rectifier("leaky_relu", smooth=True)


def _maximum(args: Sequence[Any], kwargs: Arguments, is_zero: Callable[[Any], bool]) -> Rectifier | None:
    pair = _argument(args, kwargs, 0, "input", None), _argument(args, kwargs, 1, "other", None)
    both = all(isinstance(value, Tensor) for value in pair)  # one alone is reduced
    return Rectifier("maximum", plain=True) if both and any(map(is_zero, pair)) else None


def _always(rectifier: Rectifier) -> Callable[[Sequence[Any], Arguments], Rectifier]:
    return lambda args, kwargs: rectifier


def _smooth(name: str) -> Callable[[Sequence[Any], Arguments], Rectifier]:
    return _always(Rectifier(name, smooth=True))


_RULES: dict[str, Callable[[Sequence[Any], Arguments], Rectifier | None]] = {
    "relu": _always(_RELU),
    "relu6": _always(Rectifier("relu6", cap=6.0, plain=True)),
    "hardtanh": _hardtanh,
    "threshold": _threshold,
    "_threshold": _threshold,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "hardswish": _always(Rectifier("hardswish", hinge=-3.0)),
    "rnn_relu": _always(Rectifier("rnn_relu", fused=True, plain=True)),
    "rnn_relu_cell": _always(Rectifier("rnn_relu", fused=True, plain=True)),
    "leaky_relu": _leaky_relu,
    **{name: _smooth(name) for name in ("prelu", "rrelu", "gelu", "silu", "mish", "elu", "celu", "selu", "softplus")},
}
_MAXIMA = frozenset({"maximum", "max", "fmax"})


def rectifier_of(
    name: str, args: Sequence[Any], kwargs: Arguments, is_zero: Callable[[Any], bool] = lambda value: False
) -> Rectifier | None:
    """Tell which rectifier a call of a torch function is, if any.

    Args:
        name: The function's ``__name__``; a trailing underscore (in place) does not matter.
        args: Its positional arguments, the tensor first.
        kwargs: Its keyword arguments.
        is_zero: Tells whether a tensor is known to hold nothing but zeros, for ``maximum(x, zeros)``.

    Returns:
        The rectifier, or None for any other function.

    Example:
        >>> import torch
        >>> rectifier_of("relu_", (torch.zeros(3),), {}).kind
        'relu'
        >>> rectifier_of("clamp", (torch.zeros(3),), {"min": 0, "max": 1}) is None
        True
    """
    if name in _MAXIMA:
        return _maximum(args, kwargs, is_zero)
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    return rule(args, kwargs) if rule else None


def is_rectifier_module(module: nn.Module) -> bool:
    """Tell whether a module stands for one activation, so that its path names the site.

    Example:
        >>> is_rectifier_module(nn.ReLU()), is_rectifier_module(nn.Linear(2, 2))
        (True, False)
    """
    return isinstance(module, _MODULES)


def clean(path: str) -> str:
    """Strip the prefixes that ``torch.compile``, FSDP and checkpoint wrappers put into a module path.

    Example:
        >>> clean("_orig_mod.layer1._checkpoint_wrapped_module.conv")
        'layer1.conv'
    """
    return _WRAPPERS.sub("", path).rstrip(".")


class Site(NamedTuple):
    """What makes a site itself: two calls with equal fields are one site.

    Args:
        owner: Path of the module whose forward made the call; for an activation module, its own path.
        functional: True where the call was ``F.relu`` and the like, False where it came from a module.
        kind: As :class:`Rectifier` names it.
        source: The producers' parameter names, then what tells apart calls on the same producers (``/1``: a slice
            of their output, ``-``: negated, ``+1``: behind another rectifier); or the number of the call within
            the owner's forward.
        units: How many units the site has.
        smooth: True where only dormancy is judged.
        cap: As in :class:`Rectifier`.
        traced: True if ``source`` names parameters.
    """

    owner: str
    functional: bool
    kind: str
    source: tuple[str, ...]
    units: int
    smooth: bool = False
    cap: float = math.inf
    traced: bool = True


def base_name(owner: str, functional: bool, kind: str) -> str:
    """Name what made a call, before further sites of one module are told apart.

    Example:
        >>> base_name("block", True, "relu"), base_name("block.act", False, "relu"), base_name("", True, "relu")
        ('block-relu', 'block.act', 'relu')
    """
    path = re.sub(r"[^\w.-]", "_", owner)
    if not functional:
        return path or kind
    return f"{path}-{kind}" if path else kind


def names_of(sites: Iterable[Site]) -> list[str]:
    """Name sites in their order: the module's path, then ``-1``, ``-2`` for further sites of the module.

    Example:
        >>> block = Site("block.relu", False, "relu", ("block.conv1.weight",), 8)
        >>> names_of([block, block._replace(source=("block.conv2.weight",))])
        ['block.relu', 'block.relu-1']
        >>> names_of([Site("block", True, "relu", ("block.fc.weight",), 8)])
        ['block-relu']
    """
    seen: Counter[str] = Counter()
    taken: set[str] = set()
    names = []
    for site in sites:
        base = base_name(site.owner, site.functional, site.kind)
        name = f"{base}-{seen[base]}" if seen[base] else base
        while name in taken:
            seen[base] += 1
            name = f"{base}-{seen[base]}"
        seen[base] += 1
        taken.add(name)
        names.append(name)
    return names


def is_selected(name: str, kind: str, smooth: bool, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Apply ``include`` and ``exclude``: shell patterns over site names, or kinds in full.

    A smooth activation is selected by its kind only, because nothing about it can be exactly dead.

    Example:
        >>> is_selected("encoder.act", "relu", False, ["encoder.*"], [])
        True
        >>> is_selected("encoder.act", "gelu", True, ["encoder.*"], [])
        False
        >>> is_selected("encoder.act", "gelu", True, ["encoder.*", "gelu"], [])
        True
    """
    if _matches(name, kind, exclude):
        return False
    if smooth:
        return kind in include
    names = [pattern for pattern in include if pattern not in _SMOOTH_KINDS]
    return not names or _matches(name, kind, names)


_SMOOTH_KINDS = frozenset(name for name, rule in _RULES.items() if (found := rule((), {})) and found.smooth)


def matches(name: str, pattern: str) -> bool:
    """Hold a pattern against a site's name; what a module's own forward calls is inside the module.

    Example:
        >>> matches("encoder.act", "encoder.*"), matches("encoder-relu", "encoder.*"), matches("head", "encoder.*")
        (True, True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name.replace("-", "."), pattern)


def _matches(name: str, kind: str, patterns: Sequence[str]) -> bool:
    return any(kind == pattern or matches(name, pattern) for pattern in patterns)


def unmatched(patterns: Sequence[str], names: Sequence[str], kinds: Iterable[str]) -> list[str]:
    """List the patterns that match neither a site's name nor its kind.

    Example:
        >>> unmatched(["encodr.*", "relu"], ["encoder.act"], ["relu"])
        ['encodr.*']
    """
    known = set(kinds)
    return [p for p in patterns if p not in known and not any(matches(name, p) for name in names)]


def guess_dims(ndim: int) -> tuple[int, ...]:
    """Guess the unit dimension where no producer tells it: 1 from four dimensions on, else the last.

    Example:
        >>> guess_dims(4), guess_dims(2)
        ((-3,), (-1,))
    """
    return (1 - ndim,) if ndim >= 4 else (-1,)


def count_units(x: Tensor, dims: tuple[int, ...]) -> int:
    """Multiply the sizes of the unit dimensions.

    Example:
        >>> import torch
        >>> count_units(torch.zeros(2, 8, 5, 5), (-3,))
        8
    """
    return math.prod(x.shape[dim] for dim in dims)
