"""All pair terms of one prompt for a weighting of key tokens, as a table."""

from __future__ import annotations

import torch

from qklens.analyses.lens import HeadLens
from qklens.analyses.written import WrittenPrompt


def pair_terms(lens: HeadLens, written: WrittenPrompt, position: int, weights: torch.Tensor) -> torch.Tensor:
    """`query key` over all sources, zero where a source is not there; they sum to Σ_j w_j u(p, j)."""
    query, key = lens.query(written, position), lens.keys(written, weights)
    table = query.vectors.new_zeros(len(lens.names), len(lens.names))
    table[query.index[:, None], key.index] = lens.maps.scale * query.vectors @ key.vectors.T
    return table
