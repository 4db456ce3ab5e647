"""Damaged and hostile dictionaries: one line that names the file and the key or tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qklens.dictionaries.config import CONFIG_FILE, WEIGHTS_FILE
from qklens.dictionaries.crosscoder import Crosscoder, load_crosscoder, save_crosscoder
from qklens.errors import QklensError
from tiny_folders import edit_json, edit_tensors, tree, write_safetensors


def refusal(dictionary: Path) -> str:
    """The line with which a dictionary is refused."""
    with pytest.raises(QklensError) as caught:
        load_crosscoder(dictionary)
    line = str(caught.value)
    assert "\n" not in line
    assert str(dictionary) in line
    return line


def test_the_healthy_dictionary_loads(dictionary: Path) -> None:
    assert load_crosscoder(dictionary).layers == (1, 3)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(dictionary: Path, name: str) -> None:
    (dictionary / name).unlink()
    line = refusal(dictionary)
    assert f"{name}: no such file" in line
    assert "'directions'" in line


def test_an_unknown_key_names_the_nearest(dictionary: Path) -> None:
    edit_json(dictionary / CONFIG_FILE, treshold=0.5)
    line = refusal(dictionary)
    assert CONFIG_FILE in line
    assert "'treshold'" in line
    assert "did you mean 'threshold'?" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "qklens-dictionary-9"),
        ("activation", "gelu"),
        ("site", "resid_post"),
        ("features_per_layer", "many"),
        ("d_model", 6.5),
        ("layers", "1,3"),
    ],
)
def test_a_wrong_value_names_its_key(dictionary: Path, key: str, value: object) -> None:
    edit_json(dictionary / CONFIG_FILE, **{key: value})
    line = refusal(dictionary)
    assert CONFIG_FILE in line
    assert f"key {key!r}" in line


@pytest.mark.parametrize(
    ("activation", "says"),
    [
        ({"kind": "threshold", "threshold": float("nan")}, "key 'activation.threshold'"),
        ({"kind": "threshold", "threshold": float("inf")}, "key 'activation.threshold'"),
        ({"kind": "threshold"}, "key 'activation.threshold': Field required"),
        ({"kind": "topk", "k": 0}, "key 'activation.k'"),
        ({"kind": "topk", "kk": 3, "k": 3}, "key 'activation.kk'"),
        ({"kind": "gelu"}, "'relu', 'topk', 'threshold', 'jumprelu'"),
        ({"k": 3}, "key 'activation'"),
    ],
)
def test_a_wrong_activation_names_what_is_wrong(dictionary: Path, activation: dict[str, object], says: str) -> None:
    edit_json(dictionary / CONFIG_FILE, activation=activation)
    assert says in refusal(dictionary)


def test_jumprelu_without_its_thresholds_is_refused(dictionary: Path) -> None:
    edit_json(dictionary / CONFIG_FILE, activation={"kind": "jumprelu"})
    assert f"{WEIGHTS_FILE}: tensor 'threshold.1' is missing" in refusal(dictionary)


@pytest.mark.parametrize("key", ["activation", "layers", "model_sha256", "site"])
def test_a_missing_key_is_named(dictionary: Path, key: str) -> None:
    edit_json(dictionary / CONFIG_FILE, **{key: ...})
    assert f"key {key!r}: Field required" in refusal(dictionary)


@pytest.mark.parametrize("layers", [[], [3, 1], [1, 1]])
def test_layers_out_of_order_are_refused(dictionary: Path, layers: list[int]) -> None:
    edit_json(dictionary / CONFIG_FILE, layers=layers)
    assert f"layers are {layers}" in refusal(dictionary)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "[]", "3"])
def test_a_config_that_is_no_json_object_is_refused(dictionary: Path, content: str) -> None:
    (dictionary / CONFIG_FILE).write_text(content)
    assert CONFIG_FILE in refusal(dictionary)


@pytest.mark.parametrize("name", ["encoder.1", "encoder_bias.3", "decoder.3", "decoder_bias.1"])
def test_a_missing_tensor_is_named(dictionary: Path, name: str) -> None:
    edit_tensors(dictionary / WEIGHTS_FILE, lambda tensors: tensors.pop(name))
    assert f"{WEIGHTS_FILE}: tensor {name!r} is missing" in refusal(dictionary)


@pytest.mark.parametrize("name", ["encoder.1", "encoder_bias.3", "decoder.3", "decoder_bias.1"])
def test_a_tensor_of_wrong_shape_is_named_with_both_shapes(dictionary: Path, name: str) -> None:
    shape = {}

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        shape["right"] = tuple(tensors[name].shape)
        tensors[name] = tensors[name][None].clone()

    edit_tensors(dictionary / WEIGHTS_FILE, transpose)
    assert f"tensor {name!r} has shape {(1, *shape['right'])}, expected {shape['right']}" in refusal(dictionary)


def test_a_config_of_another_size_is_refused(dictionary: Path) -> None:
    edit_json(dictionary / CONFIG_FILE, features_per_layer=10**12)
    assert "has shape" in refusal(dictionary)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(dictionary: Path, value: float) -> None:
    edit_tensors(dictionary / WEIGHTS_FILE, lambda tensors: tensors["decoder.3"].__setitem__((5, 2), value))
    line = refusal(dictionary)
    assert "'decoder.3'" in line
    assert "NaN or infinity" in line


@pytest.mark.parametrize("keep", [0, 7, 8, 60, -1])
def test_truncated_weights_are_refused(dictionary: Path, keep: int) -> None:
    (dictionary / WEIGHTS_FILE).write_bytes((dictionary / WEIGHTS_FILE).read_bytes()[:keep])
    assert f"{WEIGHTS_FILE}: damaged" in refusal(dictionary)


@pytest.mark.parametrize("length", [2**63, 10**9, 3])
def test_a_header_length_that_lies_is_refused(dictionary: Path, length: int) -> None:
    write_safetensors(dictionary / WEIGHTS_FILE, b"{}", b"\0" * 16, length=length)
    assert f"{WEIGHTS_FILE}: damaged" in refusal(dictionary)


def test_values_that_half_precision_cannot_hold_are_refused_before_writing(dictionary: Path, tmp_path: Path) -> None:
    """They would be stored as infinity, and the dictionary could not be loaded again."""
    good = load_crosscoder(dictionary)
    bias = {layer: torch.full_like(b, 1e5) for layer, b in good.decoder_bias.items()}
    large = Crosscoder(good.config, good.encoder, good.encoder_bias, good.decoder, bias)
    (tmp_path / "new").mkdir()
    with pytest.raises(QklensError, match=r"'decoder_bias\.1' does not fit torch\.float16; save it as float32"):
        save_crosscoder(large, tmp_path / "new")
    assert tree(tmp_path / "new") == {}
    save_crosscoder(large, tmp_path / "new", torch.float32)
    assert json.loads((tmp_path / "new" / CONFIG_FILE).read_text())["name"] == "healthy"
    torch.testing.assert_close(load_crosscoder(tmp_path / "new").decoder_bias[3], bias[3])
