"""Every side's edit against one layer written by hand in float64: the same logits within 1e-10."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qklens.data.render import LetterForm, render
from qklens.interventions.direction import Direction
from qklens.interventions.engine import Workset
from qklens.interventions.steer import Steer
from transformers_oracle import double_norms

S, TYPICAL, HEADS, KV_HEADS = -1.3, 1.7, 4, 2
SIDES = {
    "residual": {"layers": (0,)},
    "query of a head": {"side": "query", "heads": ((0, 2),)},
    "query of all heads": {"side": "query", "layers": (0,)},
    "shared key": {"side": "key", "heads": ((0, 1),)},
    "own key": {"side": "key", "heads": ((0, 1), (0, 2)), "key_scope": "head"},
    "key of all heads": {"side": "key", "layers": (0,)},
    "value": {"side": "value", "heads": ((0, 3),)},
    "value of all heads": {"side": "value", "layers": (0,)},
}
MODES = {
    "add": lambda x, a, d: x + S * TYPICAL * d,
    "scale": lambda x, a, d: x + (S - 1) * a * d,
    "clamp": lambda x, a, d: x + (S * TYPICAL - a) * d,
    "ablate": lambda x, a, d: x - a * d,
}
TOKENS = ("question", "correct", "answer")
CASES = [(side, norm) for side in SIDES for norm in ("recomputed", "frozen") if (side, norm) != ("residual", "frozen")]


class Layer:
    """One llama layer, as the formulas have it. A head's query, key and value may each read a stream of its own."""

    def __init__(self, model, tokens) -> None:
        self.block, self.model = model.model.layers[0], model
        self.x = model.model.embed_tokens.weight[torch.tensor(tokens)]
        self.d = model.config.hidden_size // HEADS
        inverse = 1 / 10000 ** (torch.arange(0, self.d, 2).float() / self.d)
        angles = torch.arange(len(tokens))[:, None].float() * inverse
        self.cos, self.sin = (torch.cat([f(angles)] * 2, dim=-1).double() for f in (torch.cos, torch.sin))

    def normed(self, x: Tensor, norm, like: Tensor | None = None) -> Tensor:
        """n(x), with σ that of another stream where one is given."""
        sigma = ((x if like is None else like).pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return norm.weight * x / sigma

    def turned(self, v: Tensor) -> Tensor:
        first, second = v.chunk(2, dim=-1)
        return v * self.cos + torch.cat([-second, first], dim=-1) * self.sin

    def logits(self, x: Tensor, query, key, value, frozen: bool) -> Tensor:
        """The last token's logits; `query`, `key` and `value` give the stream that a query head's part is made of."""
        attention, outputs = self.block.self_attn, []
        weight = {n: getattr(attention, f"{n}_proj").weight.view(-1, self.d, x.shape[1]) for n in "qkv"}
        read = lambda stream: self.normed(stream, self.block.input_layernorm, x if frozen else None)  # noqa: E731
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            q = self.turned(read(query(head)) @ weight["q"][head].T)
            k = self.turned(read(key(head)) @ weight["k"][group].T)
            score = (q @ k.T / math.sqrt(self.d)).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
            outputs.append(score.softmax(-1) @ read(value(head)) @ weight["v"][group].T)
        x = x + torch.cat(outputs, dim=-1) @ attention.o_proj.weight.T
        mlp, y = self.block.mlp, self.normed(x, self.block.post_attention_layernorm)
        gate, up = y @ mlp.gate_proj.weight.T, y @ mlp.up_proj.weight.T
        x = x + (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T
        return (self.normed(x, self.model.model.norm) @ self.model.lm_head.weight.T)[-1]


@pytest.fixture
def subject(tiny_llama, monkeypatch):
    subject = tiny_llama(dtype=torch.float64, num_hidden_layers=1, initializer_range=0.5)
    double_norms(monkeypatch, subject.model)
    for module in subject.model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(3))
    softmax = torch.nn.functional.softmax  # the eager attention asks for float32
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, **_: softmax(x, dim=dim))
    return subject


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("side", "norm"), CASES)
def test_a_side_has_its_closed_form(subject, word_tokenizer, items, mode, side, norm):
    options = SIDES[side]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction = Direction("d", {0: vector}, {0: TYPICAL}, lambda layer, stream: stream(layer)[..., 7])
    steer = Steer(direction, S, mode=mode, norm=norm, tokens=TOKENS, **options)
    prompt = render(word_tokenizer, items[0], "harm", "correct_first", LetterForm("", ""))
    layer = Layer(subject.model, prompt.tokens)
    clean, edited = layer.x, layer.x.clone()
    at = [p for name in TOKENS for p in prompt.span(name)]
    edited[at] = MODES[mode](clean[at], clean[at, 7:8], vector)
    named = {head for _, head in options.get("heads", [(0, h) for h in range(HEADS)])}
    if options.get("side") in ("key", "value") and "key_scope" not in options:
        named = {h for h in range(HEADS) if any(h // 2 == other // 2 for other in named)}
    stream = edited if side == "residual" else clean

    def read(which):
        return lambda head: edited if options.get("side") == which and head in named else stream

    wanted = layer.logits(stream, read("query"), read("key"), read("value"), norm == "frozen")
    unedited = layer.logits(clean, *[lambda _: clean] * 3, frozen=False)
    for reuse, atol in ((False, 1e-10), (True, 1e-5)):
        work = Workset(subject, [prompt], reuse=reuse)
        torch.testing.assert_close(work.logits()[0], unedited, rtol=0, atol=1e-10)
        torch.testing.assert_close(work.logits([steer])[0].double(), wanted, rtol=0, atol=atol)
    assert (wanted - unedited).abs().max() > 1e-3
