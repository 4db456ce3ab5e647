"""What the native form cannot hold exactly, and damaged or hostile files: one line that names file, key or tensor."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qklens.dictionaries.formats.detect import convert, load_dictionary
from qklens.errors import QklensError
from tests.dictionaries.formats import published
from tests.dictionaries.formats.published import FEATURES, WIDTH
from tiny_folders import edit_json, edit_tensors

WRITERS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "saelens": (partial(published.saelens, architecture="jumprelu"), "cfg.json", "sae_weights.safetensors"),
    "gemma scope 2": (published.gemma_scope_2, "config.json", "params.safetensors"),
    "llama scope": (published.llama_scope, "hyperparams.json", "checkpoints/final.safetensors"),
    "openmoss": (published.openmoss, "config.json", "sae_weights.safetensors"),
    "sparsify": (published.sparsify, "cfg.json", "sae.safetensors"),
}


def refusal(folder: Path, load: Callable[[Path], object] = load_dictionary) -> str:
    with pytest.raises(QklensError) as caught:
        load(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("saelens", {"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ("saelens", {"normalize_activations": "constant_norm_rescale"}, "depends on each token's vector"),
        ("saelens", {"normalize_activations": "expected_average_only_in"}, "a scale that these files do not hold"),
        ("saelens", {"architecture": "matching_pursuit"}, "architecture 'matching_pursuit'"),
        ("saelens", {"d_in": ..., "d_im": WIDTH}, "key 'd_in' is missing; did you mean 'd_im'?"),
        ("saelens", {"apply_b_dec_to_input": ..., "aply_b_dec_to_input": True}, "did you mean 'apply_b_dec_to_input'?"),
        ("saelens", {"d_in": WIDTH + 1}, f"tensor 'W_enc' has shape ({WIDTH}, {FEATURES}), expected ({WIDTH + 1}"),
        ("saelens", {"d_in": "wide"}, "key 'd_in' is 'wide', expected a whole number"),
        ("saelens", {"d_out": WIDTH}, "a transcoder"),
        ("saelens", {"reshape_activations": "hook_z"}, "reshape_activations is set"),
        ("saelens", {"rescale_acts_by_decoder_norm": True}, "expected only with topk or batchtopk"),
        ("saelens", {"metadata": {"hook_name": "blocks.3.hook_mlp_out"}}, "'blocks.3.hook_mlp_out', which is not"),
        ("saelens", {"metadata": {"hook_name": "blocks.3.attn.hook_z"}}, "which is not the stream"),
        ("saelens", {"metadata": {"hook_name": "../../blocks.3.hook_resid_pre"}}, "which is not the stream"),
        ("gemma scope 2", {"type": "transcoder"}, "a transcoder from"),
        ("gemma scope 2", {"type": "clt"}, "a clt from"),
        ("gemma scope 2", {"hf_hook_point_out": "model.layers.2.mlp.output"}, "expected an sae or crosscoder"),
        ("gemma scope 2", {"affine_connection": True}, "affine skip connection"),
        ("gemma scope 2", {"architecture": "relu"}, "architecture 'relu' is not supported"),
        ("llama scope", {"norm_activation": "token-wise"}, "norm_activation is 'token-wise'"),
        ("llama scope", {"hook_point_out": "blocks.7.hook_mlp_out"}, "expected an sae of one site"),
        ("llama scope", {"dataset_average_activation_norm": {"in": 0.0}}, "is 0.0, expected a positive number"),
        ("llama scope", {"d_sae": 99}, "d_sae is 99"),
        ("llama scope", {"use_glu_encoder": True}, "use_glu_encoder is set"),
        ("openmoss", {"sae_type": "lorsa"}, "a lorsa from"),
        ("openmoss", {"act_fn": "batchtopk"}, "act_fn 'batchtopk' is not supported"),
        ("sparsify", {"transcode": True}, "transcode is set"),
        ("sparsify", {"skip_connection": True}, "skip_connection is set"),
        ("sparsify", {"signed": True}, "signed is set"),
        ("sparsify", {"activation": "groupmax"}, "activation 'groupmax' is not supported"),
        ("sparsify", {"k": 0}, "key 'k' is 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_exactly_is_refused(tmp_path: Path, kind: str, changes: dict[str, Any], says: str) -> None:
    writer, config, _ = WRITERS[kind]
    folder = writer(tmp_path / "sae").folder
    edit_json(folder / config, **changes)
    assert says in refusal(folder)


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_weights_are_refused(tmp_path: Path, kind: str) -> None:
    writer, config, weights = WRITERS[kind]
    folder = writer(tmp_path / "sae").folder
    whole = (folder / weights).read_bytes()
    (folder / weights).write_bytes(whole[:-3])
    assert f"{weights}: damaged" in refusal(folder)
    for change, says in (
        (lambda t, n: t[n].view(-1).__setitem__(3, float("nan")), "holds NaN or infinity"),
        (lambda t, n: t.__setitem__(n, t[n][None].clone()), "has shape (1, "),
        (lambda t, n: t.pop(n), "is missing"),
    ):
        (folder / weights).write_bytes(whole)
        decoder = {"saelens": "W_dec", "gemma scope 2": "w_dec", "llama scope": "decoder.weight", "openmoss": "W_D"}
        name = decoder.get(kind, "W_dec")
        edit_tensors(folder / weights, lambda t, name=name, change=change: change(t, name))
        line = refusal(folder)
        assert f"tensor {name!r}" in line
        assert says in line
    (folder / weights).write_bytes(whole)
    for content in ("", "{", "[]", "3"):
        (folder / config).write_text(content)
        assert config in refusal(folder)


class Harm:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_pickled_array_in_a_npz_is_refused_and_does_not_run(tmp_path: Path) -> None:
    folder = published.gemma_scope(tmp_path).folder
    arrays = dict(np.load(folder / "params.npz"))
    np.savez(folder / "params.npz", **arrays | {"b_dec": np.array([Harm(tmp_path / "ran")], dtype=object)})
    assert "not only numbers" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    folder = published.gemma_scope(tmp_path).folder
    file = folder / "params.npz"
    whole, arrays = file.read_bytes(), dict(np.load(file))
    file.write_bytes(whole[: len(whole) // 2])
    assert "params.npz: damaged" in refusal(folder)
    np.savez(file, **{n: a for n, a in arrays.items() if n != "threshold"})
    assert "array 'threshold' is missing" in refusal(folder)
    np.savez(file, **arrays | {"b_enc": np.arange(FEATURES)})
    assert "expected floating-point numbers" in refusal(folder)
    np.savez(file, **arrays | {"W_dec": arrays["W_dec"] * np.nan})
    assert "NaN" in refusal(folder)
    np.savez(file, **arrays | {"b_dec": arrays["b_dec"][:-1]})
    assert f"has shape ({WIDTH - 1},), expected ({WIDTH},)" in refusal(folder)
    with zipfile.ZipFile(file, "w") as archive:  # a header that promises far more than is there
        header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 100000000000), }"
        archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    assert "params.npz: damaged" in refusal(folder)


@pytest.mark.parametrize("release", ["gemma-scope-2b-pt-mlp", "gemma-scope-2b-pt-att", "gemma-scope-2b-pt-transcoders"])
def test_gemma_scope_of_another_site_is_refused(tmp_path: Path, release: str) -> None:
    folder = published.gemma_scope(tmp_path).folder
    other = tmp_path / release / "layer_5"
    other.parent.mkdir()
    folder.rename(other)
    assert "not of the residual stream" in refusal(other)
    assert "not of the residual stream" in refusal(other, lambda f: convert(f, 6))


def test_a_site_that_nothing_records_is_asked_for_and_a_contradiction_named(tmp_path: Path) -> None:
    unnamed = published.gemma_scope(tmp_path).folder.rename(tmp_path / "mine")
    assert "`qklens dict convert` with --layer L" in refusal(unnamed)
    recorded = published.saelens(tmp_path / "sae").folder
    assert "records a dictionary of resid_pre.4, --layer says 2" in refusal(recorded, lambda f: convert(f, 2))


def test_a_crosscoder_that_writes_back_is_not_weakly_causal(tmp_path: Path) -> None:
    folder, _ = published.gemma_scope_2_crosscoder(tmp_path / "crosscoder")
    edit_tensors(folder / "params_layer_2.safetensors", lambda t: t["w_dec"].__setitem__((0, 1, 0), 0.5))
    assert "not weakly causal" in refusal(folder)
    (folder / "params_layer_2.safetensors").unlink()
    assert "params_layer_2.safetensors: no such file" in refusal(folder)


def test_unknown_and_ambiguous_directories_say_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = refusal(tmp_path / "empty")
    for looked in ("dictionary.json", "sae_weights.safetensors", "params.npz", "hyperparams.json", "sae.safetensors"):
        assert looked in line
    both = published.saelens(tmp_path / "both").folder
    (both / "sae.safetensors").write_bytes((both / "sae_weights.safetensors").read_bytes())
    assert "holds files of 2 formats, ['saelens', 'sparsify']" in refusal(both)


def test_values_beyond_float32_are_refused(tmp_path: Path) -> None:
    folder = published.saelens(tmp_path / "sae").folder
    huge = torch.full((WIDTH,), 1e300, dtype=torch.float64)
    edit_tensors(folder / "sae_weights.safetensors", lambda t: t.__setitem__("b_dec", huge))
    assert "'b_dec' holds NaN or infinity" in refusal(folder)
    assert json.loads((folder / "cfg.json").read_text())["d_in"] == WIDTH


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_a_dtype_that_holds_none_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = published.saelens(tmp_path / "sae").folder
    edit_tensors(folder / "sae_weights.safetensors", lambda t: t.__setitem__("W_enc", t["W_enc"].to(dtype)))
    said = refusal(folder)
    assert f"'W_enc' is {str(dtype).removeprefix('torch.')}; expected float16, bfloat16, float32 or float64" in said
