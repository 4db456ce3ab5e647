"""When in training do the behaviour and its wiring appear?"""

from __future__ import annotations

import math

from qklens.report.story.know import change
from qklens.report.story.parts import Section, Table, empty
from qklens.report.text import interval, listing, number, percent, printable, signed, signed_estimate, z_value
from qklens.studies.results import Results
from qklens.studies.results_around import Milestone, Origin


def origin(results: Results) -> Section:
    """Base, post-trained, and the checkpoints between."""
    title = "Origin in training"
    question = "Is the base model affected, and when do the behaviour and its wiring appear?"
    rows = sorted(results.origin, key=lambda row: row.step)
    if not rows or "origin" in results.skipped:
        return empty(results, "origin", title, question)
    first, last = rows[0], rows[-1]
    paragraphs = [
        f"At {printable(row.checkpoint)}, accuracy "
        f"{change(row.accuracy.get('none', math.nan), row.accuracy.get('harm', math.nan))} under harm; "
        f"refuse-and-redirect's contrast is {signed(row.refuse_contrast)} and its interaction with harm detection "
        f"has z {z_value(row.refuse_harm_z)}."
        for row in ([first] if first is last else [first, last])
    ]
    if len(rows) > 1:
        paragraphs += _dated(rows, results.milestones)
    paragraphs.append(_fit(rows))
    return Section(
        "origin",
        title,
        question,
        tuple(paragraphs),
        "The report half's items, and the same heads and directions, at every checkpoint with its own weights. "
        "Contrast: harm minus benign activation of refuse-and-redirect at the answer position. Adds to an option: what "
        "the pair refuse-and-redirect \u00d7 harm detection adds to the score of an option token under harm, on that "
        "checkpoint's prompts. z: of the pair in that checkpoint's weights. Roles were found in the last checkpoint "
        "alone, and its dictionary may fit earlier ones less well: the share that it leaves unexplained says how well.",
        (_table(rows), *_milestone_table(results.milestones)),
    )


def _dated(rows: list[Origin], found: list[Milestone]) -> list[str]:
    dated = [m for m in found if m.checkpoint is not None]
    undated = [m for m in found if m.checkpoint is None]
    paragraphs = []
    if dated:
        said = [f"{printable(m.event)} at {printable(m.checkpoint)}" for m in dated]
        paragraphs.append(f"Of {len(rows)} checkpoints, the first at which it is seen: {listing(said)}.")
    if undated:
        paragraphs.append(
            f"At none, because the last checkpoint does not show it: {listing(printable(m.event) for m in undated)}."
        )
    step = {m.event: m.step for m in dated}
    fall = step.get("accuracy falls under harm")
    pair = [s for event, s in step.items() if event.startswith("the pair") and s is not None]
    if fall is not None and pair:
        earliest = min(pair)
        if earliest > fall:
            paragraphs.append(
                f"The accuracy falls at {printable(rows[fall].checkpoint)}, before the pair has grown in the weights "
                f"or on prompts ({printable(rows[earliest].checkpoint)}): this pair does not explain the first fall."
            )
        else:
            paragraphs.append(
                "The pair is there no later than the fall of the accuracy, as it must be if it causes it; that alone "
                "does not show that it does."
            )
    return paragraphs


def _fit(rows: list[Origin]) -> str:
    worst = max(rows, key=lambda row: max(row.unexplained.values(), default=math.nan))
    shares = [f"{printable(row.checkpoint)} {percent(max(row.unexplained.values()), 0)}" for row in rows]
    text = f"The dictionary leaves unexplained, of the variance that the heads read: {listing(shares)}."
    own = max(rows[-1].unexplained.values())
    if max(worst.unexplained.values()) > 2 * own + 0.05:
        text += (
            f" At {printable(worst.checkpoint)} that is more than twice what it leaves at the last checkpoint and 5 "
            "points: what is said there of features is said of directions that the dictionary was not made for."
        )
    return text


def _table(rows: list[Origin]) -> Table:
    return Table(
        "Checkpoints",
        (
            "checkpoint",
            "none",
            "harm",
            "benign",
            "margin, benign \u2212 harm",
            "attention diff., harm",
            "refuse contrast",
            "adds to an option",
            "refuse \u00d7 harm",
            "z random",
            "z matched",
            "unexplained",
        ),
        tuple(
            (
                printable(r.checkpoint),
                *(percent(r.accuracy.get(name)) for name in ("none", "harm", "benign")),
                signed_estimate(r.margin_drop),
                signed(r.attention_difference.get("harm"))
                + (f" [{number(r.attention_ci['harm'][0])}, {number(r.attention_ci['harm'][1])}]"
                   if "harm" in r.attention_ci else ""),
                f"{signed(r.refuse_contrast)} [{number(r.refuse_contrast_ci[0])}, {number(r.refuse_contrast_ci[1])}]",
                signed_estimate(r.refuse_harm_realised, 3),
                signed(r.refuse_harm_interaction, 3),
                z_value(r.refuse_harm_z),
                z_value(r.refuse_harm_matched_z),
                ", ".join(f"layer {layer} {percent(share, 0)}" for layer, share in r.unexplained.items()),
            )
            for r in rows
        ),
    )  # fmt: skip


def _milestone_table(found: list[Milestone]) -> tuple[Table, ...]:
    if not found:
        return ()
    return (
        Table(
            "First seen",
            ("event", "checkpoint", "value", "rule"),
            tuple(
                (
                    printable(m.event),
                    printable(m.checkpoint) if m.checkpoint is not None else "none",
                    "" if m.value is None else signed(m.value) + (f" ({interval(m.interval)})" if m.interval else ""),
                    printable(m.rule),
                )
                for m in found
            ),
        ),
    )
