"""Intervals and tests have their known values, and cover what they should."""

from __future__ import annotations

import numpy as np
import pytest

from qklens.analyses.statistics import (
    auc,
    benjamini_hochberg,
    bootstrap_auc,
    bootstrap_mean,
    bootstrap_ratio,
    mcnemar_exact,
    wilson,
)
from qklens.errors import QklensError


def test_statistics_have_their_known_values():
    assert wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)
    assert wilson(48, 100) == pytest.approx((0.3846, 0.5768), abs=2e-4)
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auc(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.5
    assert mcnemar_exact(np.array([False] * 6), np.array([True] * 6)) == pytest.approx(2 * 0.5**6)
    assert benjamini_hochberg([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    with pytest.raises(QklensError):
        wilson(0, 0)


def test_intervals_cover_and_resample_items_together():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        sample = generator.normal(1.0, 2.0, 40)
        low, high = bootstrap_mean(sample, seed)
        hits += low <= 1.0 <= high
    assert hits / 200 > 0.88
    low, high = bootstrap_ratio(np.array([1.0, 2.0, 3.0] * 10), np.array([2.0, 4.0, 6.0] * 10), 0)
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(0.5)
    values = generator.normal(size=40)
    clusters = np.repeat(np.arange(20), 2)
    low, high = bootstrap_auc(values + 1, values, clusters, 0)
    assert low < auc(values + 1, values) < high
