"""Correct-answer features: ranked by paired difference on one half, read by AUC and sums on the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qklens.analyses.belief import BeliefCandidate, best_belief, rank_belief, read_belief


def test_features_are_ranked_by_how_often_and_how_steadily_they_prefer_the_correct_option():
    """Two orders of three items: 0 always prefers, 1 as often but unsteadily, 2 half the time, 3 never."""
    correct = torch.tensor([[2.0, 9, 1, 0]] * 2 + [[2.0, 1, 0, 0]] * 2 + [[2.0, 1, 1, 0]] * 2)
    wrong = torch.tensor([[1.0, 0, 0, 1]] * 2 + [[1.1, 0, 1, 1]] * 2 + [[0.9, 0, 1, 1]] * 2)
    ranked = rank_belief(4, correct, wrong, 3)
    assert [c.feature for c in best_belief(ranked, 3)] == [0, 1, 2]
    assert {c.layer for c in ranked} == {4}
    first = next(c for c in ranked if c.feature == 0)
    assert first.paired_auc == 1.0
    assert first.difference == pytest.approx(1.0)
    unsteady = next(c for c in ranked if c.feature == 1)
    assert unsteady.paired_auc == 1.0
    assert unsteady.difference > first.difference
    assert unsteady.steadiness < first.steadiness
    assert next(c for c in ranked if c.feature == 2).paired_auc == 0.5


def test_one_feature_that_reads_alike_in_two_layers_is_listed_once():
    same = [BeliefCandidate(layer, 5, 0.9, 1.0, 2.0) for layer in (2, 1)]
    other = BeliefCandidate(2, 5, 0.9, 1.5, 1.0)
    assert best_belief([*same, other], 9) == [same[1], other]


def test_swapping_the_options_turns_the_auc_around():
    generator = np.random.default_rng(0)
    correct, wrong = (torch.tensor(generator.normal(mean, 1, 40)) for mean in (1.0, 0.0))
    items = np.repeat(np.arange(20), 2)
    there, back = read_belief(correct, wrong, items, 0), read_belief(wrong, correct, items, 0)
    assert there.auc == pytest.approx(1 - back.auc)
    assert (there.sum_correct, there.sum_incorrect) == (back.sum_incorrect, back.sum_correct)
    assert there.auc_ci[0] < there.auc < there.auc_ci[1]
    assert there.auc_ci == pytest.approx((1 - back.auc_ci[1], 1 - back.auc_ci[0]))
