"""What holds for the package as a whole: names, imports, wheel, README, repository."""

import ast
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

import lightning_deadrelu

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_deadrelu"
README = (ROOT / "README.md").read_text(encoding="utf-8")

# From the ground up: a part may import those on the floors below its own, and nothing beside or above it.
FLOORS = (
    {"validation", "checkpoint", "guarded", "render"},
    {"model"},
    {"statistics", "attribution"},
    {"observe", "remedies"},
    {"repair", "explain", "prevention", "settings"},
    {"report"},
    {"monitor"},
    {"callback", "loop"},
    {"__init__", "__main__"},
)
ONLY_IN = {
    "lightning": {"callback", "report/loggers"},
    "torch.distributed": {"observe/ranks", "model/sharding"},
    "matplotlib": {"render", "report"},
    "wandb": {"report/loggers"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """List what a file imports, for types alone left out; ``lazy=False`` leaves out imports within functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        node
        for block in ast.walk(tree)
        if (isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test))
        or (not lazy and isinstance(block, ast.FunctionDef))
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def uses(names: set[str], package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in names)


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_all_is_sorted_complete_and_documented():
    names = lightning_deadrelu.__all__
    assert names == sorted(names)
    public = {
        name
        for name, value in vars(lightning_deadrelu).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    }
    assert public == set(names)
    for name in names:
        assert getattr(lightning_deadrelu, name).__doc__, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    part = part_of(path)
    own = {name.split(".")[1] for name in imports(path) if name.startswith("lightning_deadrelu.")}
    assert {other for other in own - {part} if floor[other] >= floor[part]} == set()
    where = path.relative_to(PACKAGE).with_suffix("").as_posix()
    for package, places in ONLY_IN.items():
        assert not uses(imports(path), package) or where.startswith(tuple(places)), package


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timing
def test_import_is_quick():
    code = (
        "import time, lightning.pytorch, lightning.pytorch.loggers; start = time.process_time();"
        "import lightning_deadrelu; print(time.process_time() - start)"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.2


def test_import_loads_no_plotting_and_no_tracker():
    heavy = "('matplotlib', 'wandb', 'rich', 'mlflow', 'tensorboard')"
    before = f"import sys, lightning.pytorch; before = set(sys.modules); import lightning_deadrelu; heavy = {heavy};"
    assert run(f"{before} print(*[name for name in heavy if name in set(sys.modules) - before])").strip() == ""


def test_works_without_wandb_and_matplotlib():
    code = """
import sys, torch, torchmetrics  # the latter would not come without the matplotlib that its metadata promise
for name in [name for name in sys.modules if name.split(".")[0] in ("wandb", "matplotlib")]:
    del sys.modules[name]
sys.modules |= {"wandb": None, "matplotlib": None}
import lightning_deadrelu
net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
report = lightning_deadrelu.find_dead_units(net, [torch.rand(300, 2)])
assert "units are dead" in str(report)
try:
    report.plot()
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(code).strip() == "Plots need matplotlib. Try `pip install lightning-deadrelu[plot]`."


def test_version_is_told_once():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    stated = re.search(r'^version = "(.+)"$', project, re.MULTILINE).group(1)
    assert version("lightning-deadrelu") == stated
    assert not any(re.search(rf'"{re.escape(stated)}"', path.read_text(encoding="utf-8")) for path in SOURCES)


@pytest.mark.slow
def test_wheel_holds_the_package_alone(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert "lightning_deadrelu/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_deadrelu"}
    assert {str(path.relative_to(ROOT)) for path in SOURCES} <= set(names)


def test_readme_shows_the_essence_in_20_lines():
    top = "\n".join(README.splitlines()[:20])
    assert top.startswith("# lightning-deadrelu\n\n")
    code = re.search(r"```python\n(.*?)```", top, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 5
    picture = ROOT / re.search(r"!\[.+\]\((.+)\)", top).group(1)
    assert 1000 < picture.stat().st_size < 100_000


def test_readme_names_every_metric():
    from lightning_deadrelu.report.loggers import metrics_of
    from lightning_deadrelu.statistics import LivenessReport

    for key in metrics_of(LivenessReport(())):
        assert f"| `{key}` |" in README


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore")
def test_readme_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    data = DataLoader(torch.randn(64, 4), batch_size=16)
    known = {"model": Net(), "train_loader": data, "network": Net(), "batches": list(data)}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), known)
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
