"""What each null draws, what its test reports, and that no result depends on the tests beside it."""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.nulls import (
    NULLS,
    NullName,
    NullTest,
    Pairs,
    Population,
    feature_pairs,
    null_tests,
    population,
    seed_for,
)
from qklens.analyses.written import WrittenPrompt, active
from qklens.errors import QklensError
from qklens.models.scores import Rotation, Scales, offset_rotation, score_maps, virtual_interaction

N_FEATURES = 400
OF_THE_PAIR = ("matched", "fixed_query", "fixed_key")


@pytest.fixture(scope="module")
def head(tiny_llama):
    subject = tiny_llama()
    return score_maps(subject, 1), offset_rotation(subject, 1, torch.tensor([4, 9]))


def written(activations: torch.Tensor, residual: torch.Tensor) -> WrittenPrompt:
    nothing = torch.zeros(len(residual), 0)
    ones = torch.ones(len(residual))
    scales = Scales(ones, ones[:, None], ones[:, None])
    bias = torch.zeros(residual.shape[1])
    return WrittenPrompt(residual, active(activations), bias, residual, scales, Rotation(nothing, nothing))


@pytest.fixture(scope="module")
def features() -> Population:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(N_FEATURES, 32, generator=generator)
    activations = torch.rand(200, N_FEATURES, generator=generator) * (
        torch.rand(200, N_FEATURES, generator=generator) < torch.rand(N_FEATURES, generator=generator)
    )
    residual = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    return population(vectors, [(written(activations, residual), range(200))])


@pytest.fixture(scope="module")
def few(features) -> Population:
    return Population(features.vectors[:4], features.frequency[:4], features.alive[:4], features.covariance_root)


def pairs_of(*rows: tuple[torch.Tensor, torch.Tensor, float, float]) -> Pairs:
    """Pairs from (query, key, query frequency, key frequency)."""
    query, key, query_frequency, key_frequency = zip(*rows, strict=True)
    return Pairs(torch.stack(query), torch.stack(key), torch.tensor(query_frequency), torch.tensor(key_frequency))


def one_test(
    null: NullName, head, queries: Population, keys: Population, pairs: Pairs, *, which: int = 1, n: int = 1000,
    seed: int = 0,
) -> NullTest:  # fmt: skip
    (test,) = null_tests(null, head[0], which, head[1], queries, keys, pairs, n=n, seed=seed)
    return test


def test_the_pair_that_interacts_least_has_its_closed_form(head, features):
    maps, turn = head
    query = features.vectors[0]
    reach = maps.scale * turn(maps.query(query[None] / query.norm(), 2))[0] @ maps.key_side.weight[1]
    usual = pairs_of((query, features.vectors[1], 0.5, 0.5))
    clean = one_test("random_pairs", head, features, features, usual, which=2)
    test = one_test("random_pairs", head, features, features, pairs_of((query, -reach, 0.5, 0.5)), which=2)
    assert test.value == pytest.approx(-float(reach.norm()), rel=1e-4)
    assert test.z == pytest.approx((test.value - float(clean.draws.mean())) / float(clean.draws.std()), rel=1e-3)
    assert test.z < -2
    assert test.p < 0.05


def test_z_and_p_are_what_the_draws_say(head, features):
    pairs = feature_pairs(features, features, [(3, 4), (5, 6), (7, 7)])
    for test in null_tests("random_pairs", head[0], 1, head[1], features, features, pairs, n=99):
        mean = sum(test.draws.tolist()) / 99
        spread = (sum((draw - mean) ** 2 for draw in test.draws.tolist()) / 98) ** 0.5
        further = [draw for draw in test.draws.tolist() if abs(draw - mean) >= abs(test.value - mean)]
        assert test.z == pytest.approx((test.value - mean) / spread, rel=1e-4)
        assert test.p == pytest.approx((1 + len(further)) / 100)


@pytest.mark.parametrize("null", NULLS)
def test_every_null_is_reproducible_by_its_seed(head, features, null):
    pairs = feature_pairs(features, features, [(3, 4)])

    def draws(seed: int) -> torch.Tensor:
        test = one_test(null, head, features, features, pairs, n=50, seed=seed)
        assert test.seed == seed
        return test.draws

    assert torch.equal(draws(7), draws(7))
    assert not torch.equal(draws(7), draws(8))


