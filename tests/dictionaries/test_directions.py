"""Contrast directions: their coordinates are least squares, so the error is orthogonal to every direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qklens.dictionaries.directions import Directions
from qklens.dictionaries.source import write_parts
from qklens.errors import QklensError

LABELS = ("need_answer", "correct_answer", "harm_detection")


def random_directions(seed: int, width: int = 8) -> Directions:
    draw = torch.Generator().manual_seed(seed)
    return Directions(
        LABELS,
        {m: torch.randn(len(LABELS), width, generator=draw, dtype=torch.float64) for m in (4, 1)},
        {m: torch.randn(width, generator=draw, dtype=torch.float64) for m in (4, 1)},
    )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), layer=st.sampled_from([1, 4]))
def test_coordinates_are_least_squares_and_the_error_is_orthogonal(seed: int, layer: int) -> None:
    source = random_directions(seed)
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    parts = write_parts(source, layer, {layer: x}.__getitem__)
    rows = (x - source.means[layer]).reshape(12, 8).numpy()
    expected = np.linalg.lstsq(source.vectors[layer].numpy().T, rows.T, rcond=None)[0].T
    np.testing.assert_allclose(parts.activations.reshape(12, 3).numpy(), expected, rtol=1e-8, atol=1e-10)
    assert float((parts.error @ source.vectors[layer].T).abs().max()) < 1e-10
    torch.testing.assert_close(parts.activations @ parts.directions + parts.bias + parts.error, x)
    assert float(parts.error.abs().max()) > 1e-3


def test_a_stream_inside_the_span_leaves_no_error() -> None:
    source = random_directions(0)
    wanted = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    parts = write_parts(source, 4, lambda layer: wanted @ source.vectors[layer] + source.means[layer])
    torch.testing.assert_close(parts.activations, wanted)
    assert float(parts.error.abs().max()) < 1e-12


def test_directions_that_coincide_still_write_the_stream() -> None:
    """The least-squares coordinates of smallest norm; a plain inverse would not exist."""
    vector = torch.tensor([1.0, 2.0, 0.0, -1.0])
    source = Directions(("a", "b"), {0: torch.stack([vector, vector])}, {0: torch.zeros(4)})
    parts = write_parts(source, 0, lambda _: 6 * vector[None])
    torch.testing.assert_close(parts.activations, torch.tensor([[3.0, 3.0]]))
    assert float(parts.error.abs().max()) < 1e-5


def test_layers_are_sorted_and_others_refused() -> None:
    source = random_directions(0)
    assert source.layers == (1, 4)
    with pytest.raises(QklensError, match=r"'directions' does not write resid_pre\.2"):
        source.encode(2, torch.zeros)
