"""Nulls are calibrated: on a null's own pairs p is uniform, z standard and discoveries rare; a planted pair is found.

A family is what one call tests: pairs that share what can be shared of the null's draws, corrected together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from null_pairs import HEAD, clustered, drawn_pairs, joined, one_head, planted_pair, small
from qklens.analyses.nulls import NULLS, NullName, null_tests
from qklens.analyses.statistics import benjamini_hochberg

FAMILIES, MEMBERS, PLANTED_FAMILIES = 200, 5, 30
FALSE_ALARM = 0.01 / 10  # of each of the ten tests of uniformity below, so that together they raise one in a hundred
QUERIES, KEYS = clustered(1), clustered(2)
FEW = small(1), small(2)


@dataclass
class Families:
    """Tests of pairs that are the null's own, `family member`, and the draws' mean kurtosis."""

    z: NDArray[np.float64]
    p: NDArray[np.float64]
    kurtosis: float


@pytest.fixture(scope="module")
def head(tiny_llama):
    return one_head(tiny_llama())


def run_families(null: NullName, head, populations, members: int) -> Families:
    z, p, kurtosis = np.zeros((FAMILIES, members)), np.zeros((FAMILIES, members)), []
    for i in range(FAMILIES):
        own = 10_000 * NULLS.index(null) + i
        pairs = drawn_pairs(null, *populations, members, own)
        tests = null_tests(null, head[0], HEAD, head[1], *populations, pairs, n=400, seed=10**6 + own)
        z[i], p[i] = [t.z for t in tests], [t.p for t in tests]
        kurtosis.append(stats.kurtosis(tests[0].draws.numpy(), fisher=False))
    return Families(z, p, float(np.mean(kurtosis)))


@pytest.fixture(scope="module", params=NULLS)
def families(request, head) -> Families:
    return run_families(request.param, head, (QUERIES, KEYS), MEMBERS)


def check_calibration(found: Families) -> None:
    """One test of each family: they share no draw, so they are independent."""
    z, p = found.z[:, 0], found.p[:, 0]
    assert stats.kstest(p, "uniform").pvalue > FALSE_ALARM
    assert abs(z.mean()) < 4 / np.sqrt(FAMILIES)
    assert abs(z.std() - 1) < 4 * np.sqrt((found.kurtosis - 1) / (4 * FAMILIES))


def test_p_is_uniform_and_z_standard_on_the_nulls_own_pairs(families):
    check_calibration(families)


@pytest.mark.parametrize("null", ["random_pairs", "matched", "fixed_query", "fixed_key"])
def test_the_same_holds_of_a_source_too_small_to_draw_from(null, head):
    check_calibration(run_families(null, head, FEW, 1))


@pytest.mark.parametrize("seed", [2, 4])
def test_matched_directions_are_alike_enough_at_any_head(seed, tiny_llama):
    """At these heads z had a standard deviation of 0.82 and 0.73 when fewer directions were drawn to choose from."""
    found = run_families("matched", one_head(tiny_llama(seed=seed)), FEW, 1)
    assert found.z.std() == pytest.approx(1.0, abs=0.15)


def test_nothing_is_found_where_all_pairs_are_null_but_for_the_nominal_rate(families):
    """The chance that a family holds any q < 0.05, and the share of p < 0.05 among pairs that share their draws."""
    hits = sum(min(benjamini_hochberg(row.tolist())) < 0.05 for row in families.p)
    assert hits <= stats.binom.isf(0.01, FAMILIES, 0.05)
    rate = (families.p < 0.05).mean(axis=1)
    assert abs(rate.mean() - 0.05) < 3 * rate.std() / np.sqrt(FAMILIES)


@pytest.mark.parametrize("null", NULLS)
def test_planted_pairs_are_found_and_false_discoveries_stay_rare_among_them(null, head):
    """Families of ten: one pair planted at +4 sd, one at -4 sd, and eight of the null itself."""
    found, significant, false = [], [], []
    for i in range(PLANTED_FAMILIES):
        up, down = (planted_pair(null, head, QUERIES, KEYS, sign, 2 * i + (sign < 0)) for sign in (1, -1))
        pairs = joined(up, down, drawn_pairs(null, QUERIES, KEYS, 8, 10**6 + i))
        tests = null_tests(null, head[0], HEAD, head[1], QUERIES, KEYS, pairs, seed=i)
        q = np.array(benjamini_hochberg([t.p for t in tests]))
        for test, sign, corrected in zip(tests[:2], (1, -1), q[:2], strict=True):
            assert test.z * sign == pytest.approx(4, abs=0.6)
            found.append(test.p < 0.05 and test.z * sign > 0)
            significant.append(corrected < 0.05)
        false.append((q[2:] < 0.05).sum() / max((q < 0.05).sum(), 1))
    assert np.mean(found) >= 0.95
    assert np.mean(significant) >= 0.95
    assert np.mean(false) <= 0.05 + 3 * np.std(false) / np.sqrt(PLANTED_FAMILIES)


def beyond_four(null: NullName, head) -> float:
    """Share of a null's draws at |z| >= 4: the p that a pair at 4 sd has."""
    pairs = drawn_pairs(null, QUERIES, KEYS, 1, 0)
    (test,) = null_tests(null, head[0], HEAD, head[1], QUERIES, KEYS, pairs, n=100_000, seed=5)
    return float(((test.draws - test.draws.mean()).abs() >= 4 * test.draws.std()).double().mean())


def test_four_standard_deviations_are_less_rare_than_of_a_normal(head):
    """A product of two isotropic sides has heavy tails, so p is counted among the draws and never read off z.

    At |z| = 4 this null has p = 0.0006 with heads of 8 dimensions; a normal distribution has 0.00006.
    """
    assert 5 * 2 * stats.norm.sf(4) < beyond_four("random_dictionary", head) < 0.002


@pytest.mark.parametrize("null", ["fixed_query", "fixed_key"])
def test_with_one_side_held_the_tails_are_no_heavier_than_normal(null, head):
    """The interaction is then linear in one unit vector: hardly any draw reaches 4 sd."""
    assert beyond_four(null, head) <= 2 * stats.norm.sf(4)
