"""Where a head looks when it does not look at the options: attention by place in the prompt, and by token.

A head that is pulled off the correct option is pulled somewhere. Every token stands in exactly one place, so the places
share out the whole of the attention, and a token's share can be named with the place it stands in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qklens.data.render import Condition, Prompt

PLACES: tuple[str, ...] = (
    "template_before",
    "intent",
    "question",
    "option_A",
    "option_B",
    "instruction",
    "template_after",
    "between",
)
Rows = Sequence[Float[Tensor, "_k_pos"]]


@dataclass(frozen=True)
class Attended:
    """A token id at one place, and the mean attention on it by condition."""

    token: int
    place: str
    attention: dict[Condition, float]


def places(prompt: Prompt) -> list[str]:
    """The place of each token; `between` are tokens of no part, such as the line break after the question."""
    at = ["between"] * len(prompt.tokens)
    for name in PLACES[:-1]:
        for position in prompt.spans.get(name, ()):
            at[position] = name
    return at


def place_mass(prompts: Sequence[Prompt], rows: Rows) -> dict[str, float]:
    """Mean over prompts of Σ_{j in place} pattern[answer, j], one number a place; they sum to 1.

    Args:
        prompts: the prompts.
        rows: the head's pattern at the answer position, one row a prompt over its own tokens.
    """
    mass: dict[str, float] = dict.fromkeys(PLACES, 0.0)
    for prompt, row in zip(prompts, rows, strict=True):
        for name, share in zip(places(prompt), row.tolist(), strict=True):
            mass[name] += share / len(prompts)
    return mass


def attended_tokens(
    prompts: Mapping[Condition, Sequence[Prompt]], rows: Mapping[Condition, Rows], shown: int
) -> list[Attended]:
    """The tokens a head attends to most under any condition, largest first.

    A token's attention is Σ_j pattern[answer, j] over its occurrences at one place, mean over all prompts of the
    condition: one that few prompts hold counts for as much as it draws overall.

    Args:
        prompts: the prompts by condition.
        rows: the head's pattern at the answer position, by condition and prompt.
        shown: how many tokens are taken from each condition.
    """
    found: dict[Condition, dict[tuple[int, str], float]] = {}
    for condition, those in prompts.items():
        mass: dict[tuple[int, str], float] = defaultdict(float)
        for prompt, row in zip(those, rows[condition], strict=True):
            for token, place, share in zip(prompt.tokens, places(prompt), row.tolist(), strict=True):
                mass[token, place] += share / len(those)
        found[condition] = dict(mass)
    kept = {key for mass in found.values() for key in sorted(mass, key=lambda k: (-mass[k], k))[:shown]}
    listed = [
        Attended(token, place, {c: m.get((token, place), 0.0) for c, m in found.items()}) for token, place in kept
    ]
    return sorted(listed, key=lambda a: (-max(a.attention.values()), a.token, a.place))
