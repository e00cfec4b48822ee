"""``python -m lightning_deadrelu audit`` and ``autopsy``: which units of a trained model are dead, and since when."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import platform
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_deadrelu.checkpoint import read_checkpoint
from lightning_deadrelu.explain.autopsy import autopsy
from lightning_deadrelu.observe.audit import find_dead_units
from lightning_deadrelu.render.names import listed
from lightning_deadrelu.repair.restore_activations import restore_activations
from lightning_deadrelu.report import RunReport, summary
from lightning_deadrelu.report.html_page import to_html
from lightning_deadrelu.report.json_export import to_json
from lightning_deadrelu.statistics import LivenessReport

_AUDIT_EPILOG = """
examples:
  python -m lightning_deadrelu audit my_package.nets:resnet --data my_package.data:validation --checkpoint last.ckpt
  python -m lightning_deadrelu audit train.py:Classifier --data train.py:held_out --fail-above 0.1 --html report.html

exit status: 0, or 1 with --fail-above if more is dead, or 2 if the audit cannot be made.
"""
_AUTOPSY_EPILOG = """
examples:
  python -m lightning_deadrelu autopsy last.ckpt --model my_package.nets:Classifier
  python -m lightning_deadrelu autopsy last.ckpt --model train.py:make_model --json dates.json

exit status: 0, or 2 if the checkpoint holds no optimizer's state, or that of another model.
"""
_STATES = (
    "optimizer_states",
    "optimizer_state_dict",
    "optimizer",
)  # where checkpoints have it; Lightning's comes first


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; by default what the process was given.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, TypeError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except Exception:  # of the model or its data; 1 is kept for --fail-above
        traceback.print_exc()
        return 2
    return status


def _run_audit(options: argparse.Namespace) -> int:
    report = audit(options)
    print(summary(RunReport(report)))
    _write(report, options)
    return int(options.fail_above is not None and report.dead_fraction > options.fail_above)


def _run_autopsy(options: argparse.Namespace) -> int:
    model = _model(options.model)
    checkpoint = read_checkpoint(
        options.checkpoint, str(options.checkpoint), "add `--trust`", weights_only=not options.trust
    )
    found = autopsy(model, _saved_optimizers(model, checkpoint, options.checkpoint))
    print(found)
    if options.json:
        _write_text(options.json, json.dumps(found.to_dict()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m lightning_deadrelu", description="Find dead ReLU units.")
    parser.add_argument("--version", action="version", version=_versions(), help="print versions, for a bug report")
    commands = parser.add_subparsers(required=True, metavar="audit|autopsy")
    _add_audit(commands)
    _add_autopsy(commands)
    return parser


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], says: str, epilog: str
) -> Callable[..., Any]:
    """Add a command, and return what adds arguments to it."""
    command = commands.add_parser(
        name,
        help=says,
        description=f"{says[0].upper()}{says[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    add: Callable[..., Any] = command.add_argument
    add("--trust", action="store_true", help="load a checkpoint that holds more than tensors, which may run any code")
    return add


def _add_autopsy(commands: Any) -> None:
    says = "say which units have had no gradient, and since when, from an optimizer's state, without data"
    add = _add_command(commands, "autopsy", _run_autopsy, says, _AUTOPSY_EPILOG)
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a Lightning checkpoint, or a file with an optimizer's state",
    )
    add("--model", required=True, metavar="MODEL_FACTORY", help="as for audit; best a LightningModule")
    add("--json", type=Path, metavar="FILE", help="write the dates here")


def _add_audit(commands: Any) -> None:
    add = _add_command(
        commands, "audit", _run_audit, "say which units of a trained model never fire on some data", _AUDIT_EPILOG
    )
    add(
        "model", metavar="MODEL_FACTORY", help="package.module:name or path/to/file.py:name; called, it makes the model"
    )
    add("--data", required=True, metavar="DATA_FACTORY", help="likewise; called, it makes an iterable of batches")
    add("--checkpoint", type=Path, metavar="FILE", help="a Lightning checkpoint, or a saved state dict")
    add("--mode", choices=["eval", "train"], default="eval", help="the mode the model is put in; default: eval")
    add("--device", default="cpu", help="such as cuda:0; default: cpu")
    add("--min-samples", type=int, default=299, metavar="N", help="silent for fewer is not dead; default: 299")
    add("--max-batches", type=int, metavar="N", help="use only the first N")
    add("--include", nargs="+", default=(), metavar="PATTERN", help="site names or kinds; default: all rectifiers")
    add("--exclude", nargs="+", default=(), metavar="PATTERN", help="site names or kinds to leave out")
    add("--json", type=Path, metavar="FILE", help="write the verdicts here")
    add("--html", type=Path, metavar="FILE", help="write a page here")
    add("--fail-above", type=_fraction, metavar="FRACTION", help="exit with 1 if a larger share is dead, 0 to 1")


def _versions() -> str:
    installed = (f"{name} {version(name)}" for name in ("lightning-deadrelu", "torch", "lightning"))
    return ", ".join([*installed, f"python {platform.python_version()}"])


def _fraction(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a fraction lies between 0 and 1. Try 0.1 for 10 %")
    return number


def audit(options: argparse.Namespace) -> LivenessReport:
    """Do what the options say.

    Raises:
        ValueError: If they cannot be followed.
    """
    device = _device(options.device)
    model, data = _model(options.model), _data(options.data)
    if options.checkpoint:
        _load(model, options.checkpoint, options.trust)
    else:
        print(f"note: no `--checkpoint`, so the weights are those that `{options.model}` makes.", file=sys.stderr)
    model.train(options.mode == "train").to(device)
    batches = itertools.islice(data, options.max_batches)
    return find_dead_units(
        model, batches, min_samples=options.min_samples, include=options.include, exclude=options.exclude
    )


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except Exception as error:  # which kinds there are depends on the device
        why = str(error).partition("\n")[0]
        raise ValueError(f"`--device {name}`: there is no such device here ({why}). Try `--device cpu`.") from error


def _write(report: LivenessReport, options: argparse.Namespace) -> None:
    for path, content in ((options.json, to_json), (options.html, to_html)):
        if path:
            _write_text(path, content(RunReport(report)))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# -- factories -------------------------------------------------------------------------------------------


def _model(spec: str) -> nn.Module:
    model = _made(spec, nn.Module)
    if not isinstance(model, nn.Module):
        raise ValueError(f"`{spec}` made a `{type(model).__name__}`, not a module. Name what returns an `nn.Module`.")
    return model


def _data(spec: str) -> Iterable[Any]:
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


# -- checkpoints -----------------------------------------------------------------------------------------


def _load(model: nn.Module, path: Path, trust: bool) -> None:
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


def _saved_optimizers(model: nn.Module, checkpoint: Mapping[str, Any], path: Path) -> list[Optimizer]:
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


if __name__ == "__main__":
    sys.exit(main())
