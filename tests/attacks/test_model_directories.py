"""Hostile and damaged model directories: one line that names the file or tensor, and nothing of the checkpoint runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qklens.errors import QklensError
from qklens.models.checkpoint import inspect_checkpoint
from qklens.models.loading import load_subject
from tiny_folders import WEIGHTS, edit_json, edit_tensors, refusal, write_safetensors

INDEX = "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def test_the_healthy_directory_loads(model: Path) -> None:
    """Otherwise every refusal below could have another reason."""
    subject = load_subject(model)
    assert (subject.n_layers, subject.d_model, subject.n_heads, subject.n_kv_heads) == (2, 16, 2, 1)


class Detonator:
    """Pickled, it leaves a file behind when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "weights.pkl"])
def test_pickled_weights_are_refused_unread(model: Path, tmp_path: Path, name: str) -> None:
    (model / WEIGHTS).unlink()
    mark = tmp_path / "ran"
    (model / name).write_bytes(pickle.dumps(Detonator(mark)))
    line = refusal(model)
    assert name in line
    assert "pickled" in line
    assert "expected model.safetensors" in line
    assert not mark.exists()
    pickle.loads((model / name).read_bytes())
    assert mark.exists(), "the payload is alive, so it was the loader that left it alone"


def plant_code(model: Path, mark: Path) -> None:
    """Python files that leave a mark when imported."""
    for name in ("evil", "modeling_llama", "configuration_llama", "tokenization_llama"):
        (model / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.EvilConfig"}),
        ("_attn_implementation_internal", "someone/kernel"),
        ("_attn_implementation", "someone/kernel:evil"),
        ("_experts_implementation_internal", "someone/kernel"),
    ],
)
def test_code_in_the_config_is_refused(model: Path, tmp_path: Path, key: str, value: object) -> None:
    plant_code(model, tmp_path / "ran")
    edit_json(model / "config.json", **{key: value})
    line = refusal(model)
    assert "config.json" in line
    assert repr(key) in line
    assert not (tmp_path / "ran").exists()


def test_code_in_the_tokenizer_config_does_not_run(model: Path, tmp_path: Path) -> None:
    plant_code(model, tmp_path / "ran")
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    assert "tokenizer" in refusal(model)
    assert not (tmp_path / "ran").exists()


def test_weights_named_by_the_config_are_refused(model: Path) -> None:
    """Transformers would load them in place of the file that was inspected and hashed."""
    shutil.copy(model / WEIGHTS, model / "other.safetensors")
    edit_json(model / "config.json", transformers_weights="other.safetensors")
    line = refusal(model)
    assert "config.json" in line
    assert "'transformers_weights'" in line


def test_an_adapter_is_refused(model: Path) -> None:
    """With peft installed, transformers would load the adapter's base model in place of this directory."""
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    assert "adapter_config.json" in refusal(model)


