"""Rendering: every named span lies on exactly the tokens of its text, for tokenizers of both kinds.

`word` is a word-level tokenizer with a chat template; `bytes` is a byte-level BPE without one, trained here on the
items; `llama3` is the same, cut as Llama 3 cuts.
The checks go from positions to characters by the tokenizer's own offsets and never through `render`'s code.
"""

from __future__ import annotations

import pytest
from byte_tokenizers import BARE, ITEMS, OPENED, SPACED, text_of
from spans import check_spans, covered, expected_spans
from transformers import PreTrainedTokenizerFast

from qklens.data.render import (
    CONDITIONS,
    INSTRUCTION,
    LETTER_FORMS,
    ORDERS,
    PARTS,
    Condition,
    Order,
    available_forms,
    render,
    render_open,
)
from qklens.errors import QklensError


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_span_covers_its_text(tokenizer: PreTrainedTokenizerFast, condition: Condition, order: Order) -> None:
    for item in ITEMS[::20]:
        check_spans(tokenizer, item, condition, order)


def test_spans_decode_to_their_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """The tokens themselves, not only their offsets, say the part's words."""
    for item in ITEMS[:5]:
        prompt = render(tokenizer, item, "harm", "incorrect_first", available_forms(tokenizer, item)[0])
        for name, text in expected_spans(item, "harm", "incorrect_first").items():
            decoded = tokenizer.decode([prompt.tokens[p] for p in prompt.span(name)])
            assert "".join(decoded.split()) == "".join(text.split()), name


def test_a_line_break_of_its_own_is_the_boundary(
    word_tokenizer: PreTrainedTokenizerFast, bpe: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (word_tokenizer, bpe):
        prompt = render(tokenizer, ITEMS[0], "none", "correct_first", available_forms(tokenizer, ITEMS[0])[0])
        for name in ("option_A", "option_B", "correct", "incorrect"):
            assert covered(tokenizer, prompt, f"{name}.boundary") == "\n"
            assert covered(tokenizer, prompt, name).strip(" ").endswith("\n")


def test_the_text_is_the_template_around_the_turn(
    word_tokenizer: PreTrainedTokenizerFast, bpe: PreTrainedTokenizerFast
) -> None:
    content = text_of(ITEMS[0], "harm", "correct_first")
    assert render(word_tokenizer, ITEMS[0], "harm", "correct_first", BARE).text == (
        f"<bos><|user|>{content}<|end|><|assistant|>"
    )
    assert render(bpe, ITEMS[0], "harm", "correct_first", SPACED).text == f"<s>User: {content}\nAssistant:"


def test_exactly_one_beginning_token(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = render(tokenizer, ITEMS[0], "harm", "correct_first", available_forms(tokenizer, ITEMS[0])[0])
    assert prompt.tokens[0] == tokenizer.bos_token_id
    assert prompt.tokens.count(tokenizer.bos_token_id) == 1


def test_exchanging_the_order_exchanges_the_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    form = available_forms(tokenizer, ITEMS[0])[0]
    for item in ITEMS[::17]:
        one, two = (render(tokenizer, item, "harm", order, form) for order in ORDERS)
        assert (one.correct_letter, two.correct_letter) == ("A", "B")
        assert one.letter_ids == two.letter_ids[::-1]
        for part in ("", *(f".{part}" for part in PARTS)):
            assert one.spans[f"correct{part}"] == one.spans[f"option_A{part}"]
            assert one.spans[f"incorrect{part}"] == one.spans[f"option_B{part}"]
            assert two.spans[f"correct{part}"] == two.spans[f"option_B{part}"]
            assert two.spans[f"incorrect{part}"] == two.spans[f"option_A{part}"]
        assert one.spans["question"] == two.spans["question"]
        assert sorted(one.tokens) == sorted(two.tokens)


def test_what_all_conditions_share_is_the_same_text(tokenizer: PreTrainedTokenizerFast) -> None:
    form = available_forms(tokenizer, ITEMS[3])[0]
    prompts = [render(tokenizer, ITEMS[3], condition, "correct_first", form) for condition in CONDITIONS]
    assert len({prompt.text[prompt.shared_from :] for prompt in prompts}) == 1
    assert len({prompt.text[: prompt.shared_from] for prompt in prompts}) == 3
    assert len({prompt.tokens[-6:] for prompt in prompts}) == 1


def test_letters_are_the_very_next_token(tokenizer: PreTrainedTokenizerFast) -> None:
    for form in available_forms(tokenizer, ITEMS[0]):
        prompt = render(tokenizer, ITEMS[0], "harm", "incorrect_first", form)
        assert prompt.correct_letter == "B"
        for letter, token in zip("BA", prompt.letter_ids, strict=True):
            longer = tokenizer(prompt.text + form.before_letter + letter, add_special_tokens=False)["input_ids"]
            assert tuple(longer) == (*prompt.tokens, token)
            assert tokenizer.decode([token]).strip() == f"{form.before_letter}{letter}".strip()
        assert prompt.letter_ids[0] != prompt.letter_ids[1]


def test_forms_are_distinct_and_named(word_tokenizer: PreTrainedTokenizerFast, bpe: PreTrainedTokenizerFast) -> None:
    """Spaces mean nothing to the word tokenizer, so " A" is the bare letter; to the byte tokenizer they differ."""
    assert [form.name for form in available_forms(word_tokenizer, ITEMS[0])] == ["A", "(|A"]
    assert [form.name for form in available_forms(bpe, ITEMS[0])] == ["A", " A", "(|A"]
    assert [form.name for form in LETTER_FORMS] == ["A", " A", "(A", "(|A"]


def test_an_opened_turn_ends_in_its_bracket(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = render(tokenizer, ITEMS[0], "none", "correct_first", BARE)
    prompt = render(tokenizer, ITEMS[0], "none", "correct_first", OPENED)
    assert prompt.text == bare.text + "("
    assert covered(tokenizer, prompt, "answer").endswith("(")
    for name in ("question", "option_A", "option_B"):
        assert prompt.spans[name] == bare.spans[name]


def test_an_open_question_has_only_its_question(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = render_open(tokenizer, ITEMS[0].question)
    assert covered(tokenizer, prompt, "question").strip() == ITEMS[0].question
    assert prompt.span("answer") == (len(prompt.tokens) - 1,)
    assert "(A)" not in prompt.text
    assert INSTRUCTION not in prompt.text
    with pytest.raises(QklensError, match=r"span 'option_A' is not in this prompt; it has \['answer', 'question'\]"):
        prompt.span("option_A")


def test_an_absent_span_names_those_that_are_there(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = render(tokenizer, ITEMS[0], "none", "correct_first", BARE)
    with pytest.raises(QklensError, match=r"span 'intent' is not in this prompt; it has \['answer', 'correct'"):
        prompt.span("intent")
