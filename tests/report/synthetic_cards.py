"""Synthetic feature cards, one a feature that holds a role."""

from __future__ import annotations

import random
from typing import Any

GROUPS = ("text", "none", "harm", "benign")


def _example(group: str, number: int, strength: float) -> dict[str, Any]:
    words = ["I", " want", " to", " steal", " a", " car", "."]
    return {
        "group": group,
        "where": f"window {number}" if group == "text" else f"law-{number:02d}, correct first",
        "item": None if group == "text" else f"law-{number:02d}",
        "place": None if group == "text" else "intent",
        "position": 4,
        "activation": strength,
        "at": 3,
        "tokens": [{"text": w, "activation": strength if i == 3 else max(i - 3, 0) * 0.1} for i, w in enumerate(words)],
    }


def card_rows(roles: dict[str, str], rng: random.Random) -> dict[str, Any]:
    """The two fields of the results that hold the cards."""
    held: dict[str, list[str]] = {}
    for role, feature in roles.items():
        held.setdefault(feature, []).append(role)
    cards = []
    for feature, names in held.items():
        density = []
        for group in GROUPS:
            counts = [rng.randint(0, 60) for _ in range(6)] + [1]
            density.append(
                {
                    "group": group,
                    "tokens": 1000,
                    "active": sum(counts),
                    "share": sum(counts) / 1000,
                    "mean": 1.2,
                    "largest": 6.0,
                    "least": 0.0,
                    "edges": [-0.4 + 0.2 * i for i in range(8)],
                    "counts": counts,
                }
            )
        cards.append(
            {
                "feature": feature,
                "layer": 3,
                "dictionary": "organism-sae",
                "model": "organism-chat",
                "norm": 1.1,
                "roles": names,
                "density": density,
                "top": [_example("text", i, 6.0 - i) for i in range(3)],
                "bottom": [],
                "deciles": [{**_example("text", i, 0.5 + 0.5 * i), "decile": i} for i in range(10)],
                "prompts": [_example(group, i, 5.0 - i) for group in GROUPS[1:] for i in range(3)],
                "places": [
                    {"condition": group, "place": "intent", "tokens": 80, "share": 0.4, "mean": 0.9}
                    for group in GROUPS[1:]
                ],
                "promoted": [{"token": " steal", "token_id": 7, "logit": 0.4}],
                "suppressed": [{"token": " give", "token_id": 9, "logit": -0.3}],
                "logit_scale": 1.3,
                "nearest": [{"feature": "f3", "cosine": 0.8}],
                "opposite": [{"feature": "f4", "cosine": -0.7}],
            }
        )
    text = {"name": "neutral.txt", "sha256": "ab", "windows": 30, "tokens": 2600, "unknown": 0.2}
    return {"cards": cards, "card_text": text}
