"""A verdict is no surer than its items allow, and says what they leave open."""

from __future__ import annotations

import pytest

from qklens.analyses.statistics import wilson
from qklens.studies.harm_pressure.certainty import qualified
from qklens.studies.results import ConditionBehaviour, HeadsDetails, Verdict


def verdict(mechanism: str = "late_flip", confidence: float = 0.9) -> Verdict:
    return Verdict.model_validate({"mechanism": mechanism, "confidence": confidence, "rule": "r", "evidence": []})


def accuracy(right: int, n: int) -> ConditionBehaviour:
    return ConditionBehaviour(accuracy=right / n, ci=wilson(right, n), margin=0, margin_ci=(0, 0), n=n, fraction_A=0.5)


def patch(low: float, high: float) -> HeadsDetails:
    return HeadsDetails(
        selected=[(1, 7)],
        attention_difference_map={},
        letter_logit_map=[],
        restored=(low + high) / 2,
        restored_ci=(low, high),
        patched_accuracy=0.9,
        patched_accuracy_ci=(0.8, 0.95),
        patched_margin=1,
        harm_margin=-1,
        none_margin=1,
        restored_random_heads=0,
        all_heads_restored=1,
        discovery_curve=[],
    )


def test_many_items_leave_the_verdict_as_it_is():
    found = qualified(verdict(), {"harm": accuracy(100, 258)}, patch(-0.05, 0.05), 64)
    assert found == verdict()


@pytest.mark.parametrize("n", [2, 4, 8])
def test_few_items_cap_the_confidence_and_say_so(n: int):
    found = qualified(verdict(), {"none": accuracy(4 * n, 4 * n), "harm": accuracy(2 * n, 4 * n)}, patch(0, 0), n)
    assert found.confidence == pytest.approx(n / (n + 1.96**2), abs=1e-3)
    assert f"report half holds {n} items" in found.caveats[0]
    low, high = wilson(2 * n, 4 * n)
    assert (
        f"accuracy after a harmful intent is known only to lie between {100 * low:.0f}% and {100 * high:.0f}%"
        in found.caveats[1]
    )


def test_confidence_is_never_raised():
    assert qualified(verdict(confidence=0.5), {"harm": accuracy(9, 10)}, None, 4).confidence == 0.5


@pytest.mark.parametrize(
    ("mechanism", "interval", "holds"),
    [
        ("late_flip", (-0.2, 0.4), True),
        ("late_flip", (-0.2, 0.2), False),
        ("attention_harm_key", (0.45, 0.9), True),
        ("attention_harm_key", (0.7, 0.9), False),
        ("belief_change", (-1.0, 2.0), False),
    ],
)
def test_an_interval_that_holds_the_rules_threshold_settles_nothing(
    mechanism: str, interval: tuple[float, float], holds: bool
):
    found = qualified(verdict(mechanism), {"harm": accuracy(100, 258)}, patch(*interval), 64)
    assert (found.confidence == 0.5) == holds
    assert bool(found.caveats) == holds
