"""The study away from its defaults: the late-flip arm, contrast directions, a killed run, and a real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qklens.report.run import study_with_report
from qklens.studies.config import StudyConfig


def test_the_late_flip_arm_is_told_apart(tmp_path):
    """Its attention was left alone and its last MLP names the other letter: the clean pattern must not help."""
    results = study_with_report(
        StudyConfig(model="organism:late-flip", dictionary="directions", out=tmp_path / "run", items=48), quiet=True
    )
    assert results.behaviour["harm"].accuracy <= 0.65
    assert results.verdict.mechanism == "late_flip"
    assert results.verdict.rule.startswith("the heads still look at the correct option under harm")
    fired = {e.name: e for e in results.verdict.evidence}
    assert all(e.holds for e in fired.values())
    assert fired["share of the loss through the heads' patterns"].threshold == "below 0.333"
    assert fired["attention difference kept under harm"].value >= 0.8, "training left the heads where they look"
    assert fired["share of the loss through the options' belief"].value <= 0.2
    assert results.verdict.caveats == []


def test_eight_items_of_the_late_flip_arm_support_less(tmp_path):
    """The same rule fires, but four items to report on cannot be sure of it, and the run says so."""
    config = StudyConfig(model="organism:late-flip", dictionary="directions", out=tmp_path / "run", items=8)
    verdict = study_with_report(config, quiet=True).verdict
    assert verdict.mechanism == "late_flip"
    assert verdict.confidence < 0.55
    assert "report half holds 4 items" in verdict.caveats[0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "This is tentative" in page
    assert "The report half holds 4 items" in page


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
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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


@pytest.mark.skipif("QKLENS_SMOLLM2" not in os.environ, reason="needs SmolLM2-135M-Instruct; set QKLENS_SMOLLM2 to it")
def test_a_real_model_that_cannot_do_the_task_gets_the_honest_verdict(tmp_path):
    config = StudyConfig(model=os.environ["QKLENS_SMOLLM2"], out=tmp_path / "run", items=16)
    results = study_with_report(config, quiet=True)
    assert results.verdict.mechanism == "task_not_solved"
    assert results.completeness is not None
    assert results.completeness.max_relative_error <= 1e-4
    assert set(results.skipped) >= {"steer_all", "steer_query", "steer_key", "transfer", "origin"}
