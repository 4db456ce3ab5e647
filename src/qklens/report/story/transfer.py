"""Does the circuit act on other kinds of withholding, and which keys does it push away there?"""

from __future__ import annotations

from qklens.report.story.know import change
from qklens.report.story.parts import Section, Table, empty
from qklens.report.text import (
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
    signed_estimate,
    source_words,
    z_value,
)
from qklens.studies.results import Results
from qklens.studies.results_around import PushedAway, Transfer

Z_CLAIM = -2.0


def transfer(results: Results) -> Section:
    """The same heads, feature and strength on other sets."""
    title = "Other sets of withholding"
    question = (
        "Do the same heads and the same feature act when the user describes symptoms, or asks for a fake document?"
    )
    if not results.transfer or "transfer" in results.skipped:
        return empty(results, "transfer", title, question)
    paragraphs: list[str] = []
    steered = not any(r.stage == "steer_query" and r.chosen and r.strength == 0 for r in results.steering)
    for name in dict.fromkeys(row.set for row in results.transfer):
        rows = {row.condition: row for row in results.transfer if row.set == name}
        paragraphs.append(_behaviour(name, rows, steered=steered))
        paragraphs += _pushed(name, [row for row in results.pushed_away if row.set == name])
    return Section(
        "transfer",
        title,
        question,
        tuple(paragraphs),
        "Heads, feature and strength come from the main set; nothing is chosen on the others, so all their items are "
        "measured, or with --items a seeded sample of each; intervals are over items. Attention difference: mean over "
        "the selected heads. Activation: refuse-and-redirect at the answer position. Pushed away: features active on a "
        "tenth of the set's prompts or more, ranked by what their pair with refuse-and-redirect adds to the score of "
        "an intent or option token; where refuse-and-redirect is silent, by the weights alone. Listed pairs are the "
        "extremes of a search over all active features, so their z is larger than that of a pair named before.",
        (_table(results), _roles(results), *_pushed_table(results.pushed_away)),
    )


def _behaviour(name: str, rows: dict[str, Transfer], *, steered: bool) -> str:
    none, harm, benign = (rows.get(condition) for condition in ("none", "harm", "benign"))
    if none is None or harm is None:
        return f"{_upper(printable(name))}: not measured under both no intent and harm."
    text = (
        f"{_upper(printable(name))}: accuracy {change(none.accuracy, harm.accuracy)} (n = {harm.n}, "
        f"{percent_interval(harm.ci)})"
        + (f", with a benign sentence {percent(benign.accuracy)}" if benign else "")
        + f", and the heads' attention difference goes from {signed(none.attention_difference)} to "
        f"{signed(harm.attention_difference)}."
    )
    if includes(harm.ci, none.accuracy):
        text += " The interval includes the accuracy with no intent: no effect is shown here."
    if harm.margin_minus_benign is not None:
        _, low, high = harm.margin_minus_benign
        text += (
            f" Beside the benign sentence the margin is {signed_estimate(harm.margin_minus_benign)}: by it the "
            f"pressure does {'more' if high < 0 else 'less' if low > 0 else 'no more'} than its benign twin."
        )
    text += f" Refuse-and-redirect's activation at the answer is {number(harm.refuse_activation)}."
    if not steered:
        return text + " Nothing is steered here, as no strength helped on the main set."
    if harm.steered_accuracy is not None:
        text += f" With refuse-and-redirect steered, accuracy is {percent(harm.steered_accuracy)}"
        text += ", within the interval of the unsteered accuracy" if includes(harm.ci, harm.steered_accuracy) else ""
        controls = harm.steering
        if controls is not None and controls.random is not None and controls.unrelated is not None:
            at_random, low, high = controls.random
            text += (
                f" (random directions {percent(at_random)}, {percent(low, 0)} to {percent(high, 0)}; an unrelated "
                f"feature {percent(controls.unrelated)}"
            )
            text += f"; under benign {percent(benign.steered_accuracy)})" if benign else ")"
        text += "."
    return text


