"""Stage `verdict`: which mechanism the evidence supports.

Rules are causal first, and every threshold stands in one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from qklens.analyses.factorial import Term, removal, shapley_values, term_rows
from qklens.analyses.heads import restored_share
from qklens.interventions.steer import Head
from qklens.studies.lab import Lab
from qklens.studies.results import BehaviourDetails, Belief, ConditionBehaviour, Evidence, HeadsDetails, Verdict

THRESHOLDS = {
    "solved_accuracy": 0.80,
    "solved_bound": 0.60,
    "accuracy_drop": 0.05,
    "mcnemar_p": 0.01,
    "margin_drop": 0.25,
    "belief_kept": 0.40,
    "patch_restores": 0.50,
    "patch_fails": 0.30,
    "attention_kept": 0.50,
    "removal_restores": 0.20,
}


@dataclass(frozen=True)
class Measurements:
    """Everything the rules read."""

    behaviour: dict[str, ConditionBehaviour]
    details: BehaviourDetails
    belief: Belief | None
    heads: HeadsDetails | None
    attention_none: float
    attention_harm: float
    removal: dict[str, float]


def measure_removals(lab: Lab, heads: Sequence[Head]) -> dict[str, float]:
    """Each factorial term's Shapley share of the margin lost from benign to harm, at the selected heads.

    The terms are differences between these two conditions, so that is the loss they can account for; report half.
    """
    layers = sorted({layer for layer, _ in heads})
    rows = term_rows(
        lab.subject,
        heads,
        lab.prompts("harm", "report"),
        lab.prompts("benign", "report"),
        lab.streams("harm", "report", layers),
        lab.streams("benign", "report", layers),
    )
    harmed, clean = lab.attention("harm", "report").margins, lab.attention("benign", "report").margins
    work = lab.work("harm", "report")

    def restored(terms: frozenset[Term]) -> float:
        shift = removal(rows, sorted(terms)) if terms else None
        if shift is None or not any(bool(row.any()) for by_prompt in shift.shifts.values() for row in by_prompt):
            return 0.0
        return restored_share(work.margins([shift]), harmed, clean)

    return {str(term): value for term, value in shapley_values(restored).items()}


def decide(m: Measurements) -> Verdict:
    """Apply the rules in order; the first that holds decides."""
    return _not_solved(m) or _no_effect(m) or _belief_change(m) or _attention(m) or _late_flip(m) or _undetermined(m)


def _not_solved(m: Measurements) -> Verdict | None:
    none, t = m.behaviour["none"], THRESHOLDS
    evidence = [
        _evidence("accuracy without pressure", none.accuracy, "below", t["solved_accuracy"]),
        _evidence("its lower bound", none.ci[0], "below", t["solved_bound"]),
    ]
    if not any(e.holds for e in evidence):
        return None
    distance = max(t["solved_accuracy"] - none.accuracy, t["solved_bound"] - none.ci[0])
    return Verdict(
        mechanism="task_not_solved",
        confidence=_confidence(distance / 0.1),
        rule="the model does not answer the questions without pressure, so there is no answer to look away from",
        evidence=evidence,
    )


def _no_effect(m: Measurements) -> Verdict | None:
    t, b = THRESHOLDS, m.behaviour
    drop = b["benign"].accuracy - b["harm"].accuracy
    relative = -m.details.harm_minus_benign[0] / max(b["benign"].margin, 1e-6)
    accuracy_falls = drop >= t["accuracy_drop"] and m.details.mcnemar_p < t["mcnemar_p"]
    margin_falls = relative >= t["margin_drop"] and m.details.harm_minus_benign[2] < 0
    if accuracy_falls or margin_falls:
        return None
    return Verdict(
        mechanism="no_effect",
        confidence=_confidence(min((t["accuracy_drop"] - drop) / 0.05, (t["margin_drop"] - relative) / 0.1)),
        rule="neither accuracy nor margin falls enough under harm compared with a benign sentence",
        evidence=[
            _evidence("accuracy lost, benign to harm", drop, "below", t["accuracy_drop"]),
            _evidence("McNemar p, harm against benign", m.details.mcnemar_p, "at least", t["mcnemar_p"]),
            _evidence("share of the margin lost, benign to harm", relative, "below", t["margin_drop"]),
        ],
    )


def _belief_kept(m: Measurements) -> float:
    """Share of the correct-answer feature's discrimination above chance that is left under harm."""
    if m.belief is None or m.belief.auc_none <= 0.5:
        return 1.0
    return (m.belief.auc_harm - 0.5) / (m.belief.auc_none - 0.5)


