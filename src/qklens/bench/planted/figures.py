"""The bench's two figures: which verdict each planted mechanism gets, and whether confidence is what it says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import altair as alt

from qklens.analyses.statistics import wilson
from qklens.bench.planted.blueprint import Verdict
from qklens.bench.planted.mechanisms import MECHANISMS
from qklens.files import atomic_write
from qklens.report.figures import style
from qklens.report.figures.render import to_svg
from qklens.report.figures.style import Drawing

VERDICTS: tuple[str, ...] = get_args(Verdict)
GROUP_WORDS = {"development": "seeds 0 to 2, for development", "held_out": "other seeds, held out"}
_CELL, _SIDE = 30, 230
_RIGHT, _WRONG = "#0b7a75", "#cc4b24"


def write_figures(results: dict[str, Any], folder: Path) -> None:
    """Write `confusion.svg` and `reliability.svg`."""
    atomic_write(folder / "confusion.svg", to_svg(confusion(results), "confusion"))
    atomic_write(folder / "reliability.svg", to_svg(reliability(results), "reliability"))


def confusion(results: dict[str, Any]) -> Drawing:
    """Planted mechanism by verdict, one panel a group of seeds."""
    groups = [name for name in GROUP_WORDS if results[name]["n"]]
    panels = [_matrix(results[name], GROUP_WORDS[name], labelled=place == 0) for place, name in enumerate(groups)]
    return style.finish(
        alt.hconcat(*panels, spacing=24),
        "Does the study name the mechanism that was planted?",
        "Runs by planted mechanism and verdict. Green: the verdict that is right for it; a mixed model's is "
        "undetermined, a decoy's its real cause.",
    )


def _matrix(part: dict[str, Any], title: str, *, labelled: bool) -> Drawing:
    planted = [name.replace("_", " ") for name in MECHANISMS]
    verdicts = [name.replace("_", " ") for name in VERDICTS]
    cells: dict[tuple[str, str, bool], int] = {}
    for row in part["confusion"]:
        key = (row["planted"].replace("_", " "), row["verdict"].replace("_", " "), row["verdict"] == row["expected"])
        cells[key] = cells.get(key, 0) + row["n"]
    whole = {name: sum(n for (of, _, _), n in cells.items() if of == name) for name in planted}
    rows = [
        {"planted": of, "verdict": verdict, "n": str(n), "share": n / whole[of], "color": _RIGHT if right else _WRONG}
        for (of, verdict, right), n in cells.items()
    ]
    y = alt.Y(
        "planted:N",
        sort=planted,
        title="planted" if labelled else None,
        axis={"labels": labelled},
        scale={"domain": planted},
    )
    x = alt.X(
        "verdict:N",
        sort=verdicts,
        title="verdict",
        axis={"labelAngle": -40},
        scale={"domain": verdicts},
    )
    base = style.chart(rows).encode(x=x, y=y)
    squares = base.mark_rect(cornerRadius=2).encode(
        color=alt.Color("color:N", scale=None),
        opacity=alt.Opacity("share:Q", scale={"domain": [0, 1], "range": [0.6, 1]}, legend=None),
    )
    numbers = base.mark_text(color=style.PAPER, fontWeight="bold", fontSize=11).encode(text="n:N")
    heading = style.heading(title, f"{part['right']} of {part['n']} right")
    return alt.layer(squares, numbers).properties(
        width=_CELL * len(verdicts), height=_CELL * 0.8 * len(planted), title=heading
    )


_BINS = (0.0, 0.5, 0.75, 0.9, 0.96, 1.01)


def reliability(results: dict[str, Any]) -> Drawing:
    """Share of right verdicts against the confidence they were given, one panel a group of seeds."""
    groups = [name for name in GROUP_WORDS if results[name]["n"]]
    panels = [_diagram(results[name], GROUP_WORDS[name], labelled=place == 0) for place, name in enumerate(groups)]
    return style.finish(
        alt.hconcat(*panels, spacing=30),
        "Is a verdict's confidence how often such verdicts are right?",
        "One dot a bin of confidence at its mean, with the runs that were right listed; bars are Wilson 95% intervals, "
        "the line is perfect calibration.",
    )


def _diagram(part: dict[str, Any], title: str, *, labelled: bool) -> Drawing:
    rows = []
    for bottom, top in pairwise(_BINS):
        some = [row for row in part["reliability"] if bottom <= row["confidence"] < top]
        n, right = (sum(row[name] for row in some) for name in ("n", "right"))
        if n:
            low, high = wilson(right, n)
            mean = sum(row["confidence"] * row["n"] for row in some) / n
            rows.append({"confidence": mean, "share": right / n, "low": low, "high": high, "n": f"{right} of {n}"})
    scale = {"domain": [0, 1.02], "nice": False}
    x = alt.X("confidence:Q", scale=scale, title="confidence", axis=_axis())
    y = alt.Y("share:Q", scale=scale, title="share right" if labelled else None, axis=_axis(labels=labelled))
    ideal = style.chart([{"confidence": v, "share": v} for v in (0, 1)])
    line = ideal.mark_line(color=style.FAINT, strokeDash=[3, 3], strokeWidth=1).encode(x=x, y=y)
    bars = style.chart(rows).mark_rule(color=style.MUTED, strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q")
    dots = style.chart(rows).mark_point(filled=True, size=70, opacity=1, color=_RIGHT).encode(x=x, y=y)
    listed = [
        {"x": 0.02, "y": 0.95 - 0.075 * place, "text": f"{row['confidence']:.2f}: {row['n']}"}
        for place, row in enumerate(rows)
    ]
    words = style.chart(listed).mark_text(align="left", baseline="bottom", color=style.INK, fontSize=10.5)
    at = {"x": alt.X("x:Q", scale=scale), "y": alt.Y("y:Q", scale=scale)}
    brier = "" if part["brier"] is None else f"Brier score {part['brier']:.3f}"
    return alt.layer(line, bars, dots, words.encode(**at, text="text:N")).properties(
        width=_SIDE, height=_SIDE, title=style.heading(title, brier)
    )


def _axis(*, labels: bool = True) -> dict[str, Any]:
    values: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)
    return {"values": list(values), "grid": True, "format": "%", "labels": labels}
