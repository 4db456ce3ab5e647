"""Spans of any text, and under tokenizers that join what the prompt keeps apart."""

from __future__ import annotations

import pytest
from byte_tokenizers import ITEMS, LLAMA3, SPACED, byte_tokenizer, corpus, joining
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spans import check_spans, covered
from transformers import PreTrainedTokenizerFast

from qklens.data.items import Item
from qklens.data.render import (
    CONDITIONS,
    ORDERS,
    Condition,
    Order,
    available_forms,
    render,
)
from qklens.errors import QklensError

# Words that no training text had, in any script: byte-level tokens then split letters, and a character may take many.
words = st.lists(
    st.text(st.characters(categories=["Ll", "Lu", "Lo", "Nd", "Po"], exclude_characters="\\"), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(
    question=words,
    correct=words,
    incorrect=words,
    intent=words,
    condition=st.sampled_from(CONDITIONS),
    order=st.sampled_from(ORDERS),
    pattern=st.sampled_from(["bpe", "llama3_like"]),
)
def test_spans_hold_for_any_text_in_byte_level_tokens(
    bpe: PreTrainedTokenizerFast,
    llama3_like: PreTrainedTokenizerFast,
    question: str,
    correct: str,
    incorrect: str,
    intent: str,
    condition: Condition,
    order: Order,
    pattern: str,
) -> None:
    item = any_item(question, correct, incorrect, intent)
    assume(item is not None)
    check_spans({"bpe": bpe, "llama3_like": llama3_like}[pattern], item, condition, order)


known = st.lists(
    st.sampled_from(sorted({w for i in ITEMS for w in i.question.rstrip("?").split()})), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=40)
@given(
    question=known,
    correct=known,
    incorrect=known,
    intent=known,
    condition=st.sampled_from(CONDITIONS),
    order=st.sampled_from(ORDERS),
)
def test_spans_hold_for_any_known_words(
    word_tokenizer: PreTrainedTokenizerFast,
    question: list[str],
    correct: list[str],
    incorrect: list[str],
    intent: list[str],
    condition: Condition,
    order: Order,
) -> None:
    item = any_item(*(" ".join(part) for part in (question, correct, incorrect, intent)))
    assume(item is not None)
    prompt = check_spans(word_tokenizer, item, condition, order)
    assert len(prompt.spans["question"]) == len(question), "one word, one token"
    assert len(prompt.spans["correct.content"]) == len(correct)


def any_item(question: str, correct: str, incorrect: str, intent: str) -> Item | None:
    """An item of these texts, or None where they are no item."""
    try:
        return Item(
            id="any",
            question=question,
            correct=correct,
            incorrect=incorrect,
            harmful_intent=intent,
            benign_intent=f"{intent} {question}",
        )
    except ValueError:
        return None


def test_a_line_break_joined_to_the_option_belongs_to_its_content(llama3_like: PreTrainedTokenizerFast) -> None:
    """Llama 3 cuts ".\\n" as one piece; every token stays in exactly one part, and the boundary is empty."""
    item = ITEMS[0].model_copy(update={"correct": "a grease fire.", "incorrect": "a paper fire"})
    texts = [*corpus(), *["a grease fire.\n(B) next"] * 50]
    tokenizer = byte_tokenizer(LLAMA3, texts=texts)
    prompt = render(tokenizer, item, "none", "correct_first", available_forms(tokenizer, item)[0])
    assert covered(tokenizer, prompt, "correct.content").strip(" ") == "a grease fire.\n"
    assert prompt.spans["correct.boundary"] == ()
    assert covered(tokenizer, prompt, "incorrect.boundary") == "\n"
    with pytest.raises(QklensError, match=r"span 'correct\.boundary'"):
        prompt.span("correct.boundary")
    assert prompt.spans["correct"][-1] + 1 == prompt.spans["incorrect"][0]


@pytest.mark.parametrize(
    ("pattern", "joined", "owner"),
    [
        (r"\n\(", "\n(", {"option_A.letter", "option_B.letter"}),
        (r"\?\n", "?\n", {"question"}),
        (r"\) ", ") ", {"option_A.letter", "option_B.letter"}),
        (r"\?\n\(A\)", "?\n(A)", {"question"}),
    ],
    ids=["break+bracket", "mark+break", "bracket+space", "mark+break+letter"],
)
def test_a_token_that_joins_two_parts_belongs_to_one(pattern: str, joined: str, owner: set[str]) -> None:
    tokenizer = joining(pattern, joined)
    (token,) = tokenizer(joined, add_special_tokens=False)["input_ids"]
    prompt = render(tokenizer, ITEMS[0], "harm", "correct_first", available_forms(tokenizer, ITEMS[0])[0])
    where = [p for p, t in enumerate(prompt.tokens) if t == token]
    assert where, "the joined token occurs"
    roles = {name for name, span in prompt.spans.items() if set(where) & set(span) and name.startswith(("q", "option"))}
    assert {name for name in roles if "." in name or name == "question"} == owner
    named = ["intent", "question", "option_A", "option_B", "answer"]
    positions = [p for name in named for p in prompt.spans[name]]
    assert len(positions) == len(set(positions))


def test_an_option_without_a_token_of_its_own_is_refused() -> None:
    item = ITEMS[0].model_copy(update={"correct": "."})
    tokenizer = joining(r"\(A\) \.\n", "(A) .\n")
    with pytest.raises(QklensError, match=r"'kitchen-01': correct\.content has no token of its own"):
        render(tokenizer, item, "none", "correct_first", SPACED)
