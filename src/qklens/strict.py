"""The base of every configuration and record: frozen, typed, and closed to unknown keys."""

from __future__ import annotations

import json
import textwrap

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

_SHOWN = 60


class Strict(BaseModel):
    """A frozen pydantic model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def first_complaint(error: ValidationError) -> ErrorDetails:
    """The error to name: an unknown key before a missing one, which is often the same key misspelt."""
    return min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")


def complaint(kind: str, message: str, found: object) -> str:
    """What pydantic found wrong with a value that a file holds, with the value that it leaves out of its message."""
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    shown = textwrap.shorten(json.dumps(found, ensure_ascii=False, default=str), _SHOWN, placeholder=" ...")
    expected = "text" if kind == "string_type" else message.removeprefix("Input should be ")
    return f"is {shown}; expected {expected}"
