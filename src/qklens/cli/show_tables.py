"""Tables on the terminal: plain columns that any pipe keeps readable; what would move a cursor is drawn or replaced."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from qklens.cli.columns import MISSING, columns, signed, write

if TYPE_CHECKING:
    from qklens.analyses.on_text import HeadOnText
    from qklens.studies.tables.head_table import HeadTable
    from qklens.studies.tables.partner_table import PartnerRow, PartnerTable


def heads(table: HeadTable, top: int, figure: Path | None) -> None:
    """The first heads by cross-validation and effect, and what the chosen ones do on items left out."""
    by_patch = table.ranked_by == "patch_gain"
    margins = ", ".join(f"{c} {m:+.2f}" for c, m in table.margin.items())
    lines = [f"{table.model['name']}: {len(table.heads)} heads, {table.data['n_items']} items; margins {margins}", ""]
    lines += columns(
        (
            "head",
            "attends",
            "letter",
            "content",
            "boundary",
            "harm",
            "QK-score",
            "copies",
            "ablated",
            "patched",
            "folds",
        ),
        [
            (
                f"L{r.layer}H{r.head}",
                signed(r.attention_difference["none"]),
                *(signed(r.attention_difference_by_part[part]) for part in ("letter", "content", "boundary")),
                signed(r.attention_difference["harm"]),
                signed(r.score_difference["all"]),
                signed(r.letter_logit),
                signed(-r.ablation_drop),
                signed(r.patch_gain),
                f"{r.chosen_in}/{len(table.folds)}",
            )
            for r in table.heads[:top]
        ],
    )
    done = "giving their clean patterns back under harm" if by_patch else "ablating them without pressure"
    found = f"{done} changes the margin by {signed(table.held_out_effect if by_patch else -table.held_out_effect)}"
    if table.held_out_share is not None and table.held_out_share_ci is not None:
        low, high = table.held_out_share_ci
        of = "of what harm takes" if by_patch else "of it"
        found += f", {100 * table.held_out_share:.0f}% [{100 * low:.0f}, {100 * high:.0f}] {of}"
    else:
        found += "; neither is the margin clearly above zero without pressure, nor does it fall under harm"
    lines += [
        "",
        "attends: attention on the correct - incorrect option, its parts, and the same under harm. QK-score: of",
        "scores. copies: logits written towards the correct letter. ablated, patched (under harm, its pattern from",
        "the bare question): change of the margin in logits. folds: in how many it is chosen, one part left out each.",
        "Rows are of all items, those that chose the head among them; the last line is of items left out alone.",
        f"on items left out: {found}",
    ]
    lines += [f"map: {figure}"] if figure else []
    write(lines + ([""] + [row["words"] for row in table.text] if table.text else []))


def on_text(rows: Sequence[HeadOnText]) -> None:
    """Heads on ordinary text beside MCQ answers."""
    lines: list[str] = []
    for row in rows:
        lines += [row.words]
        kinds = ", ".join(f"{kind} {100 * share:.0f}%" for kind, share in row.text.share.items() if share >= 0.005)
        lines += [f"  attends on text to: {kinds}"]
        lines += [f"  at answers to: {', '.join(f'{k} {100 * s:.0f}%' for k, s in row.answers.share.items())}"]
        for e in row.text.examples[:5]:
            before, after = e.query_context
            lines += [f"  {e.attention:.2f}  {before}[{e.query_token}]{after}  <-  {e.key_token}"]
        if row.text.unknown > 0.05:
            lines += [f"  note: {100 * row.text.unknown:.0f}% of the text's words are unknown to the tokenizer"]
    lines += [
        "",
        "Examples: attention, the [query token] in its context <- the key token; in the order of what the key writes,",
        "attention x length of its value through W_O, each pair of tokens once.",
    ]
    write(lines)


def partners(table: PartnerTable) -> None:
    """Both ends of the mean over heads, and of each head where there are few."""
    other = "keys" if table.side == "query" else "queries"
    lines = [
        f"{table.model['name']} through {table.dictionary}: {table.n_features} features as {other} of "
        f"{table.feature}; offsets: {table.offsets}"
    ]
    single = len(table.columns) == 2
    for column in table.columns[:1] if single else table.columns[-1:] if len(table.columns) > 4 else table.columns:
        of = f"mean over {len(table.columns) - 1} heads" if column.head == "mean" else column.head
        sd = MISSING if column.sd is None else f"{column.sd:.4f}"
        away, drawn = ([r for r in column.lowest if r.value < 0], [r for r in column.highest if r.value > 0])
        lines += [
            "",
            f"{of}: {column.n} features, mean {column.mean:+.4f}, sd {sd}",
            *columns(
                ("pushed away", "value", "z", "drawn in", "value", "z"),
                [(*_partner(low), *_partner(high)) for low, high in zip_longest(away, drawn)],
                left=(0, 3),
            ),
        ]
    lines += ["", "value: virtual interaction of unit vectors; z: its place among all features. --json has every head."]
    write(lines)


def _partner(row: PartnerRow | None) -> tuple[str, str, str]:
    if row is None:
        return "", "", ""
    return row.feature, f"{row.value:+.4f}", MISSING if row.z is None else f"{row.z:+.1f}"
