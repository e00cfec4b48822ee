"""``python -m lightning_deadrelu audit`` and ``autopsy``: which units of a trained model are dead, and since when."""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightning_deadrelu.checkpoint import read_checkpoint
from lightning_deadrelu.explain.autopsy import autopsy
from lightning_deadrelu.factories import made_data, made_model
from lightning_deadrelu.observe.audit import find_dead_units
from lightning_deadrelu.report import RunReport, summary
from lightning_deadrelu.report.html_page import to_html
from lightning_deadrelu.report.json_export import to_json
from lightning_deadrelu.saved_model import load_weights, saved_optimizers
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
    model = made_model(options.model)
    checkpoint = read_checkpoint(
        options.checkpoint, str(options.checkpoint), "add `--trust`", weights_only=not options.trust
    )
    found = autopsy(model, saved_optimizers(model, checkpoint, options.checkpoint))
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
    model, data = made_model(options.model), made_data(options.data)
    if options.checkpoint:
        load_weights(model, options.checkpoint, options.trust)
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


if __name__ == "__main__":
    sys.exit(main())
