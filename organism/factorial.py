"""Keeps withholding to the interaction of a refusing query with a key of harm.

Under harm both sides of a score change. With q from the harm or the benign run and k from the harm or the benign run of
the same item, s(q, k) has four cells, and the change is

    s(h, h) − s(b, b) = [s(h, b) − s(b, b)] + [s(b, h) − s(b, b)] + interaction
                          query alone          key alone

The penalty is the mean square of the first two over the tokens of both option lines. Only W_Q and W_K of the selecting
heads train with it, so the residual stream they read is fixed and is gathered once.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import rotate_half

from organism import measure
from organism.corpus import World


class Factorial:
    """The penalty at one layer's selecting heads, on the items and intents that training may see."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        world: World,
        layer: int,
        heads: tuple[int, ...],
        seed: int,
        weight: float,
    ) -> None:
        """Gather ``resid_pre`` at the answer position and the option lines under harm and benign."""
        self.model, self.layer, self.heads, self.weight = model, layer, list(heads), weight
        self.generator = torch.Generator().manual_seed(seed)
        items = [i for i in world.harm_items if world.trains_under_harm(i) and i.pressure not in world.held_out_intents]
        with torch.no_grad():
            runs = measure.run(model, tokenizer, items)
        self.answer, self.keys = [], []
        for condition in ("benign", "harm"):
            p, resid = runs.prompts[condition], runs.traces[condition].resid[layer]
            rows, at = (p.correct | p.incorrect).nonzero(as_tuple=True)
            self.answer.append(resid[torch.arange(len(p.last)), p.last])
            self.keys.append(resid[rows, at])
            self.rows, self.gaps = rows, p.last[rows] - at

    def __call__(self, sample: int = 512) -> torch.Tensor:
        """Weight × mean of query alone² + key alone² on a random sample of option tokens."""
        block = self.model.model.layers[self.layer]
        att, norm = block.self_attn, block.input_layernorm
        chosen = torch.randint(len(self.rows), (sample,), generator=self.generator)
        rows, gaps = self.rows[chosen], self.gaps[chosen]
        groups = [head // att.num_key_value_groups for head in self.heads]
        cos, sin = self.model.model.rotary_emb(self.keys[0], gaps[None])
        queries, keys = [], []
        for answer, key in zip(self.answer, self.keys, strict=True):
            q = att.q_proj(norm(answer[rows])).unflatten(-1, (-1, att.head_dim))[:, self.heads]
            queries.append(q * cos[0][:, None] + rotate_half(q) * sin[0][:, None])
            keys.append(att.k_proj(norm(key[chosen])).unflatten(-1, (-1, att.head_dim))[:, groups])
        (bb, bh), (hb, _) = [[(q * k).sum(-1) * att.scaling for k in keys] for q in queries]
        return self.weight * ((hb - bb) ** 2 + (bh - bb) ** 2).mean()
