"""`make study` and `make test` on a Python that is too old: one sentence, and no environment is begun."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize("target", ["study", "test"])
@pytest.mark.parametrize("script", ["exit 1", None], ids=["too old", "missing"])
def test_a_python_that_will_not_do(tmp_path: Path, target: str, script: str | None) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python3.9"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    ended = subprocess.run(
        ["make", target, f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert f"'{python}' is not Python 3.11 or newer; install one and name it: make PYTHON=" in ended.stderr
    assert not (tmp_path / ".venv").exists()
