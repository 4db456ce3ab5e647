"""The mechanism: which heads select the answer, what moves their attention, and how unusual those pairs are."""

from __future__ import annotations

from qklens.report.figures.interactions import ranked
from qklens.report.figures.style import pair_words
from qklens.report.figures.zscores import nulls_shown
from qklens.report.story import pull
from qklens.report.story.gauge import TITLE
from qklens.report.story.parts import Section, Table, empty
from qklens.report.text import (
    count,
    finite,
    head_name,
    includes,
    listing,
    mean,
    number,
    p_value,
    percent,
    percent_interval,
    printable,
    role_words,
    signed,
    source_words,
    z_value,
)
from qklens.studies.results import Results, ZScore

CLAIM_NULLS = ("random_pairs", "matched")


def heads(results: Results) -> Section:
    """The selected heads' attention and what patching it restores."""
    title = "Answer-selection heads"
    question = (
        "Which heads attend to the correct option and carry its letter, and is their attention what harm changes?"
    )
    details = results.heads_details
    if details is None or "heads" in results.skipped:
        return empty(results, "heads", title, question)
    chosen = [row for row in results.heads if row.selected]
    names = listing(head_name(layer, head) for layer, head in details.selected) or "none"
    none, harm = mean(r.attention_difference_none for r in chosen), mean(r.attention_difference_harm for r in chosen)
    paragraphs = [
        f"{count(len(details.selected), 'head')} selected on the discovery half: {names}. On the report half their "
        f"mean attention difference (correct minus incorrect option) is {signed(none)} with no intent and "
        f"{signed(harm)} under harm."
        if chosen
        else "No head is selected: on the discovery half the answers without pressure are no better than chance, so "
        "there is no answer that a head could select."
    ]
    text = (
        "Giving the selected heads back the pattern they have on the bare question moves the mean margin from "
        f"{number(details.harm_margin)} to {number(details.patched_margin)} logits, {percent(details.restored)} of "
        f"what was lost ({percent_interval(details.restored_ci)}), with {percent(details.patched_accuracy)} correct. "
        f"The same patch restores {percent(details.restored_random_heads)} at as many other heads and "
        f"{percent(details.all_heads_restored)} at every head."
    )
    if includes(details.restored_ci, 0):
        text += " The interval includes zero: the selected heads' attention is not shown to matter."
    elif finite(details.restored_random_heads) and details.restored_random_heads >= details.restored_ci[0]:
        text += " The random heads' share is not below that interval, so the effect is not specific to these heads."
    lost = details.none_margin - details.harm_margin
    if finite(lost) and lost < 0.1 * abs(details.none_margin):
        text += (
            f" Only {number(lost)} logits were lost, less than a tenth of the margin with no intent, so these shares "
            "mean little."
        )
    if chosen:
        paragraphs += [pull.tokens_sentence(chosen), pull.benign_sentence(chosen), text]
    table = Table(
        "Candidate heads",
        (
            "head",
            "attention diff., none",
            "harm",
            "benign",
            "letter logit, none",
            "harm",
            "ablation drop",
            "restores alone",
            "selected",
        ),
        tuple(
            (
                head_name(row.layer, row.head),
                signed(row.attention_difference_none),
                signed(row.attention_difference_harm),
                signed(row.attention_difference_benign),
                signed(row.letter_logit),
                signed(row.letter_logit_harm),
                number(row.ablation_drop),
                percent(row.restores_when_patched),
                "yes" if row.selected else "no",
            )
            for row in results.heads
        ),
    )
    return Section(
        "heads",
        title,
        question,
        tuple(paragraphs),
        "Maps: discovery half. Everything else: report half. Attention is read at the answer position. Letter logit: "
        "direct logit attribution of the correct letter. Restored share: (patched \u2212 harm) / (no intent \u2212 "
        "harm) of the mean margin; it can exceed 100%. Keys and values are left as they are under harm. A token's "
        "attention is summed over its occurrences at that place and averaged over all prompts; the chat template after "
        "the user's text includes the answer position itself.",
        (table, *pull.tables(chosen)),
    )


