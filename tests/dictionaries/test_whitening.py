"""Whitened directions: Fisher's discriminant of Gaussian classes, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity as cosine

from qklens.dictionaries.whitening import LEAST_SHRINKAGE, ledoit_wolf, whitened_direction
from qklens.errors import QklensError

WIDTH, ROWS = 6, 20_000
DELTA = torch.tensor([1.0, 0.5, 0.0, -0.5, 0.2, 0.1], dtype=torch.float64)


def covariance() -> Tensor:
    """Condition number 400, in a basis that is not the axes'."""
    basis = torch.linalg.qr(
        torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ).Q
    return basis @ torch.diag(torch.logspace(0.0, 2.6, WIDTH, dtype=torch.float64)) @ basis.T


def classes(rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    noise = torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, second = noise @ torch.linalg.cholesky(covariance()).T
    return first - first.mean(dim=0) + DELTA, second - second.mean(dim=0)


def whiten(first: Tensor, second: Tensor, shrinkage: float | None = None) -> Tensor:
    return whitened_direction(first, second, first.mean(dim=0) - second.mean(dim=0), "here", shrinkage)[0]


def test_anisotropic_classes_give_the_discriminant_and_plain_means_do_not() -> None:
    first, second = classes()
    truth = torch.linalg.solve(covariance(), DELTA)
    assert float(cosine(whiten(first, second), truth, dim=0)) > 0.999
    assert float(cosine(DELTA, truth, dim=0)) < 0.9


def test_without_shrinkage_it_is_the_inverse_of_the_pooled_covariance_at_the_length_of_the_difference() -> None:
    first, second = classes(rows=200)
    pooled = np.cov(torch.cat([first - first.mean(0), second - second.mean(0)]).numpy().T, bias=True)
    expected = np.linalg.inv(pooled) @ DELTA.numpy()
    expected *= float(DELTA.norm()) / np.linalg.norm(expected)
    np.testing.assert_allclose(whiten(first, second, 0.0).numpy(), expected, rtol=1e-9)


def test_full_shrinkage_is_the_plain_difference() -> None:
    torch.testing.assert_close(whiten(*classes(rows=50), 1.0), DELTA)


def test_it_turns_with_the_space_scales_with_it_and_forgets_where_zero_is() -> None:
    first, second = classes(rows=300)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    plain = whiten(first, second)
    torch.testing.assert_close(whiten(first @ turn.T, second @ turn.T), plain @ turn.T)
    torch.testing.assert_close(whiten(7 * first, 7 * second), 7 * plain)
    torch.testing.assert_close(whiten(first + 50, second + 50), plain)
    torch.testing.assert_close(whiten(second, first), -plain)


def test_without_shrinkage_scores_do_not_depend_on_the_basis() -> None:
    """⟨w, x⟩ is unchanged, up to w's length, when the stream is written in other coordinates, however skewed."""
    first, second = classes(rows=300)
    skew = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scores = torch.cat([first, second]) @ whiten(first, second, 0.0)
    moved = torch.cat([first, second]) @ skew.T @ whiten(first @ skew.T, second @ skew.T, 0.0)
    torch.testing.assert_close(moved / moved.norm(), scores / scores.norm())
    plain = torch.cat([first, second]) @ skew.T @ (skew @ DELTA)
    assert float(cosine(plain, torch.cat([first, second]) @ DELTA, dim=0)) < 0.99


def test_the_shrinkage_is_ledoit_and_wolfs() -> None:
    x = classes(rows=40)[0].numpy()
    x = x - x.mean(axis=0)
    s = x.T @ x / len(x)
    m = np.trace(s) / WIDTH
    off = np.linalg.norm(s - m * np.eye(WIDTH)) ** 2
    noise = sum(np.linalg.norm(np.outer(row, row) - s) ** 2 for row in x) / len(x) ** 2
    assert ledoit_wolf(torch.from_numpy(x)) == pytest.approx(min(noise, off) / off, rel=1e-9)
    assert 0 < noise < off


def test_fewer_tokens_than_dimensions_are_shrunk_and_the_share_is_stated() -> None:
    first, second = classes(rows=2)
    direction, share = whitened_direction(first, second, first.mean(0) - second.mean(0), "here")
    assert bool(direction.isfinite().all())
    assert share is not None
    assert LEAST_SHRINKAGE <= share <= 1
    with pytest.raises(QklensError, match="no inverse at shrinkage 0"):
        whiten(first, second, 0.0)


def test_classes_that_do_not_vary_are_refused_and_no_difference_is_no_direction() -> None:
    same = torch.ones(5, WIDTH)
    with pytest.raises(QklensError, match=r"contrast x.*10 tokens do not vary"):
        whitened_direction(2 * same, same, same[0], "contrast x")
    nothing, share = whitened_direction(same, same, torch.zeros(WIDTH), "here")
    assert not bool(nothing.any())
    assert share is None
    with pytest.raises(QklensError, match="NaN"):
        whitened_direction(torch.full((3, 2), torch.nan), torch.ones(3, 2), torch.ones(2), "here")
