"""What a call of a torch function is, in which families functions fall, and which tensors are known.

The vocabulary of all tracing: which site a call is (``observe``), and which rows feed it (``attribution``). A new
function of torch is added here, to the families it belongs to.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, TypeVar

from torch import Tensor

# -- names -----------------------------------------------------------------------------------------------

_PLAIN = {"iadd": "add", "radd": "add", "isub": "sub", "subtract": "sub", "imul": "mul", "rmul": "mul"}
_PLAIN |= {"multiply": "mul", "truediv": "div", "itruediv": "div", "idiv": "div", "divide": "div", "true_divide": "div"}
_PLAIN |= {"rtruediv": "rdiv", "imatmul": "matmul", "negative": "neg"}
_FLAGS = frozenset({"requires_grad_", "detach_"})  # they change what autograd knows of a tensor, and nothing in it
_IN_PLACE = frozenset(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "div", "pow", "mod"))

IGNORED = frozenset({"shape", "dtype", "device", "dim", "size", "ndim", "is_cuda", "requires_grad", "grad_fn", "numel"})
IGNORED |= {"is_leaf", "layout", "stride", "_set_grad_enabled", "is_floating_point", "data_ptr", "is_contiguous"}
IGNORED |= {"backward", "grad", "names", "_base"}  # the last FSDP2 asks for, and it is known by itself
"""What is asked for all the time, and never gives a tensor that matters."""


def function_name(func: Callable[..., Any]) -> str:
    """Name a torch function; ``x.T`` and its kin arrive as getters and go by their attribute's name.

    Example:
        >>> import torch
        >>> function_name(torch.nn.functional.relu), function_name(Tensor.T.__get__)
        ('relu', 'T')
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", ""))
    return str(name)


@lru_cache(maxsize=1024)
def plain_name(name: str) -> str:
    """Name a function without its forms: in place, as an operator, reflected.

    Example:
        >>> plain_name("add_"), plain_name("__iadd__"), plain_name("_max_pool2d"), plain_name("T")
        ('add', 'add', 'max_pool2d', 'T')
    """
    bare = name.strip("_")
    return _PLAIN.get(bare, bare)


