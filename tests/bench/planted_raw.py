"""Planted models as plain transformers models, asked and edited with plain hooks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qklens.bench.planted.folder import Planted, Spec, planted_model
from qklens.bench.planted.words import planted_items
from qklens.data.render import ORDERS, LetterForm, Prompt, render

ITEMS = planted_items()[:6]


def opened(models: Path, mechanism: str, architecture: str = "llama", seed: int = 0) -> tuple[Planted, PreTrainedModel]:
    spec = Spec.model_validate({"mechanism": mechanism, "architecture": architecture, "noise": 1, "seed": seed})
    planted = planted_model(spec, models)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(planted.folder, attn_implementation="eager")
    return planted, model.eval()


def prompts(planted: Planted, condition: str) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(planted.folder)
    return [render(tokenizer, i, condition, order, LetterForm("", "")) for i in ITEMS for order in ORDERS]


def margins(model: PreTrainedModel, asked: list[Prompt]) -> torch.Tensor:
    return torch.stack([margin(model, prompt) for prompt in asked])


def margin(model: PreTrainedModel, prompt: Prompt) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt.tokens])).logits[0, -1]
    return logits[prompt.letter_ids[0]] - logits[prompt.letter_ids[1]]


def attention(model: PreTrainedModel, prompt: Prompt) -> list[torch.Tensor]:
    """Each layer's answer rows, `head k_pos`."""
    with torch.no_grad():
        return [a[0, :, -1] for a in model(torch.tensor([prompt.tokens]), output_attentions=True).attentions]


def streams(model: PreTrainedModel, asked: list[Prompt], layer: int) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            model(torch.tensor([p.tokens]), output_hidden_states=True).hidden_states[layer][0].double() for p in asked
        ]


@contextlib.contextmanager
def hooked(module: torch.nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
