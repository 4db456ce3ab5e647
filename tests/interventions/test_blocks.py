"""A block put into rows of a pattern."""

from __future__ import annotations

import pytest
import torch

from qklens.interventions.blocks import with_block

KEYS, OTHERS = [4, 5, 6, 7], [0, 1, 2, 3, 8, 9, 10, 11]
CLOSE = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("gap", [0.0, 10.0, 18.0, 25.0])
def test_a_row_that_looks_at_little_else_keeps_its_sum_and_the_rest_its_proportions(
    gap: float, dtype: torch.dtype
) -> None:
    """At a gap of 20 the rest is 1e-9 of the row, which a difference of sums would lose."""
    scores = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[..., KEYS] += gap
    rows = scores.softmax(dim=-1)
    new = with_block(rows.to(dtype), KEYS, torch.full((2, 3, 4), 0.075))
    wanted = rows[..., OTHERS] / rows[..., OTHERS].sum(dim=-1, keepdim=True) * 0.7
    assert new.dtype == dtype
    assert torch.allclose(new[..., OTHERS].double(), wanted, rtol=0, atol=CLOSE[dtype])
    assert torch.allclose(new[..., KEYS].double(), torch.tensor(0.075).double(), rtol=0, atol=CLOSE[dtype])


@pytest.mark.parametrize(
    ("row", "values", "wanted"),
    [
        ([0.1, 0.2, 0.3, 0.0], [0.6, 0.2], [0.0, 0.45, 0.15, 0.0]),
        ([0.0, 0.2, 0.8, 0.0], [0.3, 0.1], [0.0, 0.75, 0.25, 0.0]),
        ([0.0, 0.2, 0.8, 0.0], [0.0, 0.0], [0.0, 0.2, 0.8, 0.0]),
        ([0.5, 0.2, 0.3, 0.0], [0.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
        ([1e-40, 0.5, 0.5, 0.0], [0.25, 0.25], [0.5, 0.25, 0.25, 0.0]),
    ],
    ids=["more than the row has", "no rest", "no rest and no values", "no values", "a rest that underflows"],
)
def test_the_row_s_sum_stays(row: list[float], values: list[float], wanted: list[float]) -> None:
    new = with_block(torch.tensor(row).reshape(1, 1, 4), [1, 2], torch.tensor(values).reshape(1, 1, 2))
    assert torch.allclose(new.flatten(), torch.tensor(wanted), atol=1e-6)
