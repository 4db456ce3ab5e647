"""Transformers with hooks and its own KV cache: all but the last token once a prompt, the last token once a strength.

    python -m benchmarks.rivals.cached TASK ANSWER

The trap: a hook on position -1 that is left on while the cache fills edits the last but one token's query too, and so
that token's keys and values in all later layers. Nothing fails and no shape is wrong. `trap` measures what it does.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.rivals.hooked import load_model, steered
from benchmarks.rivals.task import About, Sweep, Task, compete

TOLERANCE = 1e-4


def fill(model: PreTrainedModel, tokens: list[int]) -> DynamicCache:
    """Keys and values of all tokens but the last; no hook may be on."""
    return model(torch.tensor([tokens[:-1]]), use_cache=True, logits_to_keep=1).past_key_values


def last(model: PreTrainedModel, tokens: list[int], cache: DynamicCache) -> Tensor:
    """Logits of the last token; the cache is as it was afterwards."""
    logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True).logits[0, -1]
    cache.crop(-1)
    return logits


def trap(model: PreTrainedModel, task: Task) -> float:
    """How far off the first prompt's logits are when the hook is on while the cache fills.

    Raises:
        AssertionError: not at all, so that agreeing logits would not show that the trap was avoided.
    """
    tokens, strength = task.prompts[0], task.strengths[-1]
    clean = fill(model, tokens)
    with steered(model, task, strength):
        off = float((last(model, tokens, clean) - last(model, tokens, fill(model, tokens))).abs().max())
    if off < 10 * TOLERANCE:
        raise AssertionError(f"a hook left on while the cache fills moves the logits by {off:.1e} only")
    return off


def load(task: Task, about: About) -> Sweep:
    """One pass over the prefix, then one over the last token for each strength."""
    about["by"] = f"transformers {transformers.__version__}, KV cache"
    model = load_model(task)
    about["note"] = f"left on while the cache fills, the hook moves logits by {trap(model, task):.1e}, silently"

    def sweep(tokens: list[int]) -> Tensor:
        cache, rows = fill(model, tokens), []
        for strength in task.strengths:
            with steered(model, task, strength):
                rows.append(last(model, tokens, cache))
        return torch.stack(rows)

    return sweep


if __name__ == "__main__":
    compete(load)
