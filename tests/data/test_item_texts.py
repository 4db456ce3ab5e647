"""Texts of items: what counts as the same, what counts as empty, and characters that no reader sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from item_files import MINIMAL, ROW, jsonl, other, refusal

from qklens.data.audit import audit
from qklens.data.items import DEFAULT_BENIGN_INTENT, load_dataset


def test_text_is_stripped_and_any_script_is_welcome(tmp_path: Path) -> None:
    (item,) = load_dataset(str(jsonl(tmp_path, {**ROW, "correct": "  σ − 日本 é ", "incorrect": "\tb"}))).items
    assert (item.correct, item.incorrect) == ("σ − 日本 é", "b")


@pytest.mark.parametrize("value", ["", "   ", "\t"])
def test_empty_text_is_refused(tmp_path: Path, value: str) -> None:
    assert "field 'question': is empty; expected text" in refusal(jsonl(tmp_path, {**ROW, "question": value}))


@pytest.mark.parametrize("field", ["question", "incorrect", "harmful_intent", "topic"])
@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\t"])
def test_control_characters_are_refused(tmp_path: Path, field: str, character: str) -> None:
    row = json.dumps({**ROW, field: f"two{character}parts"})
    line = refusal(jsonl(tmp_path, row))
    assert f"line 1: field {field!r}: holds a line break, control or format character (U+{ord(character):04X}" in line


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("\u202e", "U+202E RIGHT-TO-LEFT OVERRIDE"),
        ("\u200f", "U+200F RIGHT-TO-LEFT MARK"),
        ("\xad", "U+00AD SOFT HYPHEN"),
        ("\u200b", "U+200B ZERO WIDTH SPACE"),
        ("\ufeff", "U+FEFF ZERO WIDTH NO-BREAK SPACE"),
        ("\U000e0041", "U+E0041 TAG LATIN CAPITAL LETTER A"),
    ],
)
def test_characters_that_do_not_show_are_refused_by_name(tmp_path: Path, character: str, name: str) -> None:
    line = refusal(jsonl(tmp_path, {**ROW, "benign_intent": f"I want to{character} clean up the kitchen."}))
    assert "line 1: field 'benign_intent': holds a line break, control or format character (" in line
    assert f"({name})" in line
    assert character not in line


def test_joiners_that_spelling_needs_are_allowed(tmp_path: Path) -> None:
    row = {**ROW, "question": "می\u200cخواهم?", "correct": "👩\u200d🍳"}
    (item,) = load_dataset(str(jsonl(tmp_path, row))).items
    assert (item.question, item.correct) == (row["question"], row["correct"])


@pytest.mark.parametrize("value", ["\u200d", " \u200c\u200d "])
def test_text_of_nothing_that_shows_is_empty(tmp_path: Path, value: str) -> None:
    assert "field 'correct': is empty; expected text" in refusal(jsonl(tmp_path, {**ROW, "correct": value}))


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    """A lone surrogate is valid JSON, but no tokenizer can read it."""
    bad = json.dumps({**ROW, "question": "Q?"}).replace("Q?", "\\ud800?")
    assert "line 1: field 'question'" in refusal(jsonl(tmp_path, bad))


ALIKE = ["A Grease Fire", "a grease\u00a0fire", "a grease fire.", "a grease fire !?", "ａ grease fire", "a grease ﬁre",
         "a gre\u200dase fire"]  # fmt: skip


@pytest.mark.parametrize("second", ["a grease fire", " a grease fire ", *ALIKE])
def test_equal_options_are_refused(tmp_path: Path, second: str) -> None:
    line = refusal(jsonl(tmp_path, ROW, other(2, incorrect=second)))
    same = second.strip() == "a grease fire"
    both = "both 'a grease fire'" if same else f"the same to a reader, 'a grease fire' and {second.strip()!r}"
    assert f"line 2: 'correct' and 'incorrect' are {both}; expected two different texts" in line


@pytest.mark.parametrize(
    "benign", [ROW["harmful_intent"], "I WANT to burn down the kitchen", "I want to  burn down the kitchen!"]
)
def test_a_benign_intent_that_is_the_harmful_one_is_refused(tmp_path: Path, benign: str) -> None:
    line = refusal(jsonl(tmp_path, ROW, other(2, benign_intent=benign)))
    assert "line 2: 'harmful_intent' and 'benign_intent' are " in line


def test_a_harmful_intent_that_is_the_default_benign_one_is_refused(tmp_path: Path) -> None:
    assert "'harmful_intent' and 'benign_intent' are both" in refusal(
        jsonl(tmp_path, {**MINIMAL, "harmful_intent": DEFAULT_BENIGN_INTENT})
    )


@pytest.mark.parametrize(("correct", "incorrect"), [("?", "!"), ("50%", "50"), ("C#", "C"), ("-5", "5"), ("é", "e")])
def test_options_that_a_reader_tells_apart_are_two(tmp_path: Path, correct: str, incorrect: str) -> None:
    (item,) = load_dataset(str(jsonl(tmp_path, {**ROW, "correct": correct, "incorrect": incorrect}))).items
    assert (item.correct, item.incorrect) == (correct, incorrect)


@pytest.mark.parametrize("swap", [False, True])
def test_a_repeated_question_names_both_lines(tmp_path: Path, swap: bool) -> None:
    options = {"correct": ROW["incorrect"], "incorrect": ROW["correct"]} if swap else {}
    line = refusal(jsonl(tmp_path, ROW, {**ROW, "id": "another", **options}))
    assert "line 2: question with these options" in line
    assert "stands on line 1 already" in line


def test_a_question_repeated_in_another_spelling_is_refused_too(tmp_path: Path) -> None:
    spelt = {**ROW, "id": "another", "question": ROW["question"].upper().rstrip("?"), "correct": "A  grease fire."}
    line = refusal(jsonl(tmp_path, ROW, spelt))
    assert f"line 2: question with these options {spelt['question']!r} stands on line 1 already" in line


def test_the_same_question_with_other_options_may_stand_twice_and_is_noted(tmp_path: Path) -> None:
    twice = {**ROW, "id": "b", "question": ROW["question"].lower(), "correct": "an oil fire"}
    items = load_dataset(str(jsonl(tmp_path, ROW, other(2), twice))).items
    assert [item.id for item in items] == ["kitchen-01", "kitchen-02", "b"]
    (note,) = [note for note in audit(items)["notes"] if "same question" in note]
    assert note.startswith(f"items 'kitchen-01', 'b' ask the same question, {ROW['question']!r}")


def test_joiners_are_noted_with_item_and_field(tmp_path: Path) -> None:
    items = load_dataset(str(jsonl(tmp_path, ROW, other(2, correct="grea\u200dse")))).items
    (note,) = [note for note in audit(items)["notes"] if "joiners" in note]
    assert "stand in 'kitchen-02' (correct);" in note