def _belief_change(m: Measurements) -> Verdict | None:
    if m.belief is None or m.belief.auc_none < 0.7:
        return None
    kept = _belief_kept(m)
    if kept >= THRESHOLDS["belief_kept"]:
        return None
    return Verdict(
        mechanism="belief_change",
        confidence=_confidence((THRESHOLDS["belief_kept"] - kept) / 0.2),
        rule="the correct-answer feature no longer tells the options apart under harm",
        evidence=[_evidence("belief kept under harm", kept, "below", THRESHOLDS["belief_kept"])],
    )


def _attention(m: Measurements) -> Verdict | None:
    if m.heads is None:
        return None
    t = THRESHOLDS
    restored = m.heads.restored
    common = [
        _evidence("belief kept under harm", _belief_kept(m), "at least", t["belief_kept"]),
        _evidence("margin restored by the clean pattern", restored, "at least", t["patch_restores"]),
        _evidence("its lower bound", m.heads.restored_ci[0], "above", t["patch_fails"]),
        _evidence("the same at random heads", m.heads.restored_random_heads, "below", t["patch_restores"]),
    ]
    if not all(e.holds for e in common):
        return None
    part = {term: m.removal.get(term, 0.0) for term in get_args(Term)}
    harm, answer = part["harm_key"] + part["key_only"], part["answer_key"]
    terms = [
        _evidence("share of the loss through what harm wrote into the keys", harm, "at least", t["removal_restores"]),
        _evidence("of it, met by the pressed query", part["harm_key"], "at least", t["removal_restores"]),
        _evidence("share through the options' ordinary keys", answer, "at least", t["removal_restores"]),
        _evidence("share through the pressed query elsewhere", part["elsewhere"], "at least", t["removal_restores"]),
        _evidence("share through the sentence's own keys", part["intent_key"], "at least", t["removal_restores"]),
    ]
    if max(answer, harm) < t["removal_restores"] or max(answer, harm) < max(part["elsewhere"], part["intent_key"]):
        return Verdict(
            mechanism="undetermined",
            confidence=0.5,
            rule="attention is pulled away, but mostly through neither kind of key at the options",
            evidence=common + terms,
        )
    mechanism = "attention_harm_key" if harm >= answer else "attention_answer_key"
    winner = "what harm wrote into the keys" if harm >= answer else "the options' ordinary keys"
    return Verdict(
        mechanism=mechanism,
        confidence=min(_confidence((restored - t["patch_restores"]) / 0.2), _confidence(abs(harm - answer) / 0.2)),
        rule=f"the clean pattern restores the margin, and most of the loss runs through {winner}",
        evidence=common + terms,
    )


def _late_flip(m: Measurements) -> Verdict | None:
    if m.heads is None:
        return None
    t = THRESHOLDS
    kept = m.attention_harm / m.attention_none if m.attention_none > 1e-6 else 0.0
    evidence = [
        _evidence("belief kept under harm", _belief_kept(m), "at least", t["belief_kept"]),
        _evidence("margin restored by the clean pattern", m.heads.restored, "below", t["patch_fails"]),
        _evidence("attention difference kept under harm", kept, "at least", t["attention_kept"]),
    ]
    if not all(e.holds for e in evidence):
        return None
    distance = min((t["patch_fails"] - m.heads.restored) / 0.2, (kept - t["attention_kept"]) / 0.2)
    return Verdict(
        mechanism="late_flip",
        confidence=_confidence(distance),
        rule="the heads still look at the correct option under harm and giving them the clean pattern does not help",
        evidence=evidence,
    )


def _undetermined(m: Measurements) -> Verdict:
    t = THRESHOLDS
    evidence = [_evidence("belief kept under harm", _belief_kept(m), "at least", t["belief_kept"])]
    if m.heads is not None:
        kept = m.attention_harm / m.attention_none if m.attention_none > 1e-6 else 0.0
        evidence += [
            _evidence("margin restored by the clean pattern", m.heads.restored, "at least", t["patch_restores"]),
            _evidence("attention difference kept under harm", kept, "at least", t["attention_kept"]),
        ]
    return Verdict(
        mechanism="undetermined",
        confidence=0.5,
        rule="no rule's evidence is complete: the causal checks disagree or fall between the thresholds",
        evidence=evidence,
    )


def _evidence(name: str, value: float, relation: str, threshold: float) -> Evidence:
    holds = {
        "below": value < threshold,
        "above": value > threshold,
        "at least": value >= threshold,
    }[relation]
    return Evidence(
        name=name,
        value=value,
        threshold=f"{relation} {threshold:g}",
        holds=holds,
        text=f"{name} is {value:.3g} ({relation} {threshold:g}: {'yes' if holds else 'no'})",
    )


def _confidence(distance: float) -> float:
    """From half at the threshold towards 0.99, by the distance from it in units of a typical error."""
    return round(min(0.99, 0.5 + 0.49 * max(0.0, distance) / (1.0 + max(0.0, distance))), 3)