def interactions(results: Results) -> Section:
    """The pairs at both ends of the ranking."""
    title = "Query\u2013key interactions at these heads"
    question = "Which pairs of sources raise attention to the correct option, and which lower it?"
    low_high = {kind: ranked(results.interactions, kind, 1) for kind in ("contrastive", "realised")}
    kind = next((kind for kind, rows in low_high.items() if rows), None)
    if kind is None or "interactions" in results.skipped:
        return empty(results, "interactions", title, question)
    paragraphs: list[str] = []
    for row in low_high[kind]:
        end = "most negative" if row.value < 0 else "most positive"
        clean = next(
            (
                r.value
                for r in results.interactions
                if (r.kind, r.condition, r.layer, r.head, r.query, r.key)
                == (kind, "none", row.layer, row.head, row.query, row.key)
            ),
            None,
        )
        at = head_name(row.layer, row.head)
        was = f"; with no intent the same pair gives {signed(clean)}" if clean is not None else ""
        paragraphs.append(
            f"Under harm the {end} {kind} pair is {source_words(row.query, row.query_role)} (query) with "
            f"{source_words(row.key, row.key_role)} (key) at {at}: {signed(row.value)}{was}."
        )
    if results.completeness is not None:
        paragraphs.append(
            f"Terms with a dictionary error on either side make up {percent(results.completeness.error_share)} of "
            "the summed size of all contrastive terms at these heads; they are listed like any other source."
        )
    rows = ranked(results.interactions, "contrastive", 12) + ranked(results.interactions, "realised", 12)
    table = Table(
        "Pairs under harm, both ends",
        ("kind", "head", "query", "role", "key", "role", "value", "weighed as without intent"),
        tuple(
            (
                row.kind,
                head_name(row.layer, row.head),
                printable(row.query),
                role_words(row.query_role),
                printable(row.key),
                role_words(row.key_role),
                signed(row.value, 3),
                "" if row.weighed_as_none is None else signed(row.weighed_as_none, 3),
            )
            for row in rows
        ),
    )
    return Section(
        "interactions",
        title,
        question,
        tuple(paragraphs),
        "A term is one (query source, key source) part of the score before softmax, after the model's own scale, "
        "mean over the report half's prompts; all terms of a score sum to it. Contrastive: score of the correct "
        "option minus score of the incorrect one. Negative lowers attention. A span's tokens count as the head attends "
        "to them, so a token that harm pushes away drops out of its own sum; pairs of roles are shown with the tokens "
        "weighed as without intent, too. How much of this depends on how the weights are written is told under "
        f"\u201c{TITLE}\u201d.",
        (table,),
    )


def pair_z(results: Results, query_role: str, key_role: str, null: str) -> list[ZScore]:
    """The z-scores of one named pair against one null, over heads and features."""
    return [
        row
        for row in results.zscores
        if (row.query_role, row.key_role, row.null) == (query_role, key_role, null) and finite(row.z)
    ]


def zscores(results: Results) -> Section:
    """Each named pair against both nulls that a claim needs."""
    title = "Named pairs against null distributions"
    question = "Are the interactions of the named features larger than those of random pairs at the same head?"
    if not results.zscores or "zscores" in results.skipped:
        return empty(results, "zscores", title, question)
    paragraphs: list[str] = []
    for query, key in dict.fromkeys((row.query_role, row.key_role) for row in results.zscores):
        by_null = {null: pair_z(results, query, key, null) for null in nulls_shown(results)}
        values = listing(
            f"{z_value(mean(r.z for r in rows))} ({_null(null)})" for null, rows in by_null.items() if rows
        )
        text = f"{pair_words(query, key).capitalize()}: mean z {values}."
        missing = [null for null in CLAIM_NULLS if not by_null.get(null)]
        if missing:
            text += f" No claim: the {listing(map(_null, missing))} null is missing."
        else:
            places = [{(r.layer, r.head, r.query, r.key): r.z for r in by_null[null]} for null in CLAIM_NULLS]
            shared = places[0].keys() & places[1].keys()
            far = [
                at
                for at in shared
                if abs(places[0][at]) >= 2 and abs(places[1][at]) >= 2 and places[0][at] * places[1][at] > 0
            ]
            text += (
                f" At {len(far)} of {count(len(shared), 'place')} (a head and a feature pair) it lies at least 2 "
                f"standard deviations out, on the same side, under both {listing(map(_null, CLAIM_NULLS))}."
            )
        paragraphs.append(text)
    played: dict[str, list[str]] = {}
    for role in results.roles:
        if role.chosen:
            played.setdefault(role.feature, []).append(role.role)
    paragraphs += [
        f"{printable(feature)} plays {listing(role_words(name) or name for name in names)}: the dictionary "
        "has one feature for both, which the head reads through W_Q at the answer and through W_K at the key."
        for feature, names in played.items()
        if len(names) > 1
    ]
    notes = dict.fromkeys(printable(h.note) for h in results.null_histograms if h.note)
    paragraphs += [f"Note on the nulls: {note}." for note in [*notes, *map(printable, results.untested)]]
    table = Table(
        "Every named pair, head and null",
        ("head", "query", "key", "null", "interaction", "z", "p (empirical)", "q (Benjamini\u2013Hochberg)"),
        tuple(
            (
                head_name(r.layer, r.head),
                role_words(r.query_role),
                role_words(r.key_role),
                _null(r.null),
                signed(r.value, 3),
                z_value(r.z),
                p_value(r.p).removeprefix("p = ").removeprefix("p "),
                p_value(r.q).removeprefix("p = ").removeprefix("p "),
            )
            for r in results.zscores
        ),
    )
    return Section(
        "zscores",
        title,
        question,
        tuple(paragraphs),
        "Virtual interaction: unit decoder directions through the head's weights, no activations, mean over the "
        "offsets from answer to correct option. z = (interaction \u2212 mean of the null) / sd of the null. Random "
        "pairs: random alive features at the same head; matched: same activation frequency and norm. The histogram "
        "pools the heads' nulls, each in its own sd. Shaded: within 2 sd.",
        (table,),
    )


def _null(name: str) -> str:
    return printable(name).replace("_", " ")