@pytest.mark.parametrize("small", [False, True], ids=["dictionary", "directions"])
@pytest.mark.parametrize("null", NULLS)
def test_a_pairs_result_depends_neither_on_the_pairs_beside_it_nor_on_their_order(head, features, few, null, small):
    side = few if small else features
    index = [(0, 1), (2, 3), (1, 1), (3, 0)]

    def run(chosen: list[tuple[int, int]]) -> dict[tuple[int, int], NullTest]:
        tests = null_tests(null, head[0], 1, head[1], side, side, feature_pairs(side, side, chosen), n=60, seed=3)
        return dict(zip(chosen, tests, strict=True))

    together, backward = run(index), run(index[::-1])
    for pair in index:
        for other in (backward[pair], run([pair])[pair]):
            assert torch.equal(together[pair].draws, other.draws)
            assert together[pair].z == pytest.approx(other.z, rel=1e-5)
            assert together[pair].p == other.p
    first, second = together[0, 1].draws, together[2, 3].draws
    assert torch.equal(first, second) == (null not in OF_THE_PAIR)


def test_every_head_and_null_has_a_seed_of_its_own(head, features):
    where = [
        (seed, layer, which, null) for seed in (0, 1) for layer in range(6) for which in range(6) for null in NULLS
    ]
    seeds = [seed_for(*place) for place in where]
    assert len(set(seeds)) == len(where)
    assert seeds == [seed_for(*place) for place in where]
    pairs = feature_pairs(features, features, [(3, 4)])
    one, other = (
        one_test("rotated", head, features, features, pairs, n=50, seed=seed_for(0, layer, 1, "rotated"))
        for layer in (1, 2)
    )
    assert not torch.equal(one.draws, other.draws)


def test_fixed_sides_are_held(head, features):
    pairs = pairs_of((features.vectors[3], torch.zeros(32), 0.3, 0.6))
    with pytest.raises(QklensError, match="no spread"):
        one_test("fixed_key", head, features, features, pairs)
    assert one_test("fixed_query", head, features, features, pairs).draws.std() > 0


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


def test_cells_part_the_alive_features_by_frequency_and_norm(features):
    """A feature shares its cell with those that share theirs with it: neighbourhoods of each would not do that."""
    norms = features.vectors.norm(dim=-1)
    cells = {}
    for i in features.alive.nonzero()[:, 0].tolist():
        cells[i] = tuple(features.cell(features.vectors[i], float(features.frequency[i])).tolist())
        assert i in cells[i]
    distinct = set(cells.values())
    assert sum(map(len, distinct)) == len(cells), "cells overlap"
    assert min(map(len, distinct)) >= 32
    assert len(distinct) >= 6
    for values in (features.frequency.log(), norms.log()):
        within = sum(float(values[list(cell)].var()) * len(cell) for cell in distinct) / len(cells)
        assert within < 0.7 * float(values[features.alive].var())


def test_few_alive_features_are_one_cell(features):
    alive = torch.arange(N_FEATURES) < 40
    some = Population(features.vectors, features.frequency, alive, features.covariance_root)
    assert some.cell(features.vectors[399], 0.9).tolist() == list(range(40))


def test_draws_beyond_a_block_are_draws_of_the_same_null(head, features):
    pairs = feature_pairs(features, features, [(3, 4)])
    few, many = (one_test("random_pairs", head, features, features, pairs, n=n) for n in (400, 20_000))
    assert len(many.draws) == 20_000
    assert len(many.draws.unique()) > 10_000
    assert float(many.draws.std()) == pytest.approx(float(few.draws.std()), rel=0.15)


def test_a_small_source_draws_from_the_covariance_and_says_so(head, features, few):
    pairs = pairs_of((few.vectors[0], few.vectors[1], 1.0, 1.0))
    for null in ("random_pairs", "matched", "fixed_query", "fixed_key"):
        for sides in ((few, few), (few, features), (features, few)):
            assert "covariance" in (one_test(null, head, *sides, pairs, which=0).note or "")
        assert one_test(null, head, features, features, pairs, which=0).note is None
    assert one_test("rotated", head, few, few, pairs, which=0).note is None


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
    maps, _ = head
    pairs = pairs_of((features.vectors[3], features.vectors[4], 0.3, 0.6))
    no_query, no_key = unread(maps.query(torch.eye(32), 1)), unread(maps.key(torch.eye(32), 1))

    def largest(queries: Population, keys: Population) -> float:
        return float(one_test(null, head, queries, keys, pairs, n=50).draws.abs().max())

    usual = largest(features, features)
    assert (largest(no_query, features) < 1e-4 * usual) == (null != "fixed_query")
    assert (largest(features, no_key) < 1e-4 * usual) == (null != "fixed_key")


