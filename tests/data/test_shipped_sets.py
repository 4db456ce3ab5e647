"""The sets that ship: their counts, their form, and that no option gives itself away."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import qklens.data
from qklens.data.audit import GIVEAWAY, audit
from qklens.data.items import SHIPPED, Item, load_dataset

SIZES = {"harm_pressure": 129, "symptoms": 60, "fraud": 60}
TRANSFER = ("symptoms", "fraud")
DOCUMENTS = """accounts bill card certificate contract diploma document email guarantee invoice label letter license
list passport receipt report statement ticket will"""
FUNCTION_WORDS = """a after an and are as at be before by can did do does for from how if in is it may never not of on
or should that the their them they this to what when where which who whom with you your"""
MODIFIERS = "after dry high many near night no red sharp small strong very when"
FRAME = "a an and at have i in is it me my name so tell that what"
TEXTS = ("question", "correct", "incorrect", "harmful_intent", "benign_intent")


def test_the_shipped_files_are_the_named_ones() -> None:
    folder = Path(qklens.data.__file__).parent / "shipped"
    assert {file.stem for file in folder.glob("*.jsonl")} == set(SHIPPED) == set(SIZES)
    assert (folder / "DATASHEET.md").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_counts_and_fields(name: str) -> None:
    items = load_dataset(name).items
    assert len(items) == SIZES[name]
    folder = Path(qklens.data.__file__).parent / "shipped"
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert all(set(row) == {"id", "topic", "severity", *TEXTS} for row in rows), "every field is written out"
    assert {item.severity for item in items} == {"mild", "severe"}


def test_the_main_set_is_varied() -> None:
    items = load_dataset("harm_pressure").items
    assert len({item.topic for item in items}) >= 12
    assert len({item.harmful_intent for item in items}) >= 60
    severe = sum(item.severity == "severe" for item in items)
    assert 0.25 < severe / len(items) < 0.75


@pytest.mark.parametrize("name", SHIPPED)
def test_the_benign_twin_has_the_harmful_ones_form(name: str) -> None:
    for item in load_dataset(name).items:
        harmful, benign = item.harmful_intent.split(), item.benign_intent.split()
        assert abs(len(harmful) - len(benign)) <= 2, item.id
        assert harmful != benign, item.id
        assert harmful[:2] == benign[:2], item.id
        if name == "harm_pressure":
            assert item.harmful_intent.startswith("I want to "), item.id
            assert item.benign_intent.startswith("I want to "), item.id


@pytest.mark.parametrize("name", TRANSFER)
def test_a_transfer_set_asks_nothing_that_the_main_set_asks(name: str) -> None:
    main, items = load_dataset("harm_pressure").items, load_dataset(name).items
    assert {i.question for i in items}.isdisjoint({i.question for i in main})
    assert {frozenset((i.correct, i.incorrect)) for i in items}.isdisjoint(
        {frozenset((i.correct, i.incorrect)) for i in main}
    )
    shared = {i.correct for i in main}
    assert sum(i.correct in shared for i in items[:24]) == 1, "facts of its own; one answer is another fact's too"
    assert all(i.correct in shared for i in items[24:]), "as the datasheet says"


def test_a_twin_of_fraud_asks_for_the_same_document() -> None:
    for item in load_dataset("fraud").items:
        harmful, benign = item.harmful_intent.split(), item.benign_intent.split()
        assert " ".join(harmful[:4]) in ("I want you to", "I want to get"), item.id
        changed = [pair for pair in zip(harmful, benign, strict=True) if pair[0] != pair[1]]
        assert len(changed) == 1, item.id
        assert changed[0][0] in ("fake", "false"), item.id
        assert changed[0][1] in ("real", "fair"), item.id
        assert words(DOCUMENTS) & words(item.harmful_intent), item.id


def test_a_twin_of_symptoms_asks_the_same_of_something_harmless() -> None:
    items = load_dataset("symptoms").items
    ill = {word for item in items for word in words(item.harmful_intent)}
    well = {word for item in items for word in words(item.benign_intent)}
    assert ill & well <= words(MODIFIERS) | words(FRAME), "no sign, illness or part of the body stands in any twin"
    for item in items:
        ask, same = (text.rstrip(".").split(" so ")[1] for text in (item.harmful_intent, item.benign_intent))
        assert len(item.harmful_intent.split()) == len(item.benign_intent.split()), item.id
        if ask == "name my illness":
            assert same.startswith("name my "), item.id
        else:
            assert ask == same in ("tell me what it is", "tell me what I have"), item.id


@pytest.mark.parametrize("name", TRANSFER)
def test_no_word_of_the_question_points_at_an_option(name: str) -> None:
    for item in load_dataset(name).items:
        asked = words(item.question)
        right, wrong = ({w for w in words(o) if points(w, asked)} for o in (item.correct, item.incorrect))
        assert len(right) == len(wrong), (item.id, right, wrong)


def words(text: str) -> set[str]:
    return set(text.lower().rstrip("?.").split())


def points(word: str, asked: set[str]) -> bool:
    """Whether a content word, or another of its stem, stands in the question."""
    function = words(FUNCTION_WORDS)
    if word in function:
        return False
    return any(
        other in (word, f"{word}s") or word == f"{other}s" or (len(word) > 3 and word[:4] == other[:4])
        for other in asked - function
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_no_sentence_is_both_harmful_and_benign(name: str) -> None:
    items = load_dataset(name).items
    assert {i.harmful_intent for i in items}.isdisjoint({i.benign_intent for i in items})


@pytest.mark.parametrize("name", SHIPPED)
def test_text_is_plain_ascii(name: str) -> None:
    for item in load_dataset(name).items:
        for field in TEXTS:
            text = getattr(item, field)
            assert text.isascii(), (item.id, field)
            assert "  " not in text, (item.id, field)
        assert item.question.endswith("?"), item.id
        assert item.harmful_intent.endswith("."), item.id
        assert item.benign_intent.endswith("."), item.id


# The second guesser is written here from nothing, so that a mistake in the audit cannot hide a giveaway.


def naive_bayes(items: Sequence[Item], *, prior: float = 0.5) -> float:
    """Leave one item out: each word votes with the log odds of the roles in which the other items have it."""
    words = sorted({w for i in items for w in (i.correct + " " + i.incorrect).lower().split()})
    column = {word: k for k, word in enumerate(words)}
    counts = np.zeros((2, len(items), len(words)))
    for row, item in enumerate(items):
        for role, option in enumerate((item.correct, item.incorrect)):
            for word in option.lower().split():
                counts[role, row, column[word]] += 1
    total = counts.sum(axis=1)
    score = 0.0
    for row in range(len(items)):
        seen = total - counts[:, row] + prior
        odds = np.log(seen[0] / seen[1])
        vote = odds @ (counts[0, row] - counts[1, row])
        score += 0.5 if abs(vote) < 1e-9 else float(vote > 0)
    return score / len(items)


def stumps(items: Sequence[Item]) -> dict[str, float]:
    """How often the longer option is right, or wrong: nothing is fitted, so the better of the two is an upper bound."""
    found = {}
    for name, size in (("characters", len), ("words", lambda text: len(text.split()))):
        signs = [np.sign(size(i.correct) - size(i.incorrect)) for i in items]
        longer = float(np.mean([(sign + 1) / 2 for sign in signs]))
        found[name] = max(longer, 1 - longer)
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_the_audit_finds_no_giveaway(name: str) -> None:
    report = audit(load_dataset(name).items)
    assert report["guesser_length"] < GIVEAWAY == 0.60
    assert report["guesser_bag_of_words"] < GIVEAWAY
    assert report["notes"] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_second_guesser_agrees(name: str) -> None:
    items = load_dataset(name).items
    assert naive_bayes(items) < 0.60
    assert all(accuracy < 0.60 for accuracy in stumps(items).values()), stumps(items)


def test_the_second_guesser_can_guess() -> None:
    """On a set whose answers give themselves away it is nearly always right, so its failure above means something."""
    items = planted_by_word(40)
    assert naive_bayes(items) > 0.9
    assert stumps(planted_by_length(40))["characters"] > 0.9


def planted_by_word(n: int) -> tuple[Item, ...]:
    """The right option says `always` where the wrong one says `seldom`: equal lengths, other words."""
    return tuple(item(k, f"always word{k % 7}", f"seldom word{k % 7}") for k in range(n))


def planted_by_length(n: int) -> tuple[Item, ...]:
    """The right option is the longer one, in words that occur once."""
    return tuple(item(k, f"aa{k:03} bb{k:03} cc{k:03}", f"dd{k:03}") for k in range(n))


def item(k: int, correct: str, incorrect: str) -> Item:
    return Item(
        id=f"i{k}",
        topic="planted",
        question=f"Question {k}?",
        correct=correct,
        incorrect=incorrect,
        harmful_intent="I want to harm.",
        benign_intent="I want to help.",
        severity="mild",
    )


def test_the_audit_flags_a_word_that_gives_away() -> None:
    report = audit(planted_by_word(40))
    assert report["guesser_bag_of_words"] > 0.9
    assert report["guesser_length"] == 0.5
    assert report["notes"] == [
        "bag of words alone picks the correct option in 100% of items; expected below 60%: reword options"
    ]


def test_the_audit_flags_a_length_that_gives_away() -> None:
    report = audit(planted_by_length(40))
    assert report["guesser_length"] > 0.9
    assert any(note.startswith("length alone picks") for note in report["notes"])


def test_a_shipped_set_with_a_planted_word_is_flagged() -> None:
    spoilt = [i.model_copy(update={"correct": f"{i.correct} indeed"}) for i in load_dataset("harm_pressure").items]
    report = audit(spoilt)
    assert report["guesser_length"] > 0.9
    assert report["guesser_bag_of_words"] > 0.9


def test_guessers_are_symmetric_and_repeatable() -> None:
    """Exchanging the roles in every item changes nothing: the guesser learns the other sign."""
    items = load_dataset("symptoms").items
    swapped = [i.model_copy(update={"correct": i.incorrect, "incorrect": i.correct}) for i in items]
    first, second = audit(items), audit(swapped)
    for name in ("guesser_length", "guesser_bag_of_words"):
        assert first[name] == pytest.approx(second[name])
    assert audit(items) == first


def test_the_audit_counts() -> None:
    items = [item(0, "a b", "c d"), item(1, "e f", "g h").model_copy(update={"severity": None, "topic": "other"})]
    report = audit(items)
    assert report["topics"] == {"planted": 1, "other": 1}
    assert report["severities"] == {"mild": 1, "unset": 1}
    assert report["n_distinct_harmful_intents"] == 1


def test_a_missing_benign_twin_is_noted() -> None:
    from qklens.data.items import DEFAULT_BENIGN_INTENT

    items = [item(0, "a b", "c d").model_copy(update={"benign_intent": DEFAULT_BENIGN_INTENT})]
    assert any("without 'benign_intent'" in note for note in audit(items)["notes"])
