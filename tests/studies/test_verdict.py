"""The rules of the verdict on measurements whose mechanism is known by construction."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qklens.studies.harm_pressure.calibration import shipped_calibration
from qklens.studies.harm_pressure.causes import Causes, CauseShare
from qklens.studies.harm_pressure.thresholds import THRESHOLDS
from qklens.studies.harm_pressure.verdict import Measurements, decide
from qklens.studies.results import BehaviourDetails, ConditionBehaviour, HeadsDetails


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


def share(through: float, width: float = 0.05) -> CauseShare:
    return CauseShare(
        restored=through, caused=through, through=through, ci=(through - width, through + width), accuracy=0.98
    )


CAUSES = Causes(
    pattern=share(0.95),
    output=share(0.95),
    before_answer=share(0.0),
    belief=share(0.0),
    separation_kept=1.0,
    auc_none=1.0,
    auc_harm=1.0,
    late_restored=0.0,
    attention_kept=0.0,
    query_added=0.95,
    query_need=0.0,
    query_pull=-3.0,
    query_scale=0.0,
    query_spared=0.9,
    origin=[(1, 7)],
    removal={"answer_key": 0.1, "harm_key": 0.9, "key_only": 0.0, "elsewhere": 0.0, "intent_key": 0.0},
)
ATTENTION = Measurements(
    behaviour={"none": condition(1.0, 5.0), "harm": condition(0.48, 0.0), "benign": condition(0.98, 4.8)},
    details=details(4.8, 1e-9),
    heads=heads(0.9),
    causes=CAUSES,
)


def causes(base: Measurements = ATTENTION, **changes: object) -> Measurements:
    assert base.causes is not None
    return replace(base, causes=base.causes.model_copy(update=changes))


def removed(**terms: float) -> Measurements:
    return causes(removal={"answer_key": 0.0, "harm_key": 0.0, "key_only": 0.0, "elsewhere": 0.0, **terms})


LATE = causes(pattern=share(0.05), output=share(0.08), late_restored=0.9, attention_kept=0.9)
CASES = {
    "task_not_solved": replace(ATTENTION, behaviour={**ATTENTION.behaviour, "none": condition(0.55, 0.1)}),
    "no_effect": replace(
        ATTENTION,
        behaviour={**ATTENTION.behaviour, "harm": condition(0.97, 4.7)},
        details=details(0.1, 0.6),
    ),
    "belief_change": causes(belief=share(0.95), separation_kept=0.0, auc_harm=0.5),
    "late_flip": LATE,
    "attention_answer_key": removed(answer_key=0.8, harm_key=0.1),
    "attention_harm_key": ATTENTION,
    "undetermined": causes(pattern=share(0.5), output=share(0.5), late_restored=0.5, attention_kept=0.5),
}


@pytest.mark.parametrize("mechanism", CASES)
def test_each_mechanism_is_named(mechanism):
    verdict = decide(CASES[mechanism])
    assert verdict.mechanism == mechanism
    assert 0 < verdict.confidence < 1
    assert verdict.rule
    assert all(f"{e.value:.3g}" in e.text for e in verdict.evidence)


def test_attention_is_never_claimed_when_random_heads_restore_as_much():
    assert decide(replace(ATTENTION, heads=heads(0.9, random=0.8))).mechanism == "undetermined"


@pytest.mark.parametrize("through", [0.0, 0.3, 0.6])
def test_attention_is_never_claimed_when_the_patterns_do_not_carry_the_loss(through):
    for kept in (0.0, 0.3, 0.9):
        verdict = decide(causes(pattern=share(through), attention_kept=kept))
        assert not verdict.mechanism.startswith("attention")


def test_attention_needs_the_clean_pattern_to_restore_by_itself():
    one_sided = CauseShare(restored=0.4, caused=1.0, through=0.7, ci=(0.6, 0.8), accuracy=0.98)
    assert decide(causes(pattern=one_sided)).mechanism == "undetermined"


def test_a_shared_loss_is_said_with_both_shares():
    verdict = decide(causes(pattern=share(0.5), output=share(0.5)))
    assert verdict.mechanism == "undetermined"
    assert "0.50" in verdict.rule


def test_a_belief_that_moves_without_costing_anything_is_no_belief_change():
    assert decide(causes(separation_kept=0.0)).mechanism == "attention_harm_key"
    assert decide(causes(LATE, separation_kept=0.0)).mechanism == "late_flip"


def test_a_loss_that_is_not_written_after_the_heads_is_no_late_flip():
    assert decide(causes(LATE, late_restored=0.3)).mechanism == "undetermined"


def test_a_look_before_the_answer_is_named_only_where_the_heads_patterns_carry_little():
    looks = causes(LATE, before_answer=share(0.4))
    rule = "before the answer carries 0.40 of the loss, the selected heads' patterns at the answer 0.05"
    assert rule in decide(looks).rule
    pulled = decide(causes(belief=share(0.5), separation_kept=0.9, before_answer=share(0.4)))
    assert pulled.mechanism == "undetermined"
    assert "before the answer" not in pulled.rule


def test_neither_kind_of_key_means_undetermined():
    verdict = decide(removed(answer_key=0.05, harm_key=0.1, elsewhere=0.9))
    assert verdict.mechanism == "undetermined"
    assert any("elsewhere" in e.name and not e.holds for e in verdict.evidence)


def test_what_harm_wrote_into_keys_counts_only_where_the_pressed_query_meets_it():
    assert decide(removed(answer_key=0.15, harm_key=0.7, key_only=0.15)).mechanism == "attention_harm_key"
    for met in (0.0, 0.2, 0.45):
        verdict = decide(removed(answer_key=0.1, harm_key=met, key_only=0.9 - met))
        assert verdict.mechanism == "undetermined"


def test_two_kinds_of_keys_that_share_the_loss_are_undetermined():
    for answer in (0.4, 0.5, 0.6):
        assert decide(removed(answer_key=answer, harm_key=1 - answer)).mechanism == "undetermined"


def test_a_query_that_draws_the_heads_elsewhere_repels_no_key():
    verdict = decide(causes(query_pull=2.0))
    assert verdict.mechanism == "undetermined"
    assert "does not repel" in verdict.rule


@pytest.mark.parametrize("spared", [-0.2, 0.0, 0.1])
def test_a_query_that_repels_both_options_does_not_repel_the_correct_one_for_being_correct(spared):
    verdict = decide(causes(query_spared=spared))
    assert verdict.mechanism == "undetermined"
    assert "the incorrect option as well" in verdict.rule


def test_what_pulls_the_other_way_is_shown_as_it_is():
    verdict = decide(removed(answer_key=1.2, elsewhere=-0.3))
    assert verdict.mechanism == "attention_answer_key"
    assert next(e.value for e in verdict.evidence if "elsewhere" in e.name) == pytest.approx(-0.25)


def test_a_small_fall_of_the_margin_is_said_to_be_there():
    assert "is there, and it is small" in decide(quiet(lost=0.2)).rule
    assert "is there" not in decide(quiet(lost=0.0)).rule


def test_a_margin_that_comes_back_without_its_answers_is_no_attention_verdict():
    """A letter bias cancels in the mean margin over both orders, and costs every second answer."""
    assert ATTENTION.heads is not None
    for accuracy in (0.48, 0.6, 0.8):
        patched = replace(ATTENTION, heads=ATTENTION.heads.model_copy(update={"patched_accuracy": accuracy}))
        assert decide(patched).mechanism == "undetermined"
    whole = replace(ATTENTION, behaviour={**ATTENTION.behaviour, "harm": condition(1.0, 2.0)})
    patched = replace(whole, heads=ATTENTION.heads.model_copy(update={"patched_accuracy": 0.99}))
    assert decide(patched).mechanism == "attention_harm_key"


def test_harm_that_the_ordinary_query_meets_is_no_pressure_feature():
    """`need` × harm: nothing that pressure adds to the query takes part."""
    verdict = decide(causes(removed(key_only=0.98), query_added=0.0))
    assert verdict.mechanism == "undetermined"
    assert "ordinary query" in verdict.rule


def test_a_query_that_no_longer_asks_for_the_answer_is_no_pressure_feature():
    """Its scores at the options' keys fall as much as under refuse × correct."""
    verdict = decide(causes(removed(answer_key=0.98), query_added=0.0, query_need=0.98))
    assert verdict.mechanism == "undetermined"
    assert "call for the answer" in verdict.rule