def test_each_side_is_matched_in_its_own_frequency(head, features):
    def draws(query: float, key: float) -> torch.Tensor:
        pairs = pairs_of((features.vectors[3], features.vectors[4], query, key))
        return one_test("matched", head, features, features, pairs, n=50).draws

    both = draws(0.3, 0.6)
    assert not torch.equal(both, draws(0.3, 0.05))
    assert not torch.equal(both, draws(0.05, 0.6))


def test_p_is_never_zero(head, features):
    """The pair that interacts most of all is more extreme than every draw."""
    maps, turn = head
    eye = torch.eye(32)
    form = torch.stack([virtual_interaction(maps, 2, turn, row[None], eye) for row in eye])
    left, _, right = torch.linalg.svd(form)
    test = one_test("random_pairs", head, features, features, pairs_of((left[:, 0], right[0], 0.5, 0.5)), which=2, n=99)
    assert test.p == 1 / 100


def test_a_population_holds_what_can_be_drawn_and_the_residuals_covariance():
    """Over two prompts, and only at the tokens that are this side's."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    activations = torch.tensor([[1.0, 1.0, 0.0], [-2.0, 0.0, 0.0]]).repeat(30, 1)
    residual = torch.randn(60, 2, generator=generator) @ torch.tensor([[3.0, 1.0], [0.0, 0.5]]) + 7
    activations[:10, 2] = 1.0
    places = [(written(activations[:30], residual[:30]), range(10, 30)), (written(activations[30:], residual[30:]),
              range(-30, 0))]  # fmt: skip
    found = population(vectors, places)
    assert found.alive.tolist() == [True, False, False], "neither a feature that writes nothing nor one not active here"
    assert found.frequency.tolist() == [1.0, 0.5, 0.0]
    torch.testing.assert_close(found.covariance_root @ found.covariance_root.T, torch.cov(residual[10:].T))


def test_the_covariance_of_fewer_tokens_than_dimensions_is_exact():
    residual = torch.randn(9, 24, generator=torch.Generator().manual_seed(1)) + 3
    found = population(torch.eye(24), [(written(torch.ones(9, 24), residual), range(9))])
    torch.testing.assert_close(found.covariance_root @ found.covariance_root.T, torch.cov(residual.T))
    drawn = found.from_covariance(50_000, torch.Generator().manual_seed(2))
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(residual.T), atol=0.05, rtol=0)


def test_feature_pairs_take_each_side_from_its_own_population(features):
    other = Population(-features.vectors, features.frequency / 2, features.alive, features.covariance_root)
    pairs = feature_pairs(features, other, [(5, 9), (2, 5)])
    assert len(pairs) == 2
    assert torch.equal(pairs.query, features.vectors[[5, 2]])
    assert torch.equal(pairs.key, -features.vectors[[9, 5]])
    assert torch.equal(pairs.query_frequency, features.frequency[[5, 2]])
    assert torch.equal(pairs.key_frequency, features.frequency[[9, 5]] / 2)


def test_too_few_draws_are_refused(head, features):
    pairs = feature_pairs(features, features, [(0, 1)])
    with pytest.raises(QklensError, match="at least 30"):
        one_test("random_pairs", head, features, features, pairs, n=29)


def test_in_a_small_source_matched_directions_vary_as_much_as_the_tested_one(few):
    """Two nulls, not one twice: random directions, and those along which the residual varies alike."""
    probes = few.from_covariance(50, torch.Generator().manual_seed(1))
    spreads = few.spread(probes)
    for axis in (probes[spreads.argmax()], probes[spreads.argmin()]):
        target = float(few.spread(axis[None])[0])
        matched = few.spread(few.matched_sample(axis, 1.0, 100, torch.Generator().manual_seed(0)))
        drawn = few.spread(few.alive_sample(100, torch.Generator().manual_seed(0)))
        off = [float((x.log() - torch.tensor(target).log()).abs().mean()) for x in (matched, drawn)]
        assert off[0] < 0.5 * off[1]
