"""How much of refuse-and-redirect's effect runs through what the dictionary leaves out?"""

from __future__ import annotations

import math

from qklens.report.story.parts import Section, Table, empty
from qklens.report.text import (
    count,
    head_name,
    includes,
    interval,
    listing,
    mean,
    number,
    percent,
    printable,
    signed,
    signed_estimate,
    signed_share,
)
from qklens.studies.results import Results
from qklens.studies.results_around import ErrorEffect

PLACE_WORDS = {
    None: "nowhere",
    "query": "in the query",
    "options": "in the options' keys",
    "prompt": "in all keys",
    "both": "in query and keys",
}
ERROR_WORDS = {None: "as it is", "zero": "nothing", "mean": "its mean", "other_item": "another item's",
               "random": "noise beside it"}  # fmt: skip


def error_terms(results: Results) -> Section:
    """The algebraic split by key source, and what replacing the error does to steering."""
    title = "What the dictionary leaves out"
    question = "Does refuse-and-redirect move the score through named features, or through the dictionary's error?"
    if not results.error_terms or "error_terms" in results.skipped:
        return empty(results, "error_terms", title, question)
    paragraphs, tables = _causal(results), [_split_table(results)]
    if results.error_effects:
        tables.append(_effects_table(results.error_effects))
    return Section(
        "error_terms",
        title,
        question,
        (*_split(results), *paragraphs),
        "Above: terms of the score whose query source is refuse-and-redirect, by key source, norms held: features, "
        "the dictionary's bias, and the residual error that no feature explains. Below: the error that the selecting "
        "heads read is replaced, norms recomputed, with and without the steering of steer_query; lost is the share "
        "of steering's effect that goes with it. Noise beside it: the error stays and as much is added in a random "
        "direction. Report half; 95% bootstrap over items. Negative terms lower attention; a negative loss means that "
        "steering does more without the error.",
        tuple(tables),
    )


def _split(results: Results) -> list[str]:
    rows = [row for row in results.error_terms if row.condition == "harm"]
    parts = list(dict.fromkeys(part for row in rows for part in row.through))
    sizes = {part: mean(row.through.get(part, math.nan) for row in rows) for part in parts}
    total = mean(row.total for row in rows)
    paragraphs = [
        f"Under harm, over {count(len(rows), 'head')}, refuse-and-redirect changes the score by {signed(total)} on "
        "average: " + listing(f"{signed(value)} through {_part(part)}" for part, value in sizes.items()) + "."
    ]
    with_zero = [head_name(r.layer, r.head) for r in rows if "error" in r.ci and includes(r.ci["error"], 0)]
    if with_zero:
        paragraphs.append(f"At {listing(with_zero)} the error's interval includes zero.")
    without = [head_name(r.layer, r.head) for r in rows if "error" in r.ci and not includes(r.ci["error"], 0)]
    if without:
        paragraphs.append(
            f"At {listing(without)} the error's interval excludes zero: part of the effect there has no name in this "
            "dictionary."
        )
    return paragraphs


def _causal(results: Results) -> list[str]:
    base = next((row for row in results.error_effects if row.place is None), None)
    both = {row.error: row for row in results.error_effects if row.place == "both"}
    if base is None or not both:
        return []
    paragraphs = [
        "The cause: steering refuse-and-redirect at the heads' queries changes the margin under harm by "
        f"{signed(base.steering_margin[0])} ({interval(base.steering_margin[1:])}) and the attention difference by "
        f"{signed(base.steering_attention[0])} ({interval(base.steering_attention[1:])})."
    ]
    for name, words in (("margin", "margin"), ("attention", "attention difference")):
        losses = {error: getattr(row, f"lost_{name}") for error, row in both.items()}
        real = [losses[e] for e in ("zero", "mean", "other_item") if losses.get(e)]
        if not real:
            paragraphs.append(f"On the {words} steering does nothing that could be lost: its interval includes zero.")
            continue
        said = [
            f"{signed_share(losses[e])} with {ERROR_WORDS[e]} in its place"
            for e in ("zero", "mean", "other_item")
            if losses.get(e)
        ]
        text = (
            f"Of its effect on the {words}, replacing the error in query and keys takes away {listing(said)}: by the "
            f"largest of these intervals' ends, at most {percent(max(0.0, *(high for _, _, high in real)))} of it runs "
            "through the error."
        )
        if losses.get("random"):
            text += f" As much noise beside the error takes away {signed_share(losses['random'])}."
        paragraphs.append(text)
    changes = [f"{signed(both[e].margin_change[0])} with {ERROR_WORDS[e]}" for e in both if e != "random"]
    text = f"Without steering, the same replacements change the margin under harm by {listing(changes)}"
    details = results.heads_details
    lost = f"; harm takes {number(details.none_margin - details.harm_margin)} of it" if details else ""
    paragraphs.append(f"{text}{lost}.")
    return paragraphs


def _split_table(results: Results) -> Table:
    parts = list(dict.fromkeys(part for row in results.error_terms for part in row.through))
    return Table(
        "By head and condition, norms held",
        ("head", "condition", *map(printable, parts), "total"),
        tuple(
            (
                head_name(r.layer, r.head),
                r.condition,
                *(
                    signed(r.through.get(part))
                    + (f" [{number(r.ci[part][0])}, {number(r.ci[part][1])}]" if part in r.ci else "")
                    for part in parts
                ),
                signed(r.total),
            )
            for r in results.error_terms
        ),
    )


def _effects_table(rows: list[ErrorEffect]) -> Table:
    return Table(
        "The error replaced, norms recomputed",
        (
            "where",
            "in its place",
            "size of the edit",
            "margin, harm",
            "margin, benign",
            "steering: margin",
            "lost",
            "steering: attention",
            "lost",
        ),
        tuple(
            (
                PLACE_WORDS[r.place],
                ERROR_WORDS[r.error] + (f" ({r.draws} draws)" if r.draws > 1 else ""),
                percent(r.edit_norm, 0),
                signed_estimate(r.margin_change) if r.place else number(r.margin[0]),
                signed_estimate(r.benign_margin_change) if r.place else "",
                signed_estimate(r.steering_margin),
                signed_share(r.lost_margin) if r.place else "",
                signed_estimate(r.steering_attention),
                signed_share(r.lost_attention) if r.place else "",
            )
            for r in rows
        ),
    )


def _part(name: str) -> str:
    return {"bias": "the dictionary's bias", "error": "its error"}.get(name, printable(name))
