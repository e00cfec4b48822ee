"""Each script in examples/causes kills what it says it kills, and its cure keeps that alive."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

CAUSES = Path(__file__).parents[2] / "examples" / "causes"
SCRIPTS = sorted(path.stem for path in CAUSES.glob("*.py") if path.stem != "common")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.syspath_prepend(CAUSES)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(script: str, *options: str) -> tuple[float, float]:
    module = import_module(script)
    return import_module("common").run(module.build, module.__doc__, ["--short", *options])


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_cause_kills_and_the_cure_does_not(script, capsys):
    before, after = run(script)
    assert before > 0.15, "the cause has no effect"
    assert after < 0.1, "the cure has no effect"
    printed = capsys.readouterr().out
    assert printed.startswith(sys.modules[script].__doc__.partition("\n")[0].rstrip("."))
    assert f"{before:.0%}" in printed


@pytest.mark.slow
def test_a_picture(tmp_path):
    run("outlier_spike", "--picture", str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_each_script_says_what_happens_how_it_looks_and_what_to_do():
    for script in SCRIPTS:
        text = (CAUSES / f"{script}.py").read_text(encoding="utf-8")
        headings = ("What happens.", "How it looks.", "The cure.", "Source", f"python examples/causes/{script}.py")
        assert all(heading in text for heading in headings), script
