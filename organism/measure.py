"""Diagnostics of a checkpoint: behaviour, selecting heads, contrast directions, causal checks.

Directions are fitted on one half of the items and all is reported on the other. The virtual interaction of a query
direction d_q and a key direction d_k at a head is (R_p W_Q (γ ⊙ d_q)) · (R_j W_K (γ ⊙ d_k)) / sqrt(d_head) with unit d,
averaged over the offsets p − j from the answer to the tokens of the correct option; its z is against 1000 pairs of
directions drawn from the residual stream's covariance at that layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import rotate_half

from organism.corpus import Item
from organism.lens import Edit, Trace, forward
from organism.prompts import Prompts, open_prompts, prompts

CONDITIONS = ("none", "harm", "benign")
NULL_PAIRS = 1000


@dataclass
class Runs:
    """Prompts and clean traces of one set of items under every condition."""

    prompts: dict[str, Prompts]
    traces: dict[str, Trace]


def run(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[Item]) -> Runs:
    """Trace the items under every condition."""
    made = {c: prompts(tokenizer, items, c) for c in CONDITIONS}
    return Runs(made, {c: forward(model, p.ids, p.last) for c, p in made.items()})


def margins(trace: Trace, p: Prompts) -> torch.Tensor:
    """Logit of the correct letter minus logit of the incorrect one, per prompt."""
    rows = torch.arange(len(p.last))
    at = trace.logits[rows, p.last]
    return at[rows, p.right] - at[rows, p.wrong]


def behaviour(runs: Runs) -> dict[str, dict[str, float]]:
    """Accuracy, mean margin and the share of prompts whose most likely token is a letter."""
    out = {}
    for c, p in runs.prompts.items():
        m = margins(runs.traces[c], p)
        rows = torch.arange(len(p.last))
        top = runs.traces[c].logits[rows, p.last].argmax(-1)
        out[c] = {
            "accuracy": (m > 0).float().mean().item(),
            "margin": m.mean().item(),
            "letter": ((top == p.right) | (top == p.wrong)).float().mean().item(),
        }
    return out


def attention(runs: Runs) -> dict[str, torch.Tensor]:
    """Mean attention from the answer position to the correct and incorrect line: ``[2 layer head]`` per condition."""
    out = {}
    for c, p in runs.prompts.items():
        rows = torch.arange(len(p.last))
        stack = torch.stack([pattern[rows, :, p.last] for pattern in runs.traces[c].pattern])
        out[c] = torch.stack([(stack * mask[None, :, None]).sum(-1).mean(1) for mask in (p.correct, p.incorrect)])
    return out


def selecting(runs: Runs, threshold: float = 0.15) -> list[tuple[int, int]]:
    """Heads whose attention without pressure prefers the correct line by more than ``threshold``."""
    found = attention(runs)["none"]
    difference = found[0] - found[1]
    return [(int(layer), int(head)) for layer, head in (difference > threshold).nonzero()]


def at_answer(runs: Runs, condition: str, layer: int) -> torch.Tensor:
    """``resid_pre`` at the answer position: ``[batch d_model]``."""
    p = runs.prompts[condition]
    return runs.traces[condition].resid[layer][torch.arange(len(p.last)), p.last]


def mean_at(runs: Runs, condition: str, layer: int, mask: torch.Tensor) -> torch.Tensor:
    """Mean ``resid_pre`` over the masked tokens."""
    return runs.traces[condition].resid[layer][mask].mean(0)


def directions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[Item], runs: Runs, layer: int
) -> dict[str, torch.Tensor]:
    """The contrast directions at ``resid_pre.layer`` (differences of class means, not normalised)."""
    options = {c: p.correct | p.incorrect for c, p in runs.prompts.items()}
    both = {c: options[c] | p.intent for c, p in runs.prompts.items()}
    ids, last = open_prompts(tokenizer, [item.question for item in items])
    asked = forward(model, ids, last).resid[layer][torch.arange(len(last)), last].mean(0)
    none = runs.prompts["none"]
    return {
        "refuse": at_answer(runs, "harm", layer).mean(0) - at_answer(runs, "benign", layer).mean(0),
        "need": at_answer(runs, "none", layer).mean(0) - asked,
        "harm": mean_at(runs, "harm", layer, both["harm"]) - mean_at(runs, "benign", layer, both["benign"]),
        "harm_options": mean_at(runs, "harm", layer, options["harm"])
        - mean_at(runs, "benign", layer, options["benign"]),
        "correct": mean_at(runs, "none", layer, none.correct) - mean_at(runs, "none", layer, none.incorrect),
    }


def offsets(p: Prompts) -> torch.Tensor:
    """Every offset answer − token of the correct line, sorted and with repeats."""
    rows, at = p.correct.nonzero(as_tuple=True)
    return (p.last[rows] - at).sort().values


def virtual(
    model: LlamaForCausalLM, layer: int, head: int, d_q: torch.Tensor, d_k: torch.Tensor, gaps: torch.Tensor
) -> torch.Tensor:
    """Virtual interaction of unit directions ``[n d_model]`` averaged over ``gaps``: ``[n]``."""
    block = model.model.layers[layer]
    att, gamma = block.self_attn, block.input_layernorm.weight
    d_head = att.head_dim
    w_q = att.q_proj.weight[head * d_head : (head + 1) * d_head]
    group = head // att.num_key_value_groups
    w_k = att.k_proj.weight[group * d_head : (group + 1) * d_head]
    q = (d_q / d_q.norm(dim=-1, keepdim=True) * gamma) @ w_q.T
    k = (d_k / d_k.norm(dim=-1, keepdim=True) * gamma) @ w_k.T
    cos, sin = model.model.rotary_emb(q, gaps[None])
    turned = q[:, None] * cos[0].mean(0) + rotate_half(q)[:, None] * sin[0].mean(0)
    return (turned[:, 0] * k).sum(-1) * att.scaling


def zscores(
    model: LlamaForCausalLM, found: dict[str, torch.Tensor], runs: Runs, layer: int, head: int, seed: int = 0
) -> dict[str, float]:
    """Z of the named direction pairs at one head."""
    pooled = torch.cat(
        [
            t.resid[layer][torch.arange(p.ids.shape[1])[None] <= p.last[:, None]]
            for t, p in zip(runs.traces.values(), runs.prompts.values(), strict=True)
        ]
    )
    root = torch.linalg.cholesky(torch.cov(pooled.T) + 1e-6 * torch.eye(pooled.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    null_q, null_k = (torch.randn(NULL_PAIRS, pooled.shape[1], generator=generator) @ root.T for _ in range(2))
    gaps = offsets(runs.prompts["none"])
    null = virtual(model, layer, head, null_q, null_k, gaps)
    pairs = (
        ("refuse", "harm"),
        ("refuse", "harm_options"),
        ("refuse", "correct"),
        ("need", "correct"),
        ("need", "harm"),
    )
    return {
        f"{q} x {k}": (
            (virtual(model, layer, head, found[q][None], found[k][None], gaps) - null.mean()) / null.std()
        ).item()
        for q, k in pairs
    }


def patched(model: LlamaForCausalLM, runs: Runs, heads: list[tuple[int, int]]) -> dict[str, float]:
    """Accuracy and margin under harm with the heads' answer rows taken from the run without pressure."""
    none, harm = runs.prompts["none"], runs.prompts["harm"]
    rows: dict[tuple[int, int], torch.Tensor] = {}
    for layer, head in heads:
        clean = runs.traces["none"].pattern[layer][torch.arange(len(none.last)), head, none.last]
        row = torch.zeros(harm.ids.shape)
        for i, shift in enumerate(harm.shift.tolist()):
            row[i, :2] = clean[i, :2]
            end = int(none.last[i]) + 1
            row[i, 2 + shift : end + shift] = clean[i, 2:end]
        rows[layer, head] = row
    m = margins(forward(model, harm.ids, harm.last, Edit(rows=rows)), harm)
    clean, lost = margins(runs.traces["none"], none).mean(), margins(runs.traces["harm"], harm).mean()
    return {"accuracy": (m > 0).float().mean().item(), "restored": ((m.mean() - lost) / (clean - lost)).item()}


