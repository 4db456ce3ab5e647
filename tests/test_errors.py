"""Lines fit for a terminal, also when the reason is another library's long or many-lined message."""

from __future__ import annotations

from qklens.errors import QklensError, nearest, reason


def test_a_line_is_one_line() -> None:
    assert str(QklensError("two\n  lines\tand  a tab")) == "two lines and a tab"


def test_a_reason_is_whole() -> None:
    assert reason(ValueError("one of:\n(1) a file,\n(2) a class. ")) == "one of: (1) a file, (2) a class"


def test_a_reason_without_words_has_its_kind() -> None:
    assert reason(RuntimeError()) == "RuntimeError"
    assert reason(KeyError("added_tokens")) == "KeyError: 'added_tokens'"


def test_a_long_reason_ends_with_a_sentence_or_says_that_it_goes_on() -> None:
    assert reason(ValueError("The file is short. " + "Nobody reads this " * 40)) == "The file is short"
    endless = reason(ValueError("word " * 200))
    assert endless.endswith("word ...")
    assert len(endless) < len("word " * 200) / 2


def test_a_hint_is_given_only_for_a_near_name() -> None:
    assert nearest("qeury", ["query", "key"]) == "; did you mean 'query'?"
    assert nearest("residual", ["query", "key"]) == ""
