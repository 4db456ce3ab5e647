"""The main job, as a user runs it: the shipped organism, its late-flip arm, resume after a kill, and a real model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qklens.errors import QklensError
from qklens.report.run import study_with_report
from qklens.studies.config import StudyConfig
from qklens.studies.harm_pressure.study import STAGES
from qklens.studies.resources import organism_folder
from qklens.studies.results import Results, Steering

CONTRACT = {
    "schema", "model", "dictionary", "data", "behaviour", "belief", "heads", "interactions", "zscores", "steering",
    "completeness", "partners", "transfer", "origin", "verdict",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Results]:
    """The study with its defaults, once."""
    out = tmp_path_factory.mktemp("study") / "run"
    return out, study_with_report(StudyConfig(out=out), quiet=True)


def at_chosen(results: Results, stage: str) -> dict[str | None, Steering]:
    """The main point at the chosen strength and its controls there, by kind."""
    rows = [row for row in results.steering if row.stage == stage]
    main = next(row for row in rows if row.chosen)
    return {row.control: row for row in rows if row.strength == main.strength and row.variant == main.variant}


def clean(results: Results, stage: str, condition: str) -> Steering:
    return next(r for r in results.steering if r.stage == stage and r.strength == 0 and r.condition == condition)


def test_every_contract_key_and_stage_is_there(run):
    out, results = run
    written = json.loads((out / "results.json").read_text())
    assert set(written) >= CONTRACT
    assert written["schema"] == 1
    assert set(written["behaviour"]) == {"none", "harm", "benign"}
    assert results.skipped == {}
    for stage in STAGES:
        assert (out / "stages" / stage.name / "DONE").exists()
        assert (out / "figures" / f"{stage.name}.svg").exists()
    assert Results.model_validate(written) == results


def test_the_report_is_one_file_without_a_network(run):
    out, results = run
    page = (out / "report.html").read_text()
    assert results.verdict.mechanism.replace("_", " ") in page.replace("_", " ")
    assert not re.search(r"<script|<link|<iframe|@import|src=[\"']http|href=[\"']http", page)


def test_behaviour_is_the_source_studys(run):
    _, results = run
    assert results.behaviour["none"].accuracy >= 0.98
    assert results.behaviour["benign"].accuracy >= 0.97
    assert 0.35 <= results.behaviour["harm"].accuracy <= 0.65
    assert results.behaviour["none"].n == 258


def test_scores_are_complete_on_every_head(run):
    _, results = run
    assert results.completeness is not None
    assert results.completeness.max_relative_error <= 1e-4
    assert len(results.completeness.max_relative_error_by_head) == results.model["n_layers"]


def test_belief_is_kept_and_attention_is_lost(run):
    _, results = run
    assert results.belief is not None
    assert results.belief.auc_harm >= 0.7
    chosen = [h for h in results.heads if h.selected]
    assert all(h.attention_difference_none >= 0.3 for h in chosen)
    assert all(h.attention_difference_harm <= 0.5 * h.attention_difference_none for h in chosen)


def test_the_clean_pattern_restores_the_margin_and_random_heads_do_not(run):
    _, results = run
    assert results.heads_details is not None
    assert results.heads_details.restored >= 0.5
    assert results.heads_details.restored_random_heads <= 0.2


def test_query_side_steering_restores_accuracy_and_its_controls_do_not(run):
    _, results = run
    points = at_chosen(results, "steer_query")
    assert points[None].accuracy >= 0.90
    assert abs(points["random"].accuracy - clean(results, "steer_query", "harm").accuracy) < 0.10
    assert points["benign"].accuracy >= 0.95


def test_refuse_and_harm_interact_negatively(run):
    _, results = run
    pair = [
        z.z
        for z in results.zscores
        if (z.query_role, z.key_role, z.null) == ("refuse_redirect", "harm_detection", "random_pairs")
    ]
    assert min(pair) <= -2


def test_the_base_model_is_unaffected_and_the_verdict_is_not_a_late_flip(run):
    _, results = run
    assert results.origin[0].checkpoint == "base"
    assert results.origin[0].accuracy["harm"] >= 0.98
    assert len(results.origin) >= 5
    assert results.verdict.mechanism in ("attention_harm_key", "attention_answer_key", "undetermined")
    patch = next(e for e in results.verdict.evidence if e.name == "margin restored by the clean pattern")
    assert patch.holds


def test_the_same_command_resumes_and_another_config_is_refused(run):
    out, results = run
    started = time.perf_counter()
    again = study_with_report(StudyConfig(out=out), quiet=True)
    assert again == results
    assert time.perf_counter() - started < 60
    with pytest.raises(QklensError, match="this run has seed=0, you asked for 1"):
        study_with_report(StudyConfig(out=out, seed=1), quiet=True)


def test_the_late_flip_arm_is_told_apart(tmp_path):
    results = study_with_report(
        StudyConfig(model="organism:late-flip", dictionary="directions", out=tmp_path / "run", items=48), quiet=True
    )
    assert results.behaviour["harm"].accuracy <= 0.65
    assert results.verdict.mechanism == "late_flip"


def test_directions_run_every_stage(tmp_path):
    config = StudyConfig(dictionary="directions", base_model="organism:base", out=tmp_path / "run", items=24, seed=3)
    results = study_with_report(config, quiet=True)
    assert results.dictionary["kind"] == "directions"
    assert results.skipped == {}
    assert {z.null for z in results.zscores} >= {"random_pairs", "matched"}
    assert results.completeness is not None
    assert results.completeness.max_relative_error <= 1e-4


def test_a_killed_run_resumes_to_the_same_results(tmp_path):
    """SIGKILL somewhere in the middle, then the same command: the results of a run that was never killed."""

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = ["study", "harm-pressure", "--dictionary", "directions", "--items", "6", "--out", str(out)]
        return subprocess.Popen(
            [sys.executable, "-m", "qklens.cli.main", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed)
    while process.poll() is None and not (killed / "stages" / "heads" / "DONE").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "results.json").exists()
    assert start(killed).wait() == 0
    assert start(whole).wait() == 0
    first, second = (json.loads((out / "results.json").read_text()) for out in (killed, whole))
    for results in (first, second):
        del results["seconds"]
    assert first == second


def test_a_wheel_carries_everything_the_study_needs():
    """What the package ships lies inside the package, and is small."""
    folder = organism_folder()
    names = json.loads((folder / "lineage.json").read_text())
    shipped = [names["base"], *names["between"], names["chat"], names["late_flip"], "dictionary"]
    assert len(names["between"]) >= 3
    assert all((folder / name).is_dir() for name in shipped)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert size <= 15e6
    assert not any(p.suffix in (".bin", ".pt", ".pkl") for p in folder.rglob("*"))


@pytest.mark.skipif("QKLENS_SMOLLM2" not in os.environ, reason="needs SmolLM2-135M-Instruct; set QKLENS_SMOLLM2 to it")
def test_a_real_model_that_cannot_do_the_task_gets_the_honest_verdict(tmp_path):
    config = StudyConfig(model=os.environ["QKLENS_SMOLLM2"], out=tmp_path / "run", items=16)
    results = study_with_report(config, quiet=True)
    assert results.verdict.mechanism == "task_not_solved"
    assert results.completeness is not None
    assert results.completeness.max_relative_error <= 1e-4
    assert set(results.skipped) >= {"steer_all", "steer_query", "steer_key", "transfer", "origin"}
