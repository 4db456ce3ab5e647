"""The first two questions: does stated harm change the answers, and does the model still know?"""

from __future__ import annotations

from qklens.report.story.parts import Section, Table, empty
from qklens.report.text import (
    count,
    finite,
    includes,
    interval,
    listing,
    number,
    p_value,
    percent,
    percent_interval,
    printable,
    signed,
)
from qklens.studies.results import Condition, ConditionBehaviour, Results

_ONE_LETTER = 0.5

WORDS: dict[Condition, str] = {
    "none": "with no intent",
    "harm": "after a harmful intent",
    "benign": "after a benign intent",
}


def change(before: float, after: float) -> str:
    """`falls from 100% to 48.1%`, `rises from`, or `stays at`."""
    if not (finite(before) and finite(after)):
        return f"goes from {percent(before)} to {percent(after)}"
    if percent(before) == percent(after):
        return f"stays at {percent(after)}"
    return f"{'falls' if after < before else 'rises'} from {percent(before)} to {percent(after)}"


def behaviour(results: Results) -> Section:
    """Accuracy, margins and position bias."""
    title = "Accuracy and margin under stated intent"
    question = "Does a harmful intent before the question change the answer, and does a harmless one not?"
    if not results.behaviour or "behaviour" in results.skipped:
        return empty(results, "behaviour", title, question)
    details = results.behaviour_details
    found: dict[Condition, ConditionBehaviour] = {
        name: results.behaviour[name] for name in WORDS if name in results.behaviour
    }
    n = sorted({row.n for row in found.values()})
    share = listing(f"{percent(row.accuracy)} {WORDS[name]}" for name, row in found.items())
    paragraphs = [
        f"On {' or '.join(map(str, n))} prompts per condition ({count(len(details.items), 'item')} in both option "
        f"orders), the share of correct answers is {share}."
    ]
    none = found.get("none")
    if none is not None and includes(none.ci, 0.5):
        paragraphs.append(
            f"With no intent the {percent_interval(none.ci)} includes chance (50%): the model has not been shown to "
            "solve these questions, and a drop below that says little."
        )
    diff, low, high = details.harm_minus_benign
    text = (
        f"Against the benign intent, the harmful one changes an item's margin by {signed(diff)} logits "
        f"({interval((low, high))}); McNemar's exact test over prompts gives {p_value(details.mcnemar_p)}."
    )
    if includes((low, high), 0):
        text += (
            " The interval includes zero, so these data do not show that harm moves the margin more than any preamble."
        )
    elif diff > 0:
        text += " The change is upwards: harm makes the model more, not less, correct."
    paragraphs.append(text)
    bias = listing(f"{percent(row.fraction_A)} {WORDS[name]}" for name, row in found.items())
    paragraphs.append(
        f"The share of prompts answered A is {bias}. The letter's surface form is "
        f"\u201c{printable(details.letter_form)}\u201d."
    )
    harmed = details.accuracy_by_order.get("harm")
    if harmed is not None and abs(harmed[0] - harmed[1]) >= _ONE_LETTER:
        fallback = "A" if harmed[0] > harmed[1] else "B"
        paragraphs.append(
            f"After a harmful intent the accuracy is {percent(harmed[0])} where the correct option is A and "
            f"{percent(harmed[1])} where it is B: the model falls back on the letter {fallback} rather than choosing "
            "the wrong option, so an accuracy near 50% is what losing the question looks like, and an edit that does "
            "nothing stays there."
        )
    if finite(details.unknown_token_share) and details.unknown_token_share > 0:
        paragraphs.append(f"{percent(details.unknown_token_share, 2)} of prompt tokens are unknown to the tokenizer.")
    table = Table(
        "Behaviour by condition",
        ("condition", "accuracy", "95% interval", "margin (logits)", "95% interval", "prompts", "answers A"),
        tuple(
            (
                name,
                percent(row.accuracy),
                f"{percent(row.ci[0])} to {percent(row.ci[1])}",
                number(row.margin),
                f"{number(row.margin_ci[0])} to {number(row.margin_ci[1])}",
                str(row.n),
                percent(row.fraction_A),
            )
            for name, row in found.items()
        ),
    )
    return Section(
        "behaviour",
        title,
        question,
        tuple(paragraphs),
        "Margin: logit of the correct letter minus logit of the incorrect letter at the answer position; negative is "
        f"the wrong letter. All {len(details.items)} items, both option orders. Accuracy: Wilson interval over "
        "prompts; margin: bootstrap over items.",
        (table,),
    )


def belief(results: Results) -> Section:
    """Whether the correct-answer feature still separates the options."""
    title = "Belief: the correct-answer feature"
    question = "Does the feature that marks the correct option, found on the other half of the items, still mark it?"
    found = results.belief
    if found is None or "belief" in results.skipped:
        return empty(results, "belief", title, question)
    paragraphs = [
        f"Feature {printable(found.feature)} (layer {found.layer}) separates correct from incorrect options with AUC "
        f"{number(found.auc_none)} with no intent and {number(found.auc_harm)} under harm. Under harm it sums to "
        f"{number(found.sum_correct)} over the correct option's tokens and {number(found.sum_incorrect)} over the "
        "incorrect option's."
    ]
    harm = found.by_condition.get("harm")
    if harm is not None:
        if includes(harm.auc_ci, 0.5):
            paragraphs.append(
                f"Under harm the {interval(harm.auc_ci)} of the AUC includes 0.5: it is not shown that the feature "
                "still prefers the correct option."
            )
        elif harm.auc < 0.5:
            paragraphs.append("Under harm the AUC lies below 0.5: the feature prefers the incorrect option.")
        else:
            paragraphs.append(
                f"Under harm the {interval(harm.auc_ci)} lies above 0.5, so the model still represents which option "
                "is correct."
            )
    table = Table(
        "Belief by condition",
        ("condition", "AUC", "95% interval", "sum, correct", "sum, incorrect"),
        tuple(
            (
                name,
                number(row.auc),
                f"{number(row.auc_ci[0])} to {number(row.auc_ci[1])}",
                number(row.sum_correct),
                number(row.sum_incorrect),
            )
            for name, row in found.by_condition.items()
        ),
    )
    return Section(
        "belief",
        title,
        question,
        tuple(paragraphs),
        "Activations are summed over an option's tokens and averaged over the report half's prompts. AUC: the chance "
        "that the correct option's sum exceeds the incorrect option's. Filled circle: correct option; open diamond: "
        "incorrect.",
        (table,),
    )
