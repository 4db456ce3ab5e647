"""What the bench runs, and what its small version finds."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from qklens.analyses.readings import read_streams
from qklens.bench.planted.bench import DEVELOPMENT, HELD_OUT, SEEDS, run_bench, summary, tasks
from qklens.bench.planted.blueprint import NAMES
from qklens.bench.planted.dictionaries import (
    DICTIONARY_KINDS,
    missing_directions,
    role_features,
    write_dictionary,
)
from qklens.bench.planted.folder import Spec, planted_model
from qklens.bench.planted.learned import TRAINING, learn
from qklens.bench.planted.mechanisms import MECHANISMS, SELECTING_LAYERS
from qklens.bench.planted.noise import LEVELS
from qklens.bench.planted.runs import Run
from qklens.bench.planted.weights import ARCHITECTURES
from qklens.bench.planted.words import planted_prompts
from qklens.dictionaries.crosscoder import load_crosscoder
from qklens.errors import QklensError
from qklens.interventions.engine import Workset
from qklens.models.loading import load_subject
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
        run(
            "task_not_solved",
            "task_not_solved",
            planted_heads=[],
            found_heads=[(2, 3)],
            planted_features=[],
            found_features=[],
            cosines={},
            signs=[],
        ),
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


@pytest.mark.parametrize("kind", ["planted", "missing"])
def test_a_role_is_one_feature_wherever_heads_select_and_has_its_planted_amount(tmp_path: Path, kind) -> None:
    spec = Spec(mechanism="attention_answer_key", architecture="llama", noise=0, seed=1)
    planted = planted_model(spec, tmp_path / "models")
    subject = load_subject(planted.folder)
    source = load_crosscoder(write_dictionary(planted, subject, kind, tmp_path / kind))
    first, last = SELECTING_LAYERS
    names = {role: sorted(features) for role, features in role_features(planted, source, first).items()}
    assert names == {role: sorted(features) for role, features in role_features(planted, source, last).items()}
    held = [len(labels) for labels in names.values()]
    assert held == [1] * 4 if kind == "planted" else max(held) == 1
    prompts = planted_prompts("harm")[:4]
    for stream, prompt in zip(read_streams(Workset(subject, prompts), SELECTING_LAYERS), prompts, strict=True):
        amounts = source.encode(last, lambda at, stream=stream: stream[at])
        for role, place in (("correct_answer", prompt.span("correct")), ("refuse_redirect", prompt.spans["answer"])):
            for label in names[role]:
                of = amounts[list(place), source.labels.index(label)].max()
                assert float(of) == pytest.approx(1.0, abs=0.1), "as the blueprint writes it"


def test_a_learned_dictionary_is_a_crosscoder_of_the_selecting_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {layer: torch.randn(300, 8, generator=generator) for layer in SELECTING_LAYERS}
    quick = TRAINING.model_copy(update={"features": 12, "steps": 30, "sparsity_warmup_steps": 15, "batch": 64})
    found = learn(rows, "x", quick)
    assert found.layers == SELECTING_LAYERS
    written = found.directions(SELECTING_LAYERS[1])
    assert bool(written[:12].any(dim=1).all()), "what the first layer reads is written at both"
    assert bool(written[12:].any())


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
    assert part["signs"]["found"] >= 12
    assert part["signs"]["found"] >= 0.8 * part["signs"]["held"]
    assert all(s["right"] == s["found"] for s in part["signs_by_dictionary"].values())
    assert {r["dictionary"] for r in found["runs"]} == set(DICTIONARY_KINDS)
    assert json.loads((tmp_path / "bench.json").read_text())["development"] == json.loads(json.dumps(part))
    for name in ("confusion", "reliability"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
