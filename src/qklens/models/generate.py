"""Continue prompts with the model's own code and cache: greedily, or drawn with a seed of each prompt's own.

Greedy continuations are those of transformers' `generate`. A drawn one depends on its prompt's seed alone, up to the
rounding of a batch of another shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qklens.errors import QklensError
from qklens.models.batch import left_padded
from qklens.models.subject import Subject


@torch.no_grad()
def continuations(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    most: int,
    *,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Token ids that the model writes after each prompt, up to its end token, which is left out.

    Args:
        subject: the model.
        prompts: token ids; they run as one batch.
        most: most tokens of a continuation.
        temperature: 0 takes the most probable token; else tokens are drawn from softmax(logits / temperature).
        seeds: one a prompt, where tokens are drawn.

    Raises:
        QklensError: no prompt or an empty one, a negative temperature, not one seed a prompt, or a prompt that leaves
            no room in the model's context.
    """
    if most < 1 or not temperature >= 0:
        raise QklensError(f"{most} tokens at temperature {temperature}; expected at least 1 token and 0 or more")
    if temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise QklensError(f"{len(seeds or ())} seeds for {len(prompts)} prompts that are drawn; expected one each")
    batch = left_padded(prompts, subject.pad_id, subject.device)
    if subject.context is not None:
        most = min(most, subject.context - batch.width)
        if most < 1:
            raise QklensError(
                f"a prompt of {batch.width} tokens fills the context of {subject.name}, {subject.context} tokens; "
                "shorten it"
            )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or ()]
    ends = end_tokens(subject)
    ids, mask, position = batch.input_ids, batch.attention_mask, batch.position_ids
    written: list[list[int]] = [[] for _ in prompts]
    open_rows, cache = set(range(len(prompts))), None
    for _ in range(most):
        out = subject.model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = out.past_key_values
        chosen = _choose(out.logits[:, -1], temperature, generators)
        for row in sorted(open_rows):
            token = int(chosen[row])
            if token in ends:
                open_rows.discard(row)
            else:
                written[row].append(token)
        if not open_rows:
            break
        ids = chosen[:, None].to(ids)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        position = position[:, -1:] + 1
    return written


def end_tokens(subject: Subject) -> set[int]:
    """The tokens that end an answer, as the checkpoint's generation config and its tokenizer name them."""
    config = subject.model.generation_config
    named = config.eos_token_id if config is not None else None
    listed = named if isinstance(named, list) else [named]
    return {int(i) for i in (*listed, subject.tokenizer.eos_token_id) if isinstance(i, int)}


def _choose(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    shares = torch.softmax(logits.double().cpu() / temperature, dim=-1)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(shares, generators, strict=True)]
    return torch.cat(drawn)
