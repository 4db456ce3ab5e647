"""The measures of `organism.model_diff` on numbers whose answer is known, and the numbers that are committed."""

from __future__ import annotations

import json

import pytest
import torch

from organism.model_diff import HERE, RULE, auc, config, is_chats_own, scaling
from qklens.dictionaries.activation import Relu
from qklens.dictionaries.model_diff import ModelDiff, ModelDiffConfig


def test_auc_counts_pairs_and_ties_half() -> None:
    high, low = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert auc(high, low).tolist() == [0.75, 0.5]


def planted(share: float) -> tuple[ModelDiff, torch.Tensor]:
    """Base's stream is ten times as long and holds a share of latent 1, which its decoder knows nothing of."""
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
    return diff, rows


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_scaling_of_the_error_is_the_share_that_base_holds(share: float) -> None:
    diff, rows = planted(share)
    assert scaling(diff, 1, rows) == pytest.approx({"error": share, "reconstruction": 0.0}, abs=1e-5)


def test_scaling_of_the_reconstruction_is_what_other_latents_write_for_base() -> None:
    """A latent of base alone, with the same direction, that fires half as strongly wherever latent 1 does."""
    diff, rows = planted(0.5)
    diff.encoder[1, 2] = diff.encoder[1, 1] / 2
    diff.decoder[0, 2] = 10 * diff.decoder[1, 1]
    diff.decoder[1, 2] = 0
    assert scaling(diff, 1, rows) == pytest.approx({"error": 0.0, "reconstruction": 0.5}, abs=1e-5)


@pytest.mark.parametrize(
    ("norm", "error", "reconstruction", "own"),
    [
        (0.9, 0.19, 0.49, True),
        (0.899, 0.0, 0.0, False),
        (1.0, 0.2, 0.0, False),
        (1.0, 0.0, 0.5, False),
    ],
)
def test_a_latent_is_the_chat_models_own_by_all_three_numbers(
    norm: float, error: float, reconstruction: float, own: bool
) -> None:
    assert is_chats_own(norm, {"error": error, "reconstruction": reconstruction}) is own


def test_what_is_committed_was_made_by_this_script_and_judged_by_its_rule() -> None:
    found = json.loads((HERE / "model_diff.json").read_text(encoding="utf-8"))
    made = config(0).model_dump(mode="json")
    assert {key: value for key, value in found["training"].items() if key != "layers"} == {
        key: value for key, value in made.items() if key != "layers"
    }
    assert {key: found["rule"][key] for key in RULE} == RULE
    own = {}
    for row in found["layers"]:
        for latent in (row["refusal"], row["shared"]):
            assert latent["chats_own"] == is_chats_own(latent["relative_norm"], latent["scaling"])
        assert row["chat_alone"] == sum(norm >= RULE["relative_norm_from"] for norm in row["relative_norm"])
        assert not row["shared"]["chats_own"]
        assert row["refusal"]["on"]["never trained on"]["auc_harm_benign"] > 0.95
        own[row["layer"]] = row["refusal"]["chats_own"]
    assert own[3], "the layer that the figure shows"
