"""The table of a steering sweep on the terminal: dose and response with the controls beside each other."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from qklens.cli.columns import columns, signed, write
from qklens.studies.tables.steer_words import curve_words

if TYPE_CHECKING:
    from pathlib import Path

    from qklens.studies.tables.steer_rows import SteerRow, SteerTable

_UNKNOWN_NOTED = 0.05


def sweep(table: SteerTable, written: list[Path]) -> None:
    """One block of rows for each place and condition."""
    spec = table.spec
    steered = spec.direction if spec.direction == table.feature else f"{spec.direction} ({table.feature})"
    lines = [
        f"{table.model['name']}, half of {table.data['n_items']} items: {spec.mode} {steered}, unit {spec.unit}, at "
        f"{', '.join(map(str, spec.tokens))}"
    ]
    lines += [
        f"clean, {condition}: accuracy {_percent(c.accuracy)}, margin {signed(c.margin)}"
        for condition, c in table.clean.items()
    ]
    for name, rows in groupby(table.rows, curve_words):
        lines += ["", name, *_block(list(rows))]
    lines += [
        "",
        "Whatever heads and features were not named are chosen on the other half of the items.",
        "accuracy [95% Wilson], margin [95% over items] in logits; attends: attention on the correct - incorrect",
        f"option; KL to the clean run on neutral text, in nats ({table.neutral.windows} windows).",
    ]
    if spec.controls:
        lines.append(
            f"Accuracy of controls: random, {spec.draws} directions of equal norm, mean [lowest, highest]; unrelated, "
            f"{table.unrelated} at equal norm; benign, the same edit there."
        )
    ran, whole = (sum(getattr(c, name) for c in table.cost.values()) for name in ("tokens_x_layers", "whole_prompts"))
    points = sum(c.points for c in table.cost.values())
    if whole:
        share = _percent(ran / whole)
        lines.append(f"{points} points: {ran:,} tokens x layers run, {share} of what whole prompts would take.")
    if table.neutral.unknown > _UNKNOWN_NOTED:
        lines.append(f"note: {_percent(table.neutral.unknown)} of the neutral text is unknown to this tokenizer")
    write(lines + [f"written: {path}" for path in written])


def _block(rows: list[SteerRow]) -> list[str]:
    header = ["strength", "accuracy", "95%", "margin", "95%", "attends", "KL"]
    if rows[0].controls is not None:
        header += ["random", "of draws", "unrelated", "benign"]
    return columns(header, [[*_own(row), *_controls(row)] for row in rows], left=())


def _own(row: SteerRow) -> list[str]:
    return [
        f"{row.strength:g}",
        _percent(row.accuracy),
        f"[{100 * row.ci[0]:.0f}, {100 * row.ci[1]:.0f}]",
        signed(row.margin),
        f"[{signed(row.margin_ci[0])}, {signed(row.margin_ci[1])}]",
        signed(row.attention_difference),
        f"{row.kl:.1e}" if row.kl else "0",
    ]


def _controls(row: SteerRow) -> list[str]:
    if row.controls is None:
        return []
    low, high = row.controls.random.accuracy_range
    return [
        _percent(row.controls.random.accuracy),
        f"[{100 * low:.0f}, {100 * high:.0f}]",
        _percent(row.controls.unrelated.accuracy),
        _percent(row.controls.benign.accuracy),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
