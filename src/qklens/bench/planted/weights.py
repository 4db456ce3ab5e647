"""From a blueprint to a transformers model: Llama, Llama with grouped keys, Qwen3 (norms on q and k), or GPT-2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qklens.bench.planted.basis import D_MODEL, READ, WORD_AMOUNT, Basis
from qklens.bench.planted.blueprint import (
    CODES,
    CONSTANT,
    CONSTANT_AMOUNT,
    N_CODES,
    TASK_CODES,
    Amounts,
    Blueprint,
    PlannedHead,
)
from qklens.bench.planted.mlp import write_flip
from qklens.bench.planted.noise import Noise
from qklens.bench.planted.words import BENIGN_VERBS, HARM_VERBS, THINGS, vocabulary

Architecture = Literal["llama", "llama_gqa", "qwen3", "gpt2"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
N_HEADS, D_MLP, CONTEXT = 6, 8, 128
_D_HEAD = {"llama": 32, "llama_gqa": 32, "qwen3": 32, "gpt2": 16}
_N_KEYS = {"llama": 6, "llama_gqa": 3, "qwen3": 3, "gpt2": 6}
_THETA = 1e6
_STEADY = 30.0
"""Qwen3's queries and keys each get a constant entry of this size, so that their norms change little."""
_LETTER = 4.0
"""The logit of a letter whose output is written once."""
Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Written:
    """A model, and which of its heads became what."""

    model: PreTrainedModel
    placed: dict[Head, PlannedHead]
    basis: Basis


def write_model(plan: Blueprint, architecture: Architecture, noise: Noise, basis: Basis, seed: int) -> Written:
    """The model of a blueprint; the seed draws which heads do what, codes, words and noise."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = _empty(plan, architecture)
    placed = {}
    for layer in range(plan.n_layers):
        mine = [head for head in plan.heads if head.layer == layer]
        places = rng.permutation(N_HEADS)[: len(mine)].tolist()
        placed |= {(layer, place): head for place, head in zip(places, mine, strict=True)}
    idle = [(layer, h) for layer in range(plan.n_layers) for h in range(N_HEADS) if (layer, h) not in placed]
    with torch.no_grad():
        embed = _embedding(plan, basis, rng, generator)
        model.get_input_embeddings().weight.copy_(embed)  # pyright: ignore[reportCallIssue, reportArgumentType]
        unembed: Tensor = model.get_output_embeddings().weight  # pyright: ignore[reportAssignmentType, reportOptionalMemberAccess]
        ids = vocabulary()
        for letter in "AB":
            unembed[ids[letter]] = (_LETTER / READ * basis[f"out_{letter}"]).float()
        for layer in range(plan.n_layers):
            here = {h: head for (at, h), head in placed.items() if at == layer}
            others = [h for at, h in idle if at == layer]
            _write_heads(model, architecture, layer, here, others, basis, noise, generator)
        for flip in plan.flips:
            write_flip(model, architecture, flip, basis)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and noise.weights and "wpe" not in name:
                size = noise.weights * float(parameter.pow(2).mean().sqrt())
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        if architecture == "qwen3":
            _steady(model, basis)
    return Written(model.eval(), placed, basis)


def _empty(plan: Blueprint, architecture: Architecture) -> PreTrainedModel:
    """A model of zeros, whose norms do nothing but normalise."""
    ids = vocabulary()
    common: dict[str, Any] = {
        "vocab_size": len(ids), "bos_token_id": ids["<bos>"], "eos_token_id": ids["<eos>"],
        "pad_token_id": ids["<pad>"],
        "tie_word_embeddings": False,
    }  # fmt: skip
    if architecture == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(
            GPT2Config(
                n_embd=D_MODEL, n_layer=plan.n_layers, n_head=N_HEADS, n_inner=D_MLP, n_positions=CONTEXT, **common
            )
        )
    else:
        common |= {
            "hidden_size": D_MODEL, "intermediate_size": D_MLP, "num_hidden_layers": plan.n_layers,
            "num_attention_heads": N_HEADS, "num_key_value_heads": _N_KEYS[architecture],
            "head_dim": _D_HEAD[architecture], "max_position_embeddings": CONTEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": _THETA},
        }  # fmt: skip
        qwen3 = architecture == "qwen3"
        model = Qwen3ForCausalLM(Qwen3Config(**common)) if qwen3 else LlamaForCausalLM(LlamaConfig(**common))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = any(part in name for part in ("norm", "ln_1", "ln_2", "ln_f")) and not name.endswith("bias")
            parameter.fill_(1.0 if norm else 0.0)
    return model


def _embedding(
    plan: Blueprint, basis: Basis, rng: np.random.Generator, generator: torch.Generator
) -> Float[Tensor, "token d_model"]:
    ids = vocabulary()
    amounts: dict[str, Amounts] = {token: {CONSTANT: CONSTANT_AMOUNT} for token in ids}
    for (task, thing), code in zip(THINGS.items(), _codes(rng), strict=True):
        amounts[task] |= {"task": 1.0, **dict(zip(TASK_CODES, code, strict=True))}
        amounts[thing] |= {"thing": 1.0, **dict(zip(CODES, code, strict=True))}
    for verb in HARM_VERBS:
        amounts[verb] |= {"harm_verb": float(rng.uniform(0.9, 1.1))}
    for letter in "AB":
        amounts[letter] |= {"letter": 1.0, f"letter_{letter}": 1.0}
    amounts["<bos>"] |= {"start": 1.0}
    amounts["<|assistant|>"] |= {"ask": 1.0, "out_A": plan.letter_bias}
    rows = torch.zeros(len(ids), D_MODEL, dtype=torch.float64)
    own = torch.nn.functional.normalize(
        torch.randn(len(ids), len(basis.words), generator=generator, dtype=torch.float64), dim=-1
    )
    for token, i in ids.items():
        word = WORD_AMOUNT * own[i] @ basis.words if token not in (*BENIGN_VERBS, *HARM_VERBS) else 0.0
        rows[i] = basis.sum(amounts[token]) + word
    return rows.float()


def _codes(rng: np.random.Generator) -> list[tuple[float, ...]]:
    """One code a task, ±1/√12 each, no two with a product above 1/3."""
    chosen: list[np.ndarray] = []
    while len(chosen) < len(THINGS):
        code = rng.choice([-1.0, 1.0], N_CODES)
        if all(float(code @ other) <= N_CODES / 3 for other in chosen):
            chosen.append(code)
    return [tuple((code / N_CODES**0.5).tolist()) for code in chosen]


def _write_heads(
    model: PreTrainedModel,
    architecture: Architecture,
    layer: int,
    heads: dict[int, PlannedHead],
    idle: Sequence[int],
    basis: Basis,
    noise: Noise,
    generator: torch.Generator,
) -> None:
    """Fill one layer's projections; heads that share a key head have entries of their own in it."""
    d_head, n_keys = _D_HEAD[architecture], _N_KEYS[architecture]
    group, scale = N_HEADS // n_keys, d_head**0.5
    q, o = torch.zeros(N_HEADS, d_head, D_MODEL), torch.zeros(N_HEADS, D_MODEL, d_head)
    k, v = torch.zeros(n_keys, d_head, D_MODEL), torch.zeros(n_keys, d_head, D_MODEL)
    order = _slow_entries(architecture)
    used, carried = [0] * n_keys, [0] * n_keys
    for h, head in sorted(heads.items()):
        shared = h // group
        for query, key in head.pairs:
            at = order[used[shared]]
            used[shared] += 1
            strength = scale * max(abs(w) * (CONSTANT_AMOUNT if n == CONSTANT else 1.0) for n, w in query.items())
            split = strength**0.5
            q[h, at] = (basis.sum({n: w * scale / split for n, w in query.items()}) / READ).float()
            k[shared, at] = (basis.sum({n: w * split for n, w in key.items()}) / READ).float()
        for read, written in head.carries:
            at = carried[shared]
            carried[shared] += 1
            v[shared, at] = (basis.sum(read) / READ).float()
            o[h, :, at] = basis.sum(written).float()
    for h in idle:
        shared, (one, two, three, four) = (
            h // group,
            torch.nn.functional.normalize(torch.randn(4, D_MODEL, generator=generator), dim=-1),
        )
        q[h, order[used[shared]]], k[shared, order[used[shared]]] = noise.heads * scale * one, two
        v[shared, carried[shared]], o[h, :, carried[shared]] = three, 0.1 * noise.heads * four
        used[shared], carried[shared] = used[shared] + 1, carried[shared] + 1
    _store(model, architecture, layer, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), torch.cat([*o], dim=1))


