"""Plain transformers with hooks: each prompt whole, once a strength. The reference of the logits.

python -m benchmarks.rivals.plain TASK ANSWER
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

from benchmarks.rivals.hooked import load_model, steered
from benchmarks.rivals.task import About, Sweep, Task, compete


def load(task: Task, about: About) -> Sweep:
    """One pass over the whole prompt for each strength."""
    about["by"] = f"transformers {transformers.__version__}, hooks"
    model = load_model(task)

    def sweep(tokens: list[int]) -> Tensor:
        ids, rows = torch.tensor([tokens]), []
        for strength in task.strengths:
            with steered(model, task, strength):
                rows.append(model(ids, use_cache=False, logits_to_keep=1).logits[0, -1])
        return torch.stack(rows)

    return sweep


if __name__ == "__main__":
    compete(load)
