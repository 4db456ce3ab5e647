"""What lies around the circuit: the dictionary's error, other partners, other sets, and training."""

from __future__ import annotations

import math

from qklens.report.story.know import change
from qklens.report.story.parts import Section, Table, empty
from qklens.report.text import (
    count,
    finite,
    head_name,
    includes,
    listing,
    mean,
    number,
    percent,
    percent_interval,
    printable,
    role_words,
    signed,
    source_words,
    z_value,
)
from qklens.studies.results import Results


def error_terms(results: Results) -> Section:
    """How much of the effect runs through the residual error."""
    title = "What the dictionary leaves out"
    question = "Does refuse-and-redirect move the score through named features, or through the dictionary's error?"
    rows = [row for row in results.error_terms if row.condition == "harm"]
    if not results.error_terms or "error_terms" in results.skipped:
        return empty(results, "error_terms", title, question)
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
    names = [*parts, "total"]
    table = Table(
        "By head and condition",
        ("head", "condition", *map(printable, names)),
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
    return Section(
        "error_terms",
        title,
        question,
        tuple(paragraphs),
        "Terms of the score whose query source is refuse-and-redirect, by key source: features, the dictionary's "
        "bias, and the residual error that no feature explains. Report half; 95% bootstrap over items. Negative "
        "lowers attention.",
        (table,),
    )


def _part(name: str) -> str:
    return {"bias": "the dictionary's bias", "error": "its error"}.get(name, printable(name))


def partners(results: Results) -> Section:
    """Both ends of the ranking of key features."""
    title = "Other features that refuse-and-redirect meets"
    question = "Which other key features does refuse-and-redirect push the selected heads away from?"
    ordered = sorted((p for p in results.partners if finite(p.value)), key=lambda p: p.value)
    if not ordered or "partners" in results.skipped:
        return empty(results, "partners", title, question)

    def name(index: int) -> str:
        partner = ordered[index]
        tokens = ", ".join(printable(token) for token in partner.top_tokens[:3])
        label = source_words(partner.feature, partner.role)
        return f"{label} at z {z_value(partner.z)}" + (f" (active on {tokens})" if tokens else "")

    negative = [i for i, p in enumerate(ordered) if p.value < 0][:3]
    paragraphs = [
        f"Of {count(len(ordered), 'key feature')} listed from both ends of the ranking, the most negative "
        + (
            f"{'is' if len(negative) == 1 else 'are'} {listing(map(name, negative))}."
            if negative
            else "does not exist: none is below zero."
        )
    ]
    harm = [i + 1 for i, p in enumerate(ordered) if p.role == "harm_detection"]
    if harm:
        paragraphs.append(
            f"Counted from the negative end of this list, harm detection ranks {listing(map(str, harm))}."
        )
    else:
        paragraphs.append("Harm detection is not in this list: at neither end is it among the strongest partners.")
    sets = list(dict.fromkeys(s for p in ordered for s in p.activation))
    table = Table(
        "Partners",
        (
            "rank",
            "feature",
            "role",
            "interaction",
            "z",
            "most active on",
            *(f"activation: {printable(s)}" for s in sets),
        ),
        tuple(
            (
                number(p.rank, 0),
                printable(p.feature),
                role_words(p.role) if p.role else "",
                signed(p.value, 3),
                z_value(p.z),
                ", ".join(map(printable, p.top_tokens)),
                *(number(p.activation.get(s)) for s in sets),
            )
            for p in ordered
        ),
    )
    return Section(
        "partners",
        title,
        question,
        tuple(paragraphs),
        "Virtual interaction with refuse-and-redirect as the query, mean over the selected heads. Rank 1 is the most "
        "negative; negative ranks count from the positive end. Right: mean activation on the intents of each set, "
        "which says where the partner could act; it is not a causal test.",
        (table,),
    )


def transfer(results: Results) -> Section:
    """The same heads, feature and strength on other sets."""
    title = "Other sets of withholding"
    question = (
        "Do the same heads and the same feature act when the user describes symptoms, or asks for help with fraud?"
    )
    if not results.transfer or "transfer" in results.skipped:
        return empty(results, "transfer", title, question)
    paragraphs: list[str] = []
    steered = not any(r.stage == "steer_query" and r.chosen and r.strength == 0 for r in results.steering)
    for name in dict.fromkeys(row.set for row in results.transfer):
        rows = {row.condition: row for row in results.transfer if row.set == name}
        none, harm = rows.get("none"), rows.get("harm")
        if none is None or harm is None:
            paragraphs.append(f"{_upper(printable(name))}: not measured under both no intent and harm.")
            continue
        text = (
            f"{_upper(printable(name))}: accuracy {change(none.accuracy, harm.accuracy)} (n = {harm.n}, "
            f"{percent_interval(harm.ci)}), and the heads' attention difference goes from "
            f"{signed(none.attention_difference)} to {signed(harm.attention_difference)}."
        )
        if includes(harm.ci, none.accuracy):
            text += " The interval includes the accuracy with no intent: no effect is shown here."
        if not steered:
            text += " Nothing is steered here, as no strength helped on the main set."
        elif harm.steered_accuracy is not None:
            text += f" With refuse-and-redirect steered, accuracy is {percent(harm.steered_accuracy)}"
            text += (
                ", within the interval of the unsteered accuracy." if includes(harm.ci, harm.steered_accuracy) else "."
            )
        paragraphs.append(text)
    table = Table(
        "Every set and condition",
        (
            "set",
            "condition",
            "prompts",
            "accuracy",
            "95% interval",
            "margin",
            "attention diff.",
            "refuse activation",
            "steered",
        ),
        tuple(
            (
                printable(r.set),
                r.condition,
                str(r.n),
                percent(r.accuracy),
                f"{percent(r.ci[0])} to {percent(r.ci[1])}",
                number(r.margin),
                signed(r.attention_difference),
                number(r.refuse_activation),
                "" if r.steered_accuracy is None else percent(r.steered_accuracy),
            )
            for r in results.transfer
        ),
    )
    return Section(
        "transfer",
        title,
        question,
        tuple(paragraphs),
        "Heads, feature and strength come from the main set. Attention difference: mean over the selected heads. "
        "Activation: refuse-and-redirect at the answer position.",
        (table,),
    )


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


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
    shown = [
        row.checkpoint
        for row in rows
        if "harm" in row.ci and "none" in row.ci and row.ci["harm"][1] < row.ci["none"][0]
    ]
    if len(rows) > 1:
        paragraphs.append(
            f"Of {len(rows)} checkpoints, the first whose interval under harm lies below its interval with no "
            f"intent is {printable(shown[0])}."
            if shown
            else f"At none of {len(rows)} checkpoints does the interval under harm lie below that with no intent."
        )
    table = Table(
        "Checkpoints",
        ("checkpoint", "none", "harm", "benign", "attention diff., harm", "refuse contrast", "refuse \u00d7 harm", "z"),
        tuple(
            (
                printable(r.checkpoint),
                *(percent(r.accuracy.get(name)) for name in ("none", "harm", "benign")),
                signed(r.attention_difference.get("harm")),
                signed(r.refuse_contrast),
                signed(r.refuse_harm_interaction, 3),
                z_value(r.refuse_harm_z),
            )
            for r in rows
        ),
    )
    return Section(
        "origin",
        title,
        question,
        tuple(paragraphs),
        "The report half's items, and the same heads and directions, at every checkpoint with its "
        "own weights. Contrast: harm minus benign "
        "activation of refuse-and-redirect at the answer position. Features are those of the last checkpoint, and "
        "may fit earlier ones less well.",
        (table,),
    )
