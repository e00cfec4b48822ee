"""The examples run as a user would run them, each logger in turn."""

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LEFT_BEHIND = {"wandb": "wandb/offline-run-*/*.wandb", "tensorboard": "**/events.out.*", "csv": "**/metrics.csv"}
LEFT_BEHIND |= {"mlflow": "mlflow.db", "none": "dead_relu.png"}


def run(example: str, out: Path, *options: str) -> str:
    command = [sys.executable, EXAMPLES / example, "--out", str(out), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def watch(out: Path, *options: str) -> str:
    return run("01_watch.py", out, *options)


@pytest.mark.slow
@pytest.mark.parametrize("logger", LEFT_BEHIND)
def test_watch(logger, tmp_path):
    printed = watch(tmp_path, "--epochs", "1", "--logger", logger)
    assert "units are dead" in printed
    assert "net.relu4" in printed
    assert list(tmp_path.glob(LEFT_BEHIND[logger]))
    assert (tmp_path / "dead_relu.png").stat().st_size > 5000
    assert ("wandb sync" in printed) == (logger == "wandb")


@pytest.mark.slow
def test_a_high_learning_rate_kills_more(tmp_path):
    def dead(lr: str) -> float:
        printed = watch(tmp_path, "--lr", lr, "--epochs", "6", "--logger", "none")
        row = next(line for line in printed.splitlines() if line.startswith("net.relu1"))
        assert "gradient_spike" not in printed  # which is what follows from a rate that is too high
        assert ("high_learning_rate (likely)" in printed) == (lr == "0.15")
        return float(row.split()[4].removesuffix("%"))

    assert dead("0.02") < 15 < dead("0.15")


@pytest.mark.slow
def test_other_data(tmp_path):
    random = np.random.default_rng(0)
    for name, values in (
        ("train-images-idx3-ubyte.gz", random.integers(0, 256, (600, 28, 28), np.uint8)),
        ("train-labels-idx1-ubyte", random.integers(0, 10, 600, np.uint8)),
    ):
        head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
        data = head + values.tobytes()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    printed = watch(tmp_path, "--data", str(tmp_path), "--epochs", "1", "--logger", "none")
    assert re.search(r"\d+ of 512 units (is|are) dead|None of 512 units is dead", printed)


@pytest.mark.slow
def test_repair(tmp_path):
    printed = run("02_repair.py", tmp_path, "--steps", "400", "--remedy", "reset", "leaky")
    assert "Reset repaired `net.relu2`" in printed
    assert "Reset revived `net.relu2`" in printed
    assert len(list(tmp_path.glob(LEFT_BEHIND["wandb"]))) == 2
    assert (tmp_path / "repair.png").stat().st_size > 5000


@pytest.mark.slow
def test_ray(tmp_path):
    """By hand: ``pip install -c constraints.txt ".[examples,ray]" pytest && pytest tests/promises -k test_ray``."""
    pytest.importorskip("ray", reason="ray is large, and not among the tests' packages")
    printed = run("03_ray.py", tmp_path)
    assert "net.relu3" in printed
    key = re.search(r"dead_fraction'\] is (0\.\d+)", printed)
    dead = re.search(r"A single process finds the same (\d+) units dead", printed)
    assert float(key[1]) == pytest.approx(int(dead[1]) / 192, abs=1e-4)
    assert int(dead[1]) > 5


@pytest.mark.slow
def test_plain_loop(tmp_path):
    printed = run("04_plain_loop.py", tmp_path, "--remedy", "reset")
    assert "128 units" in printed
    assert re.search(r"step \d+: Reset revived `1`", printed)
    assert list(tmp_path.glob(LEFT_BEHIND["wandb"]))


@pytest.mark.slow
def test_fabric(tmp_path):
    assert re.search(r"step \d+: Reset revived `1`", run("05_fabric.py", tmp_path))


def rows_of(printed: str, start: str) -> list[list[float]]:
    lines = [line.removeprefix(start).split() for line in printed.splitlines() if line.startswith(start)]
    return [[float(cell.rstrip("%")) for cell in cells] for cells in lines]


@pytest.mark.slow
def test_experts(tmp_path):
    printed = run("06_experts.py", tmp_path)
    (_, alone, _, _), (_, balanced, perplexity, _) = (rows_of(printed, f"balance x {x}")[-1] for x in (0.0, 0.1))
    assert balanced < alone
    assert perplexity > 2


@pytest.mark.slow
def test_codes(tmp_path):
    printed = run("07_codes.py", tmp_path)
    alone, anew = (rows_of(printed, start)[-1] for start in ("left alone", "drawn anew"))
    assert alone[1] > 40
    assert anew[1] < 10
    assert anew[3] > 20


@pytest.mark.slow
def test_sparse_autoencoder(tmp_path):
    printed = run("08_sparse_autoencoder.py", tmp_path)
    assert "Reset refused `topk`: a unit that is chosen takes the place of another" in printed
    dead = {arm: rows_of(printed, arm.ljust(14))[-1][0] for arm in ("killed", "killed, auto")}
    assert dead["killed"] > 60
    assert dead["killed, auto"] < dead["killed"] / 2
    assert len(list(tmp_path.glob(LEFT_BEHIND["wandb"]))) == 3


@pytest.mark.slow
def test_dqn(tmp_path):
    """By hand: ``pip install gymnasium && pytest -m slow tests/promises/test_examples.py -k dqn``."""
    pytest.importorskip("gymnasium", reason="gymnasium is not among the tests' packages")
    printed = run("09_dqn.py", tmp_path, "--steps", "1500", "--replay-ratio", "4", "--arms", "no remedy", "auto")
    alone, auto = (rows_of(printed, arm)[-1] for arm in ("no remedy", "auto"))
    assert alone[1] > 10
    assert auto[2] > 0