def _pushed(name: str, rows: list[PushedAway]) -> list[str]:
    if not rows:
        return []
    listed = sorted(rows, key=lambda row: row.rank)
    first = listed[0]
    if first.ranked_by == "virtual":
        lead = (
            f"On {printable(name)} refuse-and-redirect is active on no prompt, so it pushes nothing away there. By the "
            "weights alone, of the features active on this set it would push away most"
        )
    else:
        lead = f"On {printable(name)} the keys that refuse-and-redirect pushes away most are"
    words = [_words(row) for row in listed[:3] if _negative(row)]
    text = f"{lead} {listing(words)}." if words else f"On {printable(name)} no active feature is pushed away."
    if first.ranked_by == "virtual":
        return [text]
    claimed = [row for row in listed if _claimed(row)]
    text += (
        f" Of the {len(listed)} listed, {len(claimed)} have z at most \u22122 against both nulls, mean over heads"
        + (f": {listing(source_words(row.feature, row.role) for row in claimed[:6])}." if claimed else ".")
    )
    return [text]


def _negative(row: PushedAway) -> bool:
    return (row.realised[0] if row.ranked_by == "realised" else mean(row.virtual)) < 0


def _claimed(row: PushedAway) -> bool:
    return bool(row.z) and all(mean(values) <= Z_CLAIM for values in row.z.values())


def _words(row: PushedAway) -> str:
    tokens = ", ".join(printable(at.token) for at in row.tokens[:3])
    return f"{source_words(row.feature, row.role)}" + (f" (active on {tokens})" if tokens else "")


def _table(results: Results) -> Table:
    return Table(
        "Every set and condition",
        (
            "set",
            "condition",
            "prompts",
            "accuracy",
            "95% interval",
            "margin",
            "from no intent",
            "attention diff.",
            "refuse activation",
            "steered",
            "random",
        ),
        tuple(
            (
                printable(r.set),
                r.condition,
                str(r.n),
                percent(r.accuracy),
                f"{percent(r.ci[0])} to {percent(r.ci[1])}",
                number(r.margin),
                signed_estimate(r.margin_change),
                f"{signed(r.attention_difference)} [{number(r.attention_ci[0])}, {number(r.attention_ci[1])}]",
                number(r.refuse_activation),
                "" if r.steered_accuracy is None else percent(r.steered_accuracy),
                percent(r.steering.random[0]) if r.steering and r.steering.random else "",
            )
            for r in results.transfer
        ),
    )


def _roles(results: Results) -> Table:
    roles = list(dict.fromkeys(role for row in results.transfer for role in row.role_activation))
    return Table(
        "The roles' features where they play",
        ("set", "condition", *map(role_words, roles)),
        tuple(
            (printable(r.set), r.condition, *(signed_estimate(r.role_activation.get(role)) for role in roles))
            for r in results.transfer
        ),
    )


def _pushed_table(rows: list[PushedAway]) -> tuple[Table, ...]:
    if not rows:
        return ()
    return (
        Table(
            "Keys pushed away",
            (
                "set",
                "rank",
                "feature",
                "role",
                "per token",
                "virtual, by head",
                "z random, matched",
                "on prompts",
                "on intents: pressed, benign",
                "most active on",
            ),
            tuple(
                (
                    printable(r.set),
                    f"{r.rank} of {r.of}",
                    printable(r.feature),
                    role_words(r.role) if r.role else "",
                    signed_estimate(r.realised, 4),
                    ", ".join(
                        f"{head_name(*head)} {signed(value, 3)}" for head, value in zip(r.heads, r.virtual, strict=True)
                    ),
                    ", ".join(z_value(mean(values)) for values in r.z.values()),
                    percent(r.active_share, 0),
                    ", ".join(number(r.activation.get(name)) for name in ("harm", "benign")),
                    ", ".join(f"{printable(at.token)} ({number(at.activation, 1)})" for at in r.tokens),
                )
                for r in rows
            ),
        ),
    )


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
