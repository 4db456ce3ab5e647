"""Token windows of a text file: nothing lost, nothing read that is not needed, nothing obeyed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qklens.analyses.text_windows import BYTES_PER_TOKEN, MIN_TOKENS, text_windows
from qklens.errors import QklensError
from qklens.models.families import load_family
from qklens.models.subject import Subject, wrap_model

CONTEXT = 256
LONG = "Once upon a time a fox saw a crow, and the crow had some cheese; the fox wanted the cheese very much indeed."
SHORT = "The crow flew off."


def byte_level(*, bos: bool) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator([LONG, SHORT], trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|im_start|>"]
    )


def words_only() -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary holds its control token as a word, so that splitting does not take it apart."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "crow": 2, "the": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")


def subject_with(tokenizer: PreTrainedTokenizerFast) -> Subject:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    return wrap_model(LlamaForCausalLM(config), tokenizer, load_family("llama"))


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_with(byte_level(bos=request.param))


@pytest.fixture(scope="module")
def plain() -> Subject:
    return subject_with(byte_level(bos=False))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "text.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_windows_hold_the_text_in_order_and_bos_where_the_tokenizer_puts_one(subject, file):
    text = f"  {LONG}\n{LONG} naïve 日本 𝔘.\n\n{SHORT}\n\n{LONG}"
    windows = text_windows(subject, file(text), width=40)
    whole = subject.tokenizer.encode(text, add_special_tokens=False)
    front = [0] if subject.tokenizer.encode("a")[0] == 0 else []
    assert len(windows) == 3
    assert all(len(w.tokens) <= 40 for w in windows)
    assert all(list(w.tokens[: len(front)]) == front for w in windows)
    assert 1 not in {token for w in windows for token in w.tokens}, "the end token is none of the text's"
    held = [token for w in windows for token in w.tokens[len(front) :]]
    assert held == whole[: len(held)]
    assert len(whole) - len(held) < MIN_TOKENS
    for w in windows:
        assert len(w.ranges) == len(w.tokens)
        assert w.piece(0, len(w.tokens)) == w.text
        assert w.piece(0, len(front)) == ""
        assert w.unknown == 0
    assert text.startswith("".join(w.text for w in windows))


def test_pieces_are_the_characters_with_their_white_space(plain, file):
    (w,) = text_windows(plain, file(f"{SHORT} 𝔘 the crow"), width=64)
    pieces = [w.piece(i, i + 1) for i in range(len(w.tokens))]
    assert pieces[:4] == ["The", " crow", " flew", " off"]
    assert pieces.count("𝔘") >= 2, "each of the tokens that share its bytes covers the character"
    assert pieces[-1] == " crow"
    (bare,) = text_windows(subject_with(words_only()), file("the crow\n the  crow"))
    assert [bare.piece(i, i + 1) for i in range(4)] == ["the", " crow", "\n the", "  crow"], "no space is counted there"
    assert w.piece(-3, 2) == "The crow"
    assert w.piece(len(pieces) - 1, len(pieces) + 9) == " crow"


def test_a_window_ends_at_the_last_paragraph_of_its_second_half(plain, file):
    n = {text: len(plain.tokenizer.encode(text)) for text in (LONG, "\n\n", SHORT)}
    path = file("\n\n".join([LONG, SHORT, SHORT, LONG]))
    almost = n[LONG] + n["\n\n"] + n[SHORT]
    assert text_windows(plain, path, width=almost)[0].text == f"{LONG}\n\n"
    room = n[LONG] + 2 * (n["\n\n"] + n[SHORT]) + n["\n\n"] + 3
    assert [w.text for w in text_windows(plain, path, width=room)] == [f"{LONG}\n\n{SHORT}\n\n{SHORT}\n\n", LONG]
    width = 2 * (2 * n[SHORT] + n["\n\n"]) + 9
    early = text_windows(plain, file(f"{SHORT} {SHORT}\n\n{LONG} {LONG}"), width=width)
    assert len(early[0].tokens) == width, "a paragraph in the first half ends no window"


def test_windows_line_breaks_are_line_breaks_and_a_byte_order_mark_is_no_text(plain, file):
    one = text_windows(plain, file(f"{LONG}\n\n{LONG}"), width=64)
    assert text_windows(plain, file(b"\xef\xbb\xbf" + f"{LONG}\r\n\r\n{LONG}".encode()), width=64) == one


def test_no_more_is_read_than_needed(plain, file):
    """What lies far behind is not even decoded; the cut falls between words, and never splits a character."""
    prose = (SHORT + " é ").encode() * 400
    assert len(prose) > BYTES_PER_TOKEN * 2 * 20
    windows = text_windows(plain, file(prose + b"\xff"), width=20, limit=2)
    assert [len(w.tokens) for w in windows] == [20, 20]
    (w,) = text_windows(plain, file("x" + "é" * 999), width=20, limit=1)
    assert set(w.text) <= {"x", "é"}, "an even number of bytes ends in the middle of an é"


def test_a_file_that_is_cut_loses_the_cut_word(file):
    subject, begin = subject_with(words_only()), "the crow the crow"
    spaces = " " * (BYTES_PER_TOKEN * 20 - len(begin) - 3)
    (w,) = text_windows(subject, file(begin + spaces + "crow the"), width=20, limit=1)
    assert (w.tokens, w.unknown) == ((3, 2, 3, 2), 0)


def test_a_short_text_is_one_window_and_a_short_rest_is_none(plain, file):
    (w,) = text_windows(plain, file("The crow flew."))
    assert len(w.tokens) < MIN_TOKENS
    n = len(plain.tokenizer.encode(LONG))
    assert [len(w.tokens) for w in text_windows(plain, file(LONG), width=n - MIN_TOKENS + 1)] == [n - MIN_TOKENS + 1]
    assert [len(w.tokens) for w in text_windows(plain, file(LONG), width=n - MIN_TOKENS)] == [
        n - MIN_TOKENS,
        MIN_TOKENS,
    ]


def test_the_models_context_is_never_exceeded(subject, file):
    windows = text_windows(subject, file(LONG * 40), width=10**6, limit=3)
    assert [len(w.tokens) for w in windows] == [CONTEXT] * 3


def test_control_tokens_in_the_text_are_plain_text(subject, file):
    text = "<s></s><|im_start|>system\nThe crow</s> flew off.<|im_start|>"
    assert {0, 1, 2} <= set(subject.tokenizer.encode(text, add_special_tokens=False)), "unsplit, they would be obeyed"
    (w,) = text_windows(subject, file(text))
    front = w.ranges.count((0, 0))
    assert not {0, 1, 2} & set(w.tokens[front:])
    assert w.text == text
    assert subject.tokenizer.encode("</s>", add_special_tokens=False) == [1], "and the tokenizer is left as it was"


def test_a_control_token_that_is_also_a_word_is_refused(file):
    with pytest.raises(QklensError, match="holds '<end>', which this tokenizer can only read as a control token"):
        text_windows(subject_with(words_only()), file("the crow <end> the crow"))


def test_unknown_words_are_counted(file):
    (w,) = text_windows(subject_with(words_only()), file("the crow saw the fox"))
    assert (w.unknown, len(w.tokens)) == (2, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" \n\t\n", "holds no text"),
        (b"caf\xe9 au lait", "not UTF-8 text .* near byte 3"),
        ("crow".encode("utf-16"), "not UTF-8 text"),
        ("The crow é".encode()[:-1], "not UTF-8 text"),
        (b"The crow", "its text is 2 tokens .* expected at least 4"),
    ],
)
def test_files_that_are_no_text_are_refused_in_one_line(content, message, plain, file):
    with pytest.raises(QklensError, match=message) as caught:
        text_windows(plain, file(content))
    assert str(caught.value).startswith(str(file(content)))
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_file_are_refused(plain, tmp_path):
    with pytest.raises(QklensError, match="Is a directory"):
        text_windows(plain, tmp_path)
    with pytest.raises(QklensError, match="No such file"):
        text_windows(plain, tmp_path / "none.txt")


@pytest.mark.parametrize(("width", "limit"), [(MIN_TOKENS, 1), (64, 0)])
def test_too_little_room_is_refused(width, limit, plain, file):
    with pytest.raises(QklensError, match=f"{limit} windows of {width} tokens; expected at least 1 window of"):
        text_windows(plain, file(LONG), width=width, limit=limit)
