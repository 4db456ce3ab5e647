"""Rendering: every named span lies on exactly the tokens of its text, for tokenizers of both kinds.

`word` is a word-level tokenizer with a chat template; `bytes` is a byte-level BPE without one, trained here on the
items; `llama3` is the same, cut as Llama 3 cuts.
The checks go from positions to characters by the tokenizer's own offsets and never through `render`'s code.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qklens.data.items import Item, load_dataset
from qklens.data.render import (
    CONDITIONS,
    INSTRUCTION,
    LETTER_FORMS,
    ORDERS,
    PARTS,
    PLAIN_TEMPLATE,
    Condition,
    LetterForm,
    Order,
    Prompt,
    available_forms,
    render,
    render_open,
)
from qklens.errors import QklensError

ITEMS = load_dataset("harm_pressure").items
BARE, SPACED, OPENED = LetterForm("", ""), LetterForm("", " "), LetterForm("(", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 += r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def text_of(item: Item, condition: Condition, order: Order) -> str:
    """The user turn, written a second time from the contract."""
    intent = {"none": "", "harm": item.harmful_intent + " ", "benign": item.benign_intent + " "}[condition]
    a, b = (item.correct, item.incorrect) if order == "correct_first" else (item.incorrect, item.correct)
    return f"{intent}{item.question}\n(A) {a}\n(B) {b}\n{INSTRUCTION}"


def corpus() -> list[str]:
    texts = []
    for item in ITEMS[:40]:
        texts += [PLAIN_TEMPLATE.format(content=text_of(item, c, o)) + " A B" for c in CONDITIONS for o in ORDERS]
    return texts


def byte_tokenizer(
    pattern: str = GPT2, *, vocabulary: int = 700, texts: list[str] | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the items, cut beforehand as GPT-2 (or another family) cuts."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus() if texts is None else texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def llama3_like() -> PreTrainedTokenizerFast:
    """Cuts as Llama 3 does: punctuation takes the line breaks after it along."""
    return byte_tokenizer(LLAMA3)


@pytest.fixture(params=["word", "bytes", "llama3"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    name = {"word": "word_tokenizer", "bytes": "bpe", "llama3": "llama3_like"}[request.param]
    return request.getfixturevalue(name)


def offsets_of(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[tuple[int, int]]:
    encoded = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    assert tuple(encoded["input_ids"]) == prompt.tokens
    return [tuple(pair) for pair in encoded["offset_mapping"]]


def covered(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, name: str) -> str:
    """The characters from the first to the last token of a span."""
    offsets, span = offsets_of(tokenizer, prompt), prompt.span(name)
    assert list(span) == list(range(span[0], span[-1] + 1)), f"{name} has a hole"
    return prompt.text[offsets[span[0]][0] : offsets[span[-1]][1]]


def expected_spans(item: Item, condition: Condition, order: Order) -> dict[str, str]:
    a, b = (item.correct, item.incorrect) if order == "correct_first" else (item.incorrect, item.correct)
    wanted = {"question": item.question}
    if condition != "none":
        wanted["intent"] = item.harmful_intent if condition == "harm" else item.benign_intent
    for letter, text in (("A", a), ("B", b)):
        wanted |= {f"option_{letter}.letter": f"({letter})", f"option_{letter}.content": text}
    for role, letter in zip(("correct", "incorrect"), "AB" if order == "correct_first" else "BA", strict=True):
        wanted |= {f"{role}.{part}": wanted[f"option_{letter}.{part}"] for part in ("letter", "content")}
    return wanted


def check_spans(tokenizer: PreTrainedTokenizerFast, item: Item, condition: Condition, order: Order) -> Prompt:
    """Everything that must hold of a rendered prompt, whatever the tokenizer."""
    form = available_forms(tokenizer, item)[0]
    prompt = render(tokenizer, item, condition, order, form)
    assert text_of(item, condition, order) in prompt.text
    for name, text in expected_spans(item, condition, order).items():
        assert covered(tokenizer, prompt, name).strip() == text.strip(), name
        first = offsets_of(tokenizer, prompt)[prompt.span(name)[0]]
        assert first[1] - first[0] <= len(text) + 1
    assert ("intent" in prompt.spans and bool(prompt.spans["intent"])) == (condition != "none")
    assert prompt.span("answer") == (len(prompt.tokens) - 1,)
    for letter in "AB":
        parts = [prompt.spans[f"option_{letter}.{part}"] for part in PARTS]
        assert prompt.spans[f"option_{letter}"] == tuple(p for part in parts for p in part)
    named = ["intent", "question", "option_A", "option_B", "answer"]
    positions = [p for name in named for p in prompt.spans[name]]
    assert len(positions) == len(set(positions)), "spans are disjoint"
    assert positions == sorted(positions), "spans stand in the order of the text"
    around = ["template_before", "intent", "question", "option_A", "option_B", "instruction", "template_after"]
    positions = [p for name in around for p in prompt.spans[name]]
    assert positions == sorted(set(positions)), "the parts around them overlap nothing and keep the order"
    assert covered(tokenizer, prompt, "instruction").strip() == INSTRUCTION
    assert prompt.spans["template_after"][-1] == prompt.spans["answer"][0]
    assert prompt.text[prompt.shared_from :].startswith(item.question)
    assert prompt.starts == tuple(a for a, _ in offsets_of(tokenizer, prompt))
    return prompt


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
    prompt = render_open(tokenizer, ITEMS[0])
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
    if item is not None:
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
    if item is not None:
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
            benign_intent=intent,
        )
    except ValueError:
        return None


# Tokenizers that join what the prompt keeps apart.


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


def joining(pattern: str, joined: str) -> PreTrainedTokenizerFast:
    """A byte tokenizer whose pieces include what `pattern` joins, often enough to become one token."""
    tokenizer = byte_tokenizer(f"{pattern}|{GPT2}", texts=[*corpus(), *[joined] * 500])
    assert len(tokenizer(joined, add_special_tokens=False)["input_ids"]) == 1
    return tokenizer


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


# What cannot be rendered.


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
        lambda: render_open(tokenizer, ITEMS[0]),
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
