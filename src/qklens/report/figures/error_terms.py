"""How much of refuse-and-redirect's pull runs through what the dictionary does not explain?"""

from __future__ import annotations

import altair as alt

from qklens.report.figures import style
from qklens.report.figures.style import CONDITION_WORDS, CONDITIONS, Drawing
from qklens.report.text import finite, head_name, signed
from qklens.studies.results import Results
from qklens.studies.results_around import ErrorEffect

_PARTS = ("features", "bias", "error", "total")
_SHOWN = 6
_PLACES = {
    "query": "in the query",
    "options": "in the options' keys",
    "prompt": "in all keys",
    "both": "in query and keys",
}
_ERRORS = {"zero": "nothing", "mean": "its mean", "other_item": "another item's", "random": "control: noise beside it"}
_ERROR_COLOR = (style.SOURCE_COLOR["error"], style.ROLE_COLOR["need_answer"], style.ROLE_COLOR["correct_answer"],
                style.FAINT)  # fmt: skip


def error_terms(results: Results) -> Drawing | None:
    """Above: the effect by what it meets in the keys. Below: what is lost of steering when the error is replaced."""
    split, lost = _split(results), _lost(results.error_effects)
    panels = [panel for panel in (split, lost) if panel is not None]
    if not panels:
        return None
    return style.finish(
        alt.vconcat(*panels, spacing=26).resolve_scale(color="independent"),
        "Does refuse-and-redirect act through named features or through the dictionary's error?",
        "Above: its effect on the head's score, split by what it meets on the key side, norms held."
        + (" Below: the error" if lost is not None else ""),
        *(
            ["that the heads read is replaced; what is lost of steering's effect ran through it. Whiskers: 95%, items."]
            if lost is not None
            else ["Whiskers: 95% bootstrap over items."]
        ),
    )


def _split(results: Results) -> Drawing | None:
    rows = [
        {
            "head": head_name(row.layer, row.head),
            "condition": CONDITION_WORDS[row.condition],
            "part": part,
            "value": value,
            "low": row.ci[part][0] if part in row.ci and all(map(finite, row.ci[part])) else value,
            "high": row.ci[part][1] if part in row.ci and all(map(finite, row.ci[part])) else value,
            "label": signed(value),
        }
        for row in results.error_terms
        for part, value in [*row.through.items(), ("total", row.total)]
        if finite(value)
    ]
    if not rows:
        return None
    heads = list(dict.fromkeys(str(row["head"]) for row in rows))[:_SHOWN]
    conditions = [CONDITION_WORDS[n] for n in CONDITIONS if any(r["condition"] == CONDITION_WORDS[n] for r in rows)]
    parts = list(dict.fromkeys([*(p for p in _PARTS if p != "total"), *(str(r["part"]) for r in rows)]))
    parts = [p for p in parts if p != "total" and any(r["part"] == p for r in rows)] + ["total"]
    low, high = style.padded(min(0.0, *(float(r["low"]) for r in rows)), max(0.0, *(float(r["high"]) for r in rows)))
    across = min(3, len(heads))
    width = {1: 420, 2: 265}.get(across, 170)
    panels: list[Drawing] = []
    for index, head in enumerate(heads):
        mine = [row for row in rows if row["head"] == head]
        base = style.chart(mine).encode(
            y=alt.Y(
                "part:N",
                sort=parts,
                title=None,
                axis={"labels": index % across == 0},
                scale={"domain": parts, "paddingInner": 0.35},
            ),
            yOffset=alt.YOffset("condition:N", sort=conditions, scale={"domain": conditions}),
            color=alt.Color(
                "condition:N",
                scale=style.condition_words_scale(),
                legend={"title": None, "symbolType": "square", "values": conditions, "symbolOpacity": 1}
                if index == 0
                else None,
            ),
        )
        x = alt.X("value:Q", scale={"domain": [low, high], "nice": False}, title="part of the score")
        panels.append(
            (
                alt.layer(
                    base.mark_bar(opacity=0.75).encode(x=x),
                    base.mark_rule(color=style.INK, strokeWidth=1).encode(
                        x=alt.X("low:Q"), x2="high:Q", color=alt.value(style.INK)
                    ),
                    style.rule_at(0, color=style.INK),
                )
            ).properties(width=width, height=(12 * len(conditions) + 10) * len(parts), title=style.heading(head))
        )
    grid = [alt.hconcat(*panels[i : i + across], spacing=16) for i in range(0, len(panels), across)]
    return alt.vconcat(*grid, spacing=22)


def _lost(effects: list[ErrorEffect]) -> Drawing | None:
    rows = [
        {
            "measure": measure,
            "place": _PLACES[row.place],
            "error": _ERRORS[row.error],
            "value": estimate[0],
            "low": estimate[1],
            "high": estimate[2],
        }
        for row in effects
        for measure, estimate in (("margin", row.lost_margin), ("attention", row.lost_attention))
        if row.place is not None and row.error is not None and estimate is not None and all(map(finite, estimate))
    ]
    if not rows:
        return None
    places = [p for p in _PLACES.values() if any(r["place"] == p for r in rows)]
    errors = [e for e in _ERRORS.values() if any(r["error"] == e for r in rows)]
    # Never a smaller span than a fifth either way: what is a few per cent should look like a few per cent.
    low = min(-0.2, *(float(r["low"]) for r in rows))
    high = max(0.2, *(float(r["high"]) for r in rows))
    panels: list[Drawing] = []
    for measure, title in (("margin", "Margin: lost of steering's effect"), ("attention", "Attention: lost")):
        mine = [row for row in rows if row["measure"] == measure]
        if not mine:
            continue
        base = style.chart(mine).encode(
            y=alt.Y(
                "place:N",
                sort=places,
                title=None,
                axis={"labels": not panels},
                scale={"domain": places, "paddingInner": 0.3},
            ),
            yOffset=alt.YOffset("error:N", sort=errors, scale={"domain": errors}),
            color=alt.Color(
                "error:N",
                scale={"domain": list(_ERRORS.values()), "range": list(_ERROR_COLOR)},
                legend={
                    "title": "in the error's place",
                    "titleOrient": "left",
                    "symbolType": "circle",
                    "values": errors,
                    "symbolOpacity": 1,
                }
                if not panels
                else None,
            ),
        )
        x = alt.X(
            "value:Q",
            scale={"domain": list(style.padded(low, high, 0.03)), "nice": False},
            axis={"format": "%", "tickCount": 5},
            title="share of steering's effect",
        )
        panels.append(
            alt.layer(
                style.rule_at(0, color=style.INK),
                base.mark_rule(strokeWidth=3, opacity=0.45).encode(x=alt.X("low:Q"), x2="high:Q"),
                base.mark_point(filled=True, size=45, opacity=1).encode(x=x),
            ).properties(width=265, height=52 * len(places), title=style.heading(title))
        )
    return alt.hconcat(*panels, spacing=16)
