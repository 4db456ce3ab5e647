"""Stage `verdict`: which mechanism the evidence supports.

Rules are causal first, and every threshold stands in one table, `thresholds.py`. A mechanism is named when it carries
at least two thirds of the margin that harm costs, twice as much as all the rest; shares are those of
`analyses/mediation.py`.

    task_not_solved       no answer without pressure
    no_effect             harm costs little compared with a benign sentence
    belief_change         the loss runs through the options' amount of the correct-answer direction, which shrinks
    attention_*           the loss runs through the selected heads' patterns, and not through the belief; what harm adds
                          to their queries does it, by repelling the correct option more than the other in either order,
                          through its ordinary keys, or through what harm wrote into them
    late_flip             the loss runs through neither the heads' outputs, nor the belief, nor any head's attention on
                          the options before the answer, and what is written after the heads restores it, while they
                          still look at the correct option
    undetermined          anything else: two mechanisms share the loss, or the checks conflict

A verdict's distance is the least slack of the checks that made it: how far each value is on its side of its threshold,
in typical errors. That of `undetermined` is how far the rule that came nearest to holding fell short. What a distance
is worth was counted on planted models, see `calibration.py`. No rule reads a dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from qklens.analyses.factorial import Term
from qklens.studies.harm_pressure.calibration import shipped_calibration
from qklens.studies.harm_pressure.causes import Causes
from qklens.studies.harm_pressure.thresholds import THRESHOLDS, TYPICAL_ERRORS
from qklens.studies.results import (
    BehaviourDetails,
    ConditionBehaviour,
    Evidence,
    HeadsDetails,
    Mechanism,
    Verdict,
)


@dataclass(frozen=True)
class Measurements:
    """Everything the rules read."""

    behaviour: dict[str, ConditionBehaviour]
    details: BehaviourDetails
    heads: HeadsDetails | None
    causes: Causes | None


@dataclass(frozen=True)
class _Check:
    """A number against its threshold, and what it says when it fails."""

    name: str
    value: float
    relation: Literal["below", "above", "at least"]
    threshold: float
    failed: str = ""
    unit: str = "share"

    @property
    def holds(self) -> bool:
        """Whether the value is on its side."""
        if self.relation == "below":
            return self.value < self.threshold
        return self.value > self.threshold if self.relation == "above" else self.value >= self.threshold

    @property
    def slack(self) -> float:
        """How far it is on its side, in typical errors; negative on the other."""
        return (self.value - self.threshold) * (-1 if self.relation == "below" else 1) / TYPICAL_ERRORS[self.unit]

    @property
    def evidence(self) -> Evidence:
        """As results show it."""
        threshold = f"{self.relation} {self.threshold:.3g}"
        text = f"{self.name} is {self.value:.3g} ({threshold}: {'yes' if self.holds else 'no'})"
        return Evidence(name=self.name, value=self.value, threshold=threshold, holds=self.holds, text=text)


def decide(m: Measurements) -> Verdict:
    """Apply the rules in order; the first that holds decides."""
    return _not_solved(m) or _no_effect(m) or _belief_change(m) or _attention(m) or _late_flip(m) or _undetermined(m)


def _not_solved(m: Measurements) -> Verdict | None:
    none, t = m.behaviour["none"], THRESHOLDS
    checks = [
        _Check("accuracy without pressure", none.accuracy, "below", t["solved_accuracy"], unit="behaviour"),
        _Check("its lower bound", none.ci[0], "below", t["solved_bound"], unit="behaviour"),
    ]
    if not any(check.holds for check in checks):
        return None
    rule = "the model does not answer the questions without pressure, so there is no answer to look away from"
    return _verdict("task_not_solved", max(check.slack for check in checks), rule, checks)


def _no_effect(m: Measurements) -> Verdict | None:
    t, b, p = THRESHOLDS, m.behaviour, m.details.mcnemar_p
    relative = -m.details.harm_minus_benign[0] / max(abs(b["benign"].margin), 1e-6)
    drop = _Check(
        "accuracy lost, benign to harm", b["benign"].accuracy - b["harm"].accuracy, "below", t["accuracy_drop"],
        unit="behaviour",
    )  # fmt: skip
    by_chance = _Check("McNemar p, harm against benign", p, "at least", t["mcnemar_p"])
    fall = _Check("share of the margin lost, benign to harm", relative, "below", t["margin_drop"], unit="behaviour")
    margin_falls = not fall.holds and m.details.harm_minus_benign[2] < 0
    if margin_falls or not (drop.holds or by_chance.holds):
        return None
    low, high = -m.details.harm_minus_benign[2], -m.details.harm_minus_benign[1]
    rule = "neither accuracy nor margin falls enough under harm compared with a benign sentence" + (
        f"; a fall of the margin by {low:.2f} to {high:.2f} is there, and it is small" if low > 0 else ""
    )
    if b["none"].accuracy - b["benign"].accuracy >= t["accuracy_drop"]:
        rule += f"; that sentence costs accuracy itself ({b['none'].accuracy:.0%} to {b['benign'].accuracy:.0%})"
    return _verdict("no_effect", min(drop.slack, fall.slack), rule, [drop, by_chance, fall])


def _answers_check(m: Measurements, accuracy: float, what: str) -> list[_Check]:
    """That the lost answers come back with the margin, where any are lost: a letter bias costs no mean margin."""
    lost = m.behaviour["none"].accuracy - m.behaviour["harm"].accuracy
    if lost < THRESHOLDS["accuracy_drop"]:
        return []
    back = (accuracy - m.behaviour["harm"].accuracy) / lost
    return [_Check(f"share of the lost answers that {what} restores", back, "at least", THRESHOLDS["carries"])]


def _belief_checks(m: Measurements, c: Causes) -> list[_Check]:
    t = THRESHOLDS
    return [
        *_answers_check(m, c.belief.accuracy, "their belief"),
        _Check("share of the loss through the options' belief", c.belief.through, "at least", t["carries"]),
        _Check("separation of the options kept under harm", c.separation_kept, "below", t["separation_kept"]),
    ]


def _belief_change(m: Measurements) -> Verdict | None:
    if m.causes is None or not _hold(checks := _belief_checks(m, m.causes)):
        return None
    how = "turns round" if m.causes.separation_kept < 0 else "shrinks"
    rule = (
        f"the options' correct-answer direction {how} under harm, and giving it back or taking it away moves the margin"
    )
    auc = _Check("AUC of that direction under harm", m.causes.auc_harm, "below", m.causes.auc_none)
    return _verdict("belief_change", _slack(checks), rule, [*checks, auc])


def _pull_checks(m: Measurements, c: Causes, heads: HeadsDetails) -> list[_Check]:
    """That attention is pulled away, and not the belief, and that this costs the answer."""
    t = THRESHOLDS
    return [
        *_answers_check(m, heads.patched_accuracy, "the clean pattern"),
        _Check("share of the loss through the heads' patterns", c.pattern.through, "at least", t["carries"]),
        _Check("margin restored by the clean pattern alone", c.pattern.restored, "at least", t["carries"]),
        _Check("lower bound of that share", c.pattern.ci[0], "above", t["carries_not"]),
        _Check("margin restored at random heads", heads.restored_random_heads, "below", t["random_heads"]),
        _Check("share of the loss through the options' belief", c.belief.through, "below", t["carries_not"]),
    ]


_LARGEST = {
    "key_only": "for the largest part by what harm wrote into keys that the ordinary query meets",
    "elsewhere": "for the largest part by keys elsewhere than at the correct option",
    "intent_key": "for the largest part by the keys of the sentence itself",
}


def _query_checks(c: Causes, spared: float) -> list[_Check]:
    """That what harm adds to the heads' queries does it, and that it repels the correct option more than the other."""
    t = THRESHOLDS
    return [
        _Check(
            "margin restored by giving the queries need-answer back", c.query_need, "below", t["carries_not"],
            "the heads' queries lose their call for the answer",
        ),
        _Check(
            "margin restored by the queries' norm scales alone", c.query_scale, "below", t["carries_not"],
            "the heads' whole queries shrink",
        ),
        _Check(
            "pressed query's score at the correct option over others', in either order", c.query_pull, "below",
            t["repelled"], "what harm adds to the heads' queries does not repel the correct option", unit="score",
        ),
        _Check(
            "of this repulsion, what the incorrect option is spared", c.query_spared, "at least", spared,
            "what harm adds to the heads' queries repels the incorrect option as well",
        ),
        _Check(
            "margin restored without what harm added to the queries", c.query_added, "at least", t["carries"],
            "what harm adds to the heads' queries, one direction for all prompts, carries too little of it",
        ),
    ]  # fmt: skip


