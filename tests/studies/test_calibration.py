"""Confidence is counted, never falls with distance, and is what ships."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qklens.studies.harm_pressure.calibration import UNDETERMINED, Calibration, Group, fit, shipped_calibration

VERDICTS = st.lists(
    st.tuples(st.sampled_from(["late_flip", UNDETERMINED]), st.floats(0, 5), st.booleans()), max_size=60
)


@given(VERDICTS, st.lists(st.floats(0, 6), min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_every_verdict_counts_once_and_confidence_never_falls_with_distance(verdicts, distances):
    found = fit(verdicts, "here")
    for groups, mechanism in ((found.named, "late_flip"), (found.undetermined, UNDETERMINED)):
        mine = [right for given, _, right in verdicts if given == mechanism]
        assert sum(group.n for group in groups) == len(mine)
        assert sum(group.right for group in groups) == sum(mine)
        assert [group.least for group in groups] == sorted(group.least for group in groups)
        levels = [found.confidence(mechanism, d) for d in sorted(distances)]
        assert levels == sorted(levels)
        assert all(0 < level < 1 for level in levels)


def test_confidence_is_the_share_that_was_right_in_the_group():
    near, far = [("late_flip", 0.1, k < 6) for k in range(10)], [("late_flip", 2.0, True)] * 10
    found = fit([*near, *far, (UNDETERMINED, 0.0, True), (UNDETERMINED, 0.0, False)], "here")
    assert found.confidence("belief_change", 0.1) == pytest.approx(6.5 / 11, abs=1e-3)
    assert found.confidence("late_flip", 1.9) == pytest.approx(6.5 / 11, abs=1e-3)
    assert found.confidence("late_flip", 2.5) == pytest.approx(10.5 / 11, abs=1e-3)
    assert found.confidence(UNDETERMINED, 0.0) == 0.5


def test_nearer_to_the_threshold_than_the_bench_went_confidence_falls_to_a_half():
    found = fit([("late_flip", 0.4, True)] * 19, "here")
    levels = [found.confidence("late_flip", d) for d in (0.0, 0.2, 0.4)]
    assert levels == pytest.approx([0.5, 0.7375, 0.975], abs=1e-3)


def test_neighbours_out_of_order_are_pooled():
    verdicts = [("late_flip", float(k), k < 5) for k in range(10)]
    assert fit(verdicts, "here").named == (Group(least=0.0, n=10, right=5),)


def test_what_ships_was_counted_on_many_runs_and_says_on_which():
    shipped = shipped_calibration()
    assert Calibration.model_validate(shipped.model_dump()) == shipped
    assert sum(group.n for group in (*shipped.named, *shipped.undetermined)) >= 60
    assert "seeds" in shipped.made
