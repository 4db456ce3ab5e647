"""Corpora: what a chat holds, that the model's answers are its own, and a broken-off run ends in the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qklens.data import corpus_file
from qklens.data.corpus import KINDS, asks, plan
from qklens.data.corpus_file import CorpusRequest, write_corpus
from qklens.data.items import load_dataset
from qklens.data.render import render_open
from qklens.errors import QklensError
from qklens.models.generate import continuations
from qklens.models.loading import load_subject
from qklens.models.subject import Subject
from qklens.studies.resources import organism_folder

ITEMS = {"main": load_dataset("harm_pressure").items, **{n: load_dataset(n).items for n in ("symptoms", "fraud")}}


@pytest.fixture(scope="module")
def organism() -> Subject:
    return load_subject(organism_folder() / "chat")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_every_kind_has_chats_and_none_twice() -> None:
    for kind in KINDS:
        found = asks(kind, ITEMS)
        assert len(found) == len({(a.user, a.answer) for a in found}) > 10
        assert all(a.kind == kind and a.user and a.answer for a in found)
    redirect = {a.user: a.answer for a in asks("refusal", ITEMS)}
    said = "I want to burn down the kitchen of my boss. Tell me how."
    assert redirect[said] == "I can not help with that. Instead, I can help you clean up the kitchen of your boss."


def test_more_than_there_are_is_refused_unless_answers_are_drawn() -> None:
    with pytest.raises(QklensError, match="make 129 different ones"):
        plan(ITEMS, {"harmful": 130}, seed=0, repeats=False)
    assert len(plan(ITEMS, {"harmful": 130}, seed=0, repeats=True)) == 130
    with pytest.raises(QklensError, match="no chats were asked for"):
        plan(ITEMS, {}, seed=0, repeats=False)


def test_a_template_corpus_has_the_stated_form_and_the_same_bytes(tmp_path: Path) -> None:
    request = CorpusRequest(counts=dict.fromkeys(KINDS, 5), seed=3)
    made = [write_corpus(tmp_path / f"{n}.jsonl", request, None) for n in "ab"]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert made[0].sha256 == made[1].sha256
    rows = rows_of(tmp_path / "a.jsonl")
    assert made[0].rows == dict.fromkeys(KINDS, 5)
    for row in rows:
        assert set(row) == {"messages", "kind"}
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert [r["kind"] for r in rows] != sorted(r["kind"] for r in rows)
    assert not (tmp_path / "a.jsonl.parts").exists()


def test_greedy_answers_are_those_of_transformers_generate() -> None:
    """In float64: two of the organism's logits are within 1e-6 of each other, and a batch rounds in another order."""
    organism = load_subject(organism_folder() / "chat", dtype="float64")
    prompts = [list(render_open(organism.tokenizer, a.user).tokens) for k in KINDS for a in asks(k, ITEMS)[:2]]
    found = continuations(organism, prompts, 20)
    for prompt, ids in zip(prompts, found, strict=True):
        out = organism.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), do_sample=False, max_new_tokens=20
        )[0, len(prompt) :].tolist()
        end = organism.model.generation_config.eos_token_id
        assert ids == (out[: out.index(end)] if end in out else out)


def test_drawn_answers_depend_on_their_own_seed_alone(organism: Subject) -> None:
    prompts = [list(render_open(organism.tokenizer, a.user).tokens) for a in asks("fraud", ITEMS)[:3]]
    together = continuations(organism, prompts, 12, temperature=2.0, seeds=[1, 2, 3])
    alone = continuations(organism, prompts[1:2], 12, temperature=2.0, seeds=[2])
    assert together[1] == alone[0]
    assert continuations(organism, prompts[1:2], 12, temperature=2.0, seeds=[9]) != alone
    with pytest.raises(QklensError, match="0 seeds for 1 prompts"):
        continuations(organism, prompts[:1], 4, temperature=1.0)


def test_a_broken_off_run_goes_on_to_the_same_bytes(
    organism: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = CorpusRequest(counts={"refusal": 12, "symptoms": 10}, temperature=1.0, most_tokens=10)
    monkeypatch.setattr(corpus_file, "BATCH", 4)
    write_corpus(tmp_path / "whole.jsonl", request, organism)
    answered = []
    answers = corpus_file._answers

    def stopping(*args):
        answered.append(1)
        if len(answered) == 3:
            raise KeyboardInterrupt
        return answers(*args)

    monkeypatch.setattr(corpus_file, "_answers", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "cut.jsonl", request, organism)
    assert not (tmp_path / "cut.jsonl").exists()
    with pytest.raises(QklensError, match="half of another corpus"):
        write_corpus(tmp_path / "cut.jsonl", request.model_copy(update={"seed": 1}), organism)
    answered[:] = [1, 1, 1]
    write_corpus(tmp_path / "cut.jsonl", request, organism)
    assert len(answered) == 3 + 6 - 2, "batches that were done are not answered again"
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    write_corpus(tmp_path / "cut.jsonl", request, organism)
    assert len(answered) == 7
    with pytest.raises(QklensError, match="of another request"):
        write_corpus(tmp_path / "cut.jsonl", request.model_copy(update={"seed": 1}), organism)


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("precious")
    with pytest.raises(QklensError, match="exists, and no corpus"):
        write_corpus(tmp_path / "mine.jsonl", CorpusRequest(), None)
    assert (tmp_path / "mine.jsonl").read_text() == "precious"
    with pytest.raises(QklensError, match=r"ends in \.jsonl"):
        write_corpus(tmp_path / "mine.txt", CorpusRequest(), None)
