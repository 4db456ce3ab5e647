"""nnsight 0.8, in an environment of its own: one trace a prompt, one invoke a strength, as its steering pattern does.

python -m benchmarks.rivals.traced TASK ANSWER
"""

from __future__ import annotations

from importlib.metadata import version

import nnsight
import torch
from nnsight import TransformersModel
from torch import Tensor
from transformers.utils import logging

from benchmarks.rivals.task import About, Sweep, Task, compete


def load(task: Task, about: About) -> Sweep:
    """Whole prompts, a row for each strength; a trace for each strength would take half as long again."""
    about["by"] = f"nnsight {version('nnsight')}"
    logging.disable_progress_bar()
    model = TransformersModel(task.model, task="text-generation", dispatch=True, dtype=torch.float32)
    block, vector, heads = model.model.layers[task.layer], task.d, task.heads
    attention = block.self_attn
    width = attention._module.head_dim

    def sweep(tokens: list[int]) -> Tensor:
        ids = torch.tensor([tokens])
        with model.trace(use_cache=False, logits_to_keep=1) as tracer:
            rows = nnsight.save([])
            for strength in task.strengths:
                with tracer.invoke(ids):
                    moved = attention.q_proj(block.input_layernorm(block.input[:, -1] + strength * vector))
                    queries = attention.q_proj.output[:, -1].unflatten(-1, (-1, width))
                    queries[:, heads] = moved.unflatten(-1, (-1, width))[:, heads]
                    rows.append(model.lm_head.output[0, -1])
        return torch.stack(rows)

    return sweep


if __name__ == "__main__":
    compete(load)