def writes_in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a function, by its full name, changes a tensor that it is given.

    Example:
        >>> writes_in_place("add_", {}), writes_in_place("__iadd__", {}), writes_in_place("__add__", {})
        (True, True, False)
    """
    plainly = name.endswith("_") and not name.endswith("__") and name not in _FLAGS
    return plainly or name == "__setitem__" or name in _IN_PLACE or kwargs.get("out") is not None


# -- families, by plain names ----------------------------------------------------------------------------

IDENTITIES = frozenset({"clone", "contiguous", "detach", "data", "to", "type", "type_as", "float", "half", "double"})
IDENTITIES |= {"bfloat16", "cpu", "cuda", "requires_grad", "alias", "positive", "real", "as_subclass"}
DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "native_dropout"})
RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"})
RESHAPES |= {"ravel", "unsafe_view"}
TRANSPOSES = frozenset({"T", "mT", "H", "mH"})
"""Attributes that permute dimensions."""
PERMUTES = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint"})
PERMUTES |= TRANSPOSES
SPLITS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"})
EXPANDS = frozenset({"expand", "expand_as", "broadcast_to"})
SHUFFLES = frozenset({"pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"})
JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
RESIZES = frozenset({"interpolate", "upsample", "upsample_nearest", "upsample_bilinear"})
REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "max", "min", "median", "nanmean", "nansum"})
SPREADS = frozenset({"std", "var", "std_mean", "var_mean"})
ALONG = frozenset({"index_select", "cumsum", "sort", "cummax", "topk"})
"""Functions that take or order elements along one dimension."""
ABOVE = frozenset({"gt", "ge", "greater", "greater_equal"})
BELOW = frozenset({"lt", "le", "less", "less_equal"})
CHOICES = ABOVE | BELOW | {"topk"}
"""Functions that tell which elements are large."""
GATHERS = frozenset({"getitem", "index_select", "gather", "take_along_dim"})
POOL = re.compile(r"(?:adaptive_)?(?:avg|max|lp)_pool([123])d(?:_with_indices)?$")

LAYERS = frozenset({"linear", "bilinear", "embedding", "embedding_bag", "multi_head_attention_forward"})
PRODUCTS = frozenset({"matmul", "mm", "mv", "rmatmul", "bmm", "einsum", "addmm"})
"""Functions that may multiply activations with a weight."""
CONTRACTIONS = LAYERS | PRODUCTS | {"inner", "addbmm", "baddbmm", "addmv"}
CONTRACTIONS |= {"tensordot", "scaled_dot_product_attention", "flex_attention", "scaled_mm", "grouped_mm", "sparse_mm"}
CONTRACTIONS |= {f"{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")}
ATTENTIONS = frozenset({"scaled_dot_product_attention", "flex_attention"})
ACTIVATION_PRODUCTS = (PRODUCTS - {"addmm"}) | {"sparse_mm", "scaled_dot_product_attention"}
"""Functions that may multiply activations with one another."""
SCATTERS = frozenset({"scatter", "scatter_add", "scatter_reduce", "index_add", "index_reduce", "index_copy"})
"""Functions that gather samples where an index tells."""
CONVOLUTIONS = {f"conv{kind}{n}d": n for kind in ("", "_transpose") for n in (1, 2, 3)}
"""Each with its number of positions."""
ANY_CONVOLUTION = frozenset(CONVOLUTIONS) | {"convolution"}

BATCH_NORMS = frozenset({"batch_norm", "instance_norm"})
LAST_NORMS = frozenset({"layer_norm", "rms_norm"})
CHANNEL_NORMS = BATCH_NORMS | {"group_norm"}
MIXING_NORMS = LAST_NORMS | {"group_norm"}
"""Norms whose statistics are over several units."""
NORMS = CHANNEL_NORMS | LAST_NORMS

SUMS = frozenset({"add", "sub", "rsub"})
NEGATIONS = frozenset({"neg", "rsub"})
ZERO_TO_ZERO = frozenset({"relu", "relu6", "leaky_relu", "hardswish", "gelu", "silu", "mish", "elu", "celu", "selu"})
ZERO_TO_ZERO |= {"abs", "square", "sqrt", "tanh", "sin", "expm1", "log1p", "erf", "softsign", "sign", "nan_to_num"}
ZERO_TO_ZERO |= {"asinh", "atan", "sinh", "round", "floor", "ceil", "trunc", "hardshrink", "softshrink", "tanhshrink"}
"""Functions of each element that leave zero alone."""
ZERO_TO_SOMETHING = frozenset({"rsqrt", "reciprocal", "exp", "sigmoid", "log", "softplus", "cos", "erfc", "logsigmoid"})
ELEMENTWISE = ZERO_TO_ZERO | ZERO_TO_SOMETHING | {"pow", "clamp", "hardtanh", "masked_fill", "where"}
"""Functions of which each element depends on one of a tensor's."""
LIKES = frozenset({"ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"})
LIKES |= {"new_ones", "new_full", "new_empty"}
"""Functions that ask their first argument for its form alone."""
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})


# -- calls -----------------------------------------------------------------------------------------------


def tensors_in(args: Iterable[Any]) -> list[Tensor]:
    """List the tensors among arguments, and in the lists and tuples among them.

    Example:
        >>> import torch
        >>> len(tensors_in([torch.zeros(1), 2, [torch.zeros(1)]]))
        2
    """
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found += [item for item in arg if isinstance(item, Tensor)]
    return found


