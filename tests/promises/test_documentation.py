"""Code on the pages of the site runs, links between them lead somewhere, and each public name has its place."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from documented import code_of, run
from expected import MESSAGES

import lightning_deadrelu

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


@pytest.mark.slow
@pytest.mark.filterwarnings(*(f"ignore:{message}" for message in MESSAGES))
@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    known = run(page)
    _close(known)
    for trainer in [value for name, value in known.items() if name == "trainer"]:
        assert "dead_relu/dead_fraction" in trainer.callback_metrics


def _close(known):
    """Stop the server that a page has started, if it has."""
    if "server" in known:
        known["server"].shutdown()
        known["server"].server_close()
        known["thread"].join(10)


@pytest.mark.slow
@pytest.mark.filterwarnings(*(f"ignore:{message}" for message in MESSAGES))
def test_prometheus_scrapes_what_the_verdict_says(tmp_path, monkeypatch):
    pytest.importorskip("prometheus_client")
    monkeypatch.chdir(tmp_path)
    known = run(DOCS / "everywhere" / "cluster.md")
    monitor = known["monitor"]
    with urlopen(f"http://127.0.0.1:{known['server'].server_port}/metrics") as page:
        lines = page.read().decode().splitlines()
    _close(known)
    scraped = dict(line.rsplit(" ", 1) for line in lines if line.startswith("dead_relu"))
    expected = {f'dead_relu_dead_fraction{{layer="{one.name}"}}': one.dead_fraction for one in monitor.report.headline}
    assert {key: float(value) for key, value in scraped.items()} == expected | {"dead_relu_step": monitor.report.step}


def test_every_public_name_has_its_place_among_the_pages():
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"auto(?:class|function):: (\w+)", api))
    assert set(lightning_deadrelu.__all__) <= listed


def test_every_public_name_has_an_example():
    documented = {name: getattr(lightning_deadrelu, name).__doc__ for name in lightning_deadrelu.__all__}
    assert {name for name, text in documented.items() if ">>> " not in text} == set()


def test_no_first_sentence_of_a_property_is_taken_for_its_type():
    """Napoleon takes what stands before a colon in it for the type, and tears the sentence apart."""
    classes = [one for name in lightning_deadrelu.__all__ if isinstance(one := getattr(lightning_deadrelu, name), type)]
    properties = {
        f"{one.__name__}.{name}": value.__doc__ or ""
        for one in classes
        for name, value in inspect.getmembers(one, lambda member: isinstance(member, property))
    }
    assert len(properties) > 20
    assert not [name for name, text in properties.items() if re.match(r"[^`\n]*: ", text)]


def test_files_that_the_pages_name_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:examples|tests)/[\w/.]+\.\w+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_addresses_are_well_formed_and_ours_name_files_that_exist():
    texts = [
        *PAGES,
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "examples" / "tour.ipynb",
    ]
    found = {
        address for page in texts for address in re.findall(r"\]\(\s*(http[^)]*)\)", page.read_text(encoding="utf-8"))
    }
    assert len(found) > 10
    for address in found:
        parts = urlsplit(address)
        assert parts.scheme == "https", address
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), address
        assert not re.search(r"\s", address), address
        own = re.search(r"lightning-deadrelu/(?:blob/)?main/(.+)", address)
        assert own is None or (ROOT / own[1]).exists(), address


def test_the_messages_that_are_explained_are_those_of_the_code():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "lightning_deadrelu").rglob("*.py")]
    code = re.sub(r'"\s*f?"', "", "\n".join(sources))  # join what is broken over lines
    code = code.replace("{threshold:.0%}", "10%")
    messages = re.findall(r"^`(.+)`$", page, re.MULTILINE)
    assert len(messages) > 15
    for message in messages:
        assert message in code, message


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("furo")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