def split_weights(model: Path, **files: str) -> None:
    """Move the weights into one shard and write an index; `files` renames the shard of a tensor in the index."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    save_file(tensors, model / "shard.safetensors", metadata={"format": "pt"})
    index = {name: files.get(name.split(".")[-2], "shard.safetensors") for name in tensors}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_an_honest_index_loads(model: Path) -> None:
    split_weights(model)
    assert load_subject(model).n_layers == 2


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors", "..", "x.bin"]
)
def test_an_index_that_leaves_the_directory_is_refused(model: Path, name: str) -> None:
    shutil.copy(model / WEIGHTS, model.parent / "outside.safetensors")
    split_weights(model, q_proj=name)
    line = refusal(model)
    assert INDEX in line
    assert repr(name) in line
    assert "same directory" in line


def test_an_index_that_names_a_missing_file_is_refused(model: Path) -> None:
    split_weights(model, q_proj="gone.safetensors")
    assert "gone.safetensors: missing" in refusal(model)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_another_form_is_refused(model: Path, content: str) -> None:
    (model / WEIGHTS).unlink()
    (model / INDEX).write_text(content)
    line = refusal(model)
    assert INDEX in line
    assert "weight_map" in line


def test_a_single_file_wins_over_an_index_as_in_transformers(model: Path) -> None:
    """What is inspected and hashed must be what transformers loads."""
    whole = load_file(model / WEIGHTS)
    split_weights(model)
    edit_tensors(model / "shard.safetensors", lambda t: t["model.norm.weight"].mul_(3))
    save_file(whole, model / WEIGHTS, metadata={"format": "pt"})
    assert [file.name for file in inspect_checkpoint(model).weights] == [WEIGHTS]
    torch.testing.assert_close(load_subject(model).model.model.norm.weight, whole["model.norm.weight"])


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_weights_are_refused(model: Path, keep: int) -> None:
    payload = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(payload[:keep])
    line = refusal(model)
    assert WEIGHTS in line
    assert "truncated" in line
    assert f"{len(payload[:keep])} bytes" in line


def test_weights_with_a_tail_are_refused(model: Path) -> None:
    with (model / WEIGHTS).open("ab") as file:
        file.write(b"tail")
    assert "its header promises" in refusal(model)


@pytest.mark.parametrize("length", [0, 1, 3000, 10**9, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(model: Path, length: int) -> None:
    write_safetensors(model / WEIGHTS, b"{}", b"\0" * 64, length=length)
    line = refusal(model)
    assert WEIGHTS in line
    assert "not a safetensors file" in line


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.5]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b'{"a": ' + b"[" * 100_000 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\xff\xfe{}",
    ],
    ids=lambda header: header[:70].decode(errors="replace"),
)
def test_a_damaged_header_is_refused(model: Path, header: bytes) -> None:
    write_safetensors(model / WEIGHTS, header, b"\0" * 4)
    line = refusal(model)
    assert WEIGHTS in line
    assert "damaged safetensors header" in line


def test_overlapping_tensors_are_refused(model: Path) -> None:
    """The lengths agree, so it is safetensors itself that must refuse, in one line of ours."""
    payload = (model / WEIGHTS).read_bytes()
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    header["lm_head.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]
    write_safetensors(model / WEIGHTS, json.dumps(header).encode(), payload[8 + length :])
    refusal(model)


@pytest.mark.parametrize(
    "name", [QUERY, "model.layers.0.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_named(model: Path, name: str) -> None:
    edit_tensors(model / WEIGHTS, lambda tensors: tensors.pop(name))
    line = refusal(model)
    assert name in line
    assert "missing" in line


def test_a_tensor_of_wrong_shape_is_named(model: Path) -> None:
    edit_tensors(model / WEIGHTS, lambda tensors: tensors.__setitem__(QUERY, torch.zeros(16, 8)))
    assert QUERY in refusal(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(model: Path, value: float) -> None:
    edit_tensors(model / WEIGHTS, lambda tensors: tensors[QUERY].__setitem__((3, 5), value))
    line = refusal(model)
    assert QUERY in line
    assert "NaN or infinity" in line


def test_a_tokenizer_bigger_than_the_embedding_is_refused(model: Path) -> None:
    rows = load_file(model / WEIGHTS)["model.embed_tokens.weight"].shape[0]

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:-3].clone()

    edit_tensors(model / WEIGHTS, shrink)
    edit_json(model / "config.json", vocab_size=rows - 3)
    line = refusal(model)
    assert f"{rows} tokens" in line
    assert f"{rows - 3} rows" in line


def test_a_tokenizer_without_offsets_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CanineTokenizer"}))
    line = refusal(model)
    assert "CanineTokenizer gives no character offsets" in line
    assert "tokenizer.json" in line


def test_a_directory_without_tokenizer_is_refused(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    line = refusal(model)
    assert "no usable tokenizer (Couldn't instantiate the backend tokenizer" in line
    assert "to convert a slow tokenizer to a fast one); expected tokenizer.json" in line


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(("content", "says"), [("nonsense", "not a JSON file"), ("[]", "holds a list, expected")])
def test_a_tokenizer_file_that_is_no_json_object_is_named(model: Path, name: str, content: str, says: str) -> None:
    (model / name).write_text(content)
    assert f"{model / name}: {says}" in refusal(model)


def test_a_damaged_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": 3}')
    assert "no usable tokenizer" in refusal(model)


def test_what_is_no_model_directory_is_refused(tmp_path: Path, model: Path) -> None:
    assert "no such model directory" in refusal(tmp_path / "gone")
    assert "no such model directory" in refusal(model / "config.json")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    (model / WEIGHTS).unlink()
    assert "no weights; expected model.safetensors" in refusal(model)


def test_an_unknown_dtype_and_device_are_refused(model: Path) -> None:
    with pytest.raises(QklensError, match=re.escape("did you mean 'float32'")):
        load_subject(model, dtype="floot32")
    with pytest.raises(QklensError, match="--device 'toaster' cannot be used here"):
        load_subject(model, device="toaster")
