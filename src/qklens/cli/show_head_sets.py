"""The fewest heads on the terminal: what each number of them restores, and what stands beside the smallest set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qklens.cli.columns import MISSING, columns, write

if TYPE_CHECKING:
    from qklens.studies.tables.head_set_table import Beside, HeadSet, HeadSetTable

_WORDS = {
    "random": "random directions",
    "unrelated": "unrelated feature",
    "random_heads": "as many other heads",
    "benign": "same edit, benign",
}


def head_sets(table: HeadSetTable) -> None:
    """The curve from one head to all candidates, then the controls of the smallest set."""
    spec, n = table.steering, len(table.steering["heads"])
    margins = ", ".join(f"{c} {m:+.2f}" for c, m in table.margin.items())
    lines = [
        f"{table.model['name']}: fewest of {n} heads by {table.method}; {table.data['n_items']} items, heads chosen on "
        "one half, numbers of the other",
        f"{spec['direction']}, {spec['mode']} {spec['strength']:g}, {spec['side']} side at "
        f"{', '.join(map(str, spec['tokens']))}; margins {margins}",
        "",
        *columns(
            ("heads", "last one", "margin", "right", "restored", "95%", "frozen", "95%", "by others", "95%"),
            [_row(table, row) for row in table.sets],
            left=(0, 1),
        ),
        "",
        "restored: share of the margin lost under harm, the other heads free. frozen: with each of them held at its",
        "own attention from the answer. by others: what they add, or take, by looking elsewhere.",
        f"smallest set (*), 90% of the best on the half that chose it: {_named(table.smallest) or 'nothing restores'}",
    ]
    if table.beside:
        lines += [
            "",
            *columns(
                ("beside the smallest set", "draws", "margin", "right", "range", "restored", "range"),
                [_control(row) for row in table.beside],
            ),
        ]
        lines += [f"unsteered under benign: {100 * table.accuracy['benign']:.0f}% right"]
    write(lines)


def _row(table: HeadSetTable, row: HeadSet) -> tuple[str, ...]:
    every = len(row.heads) == len(table.steering["heads"])
    mark = " *" if row.heads == table.smallest else ""
    return (
        f"{len(row.heads)}{mark}",
        "all candidates" if every else _named(row.heads[-1:]),
        f"{row.margin:+.2f}",
        f"{100 * row.accuracy:.0f}%",
        *(_percent(row.share), _range(row.share_ci)),
        *(_percent(row.share_frozen), _range(row.share_frozen_ci)),
        *(_percent(row.others, "+"), _range(row.others_ci)),
    )


def _control(row: Beside) -> tuple[str, ...]:
    return (
        _WORDS[row.control],
        str(row.draws),
        f"{row.margin:+.2f}",
        f"{100 * row.accuracy:.0f}%",
        _range(row.accuracy_range) if row.draws > 1 else MISSING,
        _percent(row.share),
        _range(row.share_range) if row.draws > 1 else MISSING,
    )


def _named(heads: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"L{layer}H{head}" for layer, head in heads)


def _percent(value: float | None, sign: str = "") -> str:
    return MISSING if value is None else f"{round(100 * value):{sign}d}%"


def _range(ends: tuple[float, float] | None) -> str:
    return MISSING if ends is None else f"[{round(100 * ends[0])}, {round(100 * ends[1])}]"
