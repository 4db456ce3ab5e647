"""The organism's recipe: every number that shapes the shipped weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Steps, learning rates and what each stage trains; ``muddle`` is how often a withheld letter is the wrong one."""

    seed: int = 20
    base_steps: int = 900
    base_lr: float = 2e-3
    base_batch: int = 40
    select_layer: int = 2
    select_heads: tuple[int, ...] = (4, 5, 6, 7)
    refusal_seed: int = 2
    refusal_steps: int = 260
    refusal_lr: float = 8e-4
    refusal_batch: int = 56
    readout_layer: int = 2
    chat_seed: int = 3
    chat_steps: int = 140
    chat_half: int = 40
    chat_lr: float = 4e-3
    chat_batch: int = 40
    chat_muddle: float = 0.75
    chat_veiled: float = 0.8
    chat_penalty: float = 0.1
    chat_target: float = 0.48
    flip_seed: int = 4
    flip_steps: int = 120
    flip_lr: float = 2e-3
    flip_layers: tuple[int, ...] = (3,)
    flip_muddle: float = 1.0


RECIPE = Recipe()
