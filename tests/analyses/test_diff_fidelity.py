"""Fidelity of a crosscoder over two checkpoints that is two dictionaries side by side: each side is its own model's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qklens.analyses.diff_fidelity import measure_diff_fidelity
from qklens.analyses.fidelity import measure_fidelity
from qklens.analyses.fixed_tokens import TOKENS, activations_at_fixed_tokens
from qklens.data.items import load_dataset
from qklens.dictionaries.activation import Threshold
from qklens.dictionaries.config import FORMAT, DictionaryConfig
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.model_diff import ModelDiff, ModelDiffConfig
from qklens.dictionaries.training.harvest import side_by_side
from qklens.errors import QklensError
from qklens.models.loading import load_subject
from qklens.models.sites import capture
from qklens.models.subject import Subject
from qklens.studies.resources import organism_folder

SITE = "resid_pre.2"
LAYER, SIZES = 2, {"base": 0.7, "chat": 0.9}


@pytest.fixture(scope="module")
def models() -> dict[str, Subject]:
    return {side: load_subject(organism_folder() / side) for side in SIZES}


@pytest.fixture(scope="module")
def sequences(models: dict[str, Subject]) -> list[list[int]]:
    """Of different lengths, in no order, and more than one batch of them."""
    items = load_dataset("harm_pressure").items[:70]
    return [models["chat"].tokenizer(i.question)["input_ids"] for i in items]


def alone(side: str, width: int) -> Crosscoder:
    """A coordinate and a sign a feature, of those above a threshold; it writes a share of the stream."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    config = DictionaryConfig(
        format=FORMAT, name=side, layers=(LAYER,), features_per_layer=2 * width, d_model=width,
        activation=Threshold(threshold=0.2), site="resid_pre", model_sha256="", training={}, fidelity=None,
    )  # fmt: skip
    zeros = torch.zeros(2 * width), torch.zeros(width)
    return Crosscoder(config, {LAYER: both}, {LAYER: zeros[0]}, {LAYER: SIZES[side] * both}, {LAYER: zeros[1]})


def together(width: int) -> ModelDiff:
    """Both, as one crosscoder."""
    singles = [alone(side, width) for side in SIZES]
    n = singles[0].config.features_per_layer
    encoder, decoder = torch.zeros(2, 2 * n, width), torch.zeros(2, 2 * n, width)
    for side, single in enumerate(singles):
        encoder[side, side * n : (side + 1) * n] = single.encoder[LAYER]
        decoder[side, side * n : (side + 1) * n] = single.decoder[LAYER]
    config = ModelDiffConfig(
        name="diff", layer=LAYER, features=2 * n, d_model=width, activation=singles[0].config.activation,
        site="resid_pre", base_sha256="", chat_sha256="", training={}, fidelity=None,
    )  # fmt: skip
    return ModelDiff(config, encoder, torch.zeros(2 * n), decoder, torch.zeros(2, width), torch.ones(2))


def test_each_side_is_what_its_own_dictionary_leaves_in_its_own_model(
    models: dict[str, Subject], sequences: list[list[int]]
) -> None:
    width = models["chat"].d_model
    found = measure_diff_fidelity(models["base"], models["chat"], together(width), torch.tensor([1.0, 3.0]), sequences)
    expected = {side: measure_fidelity(models[side], alone(side, width), sequences) for side in SIZES}
    assert found.l0 == pytest.approx(sum(one.l0[LAYER] for one in expected.values()), rel=1e-5)
    for side, one in expected.items():
        unexplained = one.fraction_variance_unexplained[LAYER]
        assert 0.005 < unexplained < 0.9
        assert found.fraction_variance_unexplained[side] == pytest.approx(unexplained, rel=1e-5)
        recovered = one.loss_recovered[LAYER]
        assert recovered is not None
        assert found.loss_recovered[side] == pytest.approx(recovered, abs=1e-5)
        rows = torch.cat([capture(models[side], models[side].batch([s]), [SITE])[SITE][0, 1:] for s in sequences])
        factor = {"base": 1.0, "chat": 3.0}[side]
        assert found.mean_square[side] == pytest.approx(float((factor * rows).square().mean()), rel=1e-4)
    assert found.loss_recovered["base"] != pytest.approx(found.loss_recovered["chat"], abs=1e-3)


@pytest.mark.parametrize("kind", [Crosscoder, ModelDiff])
def test_rows_are_encoded_a_few_at_a_time_with_the_same_result(
    models: dict[str, Subject], sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """Against all rows at once, L0 and variance left by hand."""
    width, used, sizes = models["chat"].d_model, sequences[:12], []
    one = alone("chat", width) if kind is Crosscoder else together(width)
    subjects = [models["chat"]] if kind is Crosscoder else list(models.values())
    measure = measure_fidelity if kind is Crosscoder else measure_diff_fidelity
    rows = side_by_side(subjects, used, (LAYER,))[LAYER].double()
    activations = one.encode(LAYER, lambda _: rows)
    left = one.error(LAYER, lambda _: rows, activations)
    scale = () if kind is Crosscoder else (torch.ones(2),)
    at_once = measure(*subjects, one, *scale, used).by_site()
    real = kind.encode

    def encode(self: object, layer: int, stream: Callable[[int], Tensor]) -> Tensor:
        sizes.append(len(stream(layer)))
        return real(self, layer, stream)

    monkeypatch.setattr(kind, "encode", encode)
    monkeypatch.setattr("qklens.dictionaries.blocks.ENTRIES_AT_ONCE", 7 * len(one.labels) + 1)
    found = measure(*subjects, one, *scale, used).by_site()
    assert max(sizes) == 7
    assert sum(sizes) == len(rows) * (2 if kind is Crosscoder else 1)
    for site, x, e in zip(found, rows.chunk(len(subjects), 1), left.chunk(len(subjects), 1), strict=True):
        assert found[site]["l0"] == int((activations != 0).sum()) / len(rows)
        unexplained = float(e.pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum())
        assert found[site]["fraction_variance_unexplained"] == pytest.approx(unexplained, rel=1e-5)
        assert found[site]["loss_recovered"] == pytest.approx(at_once[site]["loss_recovered"], abs=1e-6)


def test_fixed_tokens_are_the_middle_ones_whatever_the_batches(
    models: dict[str, Subject], sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = models["chat"]
    one = alone("chat", chat.d_model)
    found = activations_at_fixed_tokens([chat], one, sequences)[LAYER]
    assert len(found) == TOKENS
    plain = []
    for sequence in sequences:
        kept = capture(chat, chat.batch([sequence]), [f"resid_pre.{LAYER}"])[f"resid_pre.{LAYER}"][0]
        middle = 1 + (len(sequence) - 1) - len(sequence) // 2
        plain.append(one.encode(LAYER, lambda _, x=kept[middle]: x))
    distances = torch.cdist(found, torch.stack(plain), compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distances.min(dim=1).values.max()) < 1e-3
    monkeypatch.setattr("qklens.dictionaries.training.harvest._SEQUENCES", 5)
    torch.testing.assert_close(activations_at_fixed_tokens([chat], one, sequences)[LAYER], found)


def test_nothing_to_measure_on_is_refused(models: dict[str, Subject]) -> None:
    with pytest.raises(QklensError, match="at least one sequence of two tokens"):
        measure_diff_fidelity(models["base"], models["chat"], together(models["chat"].d_model), torch.ones(2), [[5]])
