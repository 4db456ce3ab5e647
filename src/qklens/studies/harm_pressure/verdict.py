"""Stage `verdict`: which mechanism the evidence supports.

Rules are causal first, and every threshold stands in one table. A mechanism is named when it carries at least two
thirds of the margin that harm costs, twice as much as all the rest; shares are those of `analyses/mediation.py`.

    task_not_solved       no answer without pressure
    no_effect             harm costs little compared with a benign sentence
    belief_change         the loss runs through the options' amount of the correct-answer direction, which shrinks
    attention_*           the loss runs through the selected heads' patterns, and not through the belief; most of it
                          through the options' ordinary keys, or through what harm wrote into the keys
    late_flip             the loss runs through neither the heads' outputs nor the belief, and what is written after the
                          heads restores it, while they still look at the correct option
    undetermined          anything else: two mechanisms share the loss, or the checks conflict

Confidence is counted on planted models, see `calibration.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from qklens.analyses.factorial import Term
from qklens.studies.harm_pressure.calibration import shipped_calibration
from qklens.studies.harm_pressure.causes import Causes
from qklens.studies.results import BehaviourDetails, Belief, ConditionBehaviour, Evidence, HeadsDetails, Verdict

THRESHOLDS = {
    "solved_accuracy": 0.80,
    "solved_bound": 0.60,
    "accuracy_drop": 0.05,
    "mcnemar_p": 0.01,
    "margin_drop": 0.25,
    "carries": 2 / 3,
    "carries_not": 1 / 3,
    "separation_kept": 2 / 3,
    "attention_kept": 0.50,
    "random_heads": 1 / 3,
    "key_majority": 0.50,
}


@dataclass(frozen=True)
class Measurements:
    """Everything the rules read."""

    behaviour: dict[str, ConditionBehaviour]
    details: BehaviourDetails
    belief: Belief | None
    heads: HeadsDetails | None
    causes: Causes | None


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
        **_strength("task_not_solved", distance / 0.1),
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
        **_strength("no_effect", min((t["accuracy_drop"] - drop) / 0.05, (t["margin_drop"] - relative) / 0.1)),
        rule="neither accuracy nor margin falls enough under harm compared with a benign sentence",
        evidence=[
            _evidence("accuracy lost, benign to harm", drop, "below", t["accuracy_drop"]),
            _evidence("McNemar p, harm against benign", m.details.mcnemar_p, "at least", t["mcnemar_p"]),
            _evidence("share of the margin lost, benign to harm", relative, "below", t["margin_drop"]),
        ],
    )


def _belief_evidence(c: Causes) -> list[Evidence]:
    t = THRESHOLDS
    return [
        _evidence("share of the loss through the options' belief", c.belief.through, "at least", t["carries"]),
        _evidence("separation of the options kept under harm", c.separation_kept, "below", t["separation_kept"]),
    ]


def _belief_change(m: Measurements) -> Verdict | None:
    c, t = m.causes, THRESHOLDS
    if c is None:
        return None
    evidence = _belief_evidence(c)
    if not all(e.holds for e in evidence):
        return None
    return Verdict(
        **_strength(
            "belief_change",
            min((c.belief.through - t["carries"]) / 0.2, (t["separation_kept"] - c.separation_kept) / 0.2),
        ),
        rule="the options' correct-answer direction shrinks under harm, and giving it back or taking it away moves the "
        "margin",
        evidence=[
            *evidence,
            _evidence("AUC of that direction under harm", c.auc_harm, "below", c.auc_none),
        ],
    )


def _attention(m: Measurements) -> Verdict | None:
    c, t = m.causes, THRESHOLDS
    if c is None or m.heads is None:
        return None
    common = [
        _evidence("share of the loss through the heads' patterns", c.pattern.through, "at least", t["carries"]),
        _evidence("margin restored by the clean pattern alone", c.pattern.restored, "at least", t["carries"]),
        _evidence("lower bound of that share", c.pattern.ci[0], "above", t["carries_not"]),
        _evidence("margin restored at random heads", m.heads.restored_random_heads, "below", t["random_heads"]),
        _evidence("share of the loss through the options' belief", c.belief.through, "below", t["carries_not"]),
    ]
    if not all(e.holds for e in common):
        return None
    part = {term: max(c.removal.get(term, 0.0), 0.0) for term in get_args(Term)}
    whole = max(sum(part.values()), 1e-9)
    harm, answer = (part["harm_key"] + part["key_only"]) / whole, part["answer_key"] / whole
    terms = [
        _evidence("of what the terms carry, what harm wrote into the keys", harm, "above", t["key_majority"]),
        _evidence("of it, met by the pressed query", part["harm_key"] / whole, "at least", 0.0),
        _evidence("the options' ordinary keys", answer, "above", t["key_majority"]),
        _evidence("the pressed query elsewhere", part["elsewhere"] / whole, "below", t["key_majority"]),
        _evidence("the sentence's own keys", part["intent_key"] / whole, "below", t["key_majority"]),
    ]
    if max(answer, harm) <= t["key_majority"]:
        return Verdict(
            **_strength("undetermined", 0.0),
            rule="attention is pulled away, but mostly through neither kind of key at the options",
            evidence=common + terms,
        )
    mechanism = "attention_harm_key" if harm >= answer else "attention_answer_key"
    winner = "what harm wrote into the keys" if harm >= answer else "the options' ordinary keys"
    distance = min((c.pattern.through - t["carries"]) / 0.2, (max(harm, answer) - t["key_majority"]) / 0.2)
    return Verdict(
        **_strength(mechanism, distance),
        rule=f"the clean pattern restores the margin, and most of the loss runs through {winner}",
        evidence=common + terms,
    )


def _late_flip(m: Measurements) -> Verdict | None:
    c, t = m.causes, THRESHOLDS
    if c is None:
        return None
    evidence = [
        _evidence("share of the loss through the heads' patterns", c.pattern.through, "below", t["carries_not"]),
        _evidence("share through their whole outputs", c.output.through, "below", t["carries_not"]),
        _evidence("share of the loss through the options' belief", c.belief.through, "below", t["carries_not"]),
        _evidence("margin restored by what is written after them", c.late_restored, "at least", t["carries"]),
        _evidence("attention difference kept under harm", c.attention_kept, "at least", t["attention_kept"]),
    ]
    if not all(e.holds for e in evidence):
        return None
    distance = min(
        (t["carries_not"] - max(c.pattern.through, c.output.through)) / 0.2, (c.late_restored - t["carries"]) / 0.2
    )
    return Verdict(
        **_strength("late_flip", distance),
        rule="the heads still look at the correct option under harm, and the loss is written after them",
        evidence=evidence,
    )


def _undetermined(m: Measurements) -> Verdict:
    c, t = m.causes, THRESHOLDS
    evidence, rule = [], "no rule's evidence is complete: the causal checks disagree or fall between the thresholds"
    if c is not None:
        evidence = [
            _evidence("share of the loss through the heads' patterns", c.pattern.through, "at least", t["carries"]),
            _evidence("margin restored by the clean pattern alone", c.pattern.restored, "at least", t["carries"]),
            _evidence("share through everything but their outputs", 1 - c.output.through, "at least", t["carries"]),
            *_belief_evidence(c),
            _evidence("margin restored by what is written after them", c.late_restored, "at least", t["carries"]),
            _evidence("attention difference kept under harm", c.attention_kept, "at least", t["attention_kept"]),
        ]
        if t["carries_not"] <= c.pattern.through < t["carries"]:
            rule = (
                f"two mechanisms share the loss: the heads' patterns carry {c.pattern.through:.2f} of it, the rest "
                f"{1 - c.pattern.through:.2f}"
            )
    return Verdict(**_strength("undetermined", 0.0), rule=rule, evidence=evidence)


def _evidence(name: str, value: float, relation: str, threshold: float) -> Evidence:
    holds = {
        "below": value < threshold,
        "above": value > threshold,
        "at least": value >= threshold,
    }[relation]
    return Evidence(
        name=name,
        value=value,
        threshold=f"{relation} {threshold:.3g}",
        holds=holds,
        text=f"{name} is {value:.3g} ({relation} {threshold:.3g}: {'yes' if holds else 'no'})",
    )


def _strength(mechanism: str, distance: float) -> dict[str, Any]:
    """The mechanism, how far what decided lies from its threshold in typical errors, and how often such are right."""
    distance = round(max(distance, 0.0), 4)
    confidence = shipped_calibration().confidence(mechanism, distance)
    return {"mechanism": mechanism, "distance": distance, "confidence": confidence}