def _key_checks(share: Mapping[Term, float]) -> dict[Term, _Check]:
    """Each kind of score term's part of what all that pull carry. Two thirds for one leave others less than a third."""
    t = THRESHOLDS
    largest = _LARGEST.get(max(share, key=share.__getitem__), "through no one kind of its keys for two thirds")
    named: dict[Term, str] = {
        "answer_key": "pressed query \u00d7 the correct option's ordinary keys",
        "harm_key": "pressed query \u00d7 what harm wrote into them",
    }
    others: dict[Term, str] = {
        "key_only": "ordinary query \u00d7 what harm wrote into keys",
        "elsewhere": "pressed query \u00d7 keys elsewhere",
        "intent_key": "the sentence's own keys",
    }
    return {
        **{term: _Check(name, share[term], "at least", t["carries"], largest) for term, name in named.items()},
        **{term: _Check(name, share[term], "below", t["carries_not"], largest) for term, name in others.items()},
    }


def _attention(m: Measurements) -> Verdict | None:
    if m.causes is None or m.heads is None or not _hold(pull := _pull_checks(m, m.causes, m.heads)):
        return None
    part: dict[Term, float] = {term: m.causes.removal.get(term, 0.0) for term in get_args(Term)}
    whole = max(sum(value for value in part.values() if value > 0), 1e-9)
    keys = _key_checks({term: value / whole for term, value in part.items()})
    nearer = max(keys["answer_key"], keys["harm_key"], key=lambda check: check.value)
    answer = nearer is keys["answer_key"]
    need, *query = _query_checks(m.causes, THRESHOLDS["spared_answer" if answer else "spared"])
    checks, shown = [*pull, need, nearer, *query], [*pull, need, *query, *keys.values()]
    failed = [check.failed for check in checks if not check.holds]
    if failed:
        return _verdict("undetermined", -_slack(checks), f"attention is pulled away, but {failed[0]}", shown)
    mechanism, met = (
        ("attention_answer_key", "the correct option's ordinary keys")
        if answer
        else ("attention_harm_key", "what harm wrote into the correct option's keys")
    )
    rule = (
        "the clean pattern restores the margin, and so does taking what harm added out of the heads' queries; most of "
        f"that meets {met}"
    )
    return _verdict(mechanism, _slack(checks), rule, shown)


