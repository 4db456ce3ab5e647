"""Runs made by other code, rules or settings are not taken for this code's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qklens.bench.planted import runs
from qklens.bench.planted.folder import Spec
from qklens.bench.planted.provenance import Made, made, source_hashes


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    def hashes(**changed: str) -> tuple[str, str]:
        contents = {
            "analyses/heads.py": "a", "studies/harm_pressure/verdict.py": "b", "cli/main.py": "c",
            "bench/planted/figures.py": "d",
        } | {name.replace("__", "/") + ".py": text for name, text in changed.items()}  # fmt: skip
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return source_hashes(folder)

    return hashes


def test_rules_and_the_rest_are_told_apart(package: Callable[..., tuple[str, str]]) -> None:
    measures, rules = package()
    assert package() == (measures, rules)
    assert package(cli__main="other", bench__planted__figures="other") == (measures, rules)
    other = package(analyses__heads="other")
    assert other[0] != measures
    assert other[1] == rules
    assert package(studies__harm_pressure__verdict="other")[0] == measures
    assert package(studies__harm_pressure__verdict="other")[1] != rules


def test_settings_count() -> None:
    assert made({"seed": 1}) == made({"seed": 1})
    assert made({"seed": 1}).measured_by != made({"seed": 2}).measured_by


SPEC = Spec(mechanism="decoy", architecture="gpt2", noise=0, seed=0)


@pytest.mark.parametrize(
    ("measured", "decided", "left"),
    [
        ("same", "same", {"run.json", "verdict", "heads"}),
        ("same", "other", {"run.json", "heads"}),
        ("other", "same", set()),
    ],
)
def test_what_other_code_left_is_removed(tmp_path: Path, measured: str, decided: str, left: set[str]) -> None:
    now = runs.made_now(SPEC, "planted")
    had = {name: getattr(now, name) if said == "same" else "0" for name, said in
           (("measured_by", measured), ("decided_by", decided))}  # fmt: skip
    stages = tmp_path / "run" / "study" / "stages"
    for name in ("verdict", "heads"):
        (stages / name).mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / runs.MADE_FILE).write_text(json.dumps(had))
    runs._discard_stale(tmp_path / "run", now)
    assert {p.name for p in (tmp_path / "run").rglob("*")} & {"run.json", "verdict", "heads"} == left
    assert Made.model_validate_json((tmp_path / "run" / runs.MADE_FILE).read_text()) == now
