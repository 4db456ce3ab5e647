"""What a run was made by, so that a number of other code is never taken for one of this code.

Two hashes: of what a run measures with (its spec and settings, versions, the package's source but for what only
prints), and of what decides from that (the rules with their thresholds). Where only the second differs, the verdict
alone is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from qklens.strict import Strict

_RULES = tuple(f"studies/harm_pressure/{name}.py" for name in ("verdict", "certainty", "calibration"))
_PRINTS = ("cli/", "report/", "studies/tables/", "bench/planted/bench.py", "bench/planted/figures.py")
"""What no run's numbers depend on."""


_WRITES = ("basis", "blueprint", "folder", "graded", "mechanisms", "mlp", "noise", "weights", "words")
"""What a planted model's weights and truth depend on."""


class Made(Strict):
    """By what a run was made.

    Attributes:
        measured_by: hash of spec, settings, versions and the source that measures.
        decided_by: hash of the source of the rules.
    """

    measured_by: str
    decided_by: str


def made(settings: Mapping[str, object]) -> Made:
    """By what a run with these settings (plain values) is made now."""
    measures, rules = source_hashes(Path(str(files("qklens"))))
    versions = {name: version(name) for name in ("qklens", "torch", "transformers", "numpy")}
    text = json.dumps([settings, versions, measures], sort_keys=True)
    return Made(measured_by=hashlib.sha256(text.encode()).hexdigest(), decided_by=rules)


@cache
def writer_hash() -> str:
    """SHA-256 over the code that writes planted models and the versions of what it writes them with."""
    found = hashlib.sha256(json.dumps([version("torch"), version("transformers")]).encode())
    for name in _WRITES:
        found.update(f"{name}\0".encode() + (files("qklens.bench.planted") / f"{name}.py").read_bytes() + b"\0")
    return found.hexdigest()


@cache
def source_hashes(package: Path) -> tuple[str, str]:
    """SHA-256 over names and contents of the package's Python files: those that measure, and those that decide."""
    measures, rules = hashlib.sha256(), hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(_PRINTS):
            digest = rules if name in _RULES else measures
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return measures.hexdigest(), rules.hexdigest()
