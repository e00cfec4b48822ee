"""Try the monitor in other people's libraries, and print what came of it as a table in Markdown.

    python -m venv libraries && . libraries/bin/activate
    pip install -e . -r tests/libraries/requirements.txt
    PYTHONPATH=tests python -m libraries.run [NAME ...] [--json FOLDER]

Each library trains a small model of its own on generated data for 60 batches, in a process of its own and each time
from the same seed: unwatched and watched (bit-identical, quiet); with a quarter of a layer's units planted dead,
unwatched under a recorder of the dispatcher and watched (bit-identical, exact); and with the same units planted under
each remedy (repaired). What is wrong is said beside the number of units.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from libraries.harness import Library, examine
from libraries.zoo import LIBRARIES

COLUMNS = ("library", "model", "units in layers", "`reset` repaired", "`auto` repaired", "layers it warns of")
TESTS = Path(__file__).resolve().parents[1]
PATIENCE = 900
"""Seconds for one library."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of libraries; all by default")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="also keep all that was found, a file for each")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(examine(_named(options.alone))))
        return
    _row(COLUMNS)
    _row(["---"] * len(COLUMNS))
    for name in options.names or [library.package for library in LIBRARIES]:
        found = _alone(name)
        _row(cells(_named(name), found))
        if options.json:
            options.json.mkdir(parents=True, exist_ok=True)
            (options.json / f"{name}.json").write_text(json.dumps(found, indent=1))


def _named(name: str) -> Library:
    known = {library.package: library for library in LIBRARIES}
    if name not in known:
        raise SystemExit(f"`{name}` is not among the libraries that are tried. Known: {', '.join(known)}.")
    return known[name]


def _alone(name: str) -> dict[str, Any]:
    """Try one library in a process of its own: what goes wrong in one stays there."""
    command = [sys.executable, "-m", "libraries.run", "--alone", name]
    paths = f"{TESTS}{os.pathsep}{TESTS.parent}"
    around = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": paths}
    try:
        with TemporaryDirectory() as folder:  # some leave files where they run
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=around, cwd=folder)
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {PATIENCE} s"}
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"error": done.stderr[-3000:]}


def cells(library: Library, found: dict[str, Any]) -> list[str]:
    """Put what was found in words.

    Args:
        library: What was tried.
        found: The fields of a ``Row``; or ``error``, why there are none.
    """
    head = [f"{library.package} {version(library.package)}", library.model]
    if "error" in found:
        return [*head, f"no: {found['error'].strip().splitlines()[-1]}", *[""] * (len(COLUMNS) - 3)]
    units = f"{sum(found['sites'].values())} in {len(found['sites'])}"
    watched = "; ".join([units, *found["broken"], *_counted(found)])
    repaired = [f"{found['fire_again'][remedy]} of {found['died']}" for remedy in ("reset", "auto")]
    return [*head, watched, *repaired, str(len(found["crossed"]) or "")]


def _counted(found: dict[str, Any]) -> list[str]:
    """Say what is not as it is to be: verdicts exact, training bit-identical, and no warnings but of what dies."""
    wrong = {"masks inexact": "inexact", "tensors not bit-identical": "other_weights", "warnings too many": "loud"}
    return [f"{len(found[key])} {what}" for what, key in wrong.items() if found[key]]


def _row(row: Any) -> None:
    print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
