"""The source keeps its own rules: imports go down only, files stay short, and nothing opens a door to foreign code."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import qklens

SOURCE = Path(qklens.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = ("cli", "bench", "report", "studies", "analyses", "interventions", "data", "dictionaries", "models")
MAX_LINES = 400


def module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, module: str, *, package: bool) -> Iterator[tuple[int, str]]:
    """Every qklens module that a file imports, also inside functions, by name or relatively."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if package and node.level == 1 else -(node.level - package)]
                base = ".".join([*parents, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def climbs(source: str, module: str, *, package: bool = False) -> list[str]:
    """The imports of a file that go up or to a module without a layer."""
    layer = module.split(".")[1] if "." in module else None
    found = []
    for line, target in imports_of(ast.parse(source), module, package=package):
        parts = target.split(".")
        if layer not in LAYERS or parts[0] != "qklens" or len(parts) < 2 or parts[1] not in LAYERS:
            continue
        if LAYERS.index(parts[1]) < LAYERS.index(layer):
            found.append(f"{module}:{line} imports {target}")
    return found


def test_imports_go_down_only() -> None:
    assert [
        climb
        for file in FILES
        for climb in climbs(file.read_text(), module_of(file), package=file.name == "__init__.py")
    ] == []


def test_modules_without_a_layer_import_no_layer() -> None:
    """Errors, files and the strict base are below everything; the public list at the top loads lazily."""
    for file in FILES:
        module = module_of(file)
        if module.count(".") == 1 and module.split(".")[1] not in LAYERS:
            targets = [t for _, t in imports_of(ast.parse(file.read_text()), module, package=False)]
            assert [t for t in targets if t.startswith("qklens.") and t.split(".")[1] in LAYERS] == [], module


@pytest.mark.parametrize(
    ("source", "module", "package", "n"),
    [
        ("from qklens.studies import journal", "qklens.models.passes", False, 1),
        ("def f():\n    import qklens.report.page", "qklens.data.items", False, 1),
        ("from ..cli import main", "qklens.report.page", False, 1),
        ("from ..page import write_report", "qklens.report.figures", True, 0),
        ("from ...cli import main", "qklens.report.figures", True, 1),
        ("from .. import report", "qklens.data.items", False, 1),
        ("from . import items", "qklens.data", True, 0),
        ("from qklens.models import passes\nimport torch", "qklens.cli.main", False, 0),
        ("if TYPE_CHECKING:\n    from qklens.data.items import Item", "qklens.models.passes", False, 1),
    ],
)
def test_the_reader_of_imports_sees_what_climbs(source: str, module: str, package: bool, n: int) -> None:
    assert len(climbs(source, module, package=package)) == n


def test_the_import_linter_contract_is_the_same_and_holds() -> None:
    project = Path(__file__).parents[1] / "pyproject.toml"
    contracts = tomllib.loads(project.read_text())["tool"]["importlinter"]["contracts"]
    assert contracts[0]["layers"] == [f"qklens.{layer}" for layer in LAYERS]
    linter = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run(
        [linter, "--no-cache", "--config", project], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stdout
    assert f"{len(contracts)} kept, 0 broken" in ended.stdout


def test_every_package_is_a_layer() -> None:
    packages = {file.parent.name for file in SOURCE.glob("*/__init__.py")}
    assert packages - set(LAYERS) == set()
    assert set(LAYERS) <= packages


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_files_stay_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_LINES, f"{file} holds more than one idea"


FORBIDDEN_CALLS = {"hasattr", "eval", "exec"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}


def doors(source: str) -> list[str]:
    """Calls and imports that could run what a file says, or that ask an object what it is."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(node.func.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "np.load", "numpy.load"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            found += [] if ast.unparse(node.value) == "False" else [f"{node.arg}={ast.unparse(node.value)}"]
        elif isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in [a.name for a in node.names]:
            found.append("from torch import load")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
    return found


UNPICKLES = SOURCE / "dictionaries" / "formats" / "unpickle_weights.py"
"""The one program that opens a pickle, apart from the package's process."""


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_no_door_to_foreign_code(file: Path) -> None:
    assert doors(file.read_text()) == (["torch.load"] if file == UNPICKLES else [])


def test_the_program_that_opens_pickles_builds_tensors_alone_and_imports_nothing_of_the_package() -> None:
    tree = ast.parse(UNPICKLES.read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert [[(k.arg, ast.unparse(k.value)) for k in call.keywords] for call in calls] == [
        [("map_location", "'cpu'"), ("weights_only", "True")]
    ]
    assert [t for _, t in imports_of(tree, module_of(UNPICKLES), package=False) if t.startswith("qklens")] == []
    importers = [file for file in FILES if "unpickle_weights" in file.read_text() and file != UNPICKLES]
    assert [file.name for file in importers] == ["unpickle.py"]
    assert "unpickle_weights.main" not in importers[0].read_text()


@pytest.mark.parametrize(
    "source",
    [
        "hasattr(x, 'y')",
        "import pickle",
        "def f():\n    from pickle import loads",
        "torch.load('x')",
        "load = torch.load",
        "from torch import load",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "np.load(x, allow_pickle=True)",
        "eval('1')",
    ],
)
def test_the_watch_for_doors_sees_them(source: str) -> None:
    assert doors(source) != []
