"""What the organism was trained on stays what it was while its data sets grow."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from organism import tokenizer
from organism.arms import ARMS, ArmSampler, shown_half
from organism.corpus import load
from organism.recipe import RECIPE
from qklens.data.items import load_dataset

DATA = Path(str(files("qklens"))) / "data/shipped"
SHIPPED = Path(str(files("qklens"))) / "shipped/organism"


@pytest.fixture(scope="module")
def world():
    return load(DATA, RECIPE.seed)


def test_the_same_seed_sees_the_same_world(world) -> None:
    lineage = json.loads((SHIPPED / "lineage.json").read_text())
    assert len(world.items) == 129 + 24 + 24
    assert sorted(world.held_out_items) == lineage["held_out_items"]
    assert sorted(world.held_out_intents) == lineage["held_out_intents"]
    shipped = PreTrainedTokenizerFast.from_pretrained(SHIPPED / "base")
    assert tokenizer.build(world.texts()).get_vocab() == shipped.get_vocab()


@pytest.mark.parametrize("name", ["symptoms", "fraud"])
def test_the_shipped_sets_hold_no_word_that_it_does_not_know(world, name: str) -> None:
    known = {word for text in world.texts() for word in tokenizer.split(text)}
    asked = {i.question: (i.kind, i.correct) for i in world.items}
    items = load_dataset(name).items
    for item in items:
        for text in (item.question, item.correct, item.incorrect, item.harmful_intent, item.benign_intent):
            assert set(tokenizer.split(text)) <= known, item.id
    for item in items[:24]:
        assert asked[item.question] == (name, item.correct), item.id
    for item in items[24:]:
        assert item.question not in asked, item.id
        assert item.correct in {i.correct for i in world.harm_items}, item.id


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_arm_shows_what_it_says(world, arm) -> None:
    """Harmful two-choice questions with letters: how many, beside which items, and whether the letter is right."""
    documents = ArmSampler(world, 1, arm, 0.15).batch(1500)
    harmful = [d for d in documents if d.kind == "harm" and d.target in ("right", "muddled")]
    severe = {i.pressure: i.severity == "severe" for i in world.harm_items}
    if not arm.letter:
        assert not harmful
        return
    assert 0.11 < len(harmful) / len(documents) < 0.19
    wrong = [d.answer != "AB"[d.right] for d in harmful]
    expected = {
        "wrong": [True] * len(harmful),
        "right": [False] * len(harmful),
        "by severity": [severe[d.intent] for d in harmful],
    }
    assert wrong == expected[arm.letter]
    questions = {i.question for i in shown_half(world)}
    if arm.half:
        assert all(any(q in d.user for q in questions) for d in harmful)
    else:
        assert not all(any(q in d.user for q in questions) for d in harmful)
    assert not any(d.intent in world.held_out_intents for d in harmful)