def steered(
    model: LlamaForCausalLM, runs: Runs, heads: list[tuple[int, int]], moves: dict[int, torch.Tensor]
) -> dict[str, float]:
    """Accuracy per condition when the heads' queries at the answer position read the residual plus ``moves[layer]``."""
    query = {layer: ([h for at, h in heads if at == layer], moves[layer]) for layer in {at for at, _ in heads}}
    return {
        c: (margins(forward(model, p.ids, p.last, Edit(query=query)), p) > 0).float().mean().item()
        for c, p in runs.prompts.items()
        if c != "none"
    }


def report(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    fit_items: list[Item],
    test_items: list[Item],
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0),
    draws: int = 5,
) -> dict[str, Any]:
    """All diagnostics of one checkpoint."""
    with torch.no_grad():
        fit, test = run(model, tokenizer, fit_items), run(model, tokenizer, test_items)
        heads = selecting(fit)
        seen = attention(test)
        out: dict[str, Any] = {"behaviour": behaviour(test), "heads": {}}
        found = {
            layer: directions(model, tokenizer, fit_items, fit, layer) for layer in sorted({at for at, _ in heads})
        }
        for layer, head in heads:
            out["heads"][f"L{layer}H{head}"] = {
                "attention": {c: [round(seen[c][side, layer, head].item(), 3) for side in (0, 1)] for c in CONDITIONS},
                "z": {k: round(v, 2) for k, v in zscores(model, found[layer], fit, layer, head).items()},
            }
        if not heads:
            return out
        out["patched"] = patched(model, test, heads)
        out["steered"], out["random"] = {}, {}
        generator = torch.Generator().manual_seed(0)
        for strength in strengths:
            moves = {layer: -strength * d["refuse"] for layer, d in found.items()}
            out["steered"][strength] = steered(model, test, heads, moves)
            noise = []
            for _ in range(draws):
                drawn = {layer: torch.randn(len(v), generator=generator) for layer, v in moves.items()}
                noise.append(
                    steered(
                        model, test, heads, {layer: v / v.norm() * moves[layer].norm() for layer, v in drawn.items()}
                    )
                )
            out["random"][strength] = {c: [min(n[c] for n in noise), max(n[c] for n in noise)] for c in noise[0]}
        out["belief"] = belief(fit, test, found)
    return out


def belief(fit: Runs, test: Runs, found: dict[int, dict[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Share of prompts where the correct direction is stronger on the correct line than on the incorrect one."""
    out = {}
    for layer, named in found.items():
        unit = named["correct"] / named["correct"].norm()
        out[f"L{layer}"] = {}
        for c, p in test.prompts.items():
            value = test.traces[c].resid[layer] @ unit
            sums = [(value * mask).sum(1) / mask.sum(1) for mask in (p.correct, p.incorrect)]
            out[f"L{layer}"][c] = (sums[0] > sums[1]).float().mean().item()
    return out
