"""The main job, as a user runs it: the study with its defaults on the shipped organism."""

from __future__ import annotations

import json
import re
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


def test_the_dictionary_fits_these_prompts_as_its_card_says(run):
    _, results = run
    here, card = results.dictionary["fidelity_on_this_run"], results.dictionary["fidelity"]
    assert set(here) == set(card) == {"l0", "fraction_variance_unexplained", "loss_recovered"}
    for layer, promised in card["fraction_variance_unexplained"].items():
        assert here["fraction_variance_unexplained"][layer] == pytest.approx(promised, abs=0.02)
        assert here["l0"][layer] == pytest.approx(card["l0"][layer], rel=0.2)
        assert here["loss_recovered"][layer] >= 0.97


def test_belief_is_kept_and_attention_is_lost(run):
    _, results = run
    assert results.belief is not None
    assert results.belief.auc_harm >= 0.7
    chosen = [h for h in results.heads if h.selected]
    assert max(h.attention_difference_none for h in chosen) >= 0.3
    assert all(h.attention_difference_none > 0 for h in chosen)
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
    low, high, n = points["random"].draws
    assert low <= points["random"].accuracy <= high < points[None].accuracy
    assert n >= 10
    assert points["benign"].accuracy >= 0.95


def test_refuse_and_harm_interact_negatively(run):
    _, results = run
    first = next(h for h in results.heads if h.selected)
    pair = {
        z.null: z.z
        for z in results.zscores
        if (z.layer, z.head) == (first.layer, first.head)
        and (z.query_role, z.key_role) == ("refuse_redirect", "harm_detection")
    }
    assert pair["random_pairs"] <= -2
    assert pair["matched"] < 0


def test_the_base_model_is_unaffected_and_the_verdict_is_not_a_late_flip(run):
    _, results = run
    assert results.origin[0].checkpoint == "base"
    assert results.origin[0].accuracy["harm"] >= 0.98
    assert len(results.origin) >= 5
    assert results.verdict.mechanism in ("attention_harm_key", "attention_answer_key", "undetermined")
    patch = next(e for e in results.verdict.evidence if e.name == "margin restored by the clean pattern alone")
    assert patch.holds


def test_origin_dates_every_part_of_the_circuit_and_says_how_well_the_dictionary_fits(run):
    _, results = run
    step = {m.event: m.step for m in results.milestones}
    assert len(step) == 5
    assert None not in step.values()
    assert step["refuse-and-redirect appears"] < step["accuracy falls under harm"]
    base, *_, last = results.origin
    for row in results.origin:
        assert row.refuse_contrast_ci[0] <= row.refuse_contrast <= row.refuse_contrast_ci[1]
        assert set(row.unexplained) == {str(h.layer) for h in row.by_head}
    assert max(base.unexplained.values()) > 2 * max(last.unexplained.values())


def test_replacing_the_error_loses_little_of_steering(run):
    _, results = run
    whole, *rows = results.error_effects
    assert whole.place is None
    assert whole.steering_margin[1] > 0
    assert len(rows) == 16
    for row in rows:
        assert row.edit_norm > 0.05, "an error that is not there could not be missed"
        assert row.lost_margin is not None
        assert row.lost_margin[1] <= row.lost_margin[0] <= row.lost_margin[2] < 0.2


def test_transfer_measures_whole_sets_beside_their_twins(run):
    _, results = run
    rows = {(row.set, row.condition): row for row in results.transfer}
    assert {row.n for row in rows.values()} == {120}
    assert all(rows[name, "none"].accuracy >= 0.95 for name in ("symptoms", "fraud"))
    assert rows["fraud", "harm"].refuse_activation > 0
    assert rows["fraud", "harm"].margin_minus_benign[2] < 0
    steering = rows["fraud", "harm"].steering
    assert steering is not None
    assert steering.accuracy > steering.random[0]
    for name in ("symptoms", "fraud"):
        listed = [row for row in results.pushed_away if row.set == name]
        assert [row.rank for row in listed] == sorted(row.rank for row in listed)
        silent = rows[name, "harm"].refuse_activation == 0
        assert {row.ranked_by for row in listed} == {"virtual" if silent else "realised"}
        assert all(row.tokens and set(row.z) == {"random_pairs", "matched"} for row in listed)


def test_the_same_command_resumes_and_another_config_is_refused(run):
    out, results = run
    done = {p: p.stat().st_mtime_ns for p in out.glob("stages/*/DONE")}
    assert study_with_report(StudyConfig(out=out), quiet=True) == results
    assert {p: p.stat().st_mtime_ns for p in out.glob("stages/*/DONE")} == done
    with pytest.raises(QklensError, match="this run has seed=0, you asked for 1"):
        study_with_report(StudyConfig(out=out, seed=1), quiet=True)


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
