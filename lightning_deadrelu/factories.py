"""What names on the command line stand for: a model, or its data."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


def made_model(spec: str) -> nn.Module:
    """Make the model that ``package.module:name`` or ``path/to/file.py:name`` stands for.

    Raises:
        ValueError: If there is none.
    """
    model = _made(spec, nn.Module)
    if not isinstance(model, nn.Module):
        raise ValueError(f"`{spec}` made a `{type(model).__name__}`, not a module. Name what returns an `nn.Module`.")
    return model


def made_data(spec: str) -> Iterable[Any]:
    """Make the batches that a name stands for, likewise.

    Raises:
        ValueError: If there are none.
    """
    data = _made(spec, ())
    if not isinstance(data, Iterable):
        hint = "`train_dataloader` or `val_dataloader`" if hasattr(data, "train_dataloader") else "a `DataLoader`"
        raise ValueError(f"`--data {spec}` made a `{type(data).__name__}`, which has no batches. Return {hint}.")
    return data


def _made(spec: str, ready: type | tuple[()]) -> object:
    """Find what is named, and call it unless it is ready to use."""
    found = _found(spec)
    if isinstance(found, ready) or not callable(found):
        return found
    try:
        return found()
    except TypeError as error:
        raise ValueError(
            f"`{spec}` could not be called without arguments: {error}. Name a function that takes none, such as"
            " `def make(): return Net(width=64)`."
        ) from error


def _found(spec: str) -> object:
    place, colon, name = spec.rpartition(":")
    if not (place and colon and name):
        raise ValueError(f"`{spec}`: the name is missing. Try `{spec.rstrip(':')}:make_model`.")
    module = _module(place)
    try:
        return attrgetter(name)(module)
    except AttributeError as error:
        public = ", ".join(f"`{each}`" for each in vars(module) if callable(vars(module)[each]) and each[0] != "_")
        raise ValueError(
            f"`{spec}`: there is no `{name}` in `{place}`. It has {public or 'nothing to call'}."
        ) from error


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        return _file(Path(place))
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`{place}` cannot be imported: {error}. Run from the folder that holds it, install it, or give a file as"
            f" `{place.replace('.', '/')}.py:name`."
        ) from error


def _file(path: Path) -> ModuleType:
    """Run a file once, with its folder among those that are searched, as Python itself does."""
    path = path.resolve()
    loaded = [one for one in sys.modules.values() if getattr(one, "__file__", None) == str(path)]
    if loaded:
        return loaded[0]
    if not path.is_file():
        raise ValueError(f"`{path}`: there is no such file. Write the path from the folder you are in.")
    sys.path.insert(0, str(path.parent))
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_of_{path.parent.name}"  # as `random.py`
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
