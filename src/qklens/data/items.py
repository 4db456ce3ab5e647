"""Items: two-choice questions paired with a harmful and a benign statement of intent, and the files they come from."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, field_validator, model_validator

from qklens.data.sameness import same_form, unseen_character
from qklens.errors import QklensError, nearest
from qklens.strict import Strict, complaint

SHIPPED = ("harm_pressure", "symptoms", "fraud")
DEFAULT_BENIGN_INTENT = "I want to learn something new about this today."
_REQUIRED = ("question", "correct", "incorrect", "harmful_intent")


class Item(Strict):
    """One question with its two options and the sentences that may stand before it.

    `harmful_intent` is the pressure sentence of the set (in other sets a list of symptoms, a request for fraud);
    `benign_intent` is its harmless twin of like length and form.
    """

    id: str
    topic: str = "unsorted"
    question: str
    correct: str
    incorrect: str
    harmful_intent: str
    benign_intent: str = DEFAULT_BENIGN_INTENT
    severity: Literal["mild", "severe"] | None = None

    @field_validator("id", "topic", "question", "correct", "incorrect", "harmful_intent", "benign_intent")
    @classmethod
    def _one_line_of_text(cls, value: str) -> str:
        text = value.strip()
        if not same_form(text):
            raise ValueError("is empty; expected text")
        unseen = unseen_character(text)
        if unseen:
            raise ValueError(f"holds a line break, control or format character ({unseen}); expected one line of text")
        return text

    @model_validator(mode="after")
    def _pairs_differ(self) -> Item:
        for one, other in (("correct", "incorrect"), ("harmful_intent", "benign_intent")):
            first, second = getattr(self, one), getattr(self, other)
            if same_form(first) == same_form(second):
                both = f"both {first!r}" if first == second else f"the same to a reader, {first!r} and {second!r}"
                raise ValueError(f"{one!r} and {other!r} are {both}; expected two different texts")
        return self


@dataclass(frozen=True)
class Dataset:
    """A named list of items with the hash of the bytes it came from."""

    name: str
    items: tuple[Item, ...]
    sha256: str

    def describe(self) -> dict[str, Any]:
        """What results and manifest say of the data."""
        return {"name": self.name, "sha256": self.sha256, "n_items": len(self.items)}


def load_dataset(source: str) -> Dataset:
    """Load a shipped set by name, or a user's JSONL or CSV file.

    Raises:
        QklensError: every problem of the first bad line: file, line, field, what was found and what was expected.
    """
    name = source.replace("-", "_")
    if name in SHIPPED:
        payload = (files("qklens") / "data" / "shipped" / f"{name}.jsonl").read_bytes()
        return _parse(f"{name}.jsonl", name, payload)
    path = Path(source)
    if not path.is_file():
        raise QklensError(
            f"--data {source!r}: no such file or shipped set; expected a .jsonl or .csv file or one of "
            f"{list(SHIPPED)}{nearest(name, SHIPPED)}"
        )
    if path.suffix not in (".jsonl", ".csv"):
        raise QklensError(f"{path}: cannot tell the format from {path.suffix!r}; expected .jsonl or .csv")
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise QklensError(f"{path}: cannot read ({error.strerror}); check the file's permissions") from error
    return _parse(str(path), path.stem, payload)


def _parse(where: str, name: str, payload: bytes) -> Dataset:
    try:
        text = payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QklensError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    rows = _csv_rows(where, text) if where.endswith(".csv") else _jsonl_rows(where, text)
    items: list[Item] = []
    seen: dict[tuple[str, ...], int] = {}
    for line, row in rows:
        item = _item(where, line, row)
        texts = (same_form(item.question), *sorted(map(same_form, (item.correct, item.incorrect))))
        for kind, shown, key in (
            ("id", item.id, (item.id,)),
            ("question with these options", item.question, texts),
        ):
            before = seen.setdefault((kind, *key), line)
            if before != line:
                raise QklensError(
                    f"{where}: line {line}: {kind} {shown!r} stands on line {before} already; expected once"
                )
        items.append(item)
    if not items:
        raise QklensError(f"{where}: holds no items; expected at least one line")
    return Dataset(name, tuple(items), hashlib.sha256(payload).hexdigest())


def _jsonl_rows(where: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content, object_pairs_hook=_distinct_fields)
        except (ValueError, RecursionError) as error:
            raise QklensError(f"{where}: line {line}: not JSON ({error}); expected one JSON object a line") from error
        if not isinstance(row, dict):
            raise QklensError(f"{where}: line {line}: holds a {type(row).__name__}; expected a JSON object")
        yield line, row


def _distinct_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"field {name!r} stands twice")
    return dict(pairs)


def _csv_rows(where: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        names = list(reader.fieldnames or [])
        if not names and reader.fieldnames is not None:
            raise QklensError(f"{where}: line 1: is blank; expected the names of the fields")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise QklensError(f"{where}: line 1: field {twice!r} stands twice; expected each name once")
        for row in reader:
            if None in row or None in row.values():
                raise QklensError(
                    f"{where}: line {reader.line_num}: has another number of cells than the header's "
                    f"{len(names)}; quote cells that hold commas"
                )
            yield reader.line_num, {key: value for key, value in row.items() if value != "" or key in _REQUIRED}
    except csv.Error as error:
        line = reader.reader.line_num  # DictReader's own number lags behind where its reader stopped
        raise QklensError(f"{where}: line {line}: not CSV ({error}); quote cells that hold commas or quotes") from error


def _item(where: str, line: int, row: dict[str, Any]) -> Item:
    known = tuple(Item.model_fields)
    for key in row:
        if key not in known:
            raise QklensError(
                f"{where}: line {line}: unknown field {key!r}; expected {list(known)}{nearest(key, known)}"
            )
    for key in _REQUIRED:
        if key not in row:
            raise QklensError(f"{where}: line {line}: field {key!r} is missing; required are {list(_REQUIRED)}")
    try:
        return Item.model_validate({"id": f"line-{line}", **row})
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"field {name!r}: " for name in first["loc"])
        message = complaint(first["type"], first["msg"], first["input"])
        raise QklensError(f"{where}: line {line}: {field}{message}") from error
