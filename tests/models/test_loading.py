"""Where models come from: a directory, a GGUF file, a hub id in the cache; the same model by every road."""

from __future__ import annotations

import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from qklens.errors import QklensError
from qklens.models.loading import load_subject
from qklens.models.locate import locate_model
from qklens.models.passes import run_pass
from qklens.models.selfcheck import self_check
from tiny_folders import edit_tensors, write_tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXT = "the cat sat"
SPECIALS = ("<|endoftext|>", "<unk>", "<s>", "</s>")  # the reader adds the first where it is missing


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with one merge, which both formats can hold."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "th", *SPECIALS])}, [("t", "h")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def write_gguf(
    folder: Path, file: Path, *, output: bool, extra: dict[str, float] | None = None, layers: int = 2
) -> Path:
    """A llama GGUF of the same weights, as llama.cpp writes it: q and k in its own rotary order."""
    tensors = {name: t.numpy() for name, t in load_file(folder / "model.safetensors").items()}
    tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda pair: pair[1])
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(2048)
    writer.add_embedding_length(16)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["t h"])
    writer.add_unk_token_id(len(tokens) - 3)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)
    for key, value in (extra or {}).items():
        writer.add_float32(key, value)

    def put(name: str, value: np.ndarray) -> None:
        writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))

    def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    put("token_embd.weight", tensors["model.embed_tokens.weight"])
    put("output_norm.weight", tensors["model.norm.weight"])
    if output:
        put("output.weight", tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]))
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(2):
        for short, long in names.items():
            put(f"blk.{layer}.{short}.weight", tensors[f"model.layers.{layer}.{long}.weight"])
        for side, heads in (("q", 2), ("k", 1)):
            weight = tensors[f"model.layers.{layer}.self_attn.{side}_proj.weight"]
            put(f"blk.{layer}.attn_{side}.weight", interleaved(weight, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def logits_of(subject) -> torch.Tensor:
    return run_pass(subject, subject.batch([TEXT])).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_gives_the_same_model_as_its_directory(tied, tmp_path):
    folder = write_tiny_llama(tmp_path / "dir", byte_tokenizer(), tie_word_embeddings=tied)
    file = write_gguf(folder, tmp_path / "tiny.gguf", output=not tied)
    expected, got = load_subject(folder), load_subject(file)
    assert got.batch([TEXT]).input_ids.tolist() == expected.batch([TEXT]).input_ids.tolist()
    assert torch.equal(logits_of(got), logits_of(expected))
    assert max(row.score_error for row in self_check(got).layers) <= 1e-5
    assert got.name == "tiny"
    assert (got.unembedding.weight is got.model.get_input_embeddings().weight) == tied


def test_a_gguf_file_that_writes_the_tied_head_twice_is_tied_again(tmp_path):
    folder = write_tiny_llama(tmp_path / "dir", byte_tokenizer(), tie_word_embeddings=True)
    got = load_subject(write_gguf(folder, tmp_path / "tiny.gguf", output=True))
    assert got.unembedding.weight is got.model.get_input_embeddings().weight
    assert got.describe()["n_parameters"] == load_subject(folder).describe()["n_parameters"]


def test_a_gguf_file_whose_rotary_scaling_would_be_dropped_is_refused(tmp_path):
    folder = write_tiny_llama(tmp_path / "dir", byte_tokenizer())
    file = write_gguf(folder, tmp_path / "scaled.gguf", output=True, extra={"llama.rope.scaling.factor": 8.0})
    with pytest.raises(QklensError, match=r"scaled\.gguf: the GGUF reader drops llama.rope.scaling.factor"):
        load_subject(file)
    plain = write_gguf(folder, tmp_path / "plain.gguf", output=True, extra={"llama.rope.scaling.factor": 1.0})
    assert load_subject(plain).n_layers == 2


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("llama.attention.sliding_window", 7.0, "llama.attention.sliding_window = 7.0"),
        ("llama.attention.scale", 0.5, "llama.attention.scale = 0.5"),
        ("llama.attn_logit_softcapping", 30.0, "llama.attn_logit_softcapping"),
    ],
)
def test_gguf_keys_that_the_reader_drops_are_refused(key, value, named, tmp_path):
    folder = write_tiny_llama(tmp_path / "dir", byte_tokenizer())
    with pytest.raises(QklensError, match=f"the GGUF reader drops {named}"):
        load_subject(write_gguf(folder, tmp_path / "odd.gguf", output=True, extra={key: value}))


def test_a_gguf_file_with_more_layers_than_it_says_is_refused(tmp_path):
    folder = write_tiny_llama(tmp_path / "dir", byte_tokenizer())
    file = write_gguf(folder, tmp_path / "short.gguf", output=True, layers=1)
    with pytest.raises(QklensError, match="2 layers of tensors, block_count says otherwise"):
        load_subject(file)


def test_damaged_gguf_files_are_refused_in_one_line(tmp_path):
    folder = write_tiny_llama(tmp_path / "dir", byte_tokenizer())
    whole = write_gguf(folder, tmp_path / "whole.gguf", output=True).read_bytes()
    cases = {"cut.gguf": whole[: len(whole) // 2], "header.gguf": whole[:30], "other.gguf": b"PK\x03\x04" + whole}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(QklensError, match=name) as caught:
            load_subject(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_weights_that_are_not_numbers_are_refused_in_gguf_too(tmp_path):
    folder = write_tiny_llama(tmp_path / "dir", byte_tokenizer())
    edit_tensors(folder / "model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(QklensError, match="holds NaN or infinity"):
        load_subject(write_gguf(folder, tmp_path / "nan.gguf", output=True))


def test_auto_device_gives_the_same_logits(tmp_path):
    folder = write_tiny_llama(tmp_path / "dir", byte_tokenizer())
    alone = logits_of(load_subject(folder))
    assert torch.equal(logits_of(load_subject(folder, device="auto")), alone)
    assert torch.equal(logits_of(load_subject(folder, device={"model": "cpu", "lm_head": "cpu"})), alone)


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """A hub cache that holds one commit of `someone/tiny`, and a machine without network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repo = cache / "models--someone--tiny"
    folder = repo / "snapshots" / COMMIT
    write_tiny_llama(folder, byte_tokenizer())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def test_a_pinned_hub_id_comes_from_the_cache_without_a_word(cached):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subject = load_subject(f"someone/tiny@{COMMIT}")
    assert subject.path == cached
    assert subject.name == "someone/tiny"


def test_a_hub_id_without_a_commit_warns_and_names_the_commit(cached):
    with pytest.warns(UserWarning, match=f"is not pinned.*write someone/tiny@{COMMIT}"):
        assert locate_model("someone/tiny") == cached


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/tiny@main", "revision 'main' is not a commit; expected 40 hexadecimal digits"),
        (f"someone/tiny@{COMMIT[:39]}", "is not a commit"),
        ("someone/other", "not in the local cache; the hub cannot be asked"),
        (f"someone/tiny@{COMMIT[::-1]}", "not in the local cache"),
        ("../someone/tiny", "no such model directory"),
        ("not a name", "no such model directory"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_was_expected(name, message, cached):
    with pytest.raises(QklensError, match=message) as caught:
        locate_model(name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(QklensError, match=r"model\.bin: no such model directory but a file"):
        locate_model(str(tmp_path / "model.bin"))
