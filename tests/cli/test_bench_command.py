"""`qklens bench planted` from the command line: refusals, and what it prints of a finished bench."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qklens.bench.planted.bench import tasks
from qklens.bench.planted.runs import RUN_FILE, kept_run, made_now

PAIR = {
    "planted": {"layer": 2, "head": 0, "query_role": "need_answer", "key_role": "correct_answer", "sign": 1},
    "held": True, "kind": "realised", "value": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--seeds", "one"), "--seeds: 'one' is no whole number from 0"),
        (("--seeds=-1",), "'-1' is no whole number from 0"),
        (("--seeds=0,,1",), "--seeds: '' is no whole number from 0"),
        (("--seeds=1_0",), "'1_0' is no whole number"),
        (("--seeds", "1" * 400), "is no whole number"),
        (("--seeds=3,1,3",), "--seeds: 3 stands there twice"),
        (("--out", "/proc/nowhere"), "/proc/nowhere/planted.jsonl: cannot write"),
        (("--processes", "0"), "Invalid value for '--processes'"),
    ],
)
def test_bad_options(qklens: Callable[..., Any], arguments: tuple[str, ...], says: str) -> None:
    assert says in qklens("bench", "planted", *arguments).refused()
    assert not any(Path().iterdir())


def test_a_finished_bench_is_counted_and_not_run_again(qklens: Callable[..., Any], tmp_path: Path) -> None:
    for spec, kind in tasks([3], small=True):
        wrong = spec.mechanism == "decoy"
        row = {
            "spec": spec.model_dump(), "dictionary": kind, "variant": "", "expected": "late_flip",
            "mechanism": "attention_harm_key" if wrong else "late_flip", "distance": 2.0, "limit": 1.0, "rule": "r",
            "planted_heads": [[2, 0]], "found_heads": [[2, 0], [2, 1]] if wrong else [[2, 0]],
            "planted_features": ["a"], "found_features": ["a"], "cosines": {"a": 0.9}, "signs": [PAIR],
            "cpu_seconds": 10.0, "made": made_now(spec, kind).model_dump(),
        }  # fmt: skip
        folder = tmp_path / "out" / "runs" / f"{spec.name}-{kind}"
        folder.mkdir(parents=True)
        (folder / RUN_FILE).write_text(json.dumps(row))
    ended = qklens("bench", "planted", "--small", "--seeds", "3", "--out", tmp_path / "out", "--processes", 1)
    assert ended.status == 0
    assert "held out seeds: right verdict in 9 of 10 runs" in ended.out
    matrix = [line.split() for line in ended.out.splitlines() if line.endswith(" .") and "(late_flip)" in line]
    assert [row[0] for row in matrix if row[-7:] == [".", ".", ".", "[0]", ".", "1", "."]] == ["decoy"]
    assert sum(row[-7:] == [".", ".", ".", "[1]", ".", ".", "."] for row in matrix) == 8
    assert "late_flip                                   .          .          .        [1]" in ended.out
    assert "attention verdicts where refuse-and-redirect moves no head: 1" in ended.out
    assert "heads: recall 1.000, precision 0.909 (10 planted)" in ended.out
    assert "signs, planted dictionary: " in ended.out
    assert "decoy-" in ended.err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "runs", "planted.jsonl", "bench.json", "confusion.svg", "reliability.svg",
    }  # fmt: skip


def test_a_run_of_other_rules_is_not_kept(tmp_path: Path) -> None:
    (spec, kind), *_ = tasks([3], small=True)
    row = {
        "spec": spec.model_dump(), "dictionary": kind, "variant": "", "expected": "no_effect", "mechanism": "no_effect",
        "distance": 2.0, "limit": 1.0, "rule": "r", "planted_heads": [], "found_heads": [], "planted_features": [],
        "found_features": [], "cosines": {}, "signs": [], "cpu_seconds": 1.0, "made": made_now(spec, kind).model_dump(),
    }  # fmt: skip
    folder = tmp_path / "runs" / f"{spec.name}-{kind}"
    folder.mkdir(parents=True)
    (folder / RUN_FILE).write_text(json.dumps(row))
    assert kept_run(spec, kind, tmp_path) is not None
    (folder / RUN_FILE).write_text(json.dumps(row | {"made": row["made"] | {"decided_by": "other rules"}}))
    assert kept_run(spec, kind, tmp_path) is None
