"""Damaged and hostile `config.json` files: the line names file and key, what stands there and what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qklens.models.checkpoint import inspect_checkpoint
from qklens.models.loading import load_subject
from tiny_folders import edit_json, refusal, write_tiny_llama


def test_a_layer_more_in_the_config_than_in_the_weights_is_refused(model: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=3)
    assert "'model.layers.2.self_attn.q_proj.weight' is missing" in refusal(model)


@pytest.mark.parametrize("layers", [0, -1, "2", 2.0, True, None, [2]])
def test_a_layer_count_that_is_no_count_is_refused(model: Path, layers: object) -> None:
    edit_json(model / "config.json", num_hidden_layers=layers)
    line = refusal(model)
    assert "config.json" in line
    assert f"num_hidden_layers is {layers!r}" in line


def test_a_huge_layer_count_is_refused_at_once(model: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=10**15)
    assert "'model.layers.2.self_attn.q_proj.weight' is missing" in refusal(model)


def test_a_config_without_model_type_is_refused(model: Path) -> None:
    edit_json(model / "config.json", model_type=...)
    line = refusal(model)
    assert "no 'model_type'" in line
    assert "'llama'" in line


@pytest.mark.parametrize(("model_type", "hint"), [("lama", "did you mean 'llama'"), ("t5", "")])
def test_an_unknown_model_type_names_those_that_are_supported(model: Path, model_type: str, hint: str) -> None:
    edit_json(model / "config.json", model_type=model_type)
    line = refusal(model)
    assert repr(model_type) in line
    assert "supported: ['gemma2'" in line
    assert hint in line


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\0"])
def test_a_config_that_is_not_json_is_refused(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    line = refusal(model)
    assert "config.json" in line
    assert "not a JSON file" in line


def test_a_config_that_is_not_utf8_is_refused(model: Path) -> None:
    (model / "config.json").write_bytes(b'{"model_type": "\xff"}')
    assert "not a JSON file" in refusal(model)


@pytest.mark.parametrize(("content", "found"), [("[]", "list"), ('"llama"', "str"), ("null", "NoneType")])
def test_a_config_that_is_no_object_is_refused(model: Path, content: str, found: str) -> None:
    (model / "config.json").write_text(content)
    assert f"config.json: holds a {found}, expected a JSON object" in refusal(model)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, expected a positive integer"),
        ({"hidden_size": "16"}, "hidden_size is '16', expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a positive integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected a positive integer"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of"),
        ({"head_dim": -8}, "head_dim is -8, expected a positive integer"),
        ({"head_dim": None, "num_attention_heads": 3}, "hidden_size is 16, expected a multiple of num_attention_heads"),
        ({"head_dim": 7}, "makes no llama config (RoPE requires an even rotary dimension"),
        ({"vocab_size": True}, "vocab_size is True, expected a positive integer"),
        ({"pad_token_id": 10**9}, "pad_token_id is 1000000000, expected a token below vocab_size"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06, expected a positive finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive finite number"),
        ({"rope_theta": 0}, "rope_theta is 0, expected a positive finite number"),
        ({"rope_parameters": {"rope_theta": 0.0, "rope_type": "default"}}, "rope_parameters.rope_theta is 0.0"),
        ({"rope_parameters": {"rope_theta": -5.0, "rope_type": "default"}}, "rope_parameters.rope_theta is -5.0"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_parameters.rope_theta is inf"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 0}}}, "rope_parameters.full_attention.rope_theta is 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling.factor is 0"),
        ({"rope_parameters": {"rope_type": "yarm"}}, "rope_parameters.rope_type is 'yarm', expected one of ['default'"),
        ({"rope_parameters": 3}, "rope_parameters is 3, expected a JSON object"),
        ({"hidden_act": "sillu"}, "hidden_act is 'sillu', expected an activation"),
        ({"dtype": "floot"}, "dtype is 'floot', expected a torch dtype"),
        ({"attention_bias": "no"}, "Field 'attention_bias' expected bool, got str"),
    ],
)
def test_a_value_that_makes_no_model_is_named(model: Path, changes: dict[str, Any], says: str) -> None:
    """By the inspection already, before a tokenizer or a weight is read."""
    edit_json(model / "config.json", **changes)
    line = refusal(model, inspect_checkpoint)
    assert line.startswith(f"{model / 'config.json'}: ")
    assert says in line
    assert "tokenizer" not in line


def test_the_same_values_in_order_are_accepted(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> None:
    """A null where a key may be absent, whole numbers for real ones, a negative padding token, several rotary forms."""
    healthy = write_tiny_llama(tmp_path / "model", word_tokenizer)
    for changes in (
        {"head_dim": None, "num_key_value_heads": 1, "pad_token_id": -1},
        {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
        {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    ):
        edit_json(healthy / "config.json", **changes)
        assert load_subject(healthy).n_layers == 2


def test_a_huge_layer_count_is_refused_before_a_list_of_that_length_is_made(model: Path) -> None:
    """Qwen2 writes one word for each layer into its config."""
    edit_json(model / "config.json", model_type="qwen2", num_hidden_layers=10**15)
    assert "'model.layers.2.self_attn.q_proj.weight' is missing" in refusal(model, inspect_checkpoint)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "of type 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}}, "of type 'dynamic'"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types 'linear_attention'"),
        ({"per_layer_config": {"0": {"num_attention_heads": 4}}}, "per_layer_config"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"experts_implementation": "sonicmoe"}, "'experts_implementation' asks to run other code"),
        ({"attn_implementation": "someone/kernel"}, "'attn_implementation' asks to run other code"),
    ],
)
def test_what_is_not_proven_is_refused_by_name(model: Path, changes: dict[str, Any], named: str) -> None:
    edit_json(model / "config.json", **changes)
    assert named in refusal(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [("auto_map", {"AutoTokenizer": ["x.T", None]}), ("fast_tokenizer_files", ["../other/tokenizer.4.0.0.json"])],
)
def test_a_tokenizer_that_asks_for_code_or_other_files_is_refused(model: Path, key: str, value: object) -> None:
    edit_json(model / "tokenizer_config.json", **{key: value})
    assert f"key '{key}' asks for other code or files" in refusal(model)


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_the_directory_is_refused(model: Path, name: str) -> None:
    outside = model.parent / f"outside-{name}"
    outside.write_bytes((model / name).read_bytes() if (model / name).exists() else b"{{ messages }}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside)
    line = refusal(model)
    assert name in line
    assert "a link out of the directory" in line


@pytest.mark.parametrize("changes", [{"hidden_size": 10**12}, {"vocab_size": 10**12}])
def test_sizes_that_the_weights_have_not_are_refused_before_they_are_allocated(
    model: Path, changes: dict[str, int]
) -> None:
    edit_json(model / "config.json", **changes)
    line = refusal(model)
    assert "'model.embed_tokens.weight' has shape" in line
    assert str(10**12) in line
