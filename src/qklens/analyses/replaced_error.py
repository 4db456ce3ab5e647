"""What stands in for the residual error of a source: nothing, its mean, another item's, or as much noise beside it.

    x = Σ aᵢ dᵢ + b + e      x' = Σ aᵢ dᵢ + b + e' = x + (e' − e)

    zero        e' = 0
    mean        e' = the mean error of tokens at the same place (template, intent, question, ...) on other prompts
    other_item  e' = another item's error at the aligned token of the same place, same order of options
    random      e' = e + r, ‖r‖ = ‖e‖ at every token, r in a random direction: the control, an edit as large as `zero`

Aligned: token k of the n at a place stands against token round(k (m − 1) / (n − 1)) of the m there on the other prompt,
first against first and last against last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.attended import PLACES, places
from qklens.analyses.written import WrittenPrompt
from qklens.data.render import Prompt
from qklens.interventions.patch import other_items

Replacement = Literal["zero", "mean", "other_item", "random"]
REPLACEMENTS: tuple[Replacement, ...] = get_args(Replacement)
Deltas = list[Float[Tensor, "_pos d_model"]]


def aligned(donor: Prompt, receiver: Prompt) -> list[int]:
    """For each token of the receiver the donor's aligned one, −1 where the donor has nothing at that place."""
    there, here = places(donor), places(receiver)
    result = [-1] * len(here)
    for name in PLACES:
        source = [i for i, place in enumerate(there) if place == name]
        target = [i for i, place in enumerate(here) if place == name]
        if source:
            step = (len(source) - 1) / max(len(target) - 1, 1)
            for k, position in enumerate(target):
                result[position] = source[-1 if len(target) == 1 else round(k * step)]
    return result


def place_means(prompts: Sequence[Prompt], written: Sequence[WrittenPrompt]) -> dict[str, Float[Tensor, " d_model"]]:
    """The mean error at each place over prompts; `answer` stands by itself."""
    rows: dict[str, list[Tensor]] = {}
    for prompt, parts in zip(prompts, written, strict=True):
        for error, name in zip(parts.error, _with_answer(prompt), strict=True):
            rows.setdefault(name, []).append(error)
    return {name: torch.stack(errors).mean(dim=0) for name, errors in rows.items()}


def replaced(
    kind: Replacement,
    prompts: Sequence[Prompt],
    written: Sequence[WrittenPrompt],
    means: dict[str, Float[Tensor, " d_model"]],
    seed: int,
) -> Deltas:
    """The change e' − e at every token of each prompt.

    Args:
        kind: what stands in.
        prompts: item by item, both orders of an item next to each other.
        written: the same prompts written by the source.
        means: `place_means` of other prompts; used by `mean` alone.
        seed: draws the other items and the random directions.
    """
    errors = [parts.error for parts in written]
    if kind == "zero":
        return [-error for error in errors]
    if kind == "mean":
        return [
            torch.stack([means.get(name, own) for name, own in zip(_with_answer(prompt), error, strict=True)]) - error
            for prompt, error in zip(prompts, errors, strict=True)
        ]
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(error.shape, generator=generator).to(error) for error in errors]
        return [
            torch.nn.functional.normalize(noise, dim=-1) * error.norm(dim=-1, keepdim=True)
            for noise, error in zip(drawn, errors, strict=True)
        ]
    donors = other_items(len(prompts) // 2, seed)
    deltas: Deltas = []
    for row, (prompt, error) in enumerate(zip(prompts, errors, strict=True)):
        other = 2 * int(donors[row // 2]) + row % 2
        at = torch.tensor(aligned(prompts[other], prompt), device=error.device)
        deltas.append(torch.where((at >= 0)[:, None], errors[other][at.clamp(min=0)], error) - error)
    return deltas


def _with_answer(prompt: Prompt) -> list[str]:
    """The place of each token, the answer position's being its own."""
    names = places(prompt)
    for position in prompt.spans["answer"]:
        names[position] = "answer"
    return names
