"""As `cached`, and the last token at all strengths in one batch: the best that hooks and the KV cache do.

python -m benchmarks.rivals.batched TASK ANSWER
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

from benchmarks.rivals.cached import fill
from benchmarks.rivals.hooked import load_model, steered
from benchmarks.rivals.task import About, Sweep, Task, compete


def load(task: Task, about: About) -> Sweep:
    """One pass over the prefix, then one over the last token, a row for each strength."""
    about["by"] = f"transformers {transformers.__version__}, KV cache, batched"
    model = load_model(task)
    strengths = torch.tensor(task.strengths)[:, None]

    def sweep(tokens: list[int]) -> Tensor:
        cache = fill(model, tokens)
        cache.batch_repeat_interleave(len(strengths))
        ids = torch.tensor([tokens[-1:]]).expand(len(strengths), -1)
        with steered(model, task, strengths):
            return model(ids, past_key_values=cache, use_cache=True).logits[:, -1]

    return sweep


if __name__ == "__main__":
    compete(load)
