"""Every format's small directory encodes and decodes as its tool documents, to 1e-6, and says where it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qklens.dictionaries.crosscoder import load_crosscoder, save_crosscoder
from qklens.dictionaries.formats.detect import convert, load_dictionary
from tests.dictionaries.formats import published
from tests.dictionaries.formats.published import WIDTH, Written

CASES: dict[str, Callable[[Path], Written]] = {
    **{f"saelens {a}": partial(published.saelens, architecture=a) for a in ("standard", "topk", "jumprelu", "gated")},
    "saelens batchtopk": partial(published.saelens, architecture="batchtopk", rescale=True),
    "saelens topk rescaled": partial(published.saelens, architecture="topk", rescale=True),
    "saelens without b_dec": partial(published.saelens, architecture="jumprelu", subtract=False),
    "saelens scaled": partial(published.saelens, architecture="topk", scale=0.37),
    "saelens scaled without b_dec": partial(published.saelens, scale=2.5, subtract=False),
    "saelens 5": partial(published.saelens, version=5, finetuned=True),
    "saelens 5 topk": partial(published.saelens, architecture="topk", version=5),
    "saelens 3": partial(published.saelens, version=3, hook="blocks.3.hook_resid_pre"),
    "gemma scope": published.gemma_scope,
    "gemma scope 2": published.gemma_scope_2,
    "llama scope": published.llama_scope,
    "llama scope topk": partial(published.llama_scope, act_fn="topk", threshold=1.5),
    "openmoss": published.openmoss,
    "openmoss topk": partial(published.openmoss, act_fn="topk", norm="inference"),
    "sparsify": published.sparsify,
}


def stream(rows: int = 64, seed: int = 9) -> Tensor:
    return 2 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def close(got: Tensor, expected: Tensor) -> None:
    """To 1e-6 of the largest value: what is folded into float32 weights is rounded once."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_encodings_and_reconstruction_are_the_tool_s(tmp_path: Path, case: str) -> None:
    written = CASES[case](tmp_path / "sae")
    dictionary = load_dictionary(written.folder)
    assert dictionary.layers == (written.layer,)
    x = stream()
    activations, reconstruction = written.forward(x)
    got = dictionary.encode(written.layer, lambda _: x)
    close(got, activations)
    close(dictionary.decode(written.layer, got), reconstruction)
    assert 0.02 < (activations != 0).double().mean() < 0.9, "some features are active and some are not"


@pytest.mark.parametrize("case", CASES)
def test_converted_and_read_again_it_is_the_same(tmp_path: Path, case: str) -> None:
    written = CASES[case](tmp_path / "sae")
    direct = convert(written.folder)
    save_crosscoder(direct, tmp_path / "native", torch.float32)
    again = load_crosscoder(tmp_path / "native")
    x = stream().float()
    assert torch.equal(again.encode(written.layer, lambda _: x), direct.encode(written.layer, lambda _: x))
    assert again.config == direct.config
    assert again.config.source is not None
    assert len(again.config.source.sha256) == 64
    assert again.config.model_sha256 == ""


def test_what_was_folded_is_said(tmp_path: Path) -> None:
    written = published.saelens(tmp_path / "sae", scale=0.5, subtract=False)
    source = load_dictionary(written.folder).config.source
    assert source is not None
    assert (source.format, source.model, source.site) == ("saelens", "gemma-2-2b", "blocks.3.hook_resid_post")
    assert "decoder bias" in source.folded[0]
    assert "input scale 0.5" in source.folded[1]


def test_a_crosscoder_of_gemma_scope_2_is_the_tutorial_s(tmp_path: Path) -> None:
    folder, shards = published.gemma_scope_2_crosscoder(tmp_path / "crosscoder")
    dictionary = load_dictionary(folder)
    assert dictionary.layers == (2, 5, 7)
    x = torch.stack([stream(seed=i) for i in range(3)])
    acts = [torch.relu(z) * (z > t["threshold"]) for t, z in zip(shards, _before(shards, x), strict=True)]
    for m, layer in enumerate(dictionary.layers):
        got = dictionary.encode(layer, lambda at: x[dictionary.layers.index(at)])
        close(got[:, : (m + 1) * published.FEATURES], torch.cat(acts[: m + 1], dim=1))
        expected = sum(a @ t["w_dec"][:, m] for a, t in zip(acts, shards, strict=True)) + shards[m]["b_dec"]
        close(dictionary.decode(layer, got), expected)


def _before(shards: list[dict[str, Tensor]], x: Tensor) -> list[Tensor]:
    return [x[i] @ t["w_enc"] + t["b_enc"] for i, t in enumerate(shards)]


@pytest.mark.parametrize(
    ("name", "layer"),
    [("layers.3", 4), ("model.layers.0", 1), ("h.2", 3), ("gpt_neox.layers.11", 12)],
)
def test_a_sparsify_folder_s_name_is_its_site(tmp_path: Path, name: str, layer: int) -> None:
    folder = published.sparsify(tmp_path).folder.rename(tmp_path / name)
    assert load_dictionary(folder).layers == (layer,)


def test_a_site_that_the_format_does_not_record_is_given(tmp_path: Path) -> None:
    folder = published.gemma_scope(tmp_path).folder.rename(tmp_path / "mine")
    assert convert(folder, 9).layers == (9,)
    assert convert(published.sparsify(tmp_path).folder.rename(tmp_path / "ours"), 2).layers == (2,)


def test_the_same_number_twice_is_no_contradiction(tmp_path: Path) -> None:
    assert convert(published.gemma_scope_2(tmp_path / "sae").folder, 3).layers == (3,)


def test_a_finetuning_factor_of_one_is_nothing(tmp_path: Path) -> None:
    written = published.saelens(tmp_path / "sae", version=5)
    config = json.loads((written.folder / "cfg.json").read_text())
    assert "finetuning_scaling_factor" not in config
    from safetensors.torch import load_file, save_file

    weights = written.folder / "sae_weights.safetensors"
    save_file(load_file(weights) | {"scaling_factor": torch.ones(published.FEATURES)}, weights)
    close(load_dictionary(written.folder).encode(4, lambda _: stream()), written.forward(stream())[0])
