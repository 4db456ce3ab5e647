"""Nulls are calibrated: on pairs drawn from a null p is uniform and z standard; a planted pair is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from qklens.analyses.nulls import NULLS, Population, null_test, population
from qklens.analyses.statistics import (
    auc,
    benjamini_hochberg,
    bootstrap_auc,
    bootstrap_mean,
    bootstrap_ratio,
    mcnemar_exact,
    paired_effect,
    wilson,
)
from qklens.errors import QklensError
from qklens.models.scores import offset_rotation, score_maps, virtual_interaction

N_FEATURES = 400


@pytest.fixture(scope="module")
def head(tiny_llama):
    subject = tiny_llama()
    return score_maps(subject, 1), offset_rotation(subject, 1, torch.tensor([4, 9]))


@pytest.fixture(scope="module")
def features() -> Population:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(N_FEATURES, 32, generator=generator)
    activations = torch.rand(200, N_FEATURES, generator=generator) * (
        torch.rand(200, N_FEATURES, generator=generator) < torch.rand(N_FEATURES, generator=generator)
    )
    residual = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    return population(vectors, activations, residual)


def test_p_is_uniform_and_z_is_standard_on_the_null_itself(head, features):
    maps, turn = head
    generator = np.random.default_rng(1)
    alive = features.alive.nonzero()[:, 0].numpy()
    z, p = [], []
    for seed in range(300):
        q, k = generator.choice(alive, 2)
        pair = (features.vectors[q], features.vectors[k])
        test = null_test("random_pairs", maps, 2, turn, features, features, pair, (0.5, 0.5), n=400, seed=seed)
        z.append(test.z)
        p.append(test.p)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert abs(np.mean(z)) < 4 / np.sqrt(300)
    assert 0.85 < np.std(z) < 1.15
    assert np.mean(np.array(benjamini_hochberg(p)) < 0.05) < 0.02


def test_a_planted_pair_is_found_with_its_sign(head, features):
    maps, turn = head
    clean = null_test(
        "random_pairs", maps, 2, turn, features, features, (features.vectors[0], features.vectors[1]), (0.5, 0.5)
    )
    spread = float(clean.draws.std())
    query = features.vectors[0]
    reach = maps.scale * turn(maps.query(query[None] / query.norm(), 2))[0] @ maps.key_side.weight[1]
    key = -reach / reach.norm()
    test = null_test("random_pairs", maps, 2, turn, features, features, (query, key), (0.5, 0.5))
    assert test.value == pytest.approx(-float(reach.norm()), rel=1e-4)
    assert test.z == pytest.approx((test.value - float(clean.draws.mean())) / spread, rel=1e-3)
    assert test.z < -2
    assert test.p < 0.05


@pytest.mark.parametrize("null", NULLS)
def test_every_null_is_reproducible_by_its_seed(head, features, null):
    maps, turn = head
    pair = (features.vectors[3], features.vectors[4])

    def draws(seed: int) -> torch.Tensor:
        return null_test(null, maps, 1, turn, features, features, pair, (0.3, 0.6), n=50, seed=seed).draws

    assert torch.equal(draws(7), draws(7))
    assert not torch.equal(draws(7), draws(8))


def test_fixed_sides_are_held(head, features):
    maps, turn = head
    pair = (features.vectors[3], torch.zeros(32))
    with pytest.raises(QklensError, match="no spread"):
        null_test("fixed_key", maps, 1, turn, features, features, pair, (0.3, 0.6))
    assert null_test("fixed_query", maps, 1, turn, features, features, pair, (0.3, 0.6)).draws.std() > 0


def test_matched_draws_look_like_their_feature(features):
    generator = torch.Generator().manual_seed(0)
    rare = int(features.frequency.masked_fill(~features.alive, 2).argmin())
    drawn = features.matched_sample(features.vectors[rare], float(features.frequency[rare]), 300, generator)
    index = [(features.vectors == row).all(dim=1).nonzero()[0, 0] for row in drawn]
    frequency = features.frequency[torch.stack(index)]
    overall = features.frequency[features.alive]
    assert (frequency.log() - features.frequency[rare].log()).abs().mean() < 0.7 * (
        overall.log() - features.frequency[rare].log()
    ).abs().mean()


def test_a_small_source_draws_from_the_covariance_and_says_so(head, features):
    maps, turn = head
    small = Population(features.vectors[:4], features.frequency[:4], features.alive[:4], features.covariance_root)
    pair = (small.vectors[0], small.vectors[1])
    assert "covariance" in (null_test("random_pairs", maps, 0, turn, small, small, pair, (1.0, 1.0)).note or "")
    assert null_test("rotated", maps, 0, turn, features, features, pair, (1.0, 1.0)).note is None


def unread(matrix: torch.Tensor) -> Population:
    """A population of directions that a map from the stream, `d_model d_head`, sends to nothing."""
    basis = torch.linalg.svd(matrix.T)[2][matrix.shape[1] :]
    generator = torch.Generator().manual_seed(5)
    vectors = torch.randn(N_FEATURES, len(basis), generator=generator) @ basis
    everywhere = torch.ones(N_FEATURES)
    return Population(vectors, everywhere, everywhere.bool(), basis.T)


@pytest.mark.parametrize("null", ["random_pairs", "matched", "fixed_query", "fixed_key", "rotated"])
def test_each_side_draws_from_its_own_population(head, features, null):
    """Where a side's own population is invisible to the head, every draw is nothing, unless that side is held."""
    maps, turn = head
    pair = (features.vectors[3], features.vectors[4])
    no_query, no_key = unread(maps.query(torch.eye(32), 1)), unread(maps.key(torch.eye(32), 1))

    def largest(queries: Population, keys: Population) -> float:
        return float(null_test(null, maps, 1, turn, queries, keys, pair, (0.3, 0.6), n=50).draws.abs().max())

    usual = largest(features, features)
    assert (largest(no_query, features) < 1e-4 * usual) == (null != "fixed_query")
    assert (largest(features, no_key) < 1e-4 * usual) == (null != "fixed_key")


