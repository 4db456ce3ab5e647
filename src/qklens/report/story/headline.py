"""The first thing a reader sees: the verdict in a sentence made of its numbers, and six numbers to hold it against."""

from __future__ import annotations

from dataclasses import dataclass

from qklens.report.story.attention import CLAIM_NULLS, pair_z
from qklens.report.story.know import change
from qklens.report.story.parts import not_run
from qklens.report.story.pull import place_words, quoted, strongest
from qklens.report.story.steering import Effect, effects
from qklens.report.text import (
    count,
    head_name,
    interval,
    listing,
    mean,
    number,
    percent,
    percent_interval,
    printable,
    role_words,
    z_value,
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
    """The verdict in plain English, from the numbers, with what the number of items leaves open."""
    text = _sentence(results)
    return f"{text} This is tentative; the caveats are below." if results.verdict.caveats else text


def caveats(results: Results) -> tuple[str, ...]:
    """What the verdict leaves open, a sentence each."""
    return tuple(f"{_upper(printable(caveat).rstrip('.'))}." for caveat in results.verdict.caveats)


def _sentence(results: Results) -> str:
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
            rule = printable(results.verdict.rule).rstrip(".")
            patch = _patch(results)
            return f"{_upper(moves)}. The mechanism is undetermined: {rule}{f'; {patch}' if patch else ''}."


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
    if details is None or not details.selected:
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
    return f"refuse-and-redirect meets {role_words(key_role)} at z\u00a0=\u00a0{z_value(mean(r.z for r in rows))}"


def key_numbers(results: Results) -> tuple[KeyNumber, ...]:
    """Six numbers, in the order of the argument; one that was not measured says why."""
    return (
        _accuracy(results),
        _auc(results),
        _restored(results),
        _drawn(results),
        _z(results),
        _steered(results),
    )


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
    if not details.selected:
        return KeyNumber(label, "\u2014", "no head is selected")
    return KeyNumber(
        label,
        percent(details.restored),
        f"{percent_interval(details.restored_ci)}; random heads: {percent(details.restored_random_heads)}",
    )


def _drawn(results: Results) -> KeyNumber:
    label = "Attention on the token that draws a selected head most under harm"
    if results.heads_details is None:
        return KeyNumber(label, "\u2014", not_run(results, "heads"))
    if not results.heads_details.selected:
        return KeyNumber(label, "\u2014", "no head is selected")
    found = strongest(results)
    if found is None:
        return KeyNumber(label, "none", "no token outside the options gains a tenth of a selected head's attention")
    row, token = found
    return KeyNumber(
        label,
        percent(token.attention.get("harm")),
        f"{head_name(row.layer, row.head)} on {quoted(token.token)}, {place_words(token.span)}; no intent: "
        f"{percent(token.attention.get('none'))}, benign: {percent(token.attention.get('benign'))}",
    )


def _z(results: Results) -> KeyNumber:
    label = "z, refuse-and-redirect \u00d7 harm detection"
    first, second = (pair_z(results, "refuse_redirect", "harm_detection", null) for null in CLAIM_NULLS)
    if not first and not second:
        return KeyNumber(label, "\u2014", not_run(results, "zscores"))
    answer = pair_z(results, "refuse_redirect", "correct_answer", CLAIM_NULLS[0])
    matched = f"matched null: {z_value(mean(r.z for r in second))}" if second else "no matched null: no claim"
    contrast = f"; \u00d7 correct answer: {z_value(mean(r.z for r in answer))}" if answer else ""
    return KeyNumber(label, z_value(mean(r.z for r in first or second)), matched + contrast)


def _steered(results: Results) -> KeyNumber:
    label = "Accuracy under harm with the feature steered"
    # The first that ran, not the better one: a choice between them would be made on the report half.
    whole, query = effects(results, "steer_all"), effects(results, "steer_query")
    if not whole and not query:
        return KeyNumber(label, "\u2014", not_run(results, "steer_all"))
    first = (whole or query)[0]
    details = [f"without: {percent(first.before)}", _beside(first)]
    if whole and query:
        details.append(
            "query side only: no strength helped"
            if query[0].no_edit
            else f"query side only: {percent(query[0].point.accuracy)} ({_beside(query[0])})"
        )
    if first.no_edit:
        return KeyNumber(label, "no strength helped", "; ".join([details[0], *details[2:]]))
    if not first.was_chosen:
        details.append("strength not chosen beforehand")
    return KeyNumber(label, percent(first.point.accuracy), "; ".join(details))


def _beside(one: Effect) -> str:
    best = one.best_control
    if best is None:
        return "no control measured"
    random = one.random
    spread = f"; random mean {percent(random.accuracy)}" if random is not None and random.draws is not None else ""
    return f"best control: {percent(best[1])}, {best[0]}{spread}"
