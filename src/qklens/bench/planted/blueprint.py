"""A planted model on paper: named directions of the stream, heads as pairs of them, and what the MLPs flip.

A head's score is Σ over its pairs (Σ wₐ xₐ at the query) · (Σ w_b x_b at the key), in score units, where xₐ is the
amount of direction a in the stream. What it carries is what it reads at the attended token and writes at its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qklens.studies import results

Amounts = dict[str, float]
"""Directions by name, with an amount or weight each."""

N_CODES = 12
CODES, TASK_CODES = (tuple(f"{of}_code{i}" for i in range(N_CODES)) for of in ("thing", "task"))
"""A task and its thing have the same code, a vector of ±1/√12, along directions of their own; by it a model tells which
option is correct."""
CONSTANT = "constant"
NAMES = (
    CONSTANT, "start", "task", "thing", "letter", "letter_A", "letter_B", "option_A", "option_B", "harm_verb",
    "ask", "correct", "harm", "refuse", "need", "out_A", "out_B", "pick_A", "pick_B", "nothing",
    *CODES, *TASK_CODES,
)  # fmt: skip
CONSTANT_AMOUNT = 6.0
"""Every token's amount of `constant`; it keeps the norms' scales steady, and is the bias that a llama lacks."""
ROLE_DIRECTIONS = {
    "need_answer": "need", "correct_answer": "correct", "harm_detection": "harm", "refuse_redirect": "refuse",
}  # fmt: skip
"""Which direction plays each role of the study."""

Part = Literal[
    "match", "letter", "refuse", "need", "harm", "belief", "unneed", "select", "relay", "late", "decoy", "idle"
]
Verdict = results.Mechanism
Mechanism = Literal[
    "no_effect",
    "task_not_solved",
    "belief_change",
    "late_flip",
    "attention_answer_key",
    "attention_harm_key",
    "mixed",
    "decoy",
    "need_lost",
    "need_harm",
]
Graded = Literal["answer_key_late", "harm_key_late", "belief_late", "answer_key_need", "weak_late", "weak_answer_key"]
"""Mixtures of two causes, and weak single ones, whose strength is graded; what is right for them is measured."""


@dataclass(frozen=True)
class PlannedHead:
    """One head.

    Attributes:
        part: what it is for.
        layer: where it stands; which head of the layer it becomes is drawn.
        pairs: (query, key) whose products sum to the score.
        carries: (read, written) directions at the attended token and at its own.
        signs: planted pairs of roles and their sign, as the study should find them.
    """

    part: Part
    layer: int
    pairs: tuple[tuple[Amounts, Amounts], ...]
    carries: tuple[tuple[Amounts, Amounts], ...]
    signs: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedFlip:
    """An MLP that writes `size` · gate · (plus − minus) along (plus − minus) of `writes`, half on either.

    Attributes:
        layer: where it stands.
        gate: the direction that switches it on; None is always on.
        reads: (plus, minus), whose difference is multiplied.
        writes: (plus, minus), along which the product is written.
        size: the factor; negative flips.
    """

    layer: int
    gate: str | None
    reads: tuple[str, str]
    writes: tuple[str, str]
    size: float


@dataclass(frozen=True)
class Blueprint:
    """A whole planted model.

    Attributes:
        mechanism: what was planted.
        expected: the verdict that is right for it; of a graded one the first cause's.
        variant: which of the mechanism's forms, and how the letter reaches the output.
        n_layers: layers.
        heads: its heads; all others are idle or distractors.
        flips: its MLPs.
        letter_bias: added to the stream's `out_A` at the answer.
    """

    mechanism: Mechanism | Graded
    expected: Verdict
    variant: str
    n_layers: int
    heads: tuple[PlannedHead, ...]
    flips: tuple[PlannedFlip, ...]
    letter_bias: float = 0.0