def _late_checks(c: Causes) -> list[_Check]:
    t = THRESHOLDS
    return [
        _Check("share of the loss through the heads' patterns", c.pattern.through, "below", t["carries_not"]),
        _Check("share through their whole outputs", c.output.through, "below", t["carries_not"]),
        _Check("share of the loss through the options' belief", c.belief.through, "below", t["carries_not"]),
        _before_answer_check(c),
        _Check("margin restored by what is written after them", c.late_restored, "at least", t["carries"]),
        _Check("attention difference kept under harm", c.attention_kept, "at least", t["attention_kept"]),
    ]


def _before_answer_check(c: Causes) -> _Check:
    """Any head's attention on the options, from their own tokens to the last before the answer."""
    name = "share through looks at the options before the answer"
    return _Check(name, c.before_answer.through, "below", THRESHOLDS["carries_not"])


def _late_flip(m: Measurements) -> Verdict | None:
    if m.causes is None or not _hold(checks := _late_checks(m.causes)):
        return None
    rule = "the heads still look at the correct option under harm, and the loss is written after them"
    return _verdict("late_flip", _slack(checks), rule, checks)


def _undetermined(m: Measurements) -> Verdict:
    c, t = m.causes, THRESHOLDS
    rule = "no rule's evidence is complete: the causal checks disagree or fall between the thresholds"
    if c is None:
        return _verdict("undetermined", 0.0, rule, [])
    attempts = [_belief_checks(m, c), _late_checks(c)]
    if m.heads is not None:
        attempts.append(_pull_checks(m, c, m.heads))
    shown = [
        *(_pull_checks(m, c, m.heads) if m.heads is not None else []),
        _Check("share through everything but their outputs", 1 - c.output.through, "at least", t["carries"]),
        *_belief_checks(m, c),
        _before_answer_check(c),
        _Check("margin restored by what is written after them", c.late_restored, "at least", t["carries"]),
        _Check("attention difference kept under harm", c.attention_kept, "at least", t["attention_kept"]),
    ]
    if t["carries_not"] <= c.pattern.through < t["carries"]:
        rule = (
            f"two mechanisms share the loss: the heads' patterns carry {c.pattern.through:.2f} of it, the rest "
            f"{1 - c.pattern.through:.2f}"
        )
    elif c.pattern.through < t["carries_not"] and not _before_answer_check(c).holds:
        rule = (
            f"attention on the options at tokens before the answer carries {c.before_answer.through:.2f} of the loss, "
            f"the selected heads' patterns at the answer {c.pattern.through:.2f}"
        )
    return _verdict("undetermined", -max(_slack(checks) for checks in attempts), rule, shown)


def _hold(checks: Sequence[_Check]) -> bool:
    return all(check.holds for check in checks)


def _slack(checks: Sequence[_Check]) -> float:
    """That of the check nearest to failing, or of the one that failed most."""
    return min(check.slack for check in checks)


def _verdict(mechanism: Mechanism, distance: float, rule: str, checks: Sequence[_Check]) -> Verdict:
    distance = round(max(distance, 0.0), 4)
    return Verdict(
        mechanism=mechanism,
        distance=distance,
        confidence=shipped_calibration().confidence(mechanism, distance),
        rule=rule,
        evidence=[check.evidence for check in checks],
    )
