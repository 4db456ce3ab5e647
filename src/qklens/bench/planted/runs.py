"""One run of the bench: the study on one planted model with one dictionary, held against the truth."""

from __future__ import annotations

from pathlib import Path

from qklens.bench.planted.blueprint import ROLE_DIRECTIONS
from qklens.bench.planted.dictionaries import FEATURES, DictionaryKind, kept_features, write_dictionary
from qklens.bench.planted.folder import Planted, Spec, planted_model
from qklens.bench.planted.words import items_file
from qklens.files import atomic_write, read_json, write_json
from qklens.models.loading import load_subject
from qklens.strict import Strict
from qklens.studies.config import StudyConfig
from qklens.studies.harm_pressure.study import run_study
from qklens.studies.results import Results

LEFT_OUT = ("zscores", "steer_all", "steer_query", "steer_key", "error_terms", "partners", "transfer", "origin")
RUN_FILE = "run.json"


class Run(Strict):
    """What one run found, beside what is planted.

    Attributes:
        spec: the model.
        dictionary: the dictionary.
        variant: the model's form and layout.
        expected: the right verdict.
        mechanism: the verdict.
        confidence: its confidence.
        rule: its rule.
        planted_heads: answer-selection heads; empty where the model solves nothing and so selects nothing.
        found_heads: those selected.
        planted_features: roles whose planted direction the dictionary has.
        found_features: of these, the roles that were given that direction.
        signs: for each planted pair that was measured, whether its sign is the planted one.
    """

    spec: Spec
    dictionary: DictionaryKind
    variant: str
    expected: str
    mechanism: str
    confidence: float
    rule: str
    planted_heads: list[tuple[int, int]]
    found_heads: list[tuple[int, int]]
    planted_features: list[str]
    found_features: list[str]
    signs: list[bool]


def run_one(spec: Spec, kind: DictionaryKind, out: Path) -> Run:
    """Run the study on a planted model, or take the run that is there."""
    folder = out / "runs" / f"{spec.name}-{kind}"
    planted = planted_model(spec, out / "models")
    if (folder / RUN_FILE).is_file():
        return Run.model_validate(read_json(folder / RUN_FILE))
    data = out / "planted.jsonl"
    if not data.is_file():
        atomic_write(data, items_file())
    dictionary = out / "dictionaries" / f"{spec.name}-{kind}"
    if not dictionary.is_dir():
        write_dictionary(planted, load_subject(planted.folder), kind, dictionary)
    config = StudyConfig(
        model=str(planted.folder), dictionary=str(dictionary), data=str(data), out=folder / "study", seed=0
    )
    results, _ = run_study(config, quiet=True, leave_out=LEFT_OUT)
    run = compare(planted, kind, results)
    write_json(folder / RUN_FILE, run.model_dump(mode="json"))
    return run


def compare(planted: Planted, kind: DictionaryKind, results: Results) -> Run:
    """A study's results against the truth."""
    truth = planted.truth
    kept = [FEATURES[i] for i in kept_features(planted, kind)]
    layer = results.roles[0].layer if results.roles else 0
    label = {role: f"L{layer}/{kept.index((name, 1))}" for role, name in ROLE_DIRECTIONS.items() if (name, 1) in kept}
    chosen = {r.role: r.feature for r in results.roles if r.chosen}
    solved = truth.expected != "task_not_solved"
    values = {
        (row.layer, row.head, row.query_role, row.key_role): row.value
        for row in results.interactions
        if row.kind == "realised" and row.condition == "harm"
    }
    right = {role for role in label if chosen.get(role) == label[role]}
    signs = []
    for pair in truth.signs:
        value = values.get((pair.layer, pair.head, pair.query_role, pair.key_role))
        if value is not None and value != 0 and {pair.query_role, pair.key_role} <= right:
            signs.append((value > 0) == (pair.sign > 0))
    return Run(
        spec=truth.spec,
        dictionary=kind,
        variant=truth.variant,
        expected=truth.expected,
        mechanism=results.verdict.mechanism,
        confidence=results.verdict.confidence,
        rule=results.verdict.rule,
        planted_heads=truth.selecting if solved else [],
        found_heads=list(results.heads_details.selected) if solved and results.heads_details else [],
        planted_features=sorted(label) if solved else [],
        found_features=sorted(right) if solved else [],
        signs=signs if solved else [],
    )
