"""Templates and letters that cannot be rendered: one line, and nothing of the template runs free."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from byte_tokenizers import BARE, GPT2, ITEMS, SPACED, byte_tokenizer, corpus, joining
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from qklens.data.render import (
    available_forms,
    render,
    render_open,
)
from qklens.errors import QklensError


def with_template(word_tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer._tokenizer, bos_token="<bos>", unk_token="<unk>")
    copy.chat_template = template
    return copy


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] | replace('\n', ' ') }}{% endfor %}",
        "{% for m in messages %}{{ m['content'][:40] }}{% endfor %}",
        "no content at all",
    ],
    ids=["upper case", "one line", "cut", "dropped"],
)
def test_a_template_that_changes_the_text_is_refused(word_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer = with_template(word_tokenizer, template)
    with pytest.raises(QklensError, match="chat template changes the user's text; expected it verbatim"):
        render(tokenizer, ITEMS[0], "none", "correct_first", BARE)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only systems\nhere') }}",
        "{{ messages[0]['content'].__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
        "{% for %}",
        "{{ messages[0]['content'] | nothing_like_this }}",
    ],
    ids=["raises", "escapes", "divides", "syntax", "filter"],
)
def test_a_template_that_fails_or_attacks_is_one_line(word_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer = with_template(word_tokenizer, template)
    for ask in (
        lambda: render(tokenizer, ITEMS[0], "none", "correct_first", BARE),
        lambda: render_open(tokenizer, ITEMS[0].question),
        lambda: available_forms(tokenizer, ITEMS[0]),
    ):
        with pytest.raises(QklensError, match="chat template fails on one user turn") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_turn_that_the_template_repeats_is_read_at_its_last_place(word_tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages %}{{ m['content'] }}\n{{ m['content'] }}{% endfor %}"
    tokenizer = with_template(word_tokenizer, template)
    prompt = render(tokenizer, ITEMS[0], "none", "correct_first", BARE)
    assert prompt.spans["question"][0] > len(prompt.tokens) // 2


@pytest.mark.parametrize("drop", ["A", "B"])
def test_a_letter_that_the_tokenizer_does_not_know_is_refused(
    make_words: Callable[..., PreTrainedTokenizerFast], drop: str
) -> None:
    with pytest.raises(QklensError, match=f"letter '{drop}' is unknown to the tokenizer; expected one token for it"):
        available_forms(make_words(without=drop), ITEMS[0])


@pytest.fixture
def make_words(word_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedTokenizerFast]:
    """The word tokenizer again, without one of its words."""

    def make(without: str) -> PreTrainedTokenizerFast:
        vocabulary = {word: n for n, word in enumerate(w for w in word_tokenizer.get_vocab() if w != without)}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = word_tokenizer._tokenizer.pre_tokenizer
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
        tokenizer.chat_template = "{{ messages[0]['content'] }}\n"
        return tokenizer

    return make


def test_letters_of_two_tokens_are_refused() -> None:
    """A tokenizer that writes capitals as a shift mark and a small letter has no one-token letters."""
    inner = byte_tokenizer()._tokenizer
    inner.normalizer = normalizers.Sequence([normalizers.Replace("A", "^a"), normalizers.Replace("B", "^b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    with pytest.raises(
        QklensError, match=r"'kitchen-01': letter 'A' is not a single token after the prompt \(2 tokens\)"
    ):
        available_forms(tokenizer, ITEMS[0])


def test_a_letter_that_joins_the_prompt_is_refused() -> None:
    """ "t:A" as one token would change the prompt's own last token."""
    tokenizer = joining(r":A", ":A")
    with pytest.raises(QklensError, match="letter 'A' is not a single token after the prompt"):
        render(tokenizer, ITEMS[0], "none", "correct_first", BARE)
    assert SPACED in available_forms(tokenizer, ITEMS[0])
    assert BARE not in available_forms(tokenizer, ITEMS[0])


def test_a_letter_that_changes_the_tokens_before_it_is_refused() -> None:
    """One token more than before, but not the same ones: the margin would be read at another prompt."""
    cut = r"Assistan(?=t:[AB])|t:(?=[AB])"
    tokenizer = byte_tokenizer(f"{cut}|{GPT2}", texts=[*corpus(), *["Assistant:A"] * 500])
    prompt = render(tokenizer, ITEMS[0], "none", "correct_first", SPACED)
    longer = tokenizer(prompt.text + "A", add_special_tokens=False)["input_ids"]
    assert len(longer) == len(prompt.tokens) + 1
    assert tuple(longer[:-1]) != prompt.tokens
    with pytest.raises(QklensError, match="letter 'A' is not a single token after the prompt"):
        render(tokenizer, ITEMS[0], "none", "correct_first", BARE)
