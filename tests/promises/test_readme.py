"""The README says what is so, and its code runs; the repository names no machine."""

import re
import subprocess
from pathlib import Path

import pytest
from documented import code_of, run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_fits_on_a_few_screens_and_shows_the_essence_in_the_first_lines():
    lines = README.splitlines()
    assert len(lines) <= 120
    top = "\n".join(lines[:14])
    assert top.startswith("# lightning-deadrelu\n\n")
    code = re.search(r"```python\n(.*?)```", top, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 5
    address = re.search(r"!\[.+\]\((https://.+/main/(.+))\)", top)  # absolute, for the page on PyPI
    assert 1000 < (ROOT / address.group(2)).stat().st_size < 300_000


def test_links_within_the_repository_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_documentation_names_every_metric():
    from lightning_deadrelu.report.metrics import metrics_of
    from lightning_deadrelu.statistics import LivenessReport

    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for key in metrics_of(LivenessReport(())):
        assert f"| `{key}` |" in page


def test_readme_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    assert len(code_of(ROOT / "README.md")) >= 2
    known = run(ROOT / "README.md")
    assert known["trainer"].callback_metrics["dead_relu/dead_fraction"] == 0
    assert known["monitor"].report.sites


def test_repository_names_no_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("an unpacked source distribution has no list of tracked files")
    suffixes = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ".yaml", ""}
    places = re.compile(r"/(?:home|root|work|Users|mnt|opt)/\w|[A-Z]:\\\\")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix in suffixes and path != Path(__file__):
            assert not places.search(path.read_text(encoding="utf-8")), name
