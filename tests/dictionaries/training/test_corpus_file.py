"""Corpora from text, JSON lines and parquet: which tokens they give, and what is refused, with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from qklens.dictionaries.training.corpus import Corpus, corpus_of, read_corpus
from qklens.errors import QklensError
from word_level import make_word_tokenizer

TEXTS = ["red fox runs", "blue bird sings a song", "green tree", "old man sleeps here now"]
TEMPLATE = "{% for m in messages %}{% if m['role'] == 'judge' %}{{ raise_exception('no judges') }}{% endif %}" \
    "{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = make_word_tokenizer([*TEXTS, "user assistant"])
    made.chat_template = TEMPLATE
    return made


def words(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> list[str]:
    """The sequences as text, in alphabetical order."""
    return sorted(tokenizer.decode(list(tokens)) for tokens in (*corpus.sequences, *corpus.held_out))


def special(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    return sorted(tokenizer.decode(tokenizer(text)["input_ids"]) for text in texts)


def lines(path: Path, *values: object) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n")
    return path


def test_paragraphs_of_a_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("red fox\nruns\n\n\n" + "\n\n".join(TEXTS[1:]))
    corpus = read_corpus(path, tokenizer, 64)
    assert words(tokenizer, corpus) == special(tokenizer, ["red fox\nruns", *TEXTS[1:]])
    assert len(corpus.held_out) == 1


def test_texts_and_chats_of_json_lines(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A chat goes through the template, which brings its own special tokens; a text gets the tokenizer's."""
    chat = {"messages": [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[2]}]}
    path = lines(tmp_path / "a.jsonl", {"text": TEXTS[1]}, chat, {"text": TEXTS[3], "other": 1})
    expected = special(tokenizer, [TEXTS[1], TEXTS[3]])
    plain = tokenizer(f"user {TEXTS[0]} assistant {TEXTS[2]}", add_special_tokens=False)["input_ids"]
    corpus = read_corpus(path, tokenizer, 64)
    assert words(tokenizer, corpus) == sorted([*expected, tokenizer.decode(plain)])


def test_parquet_gives_the_same_as_json_lines(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    for column, values in (("text", TEXTS), ("messages", chats)):
        path = tmp_path / f"{column}.parquet"
        parquet.write_table(pyarrow.table({"n": list(range(len(values))), column: values}), path)
        same = lines(tmp_path / f"{column}.jsonl", *({column: value} for value in values))
        assert read_corpus(path, tokenizer, 64).sha256 == read_corpus(same, tokenizer, 64).sha256
    parquet.write_table(pyarrow.table({"words": TEXTS}), tmp_path / "other.parquet")
    with pytest.raises(QklensError, match=r"columns are \['words'\]; expected 'messages' or 'text'"):
        read_corpus(tmp_path / "other.parquet", tokenizer, 64)
    parquet.write_table(pyarrow.table({"text": [TEXTS[0], None]}), tmp_path / "none.parquet")
    with pytest.raises(QklensError, match=r"none.parquet, row 2: expected"):
        read_corpus(tmp_path / "none.parquet", tokenizer, 64)
    whole = (tmp_path / "text.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-9])
    with pytest.raises(QklensError, match="not a parquet file that can be read"):
        read_corpus(tmp_path / "cut.parquet", tokenizer, 64)


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(QklensError, match=r"needs the package 'pyarrow': pip install 'qklens\[parquet\]'"):
        read_corpus(tmp_path / "a.parquet", tokenizer, 64)


def test_long_documents_are_cut_and_single_tokens_left_out() -> None:
    corpus = corpus_of([list(range(n)) for n in range(2, 50)])
    assert len(corpus.held_out) == 2
    assert len(corpus.sequences) + len(corpus.held_out) == 48
    again = corpus_of([list(range(n)) for n in range(2, 50)])
    assert (corpus.sequences, corpus.sha256) == (again.sequences, again.sha256)
    assert corpus_of([[1, 2, 3], [4, 5]]).sha256 != corpus_of([[1, 2], [3, 4, 5]]).sha256


def test_pieces_are_no_longer_than_the_context(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": " ".join(TEXTS)} for _ in range(3)))
    corpus = read_corpus(path, tokenizer, 4)
    lengths = [len(s) for s in (*corpus.sequences, *corpus.held_out)]
    assert max(lengths) == 4
    assert min(lengths) >= 2


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "x", r"a.csv: expected a name that ends in .txt, .jsonl, .parquet"),
        ("a.jsonl", '{"text": "red"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "red fox"}\n{"txt": "red"}', 'a.jsonl, line 2: expected {"messages"'),
        ("a.jsonl", '{"messages": []}', "a.jsonl, line 1: expected"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 3}]}', "a.jsonl, line 1: expected"),
        ("a.jsonl", '{"messages": [{"role": "judge", "content": "red"}]}', "line 1: the model's chat template refuses"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.jsonl", '{"text": "red \\ud800 fox"}', r"a.jsonl, line 1: holds \ud800, half of a surrogate pair"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "\\udfff"}]}', r"line 1: holds \udfff, half of a"),
        ("a.jsonl", '{"text": "red fox"}', "holds 1 documents of two tokens or more; expected at least two"),
        ("a.txt", "", "holds 0 documents"),
        ("a.txt", None, "a.txt: cannot read"),
    ],
)  # fmt: skip
def test_what_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(QklensError) as caught:
        read_corpus(tmp_path / name, tokenizer, 64)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_a_tokenizer_without_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_bytes(b"red \xff fox")
    with pytest.raises(QklensError, match="not UTF-8"):
        read_corpus(tmp_path / "a.txt", tokenizer, 64)
    chat = {"messages": [{"role": "user", "content": "red"}]}
    bare = make_word_tokenizer(TEXTS)
    bare.chat_template = None
    with pytest.raises(QklensError, match="line 1: is a chat, and the model's tokenizer has no chat template"):
        read_corpus(lines(tmp_path / "a.jsonl", chat), bare, 64)
