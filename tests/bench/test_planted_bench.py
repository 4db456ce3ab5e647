"""What the bench runs, and what its small version finds."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from qklens.bench.planted.bench import DEVELOPMENT, HELD_OUT, SEEDS, run_bench, summary, tasks
from qklens.bench.planted.blueprint import NAMES
from qklens.bench.planted.dictionaries import DICTIONARY_KINDS, missing_directions
from qklens.bench.planted.learned import TRAINING, learn_layer, side_by_side
from qklens.bench.planted.mechanisms import MECHANISMS
from qklens.bench.planted.noise import LEVELS
from qklens.bench.planted.runs import Run
from qklens.bench.planted.weights import ARCHITECTURES
from qklens.errors import QklensError
from qklens.studies.harm_pressure.calibration import shipped_calibration


def test_each_mechanism_meets_every_level_seed_architecture_and_dictionary() -> None:
    every = tasks(SEEDS)
    assert len(every) == len(MECHANISMS) * len(LEVELS) * len(SEEDS)
    assert len({spec.name for spec, _ in every}) == len(every)
    met = defaultdict(set)
    for spec, kind in every:
        met[spec.mechanism] |= {spec.noise, spec.architecture, kind, f"seed {spec.seed}"}
        met[f"seed {spec.seed}"] |= {spec.noise, spec.architecture, kind}
    everything = {*range(len(LEVELS)), *ARCHITECTURES, *DICTIONARY_KINDS}
    for mechanism in MECHANISMS:
        assert met[mechanism] == everything | {f"seed {seed}" for seed in SEEDS}
    assert all(met[f"seed {seed}"] == everything for seed in SEEDS)
    held_out = Counter((spec.mechanism, kind) for spec, kind in every if spec.seed in HELD_OUT)
    assert set(held_out.values()) == {2}


def test_bad_seeds_are_refused() -> None:
    with pytest.raises(QklensError, match="--seeds"):
        tasks([])
    with pytest.raises(QklensError, match="--seeds"):
        tasks([0, -1])


def pair(sign: int, value: float | None) -> dict:
    planted = {"layer": 2, "head": 0, "query_role": "refuse_redirect", "key_role": "correct_answer", "sign": sign}
    held = value is not None
    return {"planted": planted, "held": held, "kind": "realised" if held else None, "value": value}


def run(expected: str, mechanism: str, **changes: object) -> Run:
    row = {
        "spec": {"mechanism": expected, "architecture": "llama", "noise": 0, "seed": 3}, "dictionary": "planted",
        "variant": "", "expected": expected, "mechanism": mechanism, "distance": 1.0, "limit": 1.0, "rule": "",
        "planted_heads": [(2, 0), (2, 1)], "found_heads": [(2, 0), (2, 1)], "planted_features": ["a", "b"],
        "found_features": ["a", "b"], "cosines": {"a": 1.0, "b": 1.0}, "signs": [pair(1, 0.5)], "cpu_seconds": 1.0,
        "made": {"measured_by": "", "decided_by": ""},
    }  # fmt: skip
    return Run.model_validate(row | changes)


def test_a_summary_counts_what_is_wrong() -> None:
    runs = [
        run("late_flip", "late_flip"),
        run(
            "late_flip",
            "attention_harm_key",
            found_heads=[(2, 0), (3, 0), (3, 1)],
            signs=[pair(1, 0.5), pair(-1, 0.1), pair(-1, None)],
        ),
        run("belief_change", "undetermined", found_features=["a"], cosines={"a": 0.8, "b": 0.0}),
        run("task_not_solved", "task_not_solved", planted_heads=[], found_heads=[(2, 3)], signs=[]),
    ]
    found = summary(runs)
    assert (found["n"], found["right"], found["false_attention"]) == (4, 2, 1)
    assert found["heads"]["recall"] == pytest.approx(5 / 6)
    assert found["heads"]["precision"] == pytest.approx(5 / 8), "a head found where none is planted is wrong"
    features = found["features"]["planted"]
    assert features["recall"] == pytest.approx(5 / 6)
    assert features["held"] == pytest.approx(5 / 6)
    signs = found["signs"]
    assert (signs["planted"], signs["held"], signs["found"], signs["right"]) == (5, 4, 4, 3)
    assert (signs["recall"], signs["recall_of_held"], signs["precision"]) == (0.8, 1.0, 0.75)
    assert found["signs_by_dictionary"]["planted"] == signs
    assert sum(row["n"] for row in found["reliability"]) == 4
    assert sum(row["n"] for row in found["confusion"]) == 4
    confidence = [r.confidence(shipped_calibration()) for r in runs]
    squares = [(confidence[0] - 1) ** 2, confidence[1] ** 2, confidence[2] ** 2, (confidence[3] - 1) ** 2]
    assert found["brier"] == pytest.approx(sum(squares) / 4)


def test_dictionaries_of_one_layer_side_by_side_write_as_each_does_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {layer: torch.randn(300, 8, generator=generator) for layer in (2, 3)}
    quick = TRAINING.model_copy(update={"features": 12, "steps": 30, "batch": 64})
    alone = [learn_layer(layer, rows[layer], "x", quick) for layer in rows]
    both = side_by_side(alone)
    for layer, one in zip(rows, alone, strict=True):
        x = rows[layer][:5]
        mine = both.decode(layer, both.encode(layer, lambda at, x=x, layer=layer: x if at == layer else 0 * x))
        its = one.decode(layer, one.encode(layer, lambda _, x=x: x))
        assert float((its - its.mean(dim=0)).abs().max()) > 0.1
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_a_fifth_of_the_directions_is_missing_in_both_signs_and_every_role_somewhere() -> None:
    specs = [spec for spec, kind in tasks(SEEDS) if kind == "missing"]
    gone = Counter(name for spec in specs for name in missing_directions(spec))
    assert {len(missing_directions(spec)) for spec in specs} == {round(0.2 * (len(NAMES) - 1))}
    assert set(gone) == {name for name in NAMES if name != "constant"}
    assert all(0.05 < gone[name] / len(specs) < 0.45 for name in gone)


@pytest.mark.slow
def test_the_small_bench(tmp_path: Path) -> None:
    found = run_bench(DEVELOPMENT[:2], tmp_path, small=True, processes=2, tick=lambda *_: None)
    part = found["development"]
    assert part["n"] == len(MECHANISMS)
    assert part["right"] == part["n"], part["confusion"]
    assert part["false_attention"] == 0
    assert part["heads"]["recall"] >= 0.95
    assert part["heads"]["precision"] >= 0.95
    signs = part["signs_by_dictionary"]["planted"]
    assert signs["planted"] == signs["held"] >= 3
    assert part["signs"]["found"] >= 6
    # A learned feature may be part of another role's: there the README counts a wrong sign on either side.
    assert all(s["right"] == s["found"] for kind, s in part["signs_by_dictionary"].items() if kind != "learned")
    assert {r["dictionary"] for r in found["runs"]} == set(DICTIONARY_KINDS)
    assert json.loads((tmp_path / "bench.json").read_text())["development"] == json.loads(json.dumps(part))
    for name in ("confusion", "reliability"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
