"""The full check passes on every family and layout, and names what is wrong when a family file lies."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from qklens.models.families import load_family
from qklens.models.fullcheck import full_check
from qklens.models.loading import load_subject
from qklens.models.norms import GEMMA_RMS
from qklens.models.projections import stacked
from qklens.models.subject import wrap_model
from tiny_families import CASES, LAYERS, tiny_model


def subject_of(case, tokenizer, **lies):
    model = tiny_model(case, len(tokenizer), torch.float32)
    subject = wrap_model(model, tokenizer, load_family(model.config.model_type))
    return replace(subject, family=replace(subject.family, **lies)) if lies else subject


@pytest.mark.parametrize("case", CASES)
def test_every_family_is_read_exactly(case, word_tokenizer):
    check = full_check(subject_of(case, word_tokenizer))
    assert check.failures() == []
    assert len(check.layers) == LAYERS
    for row in check.layers:
        errors = (row.score_error, row.pattern_error, row.row_sum_error, row.query_edit_error, row.key_edit_error)
        assert max(errors) <= 1e-5
        assert row.pattern_effect > 1e-6
    assert max(check.eager_error, check.left_padding_error, check.right_padding_error, check.batch_error) <= 1e-5


@pytest.mark.parametrize(
    ("case", "lies", "named"),
    [
        ("gemma3", {"norm": replace(GEMMA_RMS, offset=0.0)}, "score error"),
        ("gemma2 low cap", {"score_cap": lambda attention: None}, "pattern error"),
        ("mistral window", {"window": lambda attention: None}, "pattern error"),
        ("gpt_oss", {"sinks": lambda attention: None}, "row sum error"),
        ("llama gqa", {"input_norm": lambda layer: layer.post_attention_layernorm}, "score error"),
        ("gpt_neox", {"projections": stacked("query_key_value")}, "query edit error"),
        ("smollm3", {"rotary": load_family("llama").rotary}, "key edit error"),
    ],
)
def test_a_family_file_that_lies_is_found_out(case, lies, named, word_tokenizer):
    failures = full_check(subject_of(case, word_tokenizer, **lies)).failures()
    assert any(named in failure for failure in failures), failures


def long_and_at_right_angles(tokenizer, **lies):
    """GPT-2 whose queries and keys in layer 1 are long and nearly at right angles: scores are what little is left."""
    subject = subject_of("gpt2", tokenizer, **lies)
    bias, d_model, d_head = subject.model.transformer.h[1].attn.c_attn.bias, subject.d_model, subject.d_head
    length = 3e3
    with torch.no_grad():
        for head in range(subject.n_heads):
            at = head * d_head
            bias[at : at + 2] += length
            bias[d_model + at] += length
            bias[d_model + at + 1] -= length
    return subject


def test_rounding_of_long_queries_and_keys_is_no_error(word_tokenizer):
    check = full_check(long_and_at_right_angles(word_tokenizer))
    plain, long = check.layers[0], check.layers[1]
    assert plain.rounding < 1e-5
    assert long.score_error > check.tolerance, "without its allowance this model is refused"
    assert check.failures() == []


def test_the_allowance_for_rounding_hides_no_wrong_norm(word_tokenizer):
    failures = full_check(long_and_at_right_angles(word_tokenizer, input_norm=lambda layer: layer.ln_2)).failures()
    assert any("layer 1: score error" in failure for failure in failures), failures


def test_padding_that_moves_positions_is_found_out(word_tokenizer, monkeypatch):
    subject = subject_of("gpt2", word_tokenizer)
    forward = subject.model.forward

    def unpositioned(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(subject.model, "forward", unpositioned)
    assert any("left padding error" in failure for failure in full_check(subject).failures())


@pytest.mark.skipif("QKLENS_SMOLLM2" not in os.environ, reason="needs SmolLM2-135M-Instruct; set QKLENS_SMOLLM2 to it")
def test_a_real_model_is_read_exactly():
    check = full_check(load_subject(os.environ["QKLENS_SMOLLM2"]))
    assert check.failures() == []
    assert len(check.layers) == 30
    assert max(max(r.score_error, r.query_edit_error, r.key_edit_error) for r in check.layers) <= 1e-5
    assert check.eager_error <= 1e-5
