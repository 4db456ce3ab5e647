"""A table whose last column is drawn: coloured text columns beside bars that share its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt

from qklens.report.figures import style
from qklens.report.figures.style import Drawing, Row

ROW_HEIGHT = 17


@dataclass(frozen=True)
class Column:
    """A text column: the rows' field to print, the field that holds its colour, and its width in pixels."""

    field: str
    title: str
    width: int
    color: str | None = None
    align: str = "left"
    bold: bool = False


def height(rows: Sequence[Row]) -> int:
    """Pixels that `rows` need."""
    return ROW_HEIGHT * max(len(rows), 1)


def rows_axis(rows: Sequence[Row]) -> alt.Y:
    """The shared vertical position: the rows' `at`, in the order given."""
    return alt.Y("at:O", sort=[row["at"] for row in rows], axis=None, scale={"paddingInner": 0.25})


def columns(rows: Sequence[Row], wanted: Sequence[Column]) -> Drawing:
    """The text columns as one chart of fixed width, each under its title."""
    total = sum(column.width for column in wanted)
    layers: list[alt.Chart] = []
    left = 0
    for column in wanted:
        at = {"left": left, "right": left + column.width - 8, "center": left + column.width // 2}[column.align]
        mark = style.chart(rows).mark_text(
            align=column.align,  # type: ignore[arg-type]
            baseline="middle",
            fontSize=10.5,
            fontWeight="bold" if column.bold else "normal",
            limit=column.width - 6,
        )
        text = mark.encode(y=rows_axis(rows), x=alt.value(at), text=alt.Text(f"{column.field}:N"))
        layers.append(
            text.encode(color=alt.Color(f"{column.color}:N", scale=None)) if column.color is not None else text
        )
        caption = style.chart([{"title": column.title, "at": rows[0]["at"]}]).mark_text(
            align=column.align,  # type: ignore[arg-type]
            baseline="bottom",
            dy=-ROW_HEIGHT // 2 - 3,
            fontSize=10.5,
            color=style.MUTED,
        )
        layers.append(caption.encode(x=alt.value(at), y=rows_axis(rows), text="title:N"))
        left += column.width
    return alt.layer(*layers).properties(width=total, height=height(rows))
