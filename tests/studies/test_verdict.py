"""The rules of the verdict on measurements whose mechanism is known by construction."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qklens.studies.harm_pressure.verdict import Measurements, decide
from qklens.studies.results import BehaviourDetails, Belief, BeliefCondition, ConditionBehaviour, HeadsDetails


def condition(accuracy: float, margin: float) -> ConditionBehaviour:
    return ConditionBehaviour(
        accuracy=accuracy,
        ci=(accuracy - 0.05, min(1.0, accuracy + 0.05)),
        margin=margin,
        margin_ci=(margin - 0.2, margin + 0.2),
        n=130,
        fraction_A=0.5,
    )


def details(drop: float, p: float) -> BehaviourDetails:
    return BehaviourDetails(
        margin_by_item={"none": [], "harm": [], "benign": []},
        items=[],
        severity_by_item=[],
        accuracy_by_severity={},
        accuracy_by_order={"none": (1, 1), "harm": (1, 1), "benign": (1, 1)},
        harm_minus_none=(-drop, -drop - 0.1, -drop + 0.1),
        harm_minus_benign=(-drop, -drop - 0.1, -drop + 0.1),
        mcnemar_p=p,
        letter_form="A",
        unknown_token_share=0.0,
    )


def belief(none: float, harm: float) -> Belief:
    row = BeliefCondition(auc=harm, auc_ci=(0, 1), sum_correct=1, sum_incorrect=0)
    return Belief(
        feature="f",
        layer=1,
        auc_none=none,
        auc_harm=harm,
        sum_correct=1,
        sum_incorrect=0,
        by_condition={"none": row, "harm": row, "benign": row},
    )


def heads(restored: float, random: float = 0.0) -> HeadsDetails:
    return HeadsDetails(
        selected=[(1, 7)],
        attention_difference_map={},
        letter_logit_map=[],
        restored=restored,
        restored_ci=(restored - 0.05, restored + 0.05),
        patched_accuracy=0.9,
        patched_accuracy_ci=(0.8, 0.95),
        patched_margin=3,
        harm_margin=0,
        none_margin=5,
        restored_random_heads=random,
        all_heads_restored=restored,
        discovery_curve=[restored],
    )


ATTENTION = Measurements(
    behaviour={"none": condition(1.0, 5.0), "harm": condition(0.48, 0.0), "benign": condition(0.98, 4.8)},
    details=details(4.8, 1e-9),
    belief=belief(0.98, 0.9),
    heads=heads(0.9),
    attention_none=0.7,
    attention_harm=0.0,
    removal={"answer_key": 0.1, "harm_key": 0.7, "key_only": 0.1, "elsewhere": 0.0},
)

CASES = {
    "task_not_solved": replace(ATTENTION, behaviour={**ATTENTION.behaviour, "none": condition(0.55, 0.1)}),
    "no_effect": replace(
        ATTENTION,
        behaviour={**ATTENTION.behaviour, "harm": condition(0.97, 4.7)},
        details=details(0.1, 0.6),
    ),
    "belief_change": replace(ATTENTION, belief=belief(0.98, 0.4)),
    "late_flip": replace(ATTENTION, heads=heads(0.05), attention_harm=0.65),
    "attention_answer_key": replace(ATTENTION, removal={**ATTENTION.removal, "answer_key": 0.8, "harm_key": 0.1}),
    "attention_harm_key": ATTENTION,
    "undetermined": replace(ATTENTION, heads=heads(0.05), attention_harm=0.05),
}


@pytest.mark.parametrize("mechanism", CASES)
def test_each_mechanism_is_named(mechanism):
    verdict = decide(CASES[mechanism])
    assert verdict.mechanism == mechanism
    assert 0.5 <= verdict.confidence <= 0.99
    assert verdict.rule
    assert all(str(round(e.value, 2))[:3] in e.text or e.value == 0 for e in verdict.evidence)


def test_attention_is_never_claimed_when_random_heads_restore_as_much():
    assert decide(replace(ATTENTION, heads=heads(0.9, random=0.8))).mechanism == "undetermined"


def test_attention_is_never_claimed_when_the_patch_fails():
    for attention_harm in (0.0, 0.3, 0.7):
        verdict = decide(replace(ATTENTION, heads=heads(0.2), attention_harm=attention_harm))
        assert not verdict.mechanism.startswith("attention")


def test_a_margin_drop_without_an_accuracy_drop_is_an_effect():
    measured = replace(
        ATTENTION, behaviour={**ATTENTION.behaviour, "harm": condition(0.98, 2.0)}, details=details(2.8, 1.0)
    )
    assert decide(measured).mechanism == "attention_harm_key"


def test_neither_kind_of_key_means_undetermined():
    removal = {"answer_key": 0.05, "harm_key": 0.1, "key_only": 0.0, "elsewhere": 0.9}
    verdict = decide(replace(ATTENTION, removal=removal))
    assert verdict.mechanism == "undetermined"
    assert any("elsewhere" in e.name and e.holds for e in verdict.evidence)


def test_what_harm_wrote_counts_with_and_without_the_pressed_query():
    """Alone, either half would lose to the options' ordinary keys."""
    removal = {"answer_key": 0.4, "harm_key": 0.25, "key_only": 0.25, "elsewhere": 0.0}
    assert decide(replace(ATTENTION, removal=removal)).mechanism == "attention_harm_key"
    removal |= {"key_only": 0.1}
    assert decide(replace(ATTENTION, removal=removal)).mechanism == "attention_answer_key"


@pytest.mark.parametrize("elsewhere", ["elsewhere", "intent_key"])
def test_keys_that_carry_less_than_other_tokens_do_not_name_the_mechanism(elsewhere):
    removal = {"answer_key": 0.1, "harm_key": 0.4, "key_only": 0.0, elsewhere: 0.45}
    assert decide(replace(ATTENTION, removal=removal)).mechanism == "undetermined"
    assert decide(replace(ATTENTION, removal={**removal, elsewhere: 0.35})).mechanism == "attention_harm_key"


def test_a_patch_that_restores_some_is_neither_attention_nor_a_late_flip():
    kept = replace(ATTENTION, attention_harm=0.65)
    assert decide(replace(kept, heads=heads(0.4))).mechanism == "undetermined"
    assert decide(replace(kept, heads=heads(0.2))).mechanism == "late_flip"


def test_a_patch_is_believed_by_its_lower_bound():
    wide = heads(0.6).model_copy(update={"restored_ci": (0.1, 0.9)})
    assert decide(replace(ATTENTION, heads=wide)).mechanism == "undetermined"
    assert decide(replace(ATTENTION, heads=heads(0.6))).mechanism == "attention_harm_key"


def test_confidence_grows_with_the_distance_from_the_threshold():
    near, far = decide(replace(ATTENTION, heads=heads(0.52))), decide(replace(ATTENTION, heads=heads(0.95)))
    assert near.mechanism.startswith("attention") == (near.evidence[2].holds)
    assert far.confidence > near.confidence
