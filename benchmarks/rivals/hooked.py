"""The edit as forward hooks on a Llama-class model of plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks.rivals.task import Task


def load_model(task: Task) -> PreTrainedModel:
    """The model in float32."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).eval()


@contextmanager
def steered(model: PreTrainedModel, task: Task, strength: float | Tensor) -> Iterator[None]:
    """While this is open, the heads' queries at position -1 *of whatever is run* read x + s d."""
    block = model.model.layers[task.layer]
    norm, width = block.input_layernorm, block.self_attn.head_dim
    stream: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        stream[:] = [args[0][:, -1]]

    def edit(projection: nn.Linear, _: tuple[Tensor, ...], queries: Tensor) -> None:
        moved = projection.forward(norm.forward(stream.pop() + strength * task.d))
        queries[:, -1].unflatten(-1, (-1, width))[:, task.heads] = moved.unflatten(-1, (-1, width))[:, task.heads]

    handles = [norm.register_forward_pre_hook(keep), block.self_attn.q_proj.register_forward_hook(edit)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
