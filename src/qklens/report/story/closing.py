"""The verdict's evidence, the completeness of the decomposition, and what a reader should hold against all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qklens.report.story.headline import MECHANISM_WORDS, caveats
from qklens.report.story.parts import Section, Table
from qklens.report.story.pull import place_words, quoted, strongest
from qklens.report.text import count, finite, head_name, number, percent, printable
from qklens.studies.results import Results

METHODS: tuple[tuple[str, str], ...] = (
    (
        "Halves",
        "Heads, features, layers and strengths are chosen on the discovery half of the items and reported on the other "
        "half. Accuracy by condition uses all items, because nothing is chosen there.",
    ),
    (
        "Clustering",
        "Both option orders of an item are one cluster: bootstraps resample items. Wilson intervals and McNemar's "
        "test are over prompts and ignore the clustering, so they are somewhat too narrow.",
    ),
    (
        "Nulls",
        "A claim about a pair needs two nulls: random alive features at the same head, and features matched for "
        "activation frequency and norm. p is empirical and two-sided; q is Benjamini\u2013Hochberg over the pairs "
        "tested. A source with a handful of directions draws its null within the residual's covariance.",
    ),
    (
        "Controls",
        "Every edit is shown beside a random direction and an unrelated feature of equal norm at the same positions, "
        "and beside the same edit under a benign intent. At the chosen strength the random control is the mean over "
        "several draws, and the best of them is quoted too. An edit that raises accuracy no more than its controls "
        "explains nothing.",
    ),
    (
        "Norms",
        "The decomposition holds every normalisation's scale at its observed value. Causal checks recompute it.",
    ),
    (
        "Confidence",
        "How often verdicts that lie as far from the rules' thresholds were right on planted models, whose answer is "
        "known. Those are small and clean; a mechanism that nobody planted is not among them. That of `undetermined` "
        "says how often such a case was one of several mechanisms, or of none that has a name here.",
    ),
    (
        "Scope",
        "The verdict is about this model and these items; its rules read no dictionary. Roles and pairs are those of "
        "this dictionary: one that splits or merges a concept changes which pairs exist.",
    ),
)


_OTHER_TOKENS = frozenset({"undetermined", "attention_answer_key", "attention_harm_key"})


def _named(mechanism: str) -> str:
    words = MECHANISM_WORDS[mechanism]
    return words if words == mechanism else f"{words} ({mechanism})"


def verdict(results: Results) -> Section:
    """The rule, its confidence and its numbers."""
    found = results.verdict
    failing = [item for item in found.evidence if not item.holds]
    paragraphs = [
        f"Verdict: {_named(found.mechanism)}, confidence {number(found.confidence)}.",
        f"Rule: {printable(found.rule).rstrip('.')}.",
    ]
    if found.evidence:
        held = len(found.evidence) - len(failing)
        paragraphs.append(
            f"{held} of {count(len(found.evidence), 'condition')} read by the rules {'holds' if held == 1 else 'hold'}."
        )
    else:
        paragraphs.append("No evidence was recorded.")
    drawn = strongest(results)
    if drawn is not None and found.mechanism in _OTHER_TOKENS:
        row, token = drawn
        paragraphs.append(
            f"Under harm the token outside the options that gains most of a selected head's attention is "
            f"{quoted(token.token)} ({place_words(token.span)}): at {head_name(row.layer, row.head)} it goes from "
            f"{percent(token.attention.get('none'))} to {percent(token.attention.get('harm'))} (section 3)."
        )
    paragraphs += [f"Caveat: {text}" for text in caveats(results)]
    table = Table(
        "Evidence",
        ("evidence", "value", "threshold", "holds", "meaning"),
        tuple(
            (
                printable(item.name).replace("_", " "),
                number(item.value, 3),
                printable(item.threshold),
                "yes" if item.holds else "no",
                printable(item.text),
            )
            for item in found.evidence
        ),
    )
    return Section(
        "verdict",
        "Verdict",
        "Which mechanism does the evidence support, and which numbers decided?",
        tuple(paragraphs),
        "Rules are causal first: restoring the clean pattern must restore the margin for any attention verdict, and "
        "must not for a late flip. A condition that fails is evidence too: rules ask for some to hold and others not "
        "to.",
        (table,),
    )


def completeness(results: Results) -> tuple[str, ...]:
    """How exactly the terms sum to the model's own scores."""
    found = results.completeness
    if found is None:
        reason = results.skipped.get("interactions")
        return ("The decomposition was not checked" + (f": {printable(reason).rstrip('.')}." if reason else "."),)
    verdict = (
        "within the promised 1e\u22124"
        if finite(found.max_relative_error) and found.max_relative_error <= 1e-4
        else "above the promised 1e\u22124, so the decomposition should not be trusted"
    )
    return (
        f"Over {count(found.n_scores, 'score')} of all heads, the sum of all pair terms differs from the model's own "
        f"score before softmax by at most {number(found.max_relative_error)} of the largest score in size, {verdict} "
        "(float32).",
        f"Contrastive terms with an error on either side are {percent(found.error_share)} of the summed size of all "
        "contrastive terms at the heads looked through. Realised terms are not counted: the size of their biases "
        "depends on how the weights are written.",
    )


def provenance(results: Results, manifest: Mapping[str, Any]) -> tuple[Table, ...]:
    """What was run, on what, and for how long."""
    tables = [
        Table("Run", ("entry", "value"), tuple(_flat(manifest))),
        *(
            Table(name, ("entry", "value"), tuple(_flat(values)))
            for name, values in (("Model", results.model), ("Dictionary", results.dictionary), ("Data", results.data))
        ),
        Table(
            "Wall time", ("stage", "seconds"), tuple((printable(k), number(v, 1)) for k, v in results.seconds.items())
        ),
        Table(
            "Roles (discovery half)",
            (
                "role",
                "feature",
                "layer",
                "contrast",
                "steadiness",
                "on refusals",
                "interaction",
                "chosen",
                "most active on",
            ),
            tuple(
                (
                    printable(r.role).replace("_", " "),
                    printable(r.feature),
                    str(r.layer),
                    number(r.contrast),
                    number(r.steadiness),
                    number(r.refusal),
                    number(r.interaction),
                    "yes" if r.chosen else "no",
                    ", ".join(map(printable, r.top_tokens)),
                )
                for r in results.roles
            ),
        ),
    ]
    return tuple(table for table in tables if table.rows)


def _flat(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """Nested entries as dotted names."""
    if isinstance(value, Mapping):
        return [row for key, inner in value.items() for row in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list | tuple) and len(value) > 24:
        return [(printable(prefix), f"{len(value)} values")]
    return [(printable(prefix), printable(value))]
