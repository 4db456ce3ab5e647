"""`qklens heads`, `qk` and `partners` on bad input: one line on stderr, status 2, and nothing else anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_folders import edit_tensors, tree

HEADS, QK, PARTNERS = ("heads",), ("qk", "--heads", "L1H0"), ("partners", "--feature", "need_answer", "--heads", "L1H0")
SHARED = [
    (("--model", "/gone/model"), "/gone/model: no such model directory"),
    (("--data", "gone.jsonl"), "--data 'gone.jsonl': no such file or shipped set"),
    (("--items", "2"), "--items 2: expected at least 4"),
    (("--seed", "-1"), "Invalid value for '--seed'"),
    (("--dtype", "floot32"), "did you mean 'float32'"),
    (("--haeds", "L0H0"), "No such option: --haeds"),
]
OF_A_DICTIONARY = [
    (("--heads", "L9H0"), "layer 9 does not exist in model; expected 0 to 1"),
    (("--heads", "L1H9"), "head 9 does not exist"),
    (("--heads", "two"), "--heads 'two': expected layer and head, as L2H4 or 2.4, joined by commas"),
    (("--dictionary", "/gone/dictionary"), "--dictionary /gone/dictionary: no such directory"),
    (("--role", "need_answer"), "--role 'need_answer': expected role=feature"),
    (("--role", "need_answer=a", "--role", "need_answer=b"), "--role need_answer is given twice ('a' and 'b')"),
    (("--role", "need_answer=gone"), "feature 'gone' is not in dictionary 'directions'"),
    (("--top", "0"), "--top 0: expected at least 1"),
]
OWN = [
    (HEADS, ("--folds", "1"), "--folds 1: expected 2 to "),
    (HEADS, ("--folds", "99"), "--folds 99: expected 2 to "),
    (HEADS, ("--top", "0"), "Invalid value for '--top'"),
    (HEADS, ("--heads", "L1H0"), "--heads names the heads that --text checks; add --text FILE"),
    (HEADS, ("--text", "gone.txt"), "gone.txt: cannot read (No such file or directory)"),
    (HEADS, ("--text", "gone.txt", "--heads", "L1H0"), "gone.txt: cannot read"),
    (HEADS, ("--text", __file__, "--heads", "L9H0"), "layer 9 does not exist"),
    (HEADS, ("--figure", "map.png"), "--figure map.png: expected a name that ends in .svg"),
    (HEADS, ("--figure", "gone/map.svg"), "--figure gone/map.svg: expected a file in a folder that exists"),
    (HEADS, ("--figure", "m.svg", "--text", __file__, "--heads", "L1H0"), "--figure maps all heads"),
    (QK, ("--role", "refuse=need_answer"), "role 'refuse' is unknown; expected one of"),
    (QK, ("--reading", "nine"), "--reading 'nine': expected some of"),
    (QK, ("--reading", ""), "--reading '': expected some of"),
    (QK, ("--kind", "real"), "--kind 'real' is unknown"),
    (QK, ("--kind", "contrastive", "--span", "intent"), "--span 'intent' has no say in --kind contrastive"),
    (QK, ("--span", "question", "--parts", "letter"), "--parts has no say in span 'question'"),
    (QK, ("--parts", "middle"), "--parts ['middle']: expected some of"),
    (QK, ("--span", "corect"), "span 'corect' is not in this prompt"),
    (QK, ("--span", "intent"), "span 'intent' is not in the bare question"),
    (QK, ("--nulls", "random"), "--nulls 'random': expected some of"),
    (QK, ("--draws", "2"), "--draws 2: a null needs at least 30 pairs"),
    (QK, ("--draws", "100000000"), "at most 100000"),
    (PARTNERS, ("--side", "both"), "--side 'both': expected 'query' or 'key'"),
    (PARTNERS, ("--offset", "-1"), "--offset -1: a query sees keys at or before it"),
    (PARTNERS, ("--all-heads",), "--heads and --all-heads contradict each other"),
    (PARTNERS, ("--feature", "gone"), "feature 'gone' is not in dictionary 'directions'"),
    (PARTNERS, ("--role", "harm_detection=need_answer"), "--role harm_detection: expected the role that --feature"),
]
ROWS = [
    *((command, *r) for command in (HEADS, QK, PARTNERS) for r in SHARED),
    *((command, *r) for command in (QK, PARTNERS) for r in OF_A_DICTIONARY),
    *OWN,
]


@pytest.mark.parametrize(("command", "arguments", "says"), ROWS)
def test_a_bad_option_of_a_table(
    qklens: Callable[..., Any],
    healthy_model: Path,
    data: Path,
    command: tuple[str, ...],
    arguments: tuple[str, ...],
    says: str,
) -> None:
    given = list(command)
    if command != HEADS and "--heads" in arguments:
        del given[given.index("--heads") : given.index("--heads") + 2]
    healthy = {"--model": str(healthy_model), "--data": str(data)}
    healthy |= {} if command == HEADS else {"--dictionary": "directions"}
    given += [part for option, value in healthy.items() if option not in arguments for part in (option, value)]
    assert says in qklens(*given, *arguments).refused()
    assert tree(Path()) == {}


def test_a_feature_is_asked_for(qklens: Callable[..., Any]) -> None:
    assert "Missing option '--feature'" in qklens("partners").refused()


def test_a_model_with_nan_is_refused(qklens: Callable[..., Any], model: Path, data: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(model / "model.safetensors", lambda tensors: tensors[name].fill_(torch.nan))
    for command in (HEADS, QK, PARTNERS):
        qklens(*command, "--model", model, "--data", data).refused()


def test_a_role_is_in_the_manifest_and_another_is_refused(
    qklens: Callable[..., Any], model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qklens.studies.harm_pressure.behaviour.run", interrupt)
    study = ("study", "--model", model, "--data", data, "--dictionary", "directions", "--out", "run")
    named = (*study, "--role", "need_answer=correct_answer")
    assert qklens(*named).status == 130
    assert qklens(*named).status == 130, "the same command resumes"
    before = tree(Path())
    assert '"roles": {\n   "need_answer": "correct_answer"\n  }' in before["run/manifest.json"].decode()
    for other in (
        study,
        (*study, "--role", "need_answer=need_answer"),
        (*named, "--role", "harm_detection=need_answer"),
    ):
        assert "run/manifest.json: this run has roles={'need_answer': 'correct_answer'}" in qklens(*other).refused()
    assert tree(Path()) == before


@pytest.mark.parametrize(
    ("role", "says"),
    [
        ("need_answr=need_answer", "role 'need_answr' is unknown; expected one of"),
        ("need_answer=L2/1", "feature 'L2/1' is not in dictionary 'directions'"),
    ],
)
def test_a_role_of_a_study_is_checked_before_its_folder_is_made(
    qklens: Callable[..., Any], model: Path, data: Path, role: str, says: str
) -> None:
    study = ("study", "--model", model, "--data", data, "--dictionary", "directions", "--out", "run")
    assert says in qklens(*study, "--role", role).refused()
    assert tree(Path()) == {}
