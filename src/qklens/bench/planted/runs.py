"""One run of the bench: the study on one planted model with one dictionary, held against the truth."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from pydantic import ValidationError

from qklens.bench.planted.dictionaries import DictionaryKind, role_features, write_dictionary
from qklens.bench.planted.folder import Planted, Spec, planted_model
from qklens.bench.planted.provenance import Made, made
from qklens.bench.planted.signs import PairSign, find_signs
from qklens.bench.planted.words import items_file
from qklens.dictionaries.config import CONFIG_FILE
from qklens.dictionaries.crosscoder import Crosscoder, load_crosscoder
from qklens.errors import QklensError
from qklens.files import read_json, write_json
from qklens.models.loading import load_subject
from qklens.strict import Strict
from qklens.studies.config import StudyConfig
from qklens.studies.harm_pressure.calibration import Calibration
from qklens.studies.harm_pressure.study import run_study
from qklens.studies.results import Results

LEFT_OUT = (
    "fidelity", "cards", "zscores", "steer_all", "steer_query", "steer_key", "error_terms", "partners", "transfer",
    "origin",
)  # fmt: skip
LEFT_OUT_GRADED = (*LEFT_OUT, "interactions")
"""Of a graded model the verdict alone is counted."""
RUN_FILE, MADE_FILE, ITEMS_FILE = "run.json", "made.json", "planted.jsonl"
GRADED_ITEMS = 32
"""Of the 48: the fewest whose report half does not cap a confidence by itself."""


class Run(Strict):
    """What one run found, beside what is planted.

    Attributes:
        spec: the model.
        dictionary: the dictionary.
        variant: the model's form and layout.
        expected: the right verdict.
        share: of a graded model, the first cause's share as its weights have it.
        mechanism: the verdict.
        rule: its rule.
        planted_heads: answer-selection heads; empty where nothing tells which option is correct.
        found_heads: those selected.
        distance: of the number that decided from its threshold.
        limit: what the items allow the confidence to be.
        planted_features: roles whose planted direction some feature of the dictionary stands for.
        found_features: of these, the roles that were given such a feature.
        cosines: for each role, the best feature's cos with the planted direction, 0 below the least that counts.
        signs: every planted pair.
        made: by what.
        cpu_seconds: processor time of the whole run, the model's and the dictionary's making included.
    """

    spec: Spec
    dictionary: DictionaryKind
    variant: str
    expected: str
    share: float | None = None
    mechanism: str
    distance: float
    limit: float
    rule: str
    planted_heads: list[tuple[int, int]]
    found_heads: list[tuple[int, int]]
    planted_features: list[str]
    found_features: list[str]
    cosines: dict[str, float]
    signs: list[PairSign]
    made: Made
    cpu_seconds: float

    @property
    def right(self) -> bool:
        """Whether the verdict is the planted one."""
        return self.mechanism == self.expected

    def confidence(self, calibration: Calibration) -> float:
        """The verdict's confidence by a calibration."""
        return min(calibration.confidence(self.mechanism, self.distance), self.limit)


def run_one(spec: Spec, kind: DictionaryKind, out: Path) -> Run:
    """Run the study on a planted model, with the items in `out`; one that this code broke off goes on."""
    folder = _folder(spec, kind, out)
    by = made_now(spec, kind)
    _discard_stale(folder, by)
    started = time.process_time()
    planted = planted_model(spec, out / "models")
    dictionary = folder / "dictionary"
    if not (dictionary / CONFIG_FILE).is_file():
        write_dictionary(planted, load_subject(planted.folder), kind, dictionary)
    config = StudyConfig(
        model=str(planted.folder),
        dictionary=str(dictionary),
        data=str(out / ITEMS_FILE),
        items=None if spec.strength is None else GRADED_ITEMS,
        out=folder / "study",
        seed=0,
    )
    results, _ = run_study(config, quiet=True, leave_out=_left_out(spec))
    run = compare(planted, kind, load_crosscoder(dictionary), results)
    run = run.model_copy(update={"cpu_seconds": round(time.process_time() - started, 2)})
    write_json(folder / RUN_FILE, run.model_dump(mode="json"))
    return run


def _left_out(spec: Spec) -> tuple[str, ...]:
    return LEFT_OUT if spec.strength is None else LEFT_OUT_GRADED


def _folder(spec: Spec, kind: DictionaryKind, out: Path) -> Path:
    return out / "runs" / f"{spec.name}-{kind}"


def made_now(spec: Spec, kind: DictionaryKind) -> Made:
    """By what a run is made now."""
    return made({"spec": spec.model_dump(), "dictionary": kind, "left_out": _left_out(spec), "items": items_file()})


def _discard_stale(folder: Path, by: Made) -> None:
    """Remove what other code left: all of it, or the verdict alone where only the rules are others."""
    path = folder / MADE_FILE
    try:
        had = Made.model_validate(read_json(path)) if path.is_file() else None
    except (ValidationError, QklensError):
        had = None
    if had is None or had.measured_by != by.measured_by:
        shutil.rmtree(folder, ignore_errors=True)
    elif had.decided_by != by.decided_by:
        shutil.rmtree(folder / "study" / "stages" / "verdict", ignore_errors=True)
    write_json(path, by.model_dump())


def kept_run(spec: Spec, kind: DictionaryKind, out: Path) -> Run | None:
    """The run that is there, unless it is damaged or was made by other code, other rules or other settings."""
    path = _folder(spec, kind, out) / RUN_FILE
    if not path.is_file():
        return None
    try:
        run = Run.model_validate(read_json(path))
    except (ValidationError, QklensError):
        return None
    return run if run.made == made_now(spec, kind) else None


def compare(planted: Planted, kind: DictionaryKind, dictionary: Crosscoder, results: Results) -> Run:
    """A study's results against the truth."""
    truth = planted.truth
    solved = truth.expected != "task_not_solved"
    layer = results.roles[0].layer if results.roles else dictionary.layers[0]
    standing = role_features(planted, dictionary, layer)
    chosen = {r.role: r.feature for r in results.roles if r.chosen}
    held = sorted(role for role, features in standing.items() if features)
    right = [role for role in held if chosen.get(role) in standing[role]]
    found = {role: chosen[role] for role in right}
    signs = find_signs(truth, planted.folder, dictionary, set(held), found, results)
    return Run(
        spec=truth.spec,
        dictionary=kind,
        variant=truth.variant,
        expected=truth.expected,
        share=truth.share,
        mechanism=results.verdict.mechanism,
        distance=results.verdict.distance,
        limit=results.verdict.limit,
        rule=results.verdict.rule,
        planted_heads=truth.selecting if solved else [],
        found_heads=list(results.heads_details.selected) if results.heads_details else [],
        planted_features=held if solved else [],
        found_features=right if solved else [],
        cosines={role: max(features.values(), default=0.0) for role, features in standing.items()},
        signs=signs,
        made=made_now(truth.spec, kind),
        cpu_seconds=0.0,
    )