def test_each_side_is_matched_in_its_own_frequency(head, features):
    maps, turn = head
    pair = (features.vectors[3], features.vectors[4])

    def draws(frequencies: tuple[float, float]) -> torch.Tensor:
        return null_test("matched", maps, 1, turn, features, features, pair, frequencies, n=50).draws

    both = draws((0.3, 0.6))
    assert not torch.equal(both, draws((0.3, 0.05)))
    assert not torch.equal(both, draws((0.05, 0.6)))


def test_p_is_never_zero(head, features):
    """The pair that interacts most of all is more extreme than every draw."""
    maps, turn = head
    eye = torch.eye(32)
    form = torch.stack([virtual_interaction(maps, 2, turn, row[None], eye) for row in eye])
    left, _, right = torch.linalg.svd(form)
    pair = (left[:, 0], right[0])
    test = null_test("random_pairs", maps, 2, turn, features, features, pair, (0.5, 0.5), n=99)
    assert test.p == 1 / 100


def test_a_population_holds_what_can_be_drawn_and_the_residual_s_covariance():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    activations = torch.tensor([[1.0, 1.0, 0.0], [-2.0, 1.0, 0.0]])
    activations = activations.repeat(25, 1)
    residual = torch.randn(50, 2, generator=generator) @ torch.tensor([[3.0, 1.0], [0.0, 0.5]]) + 7
    found = population(vectors, activations, residual)
    assert found.alive.tolist() == [True, False, False], "neither a feature that writes nothing nor one never active"
    assert found.frequency.tolist() == [1.0, 1.0, 0.0]
    torch.testing.assert_close(found.covariance_root @ found.covariance_root.T, torch.cov(residual.T))


def test_too_few_pairs_and_unknown_nulls_are_refused(head, features):
    maps, turn = head
    pair = (features.vectors[0], features.vectors[1])
    with pytest.raises(QklensError, match="at least 30"):
        null_test("random_pairs", maps, 0, turn, features, features, pair, (1.0, 1.0), n=29)


def test_statistics_have_their_known_values():
    assert wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)
    assert wilson(48, 100) == pytest.approx((0.3846, 0.5768), abs=2e-4)
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auc(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.5
    assert mcnemar_exact(np.array([False] * 6), np.array([True] * 6)) == pytest.approx(2 * 0.5**6)
    assert paired_effect(np.array([1.0, 2.0, 3.0])) == pytest.approx(2.0)
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


def test_in_a_small_source_matched_directions_vary_as_much_as_the_tested_one(features):
    """Two nulls, not one twice: random directions, and those along which the residual varies alike."""
    small = Population(features.vectors[:4], features.frequency[:4], features.alive[:4], features.covariance_root)
    probes = small.from_covariance(50, torch.Generator().manual_seed(1))
    spreads = small.spread(probes)
    for axis in (probes[spreads.argmax()], probes[spreads.argmin()]):
        target = float(small.spread(axis[None])[0])
        matched = small.spread(small.matched_sample(axis, 1.0, 100, torch.Generator().manual_seed(0)))
        drawn = small.spread(small.alive_sample(100, torch.Generator().manual_seed(0)))
        off = [float((x.log() - torch.tensor(target).log()).abs().mean()) for x in (matched, drawn)]
        assert off[0] < 0.5 * off[1]
