"""Activations at a few fixed tokens of a batch: the middle one of up to 32 of its sequences, evenly chosen."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from torch import Tensor

from qklens.dictionaries.source import FeatureSource
from qklens.dictionaries.training.harvest import side_by_side
from qklens.models.subject import Subject

TOKENS = 32


def activations_at_fixed_tokens(
    subjects: Sequence[Subject], source: FeatureSource, sequences: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """`token feature` at every layer that a source writes; the same tokens for the same sequences.

    Args:
        subjects: the model, or those whose streams the source reads side by side.
        source: what encodes.
        sequences: token ids; those of a single token are left out.
    """
    usable = [s for s in sequences if len(s) > 1]
    index = np.linspace(0, len(usable) - 1, min(TOKENS, len(usable))).round().astype(int)
    chosen = sorted((usable[i] for i in index), key=len)  # the order in which rows come
    ends = list(accumulate(len(s) - 1 for s in chosen))
    at = [end - len(s) // 2 for end, s in zip(ends, chosen, strict=True)]
    rows = side_by_side(subjects, chosen, source.layers)
    device = subjects[0].device
    return {layer: source.encode(layer, lambda m: rows[m][at].to(device)).cpu() for layer in source.layers}
