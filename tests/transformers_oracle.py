"""What plain transformers computes, eager, without qklens."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from qklens.models.families import load_family


@dataclass
class Oracle:
    """One prompt: logits, streams, and what met in every layer's attention; a list has one entry a layer."""

    logits: torch.Tensor
    streams: list[torch.Tensor]
    patterns: list[torch.Tensor]
    queries: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    heads: list[torch.Tensor] = field(default_factory=list)
    normed: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


def oracle(model: nn.Module, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """Run the model by itself with a spy around its own eager attention function."""
    family = load_family(model.config.model_type)
    module = importlib.import_module(type(model).__module__)
    original, seen, normed, outputs, handles = module.eager_attention_forward, [], [], [], []

    def spy(attention, query, key, *args, **kwargs):
        out = original(attention, query, key, *args, **kwargs)
        seen.append((query[0].clone(), key[0].clone(), kwargs["scaling"], out[0][0].transpose(0, 1).clone()))
        return out

    for layer in family.layers(model):
        norm = family.input_norm(layer)
        if norm is None:
            handles.append(layer.register_forward_pre_hook(lambda _, args: normed.append(args[0][0].clone())))
        else:
            handles.append(norm.register_forward_hook(lambda _, args, out: normed.append(out[0].clone())))
        handles.append(
            layer.register_forward_hook(
                lambda _, args, out: outputs.append((out if isinstance(out, torch.Tensor) else out[0])[0].clone())
            )
        )
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "eager_attention_forward", spy)
        out = model(torch.tensor([tokens]), output_hidden_states=True, output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(normed) == len(outputs) == len(out.attentions)
    queries, keys, scales, heads = (list(column) for column in zip(*seen, strict=True))
    streams, patterns = [h[0] for h in out.hidden_states], [a[0] for a in out.attentions]
    return Oracle(out.logits[0], streams, patterns, queries, keys, scales, heads, normed, outputs)


def double_norms(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """transformers' RMSNorms compute in float32 whatever the model's dtype; the float64 oracle must not."""
    kinds = {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}
    for kind in kinds:
        offset = 1.0 if "Gemma" in kind.__name__ else 0.0

        def forward(self, x, offset=offset):
            epsilon = self.eps if offset else self.variance_epsilon
            return (self.weight + offset) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))

        monkeypatch.setattr(kind, "forward", forward)