@dataclass(slots=True)  # not frozen: one is made for each call of the model, and that would double its cost
class Call:
    """One call of a torch function.

    Args:
        name: The function's plain name.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: The tensors it returned.
        place: Which of these is looked at.
    """

    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    outputs: Sequence[Tensor]
    place: int = 0
    operands: list[Tensor] = field(init=False)
    """The tensors among the arguments."""

    def __post_init__(self) -> None:
        self.operands = tensors_in((*self.args, *self.kwargs.values()) if self.kwargs else self.args)

    @property
    def output(self) -> Tensor:
        """The tensor looked at among those it returned."""
        return self.outputs[self.place]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Find an argument by place or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


def may_make_zeros(name: str) -> bool:
    """Tell whether there are arguments for which a function, by its plain name, returns nothing but zeros."""
    return name in _ZEROS or name == "tensor"


def makes_zeros(name: str, args: Sequence[Any]) -> bool:
    """Tell whether a function, by its plain name, returns nothing but zeros."""
    if name != "tensor":
        return name in _ZEROS
    return bool(args) and isinstance(args[0], (int, float)) and args[0] == 0


def dimension_runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pair the shortest runs of dimensions of equal product, as a reshape maps them.

    Example:
        >>> dimension_runs((2, 3, 4), (6, 4))
        [([0, 1], [0]), ([2], [1])]
    """
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        sources: list[int] = []
        targets: list[int] = []
        left = right = 1
        while (i < len(old) or j < len(new)) and not (sources and targets and left == right):
            if (left <= right and i < len(old)) or j >= len(new):
                sources.append(i)
                left, i = left * old[i], i + 1
            else:
                targets.append(j)
                right, j = right * new[j], j + 1
        runs.append((sources, targets))
    return runs


# -- tensors ---------------------------------------------------------------------------------------------

Known = TypeVar("Known")


def version_of(tensor: Tensor) -> int:
    """Count the changes made to a tensor in place; -1 for an inference tensor, which does not count them."""
    return -1 if tensor.is_inference() else tensor._version


def node_number(node: Any) -> int:
    """Number a node of autograd's graph; its Python object may be another each time it is asked for."""
    return int(node._sequence_nr())


class TensorTable(Generic[Known]):
    """What is known of tensors, for as long as each is alive.

    Args:
        versions: Whether to note how often each was written to, for :meth:`writes_to`.

    Example:
        >>> import torch
        >>> x, table = torch.ones(2), TensorTable[str]()
        >>> table.put(x, "ones")
        >>> table.get(x), table.get(torch.ones(2)), table.writes_to(x.zero_())
        ('ones', None, 1)
    """

    def __init__(self, versions: bool = True) -> None:
        self._versions = versions
        self._entries: dict[int, tuple[weakref.ref[Tensor], int, Known]] = {}

    def put(self, tensor: Tensor, known: Known) -> None:
        """Say what is known of a tensor as it is now."""
        self._entries[id(tensor)] = weakref.ref(tensor), version_of(tensor) if self._versions else -1, known

    def get(self, tensor: Tensor) -> Known | None:
        """Return what was said of a tensor."""
        entry = self._entries.get(id(tensor))
        return entry[2] if entry is not None and entry[0]() is tensor else None

    def writes_to(self, tensor: Tensor) -> int:
        """Count how often a tensor of the table was written to since it was put there."""
        return version_of(tensor) - self._entries[id(tensor)][1]

    def __bool__(self) -> bool:
        return bool(self._entries)

    def clear(self) -> None:
        """Forget all tensors."""
        self._entries.clear()


@contextmanager
def quietly() -> Iterator[None]:
    """Repeat one of the model's calls without the warnings that the model has had already.

    Put in by hand, because the official way would let every warning of the program show once more.

    Example:
        >>> with quietly():
        ...     warnings.warn("said before")
    """
    silence: Any = ("ignore", None, Warning, None, 0)
    warnings.filters.insert(0, silence)
    try:
        yield
    finally:
        warnings.filters.remove(silence)
