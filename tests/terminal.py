"""What a terminal is shown, read back; and a name that would move its cursor."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

HOSTILE = "x\x1b[2J\x1b]0;title\x07\r\n\u202e\x9b31m"


def lines_of(out: str) -> list[str]:
    """The lines of a table, none of which can move a cursor."""
    lines = out.removesuffix("\n").split("\n")
    strange = {char for line in lines for char in line if unicodedata.category(char) in ("Cc", "Cf", "Cs")}
    assert strange == set()
    return lines


def parsed(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)
