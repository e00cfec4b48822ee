"""Turn state into plain values that ``torch.load(weights_only=True)`` accepts, and back.

One codec serves every class that is saved: a dataclass or a named tuple says by its annotations what it holds.
"""

from __future__ import annotations

import dataclasses
import types
import zipfile
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

FORMAT = 10
"""The number of the layout of a saved monitor; states of another number are not read."""

_NARROWED = frozenset({"narrowed", "dtype"})
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch began up to 1.5


def encode(value: Any) -> Any:
    """Turn a value into tensors, numbers, strings, booleans, None, lists and dictionaries of these.

    Whole numbers in tensors are stored in the smallest type that holds them, on the CPU. Fields of a dataclass that
    its constructor does not take (``init=False``) are left out. A mapping of other than numbers and strings becomes a
    list of pairs.

    Raises:
        TypeError: If something in it is none of these.

    Example:
        >>> @dataclasses.dataclass
        ... class Window:
        ...     steps: list[int]
        ...     counts: Tensor
        >>> encode(Window([3, 4], torch.tensor([1.5])))
        {'steps': [3, 4], 'counts': tensor([1.5000])}
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Tensor):
        return _encoded_tensor(value.detach())
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if _has_fields(type(value)):
        return {name: encode(getattr(value, name)) for name in _fields_of(type(value))}
    if isinstance(value, Mapping):
        plainly = all(isinstance(key, (int, str)) for key in value)
        pairs = [(encode(key), encode(item)) for key, item in value.items()]
        return dict(pairs) if plainly else pairs
    if isinstance(value, (set, frozenset)):
        return [encode(item) for item in sorted(value)]
    if isinstance(value, (Sequence, deque)):
        return [encode(item) for item in value]
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}; make it a dataclass of plain values")


def decode(kind: Any, plain: Any) -> Any:
    """Rebuild a value of a known type from what :func:`encode` returned.

    Fields that were not saved, by an older version say, take their defaults; what is saved and unknown is ignored.

    Example:
        >>> decode(dict[str, tuple[int, ...]], {"act": [1, 2]})
        {'act': (1, 2)}
    """
    origin: Any = get_origin(kind) or kind
    if origin in (Union, types.UnionType):
        return _decoded_union(get_args(kind), plain)
    if isinstance(origin, type):
        if issubclass(origin, Tensor):
            return _decoded_tensor(plain)
        if _has_fields(origin):
            hints = _fields_of(origin)
            return origin(**{name: decode(hint, plain[name]) for name, hint in hints.items() if name in plain})
        if issubclass(origin, (str, bool, int, float)):
            return origin(plain)
        if issubclass(origin, (Mapping, Sequence, set, frozenset, deque)):
            return _decoded_collection(origin, get_args(kind), plain)
    return _decoded_plain(plain)  # `Any`


def _encoded_tensor(value: Tensor) -> Any:
    narrow = narrowed(value.cpu())
    if narrow.dtype == value.dtype:
        return narrow
    return {"narrowed": narrow, "dtype": str(value.dtype).removeprefix("torch.")}


def _decoded_tensor(plain: Any) -> Any:
    if isinstance(plain, Mapping) and plain.keys() == _NARROWED:
        return plain["narrowed"].to(getattr(torch, plain["dtype"]))
    return plain.clone() if isinstance(plain, Tensor) else plain  # what is decoded goes on being written to


def _decoded_plain(plain: Any) -> Any:
    """Give tensors their types back in what is of no known type."""
    if isinstance(plain, Mapping):
        decoded = _decoded_tensor(plain)
        return decoded if isinstance(decoded, Tensor) else {key: _decoded_plain(one) for key, one in plain.items()}
    return [_decoded_plain(one) for one in plain] if isinstance(plain, (list, tuple)) else plain


def narrowed(numbers: Tensor) -> Tensor:
    """Copy whole numbers into the smallest type that holds them all; other types stay what they are.

    Example:
        >>> narrowed(torch.tensor([-1, 300]))
        tensor([ -1, 300], dtype=torch.int16)
    """
    if numbers.dtype == torch.bool or numbers.is_floating_point() or not numbers.numel():
        return numbers.clone()
    low, high = map(int, numbers.aminmax())
    limits = ((dtype, torch.iinfo(dtype)) for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32))
    return numbers.to(next((dtype for dtype, it in limits if it.min <= low and high <= it.max), torch.int64), copy=True)


def _decoded_union(kinds: Sequence[Any], plain: Any) -> Any:
    if plain is None:
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    return decode(kinds[0], plain) if len(kinds) == 1 else plain


def _decoded_collection(origin: type, kinds: Sequence[Any], plain: Any) -> Any:
    if issubclass(origin, Mapping):
        key, item = kinds or (Any, Any)
        pairs = plain.items() if isinstance(plain, Mapping) else plain
        return {decode(key, name): decode(item, value) for name, value in pairs}
    if issubclass(origin, tuple):
        kinds = [kinds[0]] * len(plain) if len(kinds) == 2 and kinds[1] is ... else kinds or [Any] * len(plain)
        return tuple(decode(kind, item) for kind, item in zip(kinds, plain, strict=True))
    items = [decode(kinds[0] if kinds else Any, item) for item in plain]
    concrete = origin if issubclass(origin, (set, frozenset, deque)) else list
    return concrete(items)


def _has_fields(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields"))


def _fields_of(kind: Any) -> dict[str, Any]:
    """List what a class saves, with the annotation of each."""
    hints = get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return {name: hints[name] for name in kind._fields}


# -- files -----------------------------------------------------------------------------------------------


def read_checkpoint(
    path: str | PathLike[str], written: str, trust: str, *, weights_only: bool = True
) -> Mapping[str, Any]:
    """Read a file that ``torch.save`` or a Trainer wrote.

    Args:
        path: Of the file.
        written: What the user wrote, for the messages, such as ``"--checkpoint last.ckpt"``.
        trust: The edit that says that the file is trusted.
        weights_only: As of ``torch.load``; False for a trusted file, which then may run any code.

    Raises:
        ValueError: If it cannot be read, or holds something else.
    """
    if reason := _no_checkpoint(Path(path)):
        raise ValueError(f"`{written}`: {reason}. Give a file that `torch.save` or `trainer.save_checkpoint` wrote.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        if weights_only and isinstance(error, UnpicklingError):
            why = f"it holds more than tensors and plain values. If you trust where it comes from, {trust}"
        else:
            why = f"torch cannot read it ({type(error).__name__}: {str(error).partition(chr(10))[0]}). Save it anew"
        raise ValueError(f"`{written}`: {why}.") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"`{written}`: it holds a `{type(loaded).__name__}`. Save `model.state_dict()`.")
    return loaded


def _no_checkpoint(path: Path) -> str:
    """Say why torch cannot have written a file; empty if it can."""
    if not path.is_file():
        return "it is a folder" if path.is_dir() else "there is no such file"
    if not path.stat().st_size:
        return "the file is empty"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            whole = any(name.endswith("data.pkl") for name in archive.namelist())
    else:
        with path.open("rb") as file:
            whole = file.read(len(_BEFORE_ZIP)) == _BEFORE_ZIP
    return "" if whole else "it is no checkpoint, or only the beginning of one"
