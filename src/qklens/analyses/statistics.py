"""Intervals and tests, from scipy and statsmodels; items, not prompts, are the unit that is resampled."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor

from qklens.errors import QklensError

Interval = tuple[float, float]
Array = NDArray[np.float64]
RESAMPLES = 2000
_Values = TypeVar("_Values", Tensor, Array)


def item_means(by_prompt: _Values) -> _Values:
    """Both orders of each item averaged, in the values' own precision; prompts come item by item."""
    orders = by_prompt.reshape(len(by_prompt) // 2, 2, *by_prompt.shape[1:])
    return (orders[:, 0] + orders[:, 1]) / 2


def wilson(successes: int, n: int) -> Interval:
    """Wilson 95% interval of a proportion."""
    if n < 1:
        raise QklensError("an accuracy needs at least one prompt")
    low, high = np.asarray(proportion_confint(successes, n, method="wilson"), dtype=float)
    return float(low), float(high)


def bootstrap_mean(by_item: Array, seed: int) -> Interval:
    """Percentile 95% interval of the mean over items; each value is one item's mean over its prompts."""
    if len(by_item) < 2:
        return float(by_item.mean()), float(by_item.mean())
    draws = np.random.default_rng(seed).integers(0, len(by_item), (RESAMPLES, len(by_item)))
    low, high = np.quantile(by_item[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_means(by_item: Array, seed: int) -> tuple[Array, Array]:
    """The same of many columns at once, `item column`: their lower and upper ends."""
    n = len(by_item)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    low, high = np.quantile(counts @ by_item / n, [0.025, 0.975], axis=0)
    return low, high


def bootstrap_ratio(numerator: Array, denominator: Array, seed: int) -> Interval:
    """Percentile 95% interval of Σ numerator / Σ denominator over items resampled together."""
    draws = np.random.default_rng(seed).integers(0, len(numerator), (RESAMPLES, len(numerator)))
    below = denominator[draws].sum(axis=1)
    ratios = numerator[draws].sum(axis=1) / np.where(below == 0, np.nan, below)
    if np.isnan(ratios).all():
        return 0.0, 0.0
    low, high = np.nanquantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_ratio_of_means(above: tuple[Array, Array], below: tuple[Array, Array], seed: int) -> Interval:
    """Percentile 95% interval of one mean over another, for two samples that are resampled apart.

    Args:
        above: the sum and the count of each unit of the sample on top; its mean is Σ sums / Σ counts.
        below: likewise for the sample below.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    means = []
    for sums, counts in (above, below):
        draws = generator.integers(0, len(sums), (RESAMPLES, len(sums)))
        means.append(sums[draws].sum(axis=1) / counts[draws].sum(axis=1))
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    return float(low), float(high)


def auc(positive: Array, negative: Array) -> float:
    """P(positive > negative) + ½ P(equal), by ranks."""
    result = stats.mannwhitneyu(positive, negative, alternative="greater", method="asymptotic")
    return float(result.statistic) / (len(positive) * len(negative))


def bootstrap_auc(positive: Array, negative: Array, items: NDArray[np.int64], seed: int) -> Interval:
    """Percentile 95% interval of the AUC, items resampled with all their prompts."""
    unique, place = np.unique(items, return_inverse=True)
    n, above = len(unique), np.sign(positive[:, None] - negative[None, :]) / 2 + 0.5
    wins = np.zeros((n, n))
    np.add.at(wins, (place[:, None], place[None, :]), above)
    prompts = np.bincount(place, minlength=n)
    generator = np.random.default_rng(seed)
    drawn = [np.bincount(generator.integers(0, n, n), minlength=n) for _ in range(400)]
    values = [times @ wins @ times / (times @ prompts) ** 2 for times in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def mcnemar_exact(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Two-sided exact McNemar p for paired right/wrong answers."""
    table = [
        [int((first & second).sum()), int((first & ~second).sum())],
        [int((~first & second).sum()), int((~first & ~second).sum())],
    ]
    return float(vars(mcnemar(table, exact=True))["pvalue"])


def benjamini_hochberg(p_values: list[float], searched: int = 0) -> list[float]:
    """q-values, in the order given.

    Args:
        p_values: of the tests made.
        searched: how many tests there were to choose from, where these are the best of a search. The others count with
            p = 1, so that no q is smaller than it would be with all of them: q_(j) = min_{i ≥ j} p_(i) searched / i.
    """
    if not p_values:
        return []
    q = np.asarray(multipletests(p_values, method="fdr_bh")[1], dtype=float)
    return np.minimum(q * max(searched / len(p_values), 1.0), 1.0).tolist()
