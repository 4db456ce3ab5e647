"""Write what TransformerLens computes on the same weights: ``python -m oracle.lens_side``, in its own environment.

The bridge runs the checkpoint's raw weights: nothing is folded or centred. `hook_attn_scores` are the scores after the
model's scale, soft cap and mask; masked ones become −∞. `hook_q_input` holds one copy of the residual per query head,
before the layer's norm, which TransformerLens then computes on the edited copy. Prompts run one by one, unpadded.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging

from oracle.cases import CASES, HEADS, LAYERS, PROMPTS, Case

MASKED = torch.finfo(torch.float32).min / 2


def boot(case: Case) -> TransformerBridge:
    """The bridge around the model directory, with a copy of the residual for each head's query, key and value."""
    bridge = TransformerBridge.boot_transformers(str(case.model), device="cpu", dtype=torch.float64)
    bridge.eval()
    bridge.set_use_split_qkv_input(True)
    return bridge


def compute(bridge: TransformerBridge, vector: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of every head, logits without an edit, and logits under the edit of each head's query alone."""
    out: dict[str, torch.Tensor] = {}
    clean, edited = [], []
    for row, prompt in enumerate(PROMPTS):
        tokens = torch.tensor([prompt])
        logits, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_attn_scores"))
        scores = torch.stack([cache[f"blocks.{layer}.attn.hook_attn_scores"][0] for layer in range(LAYERS)])
        out[f"scores.{row}"] = scores.masked_fill(scores < MASKED, float("-inf"))
        clean.append(logits[0, -1])
        heads = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
        edited.append(torch.stack([edited_logits(bridge, tokens, layer, head, vector) for layer, head in heads]))
    out["clean"] = torch.stack(clean)
    out["edited"] = torch.stack(edited, dim=1).unflatten(0, (LAYERS, HEADS))
    return out


def edited_logits(
    bridge: TransformerBridge, tokens: torch.Tensor, layer: int, head: int, vector: torch.Tensor
) -> torch.Tensor:
    """Last logits with the vector added to what one head's W_Q reads at the last position."""
    fired = []

    def edit(value: torch.Tensor, hook: object) -> torch.Tensor:
        fired.append(hook)
        value = value.clone()
        value[:, -1, head] += vector
        return value

    logits = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_q_input", edit)])[0, -1]
    if len(fired) != 1:
        raise RuntimeError(f"hook_q_input of layer {layer} fired {len(fired)} times, expected once")
    return logits


@torch.no_grad()
def main() -> None:
    """Every case."""
    logging.disable_progress_bar()
    for case in CASES:
        numbers = compute(boot(case), load_file(case.edit)["edit"])
        about = {"weights": case.digest(), "by": f"transformer-lens {version('transformer-lens')}"}
        save_file({name: tensor.contiguous() for name, tensor in numbers.items()}, case.numbers("lens"), about)


if __name__ == "__main__":
    main()
