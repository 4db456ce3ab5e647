"""The configuration of a foreign dictionary: keys that change numbers are never guessed.

Such files hold many keys of training that do not matter here, so unknown keys cannot be refused. A missing one names
the nearest key that is there, and an optional one that looks misspelt is refused: its default would be used in silence.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from qklens.errors import QklensError, nearest
from qklens.files import read_json

T = TypeVar("T", int, float, str, bool, dict)
_ALIKE = 0.85
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object"}


class Fields:
    """A JSON object whose keys are asked for one by one."""

    def __init__(self, path: Path, content: Any, known: Iterable[str] = ()) -> None:  # noqa: ANN401
        """Wrap a parsed JSON file.

        Args:
            path: the file, for errors.
            content: what it holds.
            known: keys that are no misspelling of any other.

        Raises:
            QklensError: the content is no JSON object.
        """
        if not isinstance(content, dict):
            raise QklensError(f"{path}: holds {type(content).__name__}, expected a JSON object")
        self.path, self.content, self.known = path, content, frozenset(known)

    @classmethod
    def read(cls, path: Path, known: Iterable[str] = ()) -> Fields:
        """The fields of a JSON file."""
        return cls(path, read_json(path), known)

    def need(self, key: str, kind: type[T]) -> T:
        """A value that must be there.

        Raises:
            QklensError: a missing key, or a value of another kind.
        """
        if key not in self.content:
            raise QklensError(f"{self.path}: key {key!r} is missing{nearest(key, self.content)}")
        return self._checked(key, kind)

    def get(self, key: str, default: T, kind: type[T]) -> T:
        """A value that may be left out or null.

        Raises:
            QklensError: a key that looks like this one misspelt, or a value of another kind.
        """
        if key in self.content:
            return default if self.content[key] is None else self._checked(key, kind)
        stray = [other for other in self.content if other not in self.known]
        close = difflib.get_close_matches(key, stray, n=1, cutoff=_ALIKE)
        if close:
            raise QklensError(f"{self.path}: key {close[0]!r} is unknown; did you mean {key!r}?")
        return default

    def inner(self, key: str) -> Fields:
        """The fields of an object inside."""
        return Fields(self.path, self.need(key, dict), self.known)

    def _checked(self, key: str, kind: type[T]) -> T:
        value = self.content[key]
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = whole if kind is int else isinstance(value, float) or whole if kind is float else isinstance(value, kind)
        if not fits:
            raise QklensError(f"{self.path}: key {key!r} is {str(value)[:60]!r}, expected {_WORDS[kind]}")
        return cast("T", float(value) if kind is float else value)
