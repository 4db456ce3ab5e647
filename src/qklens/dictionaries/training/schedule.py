"""Learning rate and sparsity over the steps.

learning rate   rises linearly over `warmup_steps`, stays, falls linearly to 0 over the last `decay` of the steps
λ               rises linearly over `sparsity_warmup_steps`
k               falls linearly from `first_k` over `sparsity_warmup_steps`
"""

from __future__ import annotations

from qklens.dictionaries.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """At a step, counted from 0."""
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    falling = config.decay * config.steps
    fall = min(1.0, (config.steps - step) / falling) if falling else 1.0
    return config.learning_rate * min(rise, fall)


def sparsity(config: TrainingConfig, step: int) -> float:
    """λ at a step; 0 for kinds that count."""
    return (config.sparsity or 0.0) * _risen(config, step)


def active(config: TrainingConfig, step: int) -> int:
    """K at a step; 0 for kinds that choose by a threshold."""
    k = config.k or 0
    first = config.first_k or k
    return round(first + (k - first) * _risen(config, step))


def _risen(config: TrainingConfig, step: int) -> float:
    warm = config.sparsity_warmup_steps
    return min(1.0, step / warm) if warm else 1.0
