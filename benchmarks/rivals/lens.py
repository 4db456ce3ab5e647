"""TransformerLens 4.3, in the environment of `make oracle`: a hook on `hook_q_input`.

    python -m benchmarks.rivals.lens TASK ANSWER

`hook_q_input` holds one copy of the residual per query head, before the layer's norm, which TransformerLens then
computes on the edited copy (see `oracle.lens_side`). The bridge runs the checkpoint's raw weights. All
strengths of a prompt go in one batch, which takes two thirds of the time of one strength after another.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging

from benchmarks.rivals.task import About, Sweep, Task, compete


def load(task: Task, about: About) -> Sweep:
    """One `run_with_hooks` a prompt: whole prompts, a row for each strength."""
    about["by"] = f"transformer-lens {version('transformer-lens')}"
    logging.disable_progress_bar()
    bridge = TransformerBridge.boot_transformers(task.model, device="cpu", dtype=torch.float32)
    bridge.eval()
    bridge.set_use_split_qkv_input(True)
    name, added = f"blocks.{task.layer}.attn.hook_q_input", torch.tensor(task.strengths)[:, None, None] * task.d

    def sweep(tokens: list[int]) -> Tensor:
        fired = []

        def edit(value: Tensor, hook: object) -> Tensor:
            fired.append(hook)
            value[:, -1, task.heads] += added
            return value

        ids = torch.tensor([tokens]).expand(len(added), -1)
        logits = bridge.run_with_hooks(ids, fwd_hooks=[(name, edit)], logits_to_keep=1)[:, -1]
        if len(fired) != 1:
            raise RuntimeError(f"{name} fired {len(fired)} times, expected once")
        return logits

    return sweep


if __name__ == "__main__":
    compete(load)
