"""Does a set give its answers away? Guessers that see only the options, cross-validated over items.

A set that a length or bag-of-words guesser solves would measure wording, not knowledge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from qklens.data.items import DEFAULT_BENIGN_INTENT, Item
from qklens.data.sameness import holds_joiner, same_form

GIVEAWAY = 0.60
_FOLDS = 10
_PRIOR = 1.0


def audit(items: Sequence[Item]) -> dict[str, Any]:
    """Counts, guessers' accuracies (0.5 is chance; a tie counts one half) and notes on what stands out."""
    lengths = np.array([[len(i.correct) - len(i.incorrect), _words(i.correct) - _words(i.incorrect)] for i in items])
    guessers = {
        "guesser_length": _cross_validated(lengths.astype(float)),
        "guesser_bag_of_words": _cross_validated(_word_differences(items)),
    }
    notes = [
        f"{name.removeprefix('guesser_').replace('_', ' ')} alone picks the correct option in {100 * value:.0f}% of "
        f"items; expected below {100 * GIVEAWAY:.0f}%: reword options"
        for name, value in guessers.items()
        if value >= GIVEAWAY
    ]
    if any(item.benign_intent == DEFAULT_BENIGN_INTENT for item in items):
        notes.append(
            "items without 'benign_intent' use a neutral sentence; its length does not match their harmful one"
        )
    notes += _repeated_questions(items) + _joiners(items)
    return {
        "n_topics": len({item.topic for item in items}),
        "topics": dict(Counter(item.topic for item in items)),
        "severities": dict(Counter(item.severity or "unset" for item in items)),
        "n_distinct_harmful_intents": len({same_form(item.harmful_intent) for item in items}),
        **guessers,
        "notes": notes,
    }


def _repeated_questions(items: Sequence[Item]) -> list[str]:
    """The same question with other options: allowed, but its items are not independent."""
    asked: dict[str, list[Item]] = {}
    for item in items:
        asked.setdefault(same_form(item.question), []).append(item)
    return [
        f"items {', '.join(repr(item.id) for item in same)} ask the same question, {same[0].question!r}; they are not "
        "independent"
        for same in asked.values()
        if len(same) > 1
    ]


def _joiners(items: Sequence[Item]) -> list[str]:
    """Zero-width characters that some scripts need and that elsewhere hide a difference from the reader."""
    fields = ("id", "topic", "question", "correct", "incorrect", "harmful_intent", "benign_intent")
    found = [f"{item.id!r} ({field})" for item in items for field in fields if holds_joiner(getattr(item, field))]
    return [f"zero-width joiners stand in {', '.join(found)}; the model reads them, a person does not"] if found else []


def _words(text: str) -> int:
    return len(text.split())


def _word_differences(items: Sequence[Item]) -> NDArray[np.float64]:
    vocabulary = sorted(
        {w for item in items for option in (item.correct, item.incorrect) for w in option.lower().split()}
    )
    column = {word: i for i, word in enumerate(vocabulary)}
    rows = np.zeros((len(items), len(vocabulary)))
    for row, item in enumerate(items):
        for sign, option in ((1.0, item.correct), (-1.0, item.incorrect)):
            for word in option.lower().split():
                rows[row, column[word]] += sign
    return rows


def _cross_validated(differences: NDArray[np.float64]) -> float:
    """Accuracy of a ridge-logistic guesser on (correct − incorrect) features; without intercept, so it is symmetric."""
    scale = differences.std(axis=0)
    rows = differences / np.where(scale > 0, scale, 1.0)
    folds = np.random.default_rng(0).permutation(len(rows)) % min(_FOLDS, len(rows))
    score = 0.0
    for fold in np.unique(folds):
        weights = _fit(rows[folds != fold])
        value = rows[folds == fold] @ weights
        score += float((value > 1e-12).sum() + 0.5 * (np.abs(value) <= 1e-12).sum())
    return score / len(rows)


def _fit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Minimise Σ log(1 + e^{−w·x}) + prior/2 ‖w‖²; every row is correct − incorrect, so all labels are positive."""

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value = rows @ weights
        gradient = _PRIOR * weights - rows.T @ expit(-value)
        return float(np.logaddexp(0, -value).sum() + _PRIOR / 2 * weights @ weights), gradient

    return minimize(loss, np.zeros(rows.shape[1]), jac=True, method="L-BFGS-B").x
