"""`qklens dict show`, `qklens data corpus`, and frozen-random controls where a dictionary is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qklens.studies.cards import ShownCard
from qklens.studies.tables.pair_rows import PairTable
from terminal import parsed

TEXT = "Which gas do plants take in? Plants take in the gas. Which animal is the largest?\n\n" * 6


@pytest.fixture
def asked(healthy_model: Path, data: Path, tmp_path: Path) -> tuple[object, ...]:
    (tmp_path / "text.txt").write_text(TEXT)
    return ("--model", healthy_model, "--data", data, "--text", tmp_path / "text.txt")


def test_a_feature_is_shown_and_its_json_is_the_same_card(
    qklens: Callable[..., Any], asked: tuple[object, ...]
) -> None:
    page = qklens("dict", "show", "directions", "harm_detection", *asked, "--top", 2)
    assert page.status == 0, page
    card = ShownCard.model_validate(
        parsed(qklens("dict", "show", "directions", "harm_detection", *asked, "--json").out)
    )
    assert card.card.feature == "harm_detection"
    assert card.card.label is None, "a label was asked for that nobody wanted"
    assert {density.group for density in card.card.density} == {"text", "none", "benign", "harm"}
    for shown in ("harm_detection", card.card.nearest[0].feature, card.card.promoted[0].token.strip()):
        assert shown in page.out


def test_a_feature_that_is_not_there_names_those_that_are(
    qklens: Callable[..., Any], asked: tuple[object, ...]
) -> None:
    line = qklens("dict", "show", "directions", "harm_detector", *asked).refused()
    assert "harm_detection" in line


def test_roles_of_a_run_that_is_none_are_refused(
    qklens: Callable[..., Any], asked: tuple[object, ...], tmp_path: Path
) -> None:
    line = qklens("dict", "show", "directions", "harm_detection", *asked, "--run", tmp_path / "nowhere").refused()
    assert str(tmp_path / "nowhere") in line


def test_an_endpoint_without_a_model_is_refused_before_any_work(qklens: Callable[..., Any]) -> None:
    ended = qklens("dict", "show", "nowhere", "x", "--label-url", "http://localhost:1")
    assert "belong together" in ended.refused()


@pytest.mark.parametrize("source", ["random-covariance:directions", "directions:whitened"])
def test_pairs_are_read_off_a_control_as_off_the_directions(
    qklens: Callable[..., Any], healthy_model: Path, data: Path, source: str
) -> None:
    def pairs(dictionary: str) -> PairTable:
        asked = ("--model", healthy_model, "--data", data, "--dictionary", dictionary, "--reading", "harm-none")
        ended = qklens("qk", *asked, "--heads", "L1H0", "--draws", 30, "--json")
        assert ended.status == 0, ended
        return PairTable.model_validate(parsed(ended.out))

    control, plain = pairs(source), pairs("directions")
    assert control.dictionary != plain.dictionary
    ours, theirs = control.readings[0], plain.readings[0]
    assert ours.score == pytest.approx(theirs.score, rel=1e-4), "whatever the source, its pairs sum to the score"
    assert ours.pairs[0].value != theirs.pairs[0].value


def test_a_corpus_is_written_once_and_another_request_is_refused(qklens: Callable[..., Any]) -> None:
    first = qklens("data", "corpus", "chats.jsonl", "--template", "--count", "mcq=3", "--count", "fraud=2")
    assert first.status == 0, first
    assert "5 chats (" in first.out
    rows = [json.loads(line) for line in Path("chats.jsonl").read_text().splitlines()]
    assert sorted(row["kind"] for row in rows) == ["fraud"] * 2 + ["mcq"] * 3
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    before = Path("chats.jsonl").read_bytes()
    assert qklens("data", "corpus", "chats.jsonl", "--template", "--count", "mcq=3", "--count", "fraud=2").status == 0
    assert Path("chats.jsonl").read_bytes() == before
    assert "chats.jsonl" in qklens("data", "corpus", "chats.jsonl", "--template", "--count", "mcq=4").refused()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--count", "mqc=3"), "did you mean 'mcq'"),
        (("--count", "mcq=-3"), "expected a number"),
        (("--count", "many"), "expected a number"),
        (("--temperature", -1), "--temperature"),
        (("--temperature", "inf"), "--temperature"),
    ],
)
def test_a_wrong_request_is_refused_before_a_file_is_there(
    qklens: Callable[..., Any], flags: tuple[object, ...], says: str
) -> None:
    assert says in qklens("data", "corpus", "chats.jsonl", "--template", *flags).refused()
    assert not Path("chats.jsonl").exists()
