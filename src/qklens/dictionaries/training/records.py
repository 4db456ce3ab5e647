"""Records that a run of training leaves as JSON beside its tensors, read back with one line for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from qklens.errors import QklensError
from qklens.files import read_json
from qklens.strict import Strict, complaint, first_complaint

_Record = TypeVar("_Record", bound=Strict)


def read_record(kind: type[_Record], path: Path, remedy: str) -> _Record:
    """A record of a kind from its file.

    Args:
        kind: of the record.
        path: the file.
        remedy: what to do about a damaged one.

    Raises:
        QklensError: a file that cannot be read, is no JSON object, or has a key that is unknown, missing or wrong.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise QklensError(f"{path}: holds a {type(found).__name__}; expected an object with keys; {remedy}")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = first_complaint(error)
        known = {"extra_forbidden": "is unknown", "missing": "is missing"}
        said = known.get(first["type"]) or complaint(first["type"], first["msg"], first["input"])
        raise QklensError(f"{path}: key {'.'.join(map(str, first['loc']))!r} {said}; {remedy}") from error
