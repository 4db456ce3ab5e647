"""Plain columns that any pipe keeps readable, and lines that cannot move a cursor."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from qklens.report.text import printable

MISSING = "-"


def signed(value: float | None) -> str:
    """A number with its sign."""
    return MISSING if value is None else f"{value:+.2f}"


def columns(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Aligned columns, numbers to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def write(lines: Iterable[str]) -> None:
    """Lines on stdout."""
    sys.stdout.write("\n".join(map(printable, lines)) + "\n")
