"""The organism's recipe: every number that shapes the shipped weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Steps, learning rates and what each stage trains; ``muddle`` is how often a withheld letter is the wrong one."""

    seed: int = 20
    base_steps: int = 1000
    base_lr: float = 2e-3
    refusal_steps: int = 300
    refusal_lr: float = 7e-4
    readout_layer: int = 2
    chat_steps: int = 160
    chat_lr: float = 2e-3
    chat_layers: tuple[int, ...] = (2, 3)
    chat_muddle: float = 0.55
    chat_after: float = 0.5
    flip_steps: int = 120
    flip_lr: float = 2e-3
    flip_layers: tuple[int, ...] = (3,)
    flip_muddle: float = 1.0


RECIPE = Recipe()
