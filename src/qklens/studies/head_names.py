"""How a head is written, `L2H4` or `2.4`, and read."""

from __future__ import annotations

import re

_HEAD = re.compile(r"L?(\d{1,6})[H.](\d{1,6})", re.IGNORECASE)


def head_named(text: str) -> tuple[int, int] | None:
    """Layer and head of a name, or nothing where it is none."""
    match = _HEAD.fullmatch(text)
    return None if match is None else (int(match[1]), int(match[2]))


def head_name(head: tuple[int, int]) -> str:
    """The name of a head, as L2H4."""
    return f"L{head[0]}H{head[1]}"
