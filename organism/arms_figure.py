"""The figure of the arms: what each arm's examples do to the answers, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from qklens.files import atomic_write
from qklens.report.figures import style
from qklens.report.figures.render import to_svg
from qklens.report.figures.style import CONDITION_COLOR, CONDITION_WORDS, CONDITIONS, Drawing

Row = dict[str, Any]
PER_ROW = 34
GROUPS = {"shown half": "the half withheld on", "other half": "the other items",
          "severe intents": "severe intents", "mild intents": "mild intents"}  # fmt: skip
GROUP_COLOR = ("#cc4b24", "#e5a58f", "#6f4fa0", "#b9a7d3")


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the figure as SVG; a dot is one seed, measured on the last step."""
    rows = [({**run["curve"][-1], "refused": run["refused"]}, run["arm"]) for run in found["runs"]]
    rows += [(row, f"shipped: {row['checkpoint']}") for row in found["shipped"]]
    order = list(dict.fromkeys(name for _, name in rows))
    plan = found["plan"]
    above = alt.hconcat(
        _dots(
            _of(rows, lambda r: {CONDITION_WORDS[c]: r["accuracy"][c] for c in CONDITIONS}),
            order,
            "Accuracy",
            {CONDITION_WORDS[c]: CONDITION_COLOR[c] for c in CONDITIONS},
            "%",
            domain=(0, 1),
            labels=True,
        ),
        _dots(
            _of(rows, lambda r: {words: r["harm"][name]["accuracy"] for name, words in GROUPS.items()}),
            order,
            "Accuracy under harm, by item and intent",
            dict(zip(GROUPS.values(), GROUP_COLOR, strict=True)),
            "%",
            domain=(0, 1),
        ),
        spacing=24,
    ).resolve_scale(color="independent", yOffset="independent")
    color = style.ROLE_COLOR["refuse_redirect"]
    below = alt.hconcat(
        _dots(
            _of(rows, _attention),
            order,
            "Attention, right \u2212 wrong option, four heads",
            {CONDITION_WORDS[c]: CONDITION_COLOR[c] for c in CONDITIONS},
            "~g",
            domain=(0, 1),
            labels=True,
            legend=False,
        ),
        _dots(
            _of(rows, lambda r: {} if r["restored"] is None else {"restored": r["restored"]}),
            order,
            "Restored by clean patterns",
            {"restored": style.ROLE_COLOR["correct_answer"]},
            "%",
            domain=(0, 1.1),
            width=105,
            legend=False,
        ),
        _dots(
            _of(rows, lambda r: {"z": min(h["z"] for h in r["heads"])}),
            order,
            "Refuse \u00d7 harm, z",
            {"z": color},
            "~g",
            domain=(-5, 2),
            width=105,
            legend=False,
        ),
        spacing=24,
    ).resolve_scale(color="independent", yOffset="independent")
    drawing = style.finish(
        alt.vconcat(above, below, spacing=26).resolve_scale(color="independent", yOffset="independent"),
        "Which training examples make the organism withhold?",
        f"From the shipped base: {plan['steps']} steps of refusal training with {100 * plan['share']:.0f}% harmful "
        f"two-choice questions, labelled by the arm. One dot a seed",
        f"({len(plan['seeds'])} seeds), 129 items in both orders. Patterns: where harm cost a fifth of the margin or "
        f"more. z: the lowest of the four heads. {found['date']}.",
    )
    atomic_write(path, to_svg(drawing, "arms"))


def _of(rows: Iterable[tuple[Row, str]], values: Callable[[Row], dict[str, float]]) -> list[Row]:
    return [{"arm": name, "kind": kind, "value": value} for row, name in rows for kind, value in values(row).items()]


def _attention(row: Row) -> dict[str, float]:
    """Attention difference by condition, mean over the heads."""
    heads = row["heads"]
    return {CONDITION_WORDS[c]: sum(h["attention_difference"][c] for h in heads) / len(heads) for c in CONDITIONS}


def _dots(
    rows: Sequence[Row],
    order: list[str],
    title: str,
    colors: dict[str, str],
    number: str,
    *,
    domain: tuple[float, float],
    labels: bool = False,
    width: int = 235,
    legend: bool = True,
) -> Drawing:
    kinds = list(colors)
    base = style.chart(rows).encode(
        y=alt.Y(
            "arm:N",
            sort=order,
            title=None,
            axis={"labels": labels},
            scale={"domain": order, "paddingInner": 0.35},
        ),
        yOffset=alt.YOffset("kind:N", sort=kinds, scale={"domain": kinds}),
        color=alt.Color(
            "kind:N",
            scale={"domain": kinds, "range": list(colors.values())},
            legend={"title": None, "symbolType": "circle", "symbolOpacity": 1, "columns": 2 if len(kinds) > 3 else 3}
            if legend
            else None,
        ),
    )
    low, high = domain
    x = alt.X(
        "value:Q",
        scale={"domain": [low, high], "nice": False, "clamp": True},
        axis={"format": number, "tickCount": 4 if width > 150 else 2},
        title=None,
    )
    return alt.layer(
        style.rule_at(0.5 if number == "%" and high == 1 else 0, dash=(3, 3)),
        base.mark_point(filled=True, size=48, opacity=0.85).encode(x=x),
    ).properties(width=width, height=PER_ROW * len(order), title=style.heading(title))
