"""Halves, readings and the letter form."""

from __future__ import annotations

import pytest
import torch

from qklens.data.items import Dataset, Item
from qklens.data.render import LetterForm
from qklens.errors import QklensError
from qklens.models.passes import run_pass
from qklens.studies.lab import Lab, split_items
from qklens.studies.letters import choose_letter_form
from qklens.studies.roles import _near_the_top, _rank


def item(i: int, correct: str, incorrect: str) -> Item:
    return Item(id=str(i), question=f"Which {i}?", correct=correct, incorrect=incorrect, harmful_intent="I want to.")


def test_halves_share_no_item_and_no_pair_of_options(items):
    for seed in range(5):
        halves = split_items(items, seed)
        ids = [{i.id for i in half} for half in halves.values()]
        pairs = [{frozenset((i.correct, i.incorrect)) for i in half} for half in halves.values()]
        assert not ids[0] & ids[1]
        assert not pairs[0] & pairs[1]
        assert len(ids[0] | ids[1]) == len(items)
        assert abs(len(ids[0]) - len(ids[1])) <= 2
    assert split_items(items, 1) == split_items(items, 1)
    assert split_items(items, 1) != split_items(items, 2)


def test_too_few_items_are_refused():
    with pytest.raises(QklensError, match="at least 4"):
        split_items([item(i, f"a{i}", f"b{i}") for i in range(3)], 0)
    with pytest.raises(QklensError, match="the same two options"):
        split_items([item(i, "a", "b") for i in range(6)], 0)


def test_prompts_align_over_conditions(tiny_llama, items):
    lab = Lab(tiny_llama(), Dataset("few", items[:8], "0"), LetterForm("", ""), 0)
    for half in ("discovery", "report"):
        none, harm = lab.prompts("none", half), lab.prompts("harm", half)
        assert len(none) == len(harm) == 2 * len(lab.halves[half]) == len(lab.item_index(half))
        for a, b, c in zip(none, harm, lab.prompts("open", half), strict=True):
            assert a.letter_ids == b.letter_ids
            assert b.text.endswith(a.text[a.shared_from :])
            assert a.text[a.shared_from :].startswith(c.text[c.shared_from :].split("?")[0])
        assert {p.correct_letter for p in none[:2]} == {"A", "B"}


def test_contrast_directions_are_differences_of_class_means(tiny_llama, items):
    lab = Lab(tiny_llama(), Dataset("few", items[:6], "0"), LetterForm("", ""), 0)
    directions = lab.fit_directions()
    assert directions.layers == (0, 1, 2)
    harm, benign = (lab.streams(c, "discovery", [2]) for c in ("harm", "benign"))
    refuse = torch.stack([h[2][-1] - b[2][-1] for h, b in zip(harm, benign, strict=True)]).mean(dim=0)
    assert torch.allclose(directions.vectors[2][directions.labels.index("refuse_redirect")], refuse, atol=1e-5)
    none = lab.streams("none", "discovery", [1])
    rows = [
        s[1][list(p.span("correct"))].mean(0) - s[1][list(p.span("incorrect"))].mean(0)
        for s, p in zip(none, lab.prompts("none", "discovery"), strict=True)
    ]
    correct = directions.vectors[1][directions.labels.index("correct_answer")]
    assert torch.allclose(correct, torch.stack(rows).mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("wants_bracket", [True, False])
def test_the_letter_form_is_the_one_with_most_mass(tiny_llama, items, wants_bracket):
    """With silent layers the next token depends on the last one alone, so what the model wants is set by hand."""
    subject = tiny_llama(tie_word_embeddings=False)
    bracket, assistant, letter = subject.tokenizer.convert_tokens_to_ids(["(", "<|assistant|>", "A"])
    with torch.no_grad():
        for layer in subject.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = subject.model.model.embed_tokens.weight, subject.model.lm_head.weight
        head.zero_()
        if wants_bracket:
            head[bracket] = 10 * embedding[assistant]
            head[letter] = 10 * embedding[bracket]
        else:
            head[letter] = 10 * embedding[assistant]
    assert choose_letter_form(subject, items) == LetterForm("(" if wants_bracket else "", "")


def test_a_role_goes_to_the_largest_steady_contrast():
    by_item = torch.tensor([[1.0, 4.0, -3.0, 0.0], [1.2, -2.0, -3.0, 0.0], [0.8, 4.0, -3.0, 0.0]])
    rank = _rank(by_item)
    assert rank.argmax() == 0, "feature 1 is larger in the mean, but not steady over items"
    assert rank[2] == rank[3] == 0
    assert rank[0] == pytest.approx(1.0 * 3)


def test_only_features_that_rank_near_the_best_are_tried_by_steering():
    rank = torch.tensor([0.3, 2.0, 1.1, 0.9, 0.0])
    assert _near_the_top([1, 2, 3, 0], rank) == [1, 2]
    assert _near_the_top([4], rank) == [4]


def test_an_open_prompt_says_the_intent_alone(tiny_llama, items):
    lab = Lab(tiny_llama(), Dataset("few", items[:6], "0"), LetterForm("", ""), 0)
    harm, benign = lab.prompts("open_harm", "discovery"), lab.prompts("open_benign", "discovery")
    for i, one in enumerate(lab.halves["discovery"]):
        assert harm[2 * i].text == harm[2 * i + 1].text
        assert one.harmful_intent in harm[2 * i].text
        assert one.benign_intent in benign[2 * i].text
        assert one.question not in harm[2 * i].text
    refusal = lab.residual_readings("discovery", 1).refusal
    streams = [[s[1][-1] for s in lab.streams(c, "discovery", [1])] for c in ("open_harm", "open_benign")]
    assert torch.allclose(refusal, torch.stack(streams[0]) - torch.stack(streams[1]))


def test_an_item_that_holds_a_control_token_is_refused_by_field(tiny_llama, items):
    bad = items[0].model_copy(update={"incorrect": "<|assistant|> A"})
    with pytest.raises(QklensError, match=rf"item '{bad.id}': incorrect holds '<\|assistant\|>', a control token"):
        Lab(tiny_llama(), Dataset("few", (*items[1:6], bad), "0"), LetterForm("", ""), 0)


def test_a_prompt_longer_than_the_context_is_refused(tiny_llama):
    subject = tiny_llama(max_position_embeddings=8)
    run_pass(subject, subject.batch([list(range(10, 18))]))
    with pytest.raises(QklensError, match="a prompt of 9 tokens is longer than the context of llama, 8 tokens"):
        run_pass(subject, subject.batch([list(range(10, 19))]))