def _slow_entries(architecture: Architecture) -> Sequence[int]:
    """A head's entries that carry scores: under rotary positions the slowest pairs, which hardly turn."""
    d_head = _D_HEAD[architecture]
    if architecture == "gpt2":
        return range(d_head)
    half = d_head // 2
    return [entry for i in reversed(range(half)) for entry in (i, i + half)]


def _steady(model: Any, basis: Basis) -> None:  # noqa: ANN401
    """Give queries and keys a constant entry each where the other side has none, and norms that restore the size."""
    constant = (basis[CONSTANT] * _STEADY / CONSTANT_AMOUNT / READ).float()
    for layer in model.model.layers:
        attention = layer.self_attn
        for side, norm, own in ((attention.q_proj, attention.q_norm, 0), (attention.k_proj, attention.k_norm, 1)):
            d_head = len(norm.weight)
            side.weight[own::d_head], side.weight[1 - own :: d_head] = constant, 0.0
            norm.weight.fill_(_STEADY / d_head**0.5)


def _store(
    model: Any,  # noqa: ANN401
    architecture: Architecture,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
) -> None:
    if architecture == "gpt2":
        attention = model.transformer.h[layer].attn
        attention.c_attn.weight.copy_(torch.cat([q, k, v]).T)
        attention.c_proj.weight.copy_(o.T)
        return
    attention = model.model.layers[layer].self_attn
    for module, weight in (
        (attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v), (attention.o_proj, o)
    ):  # fmt: skip
        module.weight.copy_(weight)