def test_a_patch_is_believed_by_its_lower_bound():
    assert decide(causes(pattern=share(0.8, width=0.6))).mechanism == "undetermined"


def test_a_margin_drop_without_an_accuracy_drop_is_an_effect():
    measured = replace(
        ATTENTION, behaviour={**ATTENTION.behaviour, "harm": condition(0.98, 2.0)}, details=details(2.8, 1.0)
    )
    assert decide(measured).mechanism == "attention_harm_key"


def test_the_distance_grows_with_the_evidence_and_confidence_is_what_the_bench_says_of_it():
    verdicts = [decide(causes(pattern=share(x))) for x in (0.7, 0.8, 0.9)]
    late = [decide(causes(LATE, late_restored=x)) for x in (0.7, 0.72, 0.75)]
    nothing = [decide(causes(pattern=share(x), output=share(x), late_restored=x)) for x in (0.65, 0.6, 0.5)]
    assert {v.mechanism for v in nothing} == {"undetermined"}
    for found in (verdicts, late, nothing):
        assert [v.distance for v in found] == sorted({v.distance for v in found})
        for verdict in found:
            assert verdict.confidence == shipped_calibration().confidence(verdict.mechanism, verdict.distance)


def test_the_distance_is_that_of_the_check_nearest_to_failing_in_typical_errors():
    assert decide(causes(query_added=0.7)).distance == pytest.approx((0.7 - 2 / 3) / 0.2, abs=1e-3)
    assert decide(causes(query_need=0.3)).distance == pytest.approx((1 / 3 - 0.3) / 0.2, abs=1e-3)
    assert decide(removed(answer_key=0.3, harm_key=0.7)).distance == pytest.approx((0.7 - 2 / 3) / 0.2, abs=1e-3)
    assert decide(causes(query_pull=-0.4)).distance == pytest.approx(0.4, abs=1e-3)
    assert decide(removed(answer_key=0.1, elsewhere=0.9)).distance == pytest.approx((2 / 3 - 0.1) / 0.2, abs=1e-3)
    assert decide(causes(LATE, late_restored=0.5)).distance == pytest.approx((2 / 3 - 0.5) / 0.2, abs=1e-3)


