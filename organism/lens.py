"""A plain forward pass of the organism that records and edits attention, for the diagnostics of training.

Independent of qklens on purpose: it measures the organism with other code than the code the organism is there to test.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass
class Trace:
    """``logits`` ``[batch pos vocab]``; ``resid`` ``[batch pos d_model]``, ``pattern`` ``[batch head q k]``."""

    logits: torch.Tensor
    resid: list[torch.Tensor] = field(default_factory=list)
    pattern: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Edit:
    """Edits at the answer position: pattern rows to write, and a residual offset that only the heads' queries read."""

    rows: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    query: dict[int, tuple[list[int], torch.Tensor]] = field(default_factory=dict)


def forward(model: LlamaForCausalLM, ids: torch.Tensor, last: torch.Tensor, edit: Edit | None = None) -> Trace:
    """Run right-padded ``ids``; ``last`` is each prompt's answer position."""
    edit = edit or Edit()
    rows = torch.arange(ids.shape[0])
    core = model.model
    x = core.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    cos, sin = core.rotary_emb(x, positions)
    future = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
    trace = Trace(logits=x)
    for index, layer in enumerate(core.layers):
        trace.resid.append(x)
        normed, att = layer.input_layernorm(x), layer.self_attn
        d_head, groups = att.head_dim, att.num_key_value_groups
        q = att.q_proj(normed).unflatten(-1, (-1, d_head)).transpose(1, 2)
        k = att.k_proj(normed).unflatten(-1, (-1, d_head)).transpose(1, 2)
        v = att.v_proj(normed).unflatten(-1, (-1, d_head)).transpose(1, 2).repeat_interleave(groups, 1)
        if index in edit.query:
            heads, offset = edit.query[index]
            moved = x.clone()
            moved[rows, last] = x[rows, last] + offset
            new = att.q_proj(layer.input_layernorm(moved)).unflatten(-1, (-1, d_head)).transpose(1, 2)
            q = q.clone()
            q[:, heads] = new[:, heads]
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * att.scaling + future
        pattern = scores.softmax(-1)
        for (at, head), row in edit.rows.items():
            if at == index:
                pattern[rows, head, last] = row
        trace.pattern.append(pattern)
        x = x + att.o_proj((pattern @ v).transpose(1, 2).flatten(-2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    trace.resid.append(x)
    trace.logits = model.lm_head(core.norm(x))
    return trace
