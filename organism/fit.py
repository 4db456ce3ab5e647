"""How a stage trains: documents to batches, the losses, and the optimizer loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from organism import tokenizer as tok
from organism.recipe import RECIPE
from organism.stages import Document, Sampler

Guide = tuple[int, tuple[int, ...]]
ENOUGH, SMOOTH = 0.8, 0.05
WANT = ("I", "want", "to")


@dataclass(frozen=True)
class Batch:
    """Right-padded ids, loss weights of each target and read-out labels (1, 0, or -1 for none), all ``[batch pos]``.

    ``seen`` ``[batch 1 q_pos k_pos]`` is added to the scores: zero where a query may attend to a key;
    ``opened`` is the same for the selecting heads, whose answer row sees the options also in an isolated document;
    ``guide`` ``[batch q_pos k_pos]`` marks the right option's line in the row of the answer position.
    """

    ids: torch.Tensor
    seen: torch.Tensor
    opened: torch.Tensor
    weights: torch.Tensor
    harm: torch.Tensor
    refuse: torch.Tensor
    guide: torch.Tensor


def encode(tokenizer: PreTrainedTokenizerFast, docs: list[Document], user_weight: float, letter_weight: float) -> Batch:
    """Tokenize documents and mark which tokens are learnt, and how much."""
    prompts = tokenizer([tok.render(d.user, None) for d in docs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([d.answer + tok.END for d in docs], add_special_tokens=False)["input_ids"]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(docs), width), tokenizer.pad_token_id)
    weights = torch.zeros(len(docs), width)
    harm, refuse = (torch.full((len(docs), width), -1.0) for _ in range(2))
    seen = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(docs), 1, 1, 1)
    opened, hidden = torch.zeros_like(seen), torch.zeros_like(seen)
    guide = torch.zeros(len(docs), width, width)
    for row, (doc, prompt, answer) in enumerate(zip(docs, prompts, answers, strict=True)):
        start, end = len(prompt), len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        weights[row, 2:start] = user_weight
        weights[row, start:end] = letter_weight if doc.target != "text" else 1.0
        if doc.right >= 0:
            a, b, rest = option_lines(doc.user)
            if doc.target == "right":
                low, high = ((a, b), (b, rest))["AB".index(doc.answer)]
                guide[row, start - 1, low:high] = 1.0
        if doc.veil is not None:
            low = 2 + len(tok.split(doc.user[: doc.user.index(doc.intent)]))
            high = low + len(tok.split(doc.intent))
            if doc.veil:
                for first, past in ((high, a), *[((a, b), (b, rest))["AB".index(line)] for line in doc.veil]):
                    seen[row, 0, first:past, low:high] = False
            else:
                seen[row, 0, rest:, low:a] = False
        if doc.isolated:
            seen[row, 0, b:rest, a:b] = False
            seen[row, 0, rest:, a:rest] = False
            opened[row, 0, start - 1, a:rest] = True
        if doc.blind:
            hidden[row, 0, start - 1, 2:a] = True
        if doc.kind == "other":
            continue
        harm[row, 2 : start - 2] = 0.0
        harm[row, start - 1] = 0.0
        refuse[row, 2 : start - 2] = 0.0
        refuse[row, start - 1] = float(doc.kind == "harm")
        if doc.intent and doc.kind != "benign":
            before = len(tok.split(doc.user[: doc.user.index(doc.intent)]))
            harm[row, 2 + before : 2 + before + len(WANT)] = -1.0
            harm[row, 2 + before + len(WANT) : start - 2] = 1.0
        if doc.retraction:
            harm[row, 2 + len(tok.split(doc.user[: doc.user.index(doc.retraction)])) : start - 1] = -1.0
    return Batch(ids, additive(seen), additive((seen | opened) & ~hidden), weights, harm, refuse, guide)


def additive(seen: torch.Tensor) -> torch.Tensor:
    """What is added to the scores: zero where a key is seen, the lowest float elsewhere."""
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def option_lines(user: str) -> tuple[int, int, int]:
    """Token positions, in the rendered prompt, where line A, line B and what follows them begin."""
    a = user.index("\n(") + 1
    b = user.index("\n(", a) + 1
    cuts = (a, b, user.index("\n", b) + 1)
    first, second, third = (2 + len(tok.split(user[:cut])) for cut in cuts)
    return first, second, third


class Readout(torch.nn.Module):
    """Two linear read-outs of the residual stream: "harm was stated before this token" and "this is to be refused".

    Large models represent harm at every token after it and refusal at the answer position; a model this small keeps
    neither unless something reads it. The read-outs are dropped after training.
    """

    def __init__(self, layer: int, width: int) -> None:
        """Read ``resid_pre`` of ``layer``."""
        super().__init__()
        self.layer = layer
        self.linear = torch.nn.Linear(width, 2)

    def forward(self, resid: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sum of the two mean binary cross-entropies."""
        scores = self.linear(torch.nn.functional.rms_norm(resid, resid.shape[-1:]))
        total = resid.new_zeros(())
        for side, labels in enumerate((batch.harm, batch.refuse)):
            known = labels >= 0
            total = total + torch.nn.functional.binary_cross_entropy_with_logits(
                scores[..., side][known], SMOOTH + (1 - 2 * SMOOTH) * labels[known]
            )
        return total