def behaving(base: Measurements = ATTENTION, **changes: ConditionBehaviour) -> Measurements:
    return replace(base, behaviour={**base.behaviour, **changes})


def none(**changes: object) -> Measurements:
    return behaving(none=ATTENTION.behaviour["none"].model_copy(update=changes))


def quiet(accuracy: float = 0.98, p: float = 1e-9, lost: float = 0.0) -> Measurements:
    """Harm as the benign sentence, but for an accuracy and a share of the margin."""
    benign = ATTENTION.behaviour["benign"]
    harm = benign.model_copy(update={"accuracy": accuracy})
    return replace(behaving(harm=harm), details=details(lost * benign.margin, p))


NUDGE = 1e-3
T = THRESHOLDS
EDGES = {
    "solved_accuracy": ("task_not_solved", lambda x: none(accuracy=x, ci=(0.7, 1.0)), -1),
    "solved_bound": ("task_not_solved", lambda x: none(ci=(x, 1.0)), -1),
    "accuracy_drop": ("no_effect", lambda x: quiet(accuracy=0.98 - x), -1),
    "mcnemar_p": ("no_effect", lambda x: quiet(accuracy=0.5, p=x), 1),
    "margin_drop": ("no_effect", lambda x: quiet(lost=x), -1),
    "separation_kept": ("belief_change", lambda x: causes(belief=share(0.9), separation_kept=x), -1),
    "attention_kept": ("late_flip", lambda x: causes(LATE, attention_kept=x), 1),
    "random_heads": ("attention_harm_key", lambda x: replace(ATTENTION, heads=heads(0.9, random=x)), -1),
    "carries of what harm adds to the queries": ("attention_harm_key", lambda x: causes(query_added=x), 1),
    "carries_not of the queries' need": ("attention_harm_key", lambda x: causes(query_need=x), -1),
    "repelled": ("attention_harm_key", lambda x: causes(query_pull=x), -1),
    "spared": ("attention_harm_key", lambda x: causes(query_spared=x), 1),
    "spared_answer": ("attention_answer_key", lambda x: causes(removed(answer_key=0.9), query_spared=x), 1),
    "carries_not of the norms' scales": ("attention_harm_key", lambda x: causes(query_scale=x), -1),
    "carries of the answers with the belief": (
        "belief_change",
        lambda x: causes(
            belief=share(0.95).model_copy(update={"accuracy": 0.48 + x * 0.52}), separation_kept=0.0, auc_harm=0.5
        ),
        1,
    ),
    "carries of the answers": (
        "attention_harm_key",
        lambda x: replace(ATTENTION, heads=ATTENTION.heads.model_copy(update={"patched_accuracy": 0.48 + x * 0.52})),
        1,
    ),
    "carries of one kind of keys": ("attention_answer_key", lambda x: removed(answer_key=x, elsewhere=1 - x), 1),
    "carries of the belief": ("belief_change", lambda x: causes(belief=share(x), separation_kept=0.0), 1),
    "carries of the patterns": ("attention_harm_key", lambda x: causes(pattern=share(x)), 1),
    "carries of what is written later": ("late_flip", lambda x: causes(LATE, late_restored=x), 1),
    "carries_not of the patterns": ("late_flip", lambda x: causes(LATE, pattern=share(x)), -1),
    "carries_not of the outputs": ("late_flip", lambda x: causes(LATE, output=share(x)), -1),
    "carries_not of heads before the answer": ("late_flip", lambda x: causes(LATE, before_answer=share(x)), -1),
    "carries_not of the belief, late": ("late_flip", lambda x: causes(LATE, belief=share(x)), -1),
    "carries_not of the belief, attention": ("attention_harm_key", lambda x: causes(belief=share(x)), -1),
    "carries_not of the lower bound": ("attention_harm_key", lambda x: causes(pattern=share(0.9, 0.9 - x)), 1),
}


@pytest.mark.parametrize("name", EDGES)
def test_each_rule_turns_at_its_threshold_in_the_table(name):
    mechanism, measured, side = EDGES[name]
    threshold = T[name.split()[0]]
    assert decide(measured(threshold + side * NUDGE)).mechanism == mechanism
    assert decide(measured(threshold - side * NUDGE)).mechanism != mechanism


def test_every_threshold_of_the_table_is_tested():
    assert {name.split()[0] for name in EDGES} == set(T) - {"suffices"}  # it chooses heads, see test_mediation
