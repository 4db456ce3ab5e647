"""The one-pass tally of features: equal to sorting a dense table, whatever the order of passages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qklens.analyses.card_tally import AFTER, BEFORE, BINS_PER_DECADE, SAMPLED, CardTally, place_sums


def passages(seed: int, n: int, n_features: int, share: float = 0.3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (n,), generator=draw).tolist()
    found = []
    for length in lengths:
        values = torch.randn(length, n_features, generator=draw) * 3
        found.append(values * (torch.rand(length, n_features, generator=draw) < share))
    return found


def tally_of(texts: list[Tensor], k: int, order: list[int] | None = None) -> CardTally:
    tally = CardTally(texts[0].shape[1], k, seed=5)
    for i in order or range(len(texts)):
        tally.add(i, texts[i])
    return tally


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 25), k=st.integers(1, 6))
def test_extremes_counts_and_histogram_are_those_of_the_dense_table(seed: int, n: int, k: int) -> None:
    texts = passages(seed, n, 4)
    tally = tally_of(texts, k)
    for feature in range(4):
        rows = [t[1:, feature] for t in texts]
        joined = torch.cat(rows)
        assert tally.tokens == len(joined)
        assert int(tally.active[feature]) == int((joined != 0).sum())
        assert float(tally.sum[feature]) == pytest.approx(float(joined.double().sum()), abs=1e-9)
        for found, sign in ((tally.top(feature), 1), (tally.bottom(feature), -1)):
            best = [(float((sign * r).max()), -i) for i, r in enumerate(rows) if len(r) and float((sign * r).max()) > 0]
            expected = sorted(best, reverse=True)[:k]
            assert [(sign * f.activation, -f.passage) for f in found] == expected
            for f in found:
                assert float(texts[f.passage][f.position, feature]) == f.activation
        histogram, active = tally.histogram(feature), joined[joined != 0].abs().log10().double().numpy()
        assert sum(histogram.counts) == len(active)
        if len(active):
            counts, _ = np.histogram(active, bins=np.array(histogram.edges))
            assert np.abs(counts - np.array(histogram.counts)).sum() <= 2  # float32's last bit at an edge
            assert np.diff(histogram.edges) == pytest.approx(1 / BINS_PER_DECADE)


def test_contexts_are_the_tokens_around_an_example_and_zero_beyond_the_passage() -> None:
    texts = passages(3, 6, 2, share=0.9)
    for feature in range(2):
        for found in (*tally_of(texts, 6).top(feature), *tally_of(texts, 6).deciles(feature)):
            assert len(found.context) == BEFORE + 1 + AFTER
            for offset, value in enumerate(found.context, start=found.position - BEFORE):
                inside = 0 <= offset < len(texts[found.passage])
                assert value == (float(texts[found.passage][offset, feature]) if inside else 0)


def test_nothing_depends_on_the_order_of_passages() -> None:
    texts = passages(11, 40, 3)
    one, other = tally_of(texts, 5), tally_of(texts, 5, order=list(range(39, -1, -1)))
    for feature in range(3):
        for side in (CardTally.top, CardTally.bottom, CardTally.deciles, CardTally.histogram):
            assert side(one, feature) == side(other, feature)


def test_deciles_are_exact_where_few_tokens_are_active_and_fair_where_many_are() -> None:
    values = torch.zeros(61, 1)
    values[1:, 0] = torch.arange(1.0, 61.0)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    found = tally_of([values], 3).deciles(0)
    assert [f.decile for f in found] == list(range(10))
    assert all(6 * f.decile < f.activation <= 6 * (f.decile + 1) for f in found if f.decile is not None)
    assert [f.activation for f in found] != [6.0 * (i + 1) for i in range(10)]
    many = torch.rand(8001, 1, generator=torch.Generator().manual_seed(1)) + 0.001
    assert 10 * SAMPLED < 8000
    for f in tally_of([many[:4000], many[4000:]], 3).deciles(0):
        assert f.decile is not None
        assert abs(f.activation - (f.decile + 0.5) / 10) < 0.2


def test_first_tokens_and_features_that_are_never_active_leave_nothing() -> None:
    values = torch.zeros(4, 2)
    values[0, 0] = 9.0
    tally = tally_of([values, torch.ones(1, 2)], 3)
    assert tally.tokens == 3
    for feature in range(2):
        assert tally.top(feature) == tally.bottom(feature) == tally.deciles(feature) == []
        assert tally.histogram(feature).edges == ()


def test_places_are_summed_without_the_first_token() -> None:
    values = torch.tensor([[5.0], [0.0], [2.0], [-1.0]])
    tokens, active, sums = place_sums(values, ("a", "a", "b", None), ("a", "b", "c"))
    assert tokens.tolist() == [1, 1, 0]
    assert active.tolist() == [[0], [1], [0]]
    assert sums.tolist() == [[0.0], [2.0], [0.0]]
