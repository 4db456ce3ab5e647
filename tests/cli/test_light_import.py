"""`import qklens` and `qklens --help` are light, and the public names are those that the package lists."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import pytest

import qklens

HEAVY = ("torch", "transformers", "numpy", "scipy", "pandas", "statsmodels", "altair", "tokenizers", "safetensors")
REPORT = "import sys; sys.stderr.write(' '.join(m for m in {heavy!r} if m in sys.modules))"


def heavy_after(code: str) -> tuple[list[str], str]:
    """The heavy modules in memory after some code, in a process of its own, and what it printed."""
    program = f"import atexit\nimport sys\natexit.register(lambda: exec({REPORT.format(heavy=HEAVY)!r}))\n{code}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.stderr.split(), ended.stdout


def test_the_watch_sees_heavy_modules() -> None:
    assert heavy_after("import numpy")[0] == ["numpy"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert heavy_after("import qklens; dir(qklens); qklens.QklensError; qklens.StudyConfig()")[0] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--help"], "Run a study from end to end"),
        (["study", "--help"], "--dictionary"),
        (["heads", "--help"], "--figure"),
        (["qk", "--help"], "--reading"),
        (["partners", "--help"], "--all-heads"),
        (["steer", "--help"], "--strengths"),
        (["data", "check", "--help"], "FILE"),
        (["model", "check", "--help"], "MODEL"),
        (["dict", "check", "--help"], "--record"),
        (["dict", "convert", "--help"], "--layer"),
        (["dict", "export", "--help"], "--to"),
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str], says: str) -> None:
    heavy, printed = heavy_after(f"sys.argv = ['qklens', *{arguments!r}]\nfrom qklens.cli.main import main\nmain()")
    assert heavy == []
    assert says.casefold() in printed.casefold()


def test_the_version_is_the_package_s_and_loads_nothing_heavy() -> None:
    heavy, printed = heavy_after("sys.argv = ['qklens', '--version']\nfrom qklens.cli.main import main\nmain()")
    assert heavy == []
    assert printed == f"qklens {version('qklens')}\n"


def test_a_data_file_is_checked_without_torch() -> None:
    code = "sys.argv = ['qklens', 'data', 'check', 'fraud']\nfrom qklens.cli.main import main\nmain()"
    heavy, printed = heavy_after(code)
    assert not {"torch", "transformers"} & set(heavy)
    assert printed.startswith("fraud: 60 items")


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(qklens.__all__) == dir(qklens)
    assert set(qklens.__all__) == set(qklens._HOME)
    for name in qklens.__all__:
        value = getattr(qklens, name)
        assert value is getattr(import_module(f"qklens.{qklens._HOME[name]}"), name)
        assert value.__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'qklens' has no attribute 'load_modle'"):
        _ = qklens.load_modle
