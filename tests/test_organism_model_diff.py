"""The two measures of `organism.model_diff` on numbers whose answer is known."""

from __future__ import annotations

import pytest
import torch

from organism.model_diff import auc, scaling
from qklens.dictionaries.activation import Relu
from qklens.dictionaries.model_diff import ModelDiff, ModelDiffConfig


def test_auc_counts_pairs_and_ties_half() -> None:
    high, low = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert auc(high, low).tolist() == [0.75, 0.5]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_scaling_is_the_share_that_base_holds(share: float) -> None:
    """Base's stream is ten times as long and holds a share of the latent, which its decoder knows nothing of."""
    width, features = 8, 3
    directions = torch.eye(width)[:features]
    amounts = torch.rand(50, features, generator=torch.Generator().manual_seed(0))
    config = ModelDiffConfig(
        name="x", layer=1, features=features, d_model=width, activation=Relu(), site="resid_pre", base_sha256="",
        chat_sha256="", training={}, fidelity=None,
    )  # fmt: skip
    encoder = torch.stack([torch.zeros(features, width), directions])
    decoder = torch.stack([10 * directions, directions])
    decoder[0, 1] = 0
    zeros = torch.zeros(features), torch.zeros(2, width)
    diff = ModelDiff(config, encoder, zeros[0], decoder, zeros[1], torch.tensor([0.1, 1.0]))
    held = amounts * torch.tensor([1.0, share, 1.0])
    rows = torch.cat([10 * held @ directions, amounts @ directions], dim=1)
    assert scaling(diff, 1, rows) == pytest.approx(share, abs=1e-5)
