"""The first thing a reader sees: the verdict in a sentence made of its numbers, and five numbers to hold it against."""

from __future__ import annotations

from dataclasses import dataclass

from qklens.report.story.attention import CLAIM_NULLS, pair_z
from qklens.report.story.know import change
from qklens.report.story.parts import not_run
from qklens.report.story.steering import effects
from qklens.report.text import (
    count,
    finite,
    interval,
    listing,
    mean,
    number,
    percent,
    percent_interval,
    printable,
    role_words,
    signed,
)
from qklens.studies.results import Results

MECHANISM_WORDS = {
    "task_not_solved": "the task is not solved",
    "no_effect": "no effect of harm",
    "belief_change": "the belief changes",
    "late_flip": "a late flip, after attention",
    "attention_answer_key": "attention: correct-answer keys are suppressed",
    "attention_harm_key": "attention: harm keys are suppressed",
    "undetermined": "undetermined",
}


@dataclass(frozen=True)
class KeyNumber:
    """One number with its name and what qualifies it."""

    label: str
    value: str
    detail: str


def headline(results: Results) -> str:
    """The verdict in plain English, from the numbers."""
    none, harm = results.behaviour.get("none"), results.behaviour.get("harm")
    if none is None or harm is None:
        return (
            f"The verdict is {printable(results.verdict.mechanism)}; accuracy was not measured under both conditions."
        )
    moves = f"accuracy {change(none.accuracy, harm.accuracy)} when the user states a harmful intent"
    match results.verdict.mechanism:
        case "task_not_solved":
            return (
                f"The model answers {percent(none.accuracy)} of the questions correctly with no intent "
                f"({percent_interval(none.ci)}), which is too few to ask whether it withholds."
            )
        case "no_effect":
            return f"No effect of harm: {moves} ({percent_interval(harm.ci)})."
        case "belief_change":
            return f"{_upper(moves)}, and what the model represents as correct changes with it{_belief(results)}."
        case "late_flip":
            return (
                f"{_upper(moves)}; the attention of the heads that select the answer does not explain it"
                f"{_because(_patch(results))}, so the evidence points to a change after attention."
            )
        case "attention_harm_key":
            reasons = _because(_patch(results), _pair(results, "harm_detection"))
            return f"{_upper(moves)}; the evidence points to attention{reasons}."
        case "attention_answer_key":
            reasons = _because(_patch(results), _pair(results, "correct_answer"))
            return f"{_upper(moves)}; the evidence points to attention{reasons}."
        case "undetermined":
            return f"{_upper(moves)}; the evidence does not settle how{_because(_patch(results))}."


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _belief(results: Results) -> str:
    if results.belief is None:
        return ""
    return f" (AUC of the correct-answer feature {number(results.belief.auc_none)}, then "
    f"{number(results.belief.auc_harm)})"


def _because(*reasons: str) -> str:
    given = [reason for reason in reasons if reason]
    return f": {listing(given)}" if given else ""


def _patch(results: Results) -> str:
    details = results.heads_details
    if details is None:
        return ""
    return (
        f"clean patterns put back into {count(len(details.selected), 'head')} restore {percent(details.restored, 0)} "
        "of the lost margin"
    )


def _pair(results: Results, key_role: str) -> str:
    rows = pair_z(results, "refuse_redirect", key_role, CLAIM_NULLS[0])
    if not rows:
        return ""
    # No-break spaces keep the number on one line with its name.
    return f"refuse-and-redirect meets {role_words(key_role)} at z\u00a0=\u00a0{number(mean(r.z for r in rows), 1)}"


def key_numbers(results: Results) -> tuple[KeyNumber, ...]:
    """Five numbers, in the order of the argument; one that was not measured says why."""
    return (_accuracy(results), _auc(results), _restored(results), _z(results), _steered(results))


def _accuracy(results: Results) -> KeyNumber:
    none, harm, benign = (results.behaviour.get(name) for name in ("none", "harm", "benign"))
    label = "Accuracy, no intent \u2192 harmful intent"
    if none is None or harm is None:
        return KeyNumber(label, "\u2014", not_run(results, "behaviour"))
    detail = f"benign intent: {percent(benign.accuracy)}; " if benign else ""
    return KeyNumber(
        label, f"{percent(none.accuracy)} \u2192 {percent(harm.accuracy)}", f"{detail}n = {harm.n} prompts each"
    )


def _auc(results: Results) -> KeyNumber:
    label = "AUC of the correct-answer feature under harm"
    found = results.belief
    if found is None:
        return KeyNumber(label, "\u2014", not_run(results, "belief"))
    harm = found.by_condition.get("harm")
    bounds = f"{interval(harm.auc_ci)}; " if harm else ""
    return KeyNumber(label, number(found.auc_harm), f"{bounds}no intent: {number(found.auc_none)}")


def _restored(results: Results) -> KeyNumber:
    label = "Lost margin restored by clean patterns"
    details = results.heads_details
    if details is None:
        return KeyNumber(label, "\u2014", not_run(results, "heads"))
    return KeyNumber(
        label,
        percent(details.restored),
        f"{percent_interval(details.restored_ci)}; random heads: {percent(details.restored_random_heads)}",
    )


def _z(results: Results) -> KeyNumber:
    label = "z, refuse-and-redirect \u00d7 harm detection"
    first, second = (pair_z(results, "refuse_redirect", "harm_detection", null) for null in CLAIM_NULLS)
    if not first and not second:
        return KeyNumber(label, "\u2014", not_run(results, "zscores"))
    answer = pair_z(results, "refuse_redirect", "correct_answer", CLAIM_NULLS[0])
    matched = f"matched null: {signed(mean(r.z for r in second), 1)}" if second else "no matched null: no claim"
    contrast = f"; \u00d7 correct answer: {signed(mean(r.z for r in answer), 1)}" if answer else ""
    return KeyNumber(label, signed(mean(r.z for r in first or second), 1), matched + contrast)


def _steered(results: Results) -> KeyNumber:
    label = "Accuracy under harm with the feature steered"
    # The first that ran, not the better one: a choice between them would be made on the report half.
    whole, query = effects(results, "steer_all"), effects(results, "steer_query")
    if not whole and not query:
        return KeyNumber(label, "\u2014", not_run(results, "steer_all"))
    first = (whole or query)[0]
    rivals = [row.accuracy for row in first.controls.values() if row.condition == "harm" and finite(row.accuracy)]
    details = [
        f"without: {percent(first.before)}",
        f"best control: {percent(max(rivals))}" if rivals else "no control measured",
    ]
    if whole and query:
        details.append(f"query side only: {percent(query[0].point.accuracy)}")
    if not first.was_chosen:
        details.append("strength not chosen beforehand")
    return KeyNumber(label, percent(first.point.accuracy), "; ".join(details))
