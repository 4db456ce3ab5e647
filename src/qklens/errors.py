"""The one exception that a user may see: a line that says what, where, what was expected and what to do."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable

_REASON_LENGTH = 400


class QklensError(Exception):
    """Bad input or an impossible request; its text is one line fit for a terminal. The CLI exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class NoSpreadError(QklensError):
    """A null distribution whose draws are all alike: nothing can be placed in it."""


class NothingChangedError(QklensError):
    """An edit that changed no value anywhere: a mistake where one edit was asked for, no effect where all are tried."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint "; did you mean 'x'?" for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def reason(error: BaseException) -> str:
    """Why another library failed, on one line: its whole message, or its first sentences where it goes on and on."""
    message = " ".join(str(error).split()).rstrip(" .;:")
    if not message or isinstance(error, KeyError | AttributeError | IndexError | TypeError):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    if len(message) <= _REASON_LENGTH:
        return message
    sentences = message[:_REASON_LENGTH].rpartition(". ")[0]
    return sentences or textwrap.shorten(message, _REASON_LENGTH, placeholder=" ...")