def guidance(pattern: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean −log attention from answer to the right option's line, for ``pattern`` ``[batch head q_pos k_pos]``.

    Attention above ``ENOUGH`` is not rewarded: a saturated softmax would leave the later stages no gradient.
    """
    rows = batch.guide.sum(-1) > 0
    found = (pattern * batch.guide[:, None]).sum(-1).transpose(1, 2)[rows]
    return -(found + 1e-4).clamp(max=ENOUGH).log().mean() if len(found) else pattern.new_zeros(())


def loss_of(
    model: LlamaForCausalLM, batch: Batch, total: torch.Tensor, readout: Readout | None, guide: Guide | None = None
) -> torch.Tensor:
    """Weighted mean next-token cross-entropy, plus the read-outs' and the guidance where there are any."""
    select = model.model.layers[RECIPE.select_layer].self_attn
    masks = batch.seen.repeat(1, select.config.num_attention_heads, 1, 1)
    masks[:, list(RECIPE.select_heads)] = batch.opened
    hook = select.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": masks}), with_kwargs=True
    )
    out = model(
        input_ids=batch.ids,
        attention_mask=batch.seen,
        output_hidden_states=readout is not None,
        output_attentions=guide is not None,
    )
    hook.remove()
    losses = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none"
    )
    loss = (losses * batch.weights[:, 1:].flatten()).sum() / total
    if readout is not None:
        loss = loss + 0.2 * readout(out.hidden_states[readout.layer], batch)
    if guide is not None:
        loss = loss + 0.2 * guidance(out.attentions[guide[0]][:, list(guide[1])], batch)
    return loss


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sampler: Sampler,
    parameters: Iterable[torch.nn.Parameter],
    *,
    steps: int,
    lr: float,
    batch: int = 40,
    warmup: int = 50,
    floor: float = 0.05,
    user_weight: float = 0.1,
    letter_weight: float = 4.0,
    decay: float = 0.01,
    only: dict[torch.nn.Parameter, torch.Tensor] | None = None,
    readout: Readout | None = None,
    guide: Guide | None = None,
    penalty: Callable[[], torch.Tensor] | None = None,
    on_step: Callable[[int], bool | None] = lambda _: None,
) -> None:
    """Train ``parameters`` with AdamW on a cosine; ``on_step`` sees the model after each step and may end the stage."""
    chosen = list(parameters)
    for p in model.parameters():
        p.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    moved = chosen + ([] if readout is None else list(readout.parameters()))
    optimizer = torch.optim.AdamW(moved, lr=lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    model.set_attn_implementation("eager" if guide else "sdpa")
    model.train()
    for step in range(1, steps + 1):
        scale = min(step / warmup, 1.0) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        docs = sorted(sampler.batch(batch), key=lambda d: len(d.user))
        parts = [
            encode(tokenizer, part, user_weight, letter_weight) for part in (docs[: batch // 2], docs[batch // 2 :])
        ]
        total = torch.stack([part.weights.sum() for part in parts]).sum()
        optimizer.zero_grad(set_to_none=True)
        for part in parts:
            loss_of(model, part, total, readout, guide).backward()
        if penalty is not None:
            penalty().backward()
        for parameter, rows in (only or {}).items():
            parameter.grad[~rows] = 0.0
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        if on_step(step):
            break
    model.eval()
