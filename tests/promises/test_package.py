"""The plan of the package holds: what imports what, how long files are, what is public, what the wheel holds."""

import ast
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import lightning_deadrelu

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_deadrelu"

# From the ground up: a part may import those on the floors below its own, and nothing beside or above it.
FLOORS = (
    {"progress"},
    {"validation", "checkpoint", "guarded", "render", "warn"},
    {"model"},
    {"statistics", "attribution"},
    {"observe", "remedies"},
    {"repair", "explain", "prevention"},
    {"report"},
    {"monitor"},
    {"trainer_host"},
    {"callback", "loop"},
    {"environment", "factories", "saved_model"},
    {"__init__", "__main__"},
)
ONLY_IN = {
    "lightning": {"callback", "environment", "trainer_host", "report/loggers"},
    "torch.distributed": {"observe/ranks", "model/sharding"},
    "matplotlib": {"render", "report"},
    "wandb": {"report/loggers"},
}


# Where private torch may be named: each place is one that a new torch may break.
PRIVATE_TORCH = ("observe/torch_modes", "observe/compiled")  # and what else begins so
# The one function that reads what Lightning keeps to itself.
READS_PRIVATE_LIGHTNING = ("report/loggers/private_lightning", "read_private")
MOST_LINES, MOST_LINES_OF_A_CLASS = 400, 250

SOURCES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {where: ast.parse(path.read_text(encoding="utf-8")) for where, path in SOURCES.items()}


def imports(where: str) -> set[str]:
    """List what a file imports, also within functions; for types alone left out."""
    skipped = {
        node
        for block in ast.walk(TREES[where])
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(TREES[where]):
        if isinstance(node, ast.Import) and node not in skipped:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node not in skipped:
            assert not node.level, f"{where}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(where: str) -> set[str]:
    """List the files of ours that a file imports, a folder's ``__init__`` where the name comes from there."""
    prefix, found = "lightning_deadrelu.", set()
    for name in imports(where):
        parts = name.removeprefix(prefix).split(".") if name.startswith(prefix) else []
        ways = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
        ways = [known for way in ways for known in (way, f"{way}/__init__") if known in SOURCES]
        found |= set(ways[:1])
    return found - {where}


def private_torch(tree: ast.AST) -> set[str]:
    """List the private names of torch that a file imports or reaches by their full name."""
    dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dotted |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in dotted if re.match(r"torch(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*$", name)}


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


def test_imports_point_down():
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    arrows = {(where, other) for where in SOURCES for other in own_imports(where)}
    parts = {arrow: tuple(place.partition("/")[0] for place in arrow) for arrow in arrows}
    assert {arrow for arrow, (own, other) in parts.items() if own != other and floor[other] >= floor[own]} == set()


def test_no_circles():
    tuple(TopologicalSorter({where: own_imports(where) for where in SOURCES}).static_order())


def test_no_file_imports_its_neighbours_through_their_folder():
    arrows = {(where, f"{where.rpartition('/')[0]}/__init__") for where in SOURCES}
    assert {(where, init) for where, init in arrows if init in own_imports(where)} == set()


@pytest.mark.parametrize("package", ONLY_IN)
def test_what_is_imported_in_few_places(package):
    users = {
        where
        for where in SOURCES
        for name in imports(where)
        if f"{name}.".startswith(f"{package}.") and not where.startswith(tuple(ONLY_IN[package]))
    }
    assert users == set()


def test_private_torch_is_named_in_few_places():
    elsewhere = {where: tree for where, tree in TREES.items() if not where.startswith(PRIVATE_TORCH)}
    assert {where: names for where, tree in elsewhere.items() if (names := private_torch(tree))} == {}


def test_private_lightning_is_read_by_one_function():
    where, function = READS_PRIVATE_LIGHTNING
    assert function in {node.name for node in TREES[where].body if isinstance(node, ast.FunctionDef)}
    reads = {
        (other, ast.unparse(node))
        for other, tree in TREES.items()
        if "lightning" in {name.partition(".")[0] for name in imports(other)} or other.startswith("report/loggers")
        for node in ast.walk(tree)
        if re.match(r"getattr\(.*, f?'_[a-z]|(?!self\.)[\w.]+\._[a-z]\w*$", ast.unparse(node))
    }
    assert reads == set()
    assert {other for other, tree in TREES.items() if f"{function}(" in ast.unparse(tree)} == {
        where,
        "trainer_host",
        "report/loggers/adapters",
    }


def test_names_of_functions_and_classes_are_unique_in_their_folder():
    places = {}
    for where, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                places.setdefault((where.rpartition("/")[0], node.name), set()).add(where)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_files_and_classes_are_short():
    classes = {
        (where, node.name): node.end_lineno - node.lineno + 1
        for where, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    files = {where: len(path.read_text(encoding="utf-8").splitlines()) for where, path in SOURCES.items()}
    assert {where for where, lines in files.items() if lines > MOST_LINES} == set()
    assert {name for name, lines in classes.items() if lines > MOST_LINES_OF_A_CLASS} == set()


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


@pytest.mark.slow
def test_works_without_wandb_and_matplotlib():
    code = """
import sys, torch, torchmetrics  # the latter would not come without the matplotlib that its metadata promise
for name in [name for name in sys.modules if name.split(".")[0] in ("wandb", "matplotlib")]:
    del sys.modules[name]
sys.modules |= {"wandb": None, "matplotlib": None}
import lightning_deadrelu
net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
report = lightning_deadrelu.find_dead_units(net, [torch.rand(300, 2)])
assert str(report).count("dead") == 2, str(report)
try:
    report.plot()
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(code).strip() == "Plots need matplotlib. Try `pip install lightning-deadrelu[plot]`."


def test_version_is_told_once():
    stated = lightning_deadrelu.__version__
    assert version("lightning-deadrelu") == stated
    told = [path.name for path in SOURCES.values() if f'"{stated}"' in path.read_text(encoding="utf-8")]
    assert told == ["__init__.py"]
    assert stated not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for other in ("CITATION.cff", "conda/recipe.yaml"):
        assert f"version: {stated}\n" in (ROOT / other).read_text(encoding="utf-8")


@pytest.mark.slow
def test_wheel_holds_the_package_alone(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert "lightning_deadrelu/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_deadrelu"}
    assert {str(path.relative_to(ROOT)) for path in SOURCES.values()} <= set(names)
