"""The score's algebra against the model itself, in float64 where it matters."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pair_terms import pair_terms
from qklens.analyses.lens import head_lens
from qklens.analyses.written import write_prompts
from qklens.dictionaries.directions import Directions
from qklens.errors import QklensError
from qklens.models.attention import AttentionRead
from qklens.models.batch import left_padded
from qklens.models.copies import Reads
from qklens.models.norms import NormMap
from qklens.models.passes import run_pass
from qklens.models.scores import offset_rotation, rotation, score_maps, virtual_interaction

TOKENS = list(range(20, 33))


@pytest.fixture
def double_norms(monkeypatch):
    """transformers' RMSNorm computes in float32 whatever the model's dtype; the float64 oracle must not."""

    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def read_all(subject):
    batch = left_padded([TOKENS], 0, subject.device)
    streams: dict[int, torch.Tensor] = {}
    attention: dict[int, AttentionRead] = {}
    layers = range(subject.n_layers)
    run_pass(
        subject,
        batch,
        reads=Reads(
            {m: (lambda x, m=m: streams.__setitem__(m, x[0])) for m in layers},
            {m: (lambda a, m=m: attention.__setitem__(m, a)) for m in layers},
        ),
    )
    return streams, attention


def random_source(d_model: int, layers: int, dtype: torch.dtype) -> Directions:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Directions(
        tuple(f"d{i}" for i in range(7)),
        {m: draw(7, d_model) for m in range(layers)},
        {m: draw(d_model) for m in range(layers)},
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("biases", [False, True])
def test_pair_terms_sum_to_the_models_own_scores_in_float64(tiny_llama, double_norms, kv_heads, biases):
    subject = tiny_llama(dtype=torch.float64, num_key_value_heads=kv_heads, attention_bias=biases)
    for layer in subject.layers:
        torch.nn.init.normal_(layer.input_layernorm.weight)
        for name in ("q_proj", "k_proj") if biases else ():
            torch.nn.init.normal_(getattr(layer.self_attn, name).bias)
    streams, attention = read_all(subject)
    source = random_source(subject.d_model, subject.n_layers, torch.float64)
    worst, largest = 0.0, 0.0
    for layer in range(subject.n_layers):
        (written,) = write_prompts(subject, source, score_maps(subject, layer), [{layer: streams[layer]}])
        for head in range(subject.n_heads):
            lens = head_lens(subject, source, layer, head)
            read = attention[layer]
            keys = read.key[0, head // (subject.n_heads // kv_heads)]
            for position in (3, len(TOKENS) - 1):
                own = read.scale * keys @ read.query[0, head, position]
                total = lens.terms_by_token(written, position).scores(len(TOKENS))
                assert torch.allclose(lens.scores(written, position)[: position + 1], own[: position + 1], atol=1e-9)
                worst = max(worst, float((total - own).abs().max()))
                largest = max(largest, float(own.abs().max()))
    assert largest > 0.1
    assert worst / largest < 1e-10


def test_weighted_terms_are_the_weighted_sum_of_terms_by_token(tiny_llama):
    subject = tiny_llama()
    streams, _ = read_all(subject)
    source = random_source(subject.d_model, subject.n_layers, torch.float32)
    (written,) = write_prompts(subject, source, score_maps(subject, 1), [{1: streams[1]}])
    lens = head_lens(subject, source, 1, 2)
    weights = torch.zeros(len(TOKENS))
    weights[4], weights[7] = 0.3, -1.7
    found = lens.terms_by_token(written, 12)
    combined = torch.zeros(len(lens.names), len(lens.names))
    for column, (key, token) in enumerate(zip(found.key, found.position, strict=True)):
        combined[found.query, key] += weights[token] * found.value[:, column]
    assert torch.allclose(pair_terms(lens, written, 12, weights), combined, atol=1e-4)


def test_offset_rotation_is_the_relative_rotation(tiny_llama):
    subject = tiny_llama()
    q, k = torch.randn(2, subject.d_head, generator=torch.Generator().manual_seed(1))
    for p, j in ((9, 2), (30, 29), (5, 5)):
        pair = rotation(subject, 0, torch.tensor(p))(q) @ rotation(subject, 0, torch.tensor(j))(k)
        relative = offset_rotation(subject, 0, torch.tensor([p - j]))(q) @ k
        assert torch.allclose(pair, relative, atol=1e-5)


def test_a_unit_vector_is_of_what_the_norm_lets_through():
    """LayerNorm takes a direction's mean away before its length is taken; RMSNorm changes no bit of d / ‖d‖."""
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 5)[:, None]
    gamma = torch.linspace(0.5, 2, 32)
    layer, rms = NormMap(centred=True, gamma=gamma), NormMap(centred=False, gamma=gamma)
    assert torch.equal(rms.unit(rows), torch.nn.functional.normalize(rows, dim=-1))
    unit = layer.unit(rows)
    assert torch.allclose(unit.norm(dim=-1), torch.ones(5))
    assert torch.allclose(unit.mean(dim=-1), torch.zeros(5), atol=1e-7)
    assert torch.allclose(layer.unit(rows + 2 * rows.norm(dim=-1, keepdim=True)), unit, atol=1e-5)
    assert not torch.allclose(rms.unit(rows + 2 * rows.norm(dim=-1, keepdim=True)), rms.unit(rows), atol=0.1)
    constant = torch.tensor([0.0, 0.1, 3.7, -1e5])[:, None].expand(4, 33)
    assert torch.equal(NormMap(centred=True).unit(constant), torch.zeros(4, 33))


def test_virtual_interaction_ignores_scale_and_keeps_sign(tiny_llama):
    subject = tiny_llama()
    maps, turn = score_maps(subject, 0), offset_rotation(subject, 0, torch.tensor([3, 5]))
    q, k = torch.randn(2, 1, subject.d_model, generator=torch.Generator().manual_seed(2))
    value = virtual_interaction(maps, 1, turn, q, k)
    assert torch.allclose(virtual_interaction(maps, 1, turn, 7 * q, 0.1 * k), value, atol=1e-6)
    assert torch.allclose(virtual_interaction(maps, 1, turn, -q, k), -value, atol=1e-6)
    unit_q, unit_k = q[0] / q.norm(), k[0] / k.norm()
    by_hand = (
        maps.scale
        * torch.stack(
            [
                offset_rotation(subject, 0, torch.tensor([o]))(maps.query_side.weight[1] @ unit_q)
                @ (maps.key_side.weight[0] @ unit_k)
                for o in (3, 5)
            ]
        ).mean()
    )
    assert torch.allclose(value[0], by_hand, atol=1e-6)


def test_a_head_that_does_not_exist_names_the_range(tiny_llama):
    subject = tiny_llama()
    source = random_source(subject.d_model, 2, torch.float32)
    with pytest.raises(QklensError, match="head 9 does not exist in llama; expected 0 to 3"):
        head_lens(subject, source, 0, 9)
    with pytest.raises(QklensError, match=r"does not write resid_pre\.2.*it writes layers \[0, 1\]"):
        head_lens(subject, source, 2, 0)
