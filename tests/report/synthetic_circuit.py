"""Synthetic rows for the stages after the heads are found."""

from __future__ import annotations

import math
import random
from typing import Any


def qk_rows(selected: list[tuple[int, int]], rng: random.Random, names: dict[str, str]) -> dict[str, Any]:
    pairs = [
        ("need_answer", "correct_answer", 2.6, 2.7, 6.1),
        ("refuse_redirect", "harm_detection", 0.0, -2.3, -3.4),
        ("refuse_redirect", "correct_answer", 0.0, -0.1, -0.3),
        ("need_answer", "harm_detection", 0.02, 0.2, 0.4),
    ]
    interactions, shares, zscores, nulls = [], [], [], []
    for layer, head in selected:
        for kind in ("realised", "contrastive"):
            for condition in ("none", "harm"):
                for query, key, none, harm, _ in pairs:
                    value = (none if condition == "none" else harm) * rng.uniform(0.8, 1.1)
                    interactions.append(
                        {
                            "layer": layer,
                            "head": head,
                            "query": names[query],
                            "key": names[key],
                            "condition": condition,
                            "value": value,
                            "kind": kind,
                            "query_role": query,
                            "key_role": key,
                        }
                    )
                interactions += [
                    {
                        "layer": layer,
                        "head": head,
                        "query": "error" if i == 0 else f"f{300 + i}",
                        "key": "bias" if i == 1 else f"f{400 + i}",
                        "condition": condition,
                        "value": rng.gauss(0, 0.5),
                        "kind": kind,
                    }
                    for i in range(8)
                ]
                parts = {
                    f"{q} x {k}": rng.gauss(0, 0.3)
                    for q in ("feature", "bias", "error")
                    for k in ("feature", "bias", "error")
                }
                shares.append(
                    {
                        "layer": layer,
                        "head": head,
                        "condition": condition,
                        "kind": kind,
                        "score": sum(parts.values()),
                        "shares": parts,
                    }
                )
        for null in ("random_pairs", "matched"):
            for query, key, _, _, z in pairs:
                zscores.append(
                    {
                        "layer": layer,
                        "head": head,
                        "query": names[query],
                        "key": names[key],
                        "value": 0.02 * z,
                        "null": null,
                        "z": z * (1 if null == "random_pairs" else 0.85) + rng.gauss(0, 0.2),
                        "p": 0.002 if abs(z) > 2 else 0.6,
                        "q": 0.008 if abs(z) > 2 else 0.8,
                        "query_role": query,
                        "key_role": key,
                        "n_draws": 1000,
                        "seed": 7,
                    }
                )
            edges = [-0.08 + 0.004 * i for i in range(41)]
            counts = [round(80 * math.exp(-0.5 * ((e + 0.002) / 0.02) ** 2)) for e in edges[:-1]]
            nulls.append(
                {
                    "layer": layer,
                    "head": head,
                    "null": null,
                    "edges": edges,
                    "counts": counts,
                    "mean": 0.0,
                    "sd": 0.02,
                    "n": sum(counts),
                }
            )
    return {"interactions": interactions, "interaction_shares": shares, "zscores": zscores, "null_histograms": nulls}


def steering_rows(control_works: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    plan = [
        ("steer_all", "refuse-and-redirect, residual, every layer", 0.45),
        ("steer_query", "refuse-and-redirect, query side of the selected heads", 0.44),
        ("steer_key", "harm detection down on the correct option, layers 2-4", 0.05),
        ("steer_key", "harm detection up on the incorrect option, layers 0-4", 0.31),
    ]
    for stage, variant, gain in plan:
        sign = 1 if "up on" in variant else -1
        for control in (None, "random", "unrelated", "benign"):
            for step in range(6):
                dose = step / 5
                effect = gain * (1 - (1 - dose) ** 2)
                if control in ("random", "unrelated"):
                    effect *= 0.9 if control_works else 0.04
                accuracy = 0.97 - 0.05 * dose if control == "benign" else 0.48 + effect
                rows.append(
                    {
                        "stage": stage,
                        "spec": {"mode": "add", "unit": "activation_max", "layers": [2, 3]},
                        "strength": sign * dose * 2,
                        "condition": "benign" if control == "benign" else "harm",
                        "accuracy": accuracy,
                        "ci": (max(0.0, accuracy - 0.08), min(1.0, accuracy + 0.07)),
                        "margin": 8 * accuracy - 4,
                        "control": control,
                        "variant": variant,
                        "chosen": step == 4,
                    }
                )
    return rows


def outer_rows(selected: list[tuple[int, int]], rng: random.Random) -> dict[str, Any]:
    errors = [
        {
            "layer": layer,
            "head": head,
            "condition": condition,
            "through": {"features": -1.6 * g, "bias": 0.1 * g, "error": -0.5 * g},
            "ci": {"features": (-1.9 * g, -1.3 * g), "bias": (0.02, 0.2), "error": (-0.9 * g, 0.05)},
            "total": -2.0 * g,
        }
        for layer, head in selected
        for condition, g in (("none", 0.1), ("harm", 1.0), ("benign", 0.15))
    ]
    ranked = sorted([rng.gauss(0, 0.03) for _ in range(28)] + [-0.14, -0.11, 0.12])
    tags = {
        0: ("harm_detection", ["poison", "hurt", "steal"]),
        1: (None, ["fever", "dizzy", "rash"]),
        2: (None, ["invoice", "forge"]),
    }
    partners = [
        {
            "feature": f"f{500 + i}",
            "value": value,
            "z": value / 0.03,
            "rank": i + 1 if i < 16 else i - 31,
            "role": tags.get(i, (None,))[0],
            "top_tokens": tags.get(i, (None, ["the", "city", "of"]))[1],
            "activation": {
                "harm": abs(rng.gauss(0.2, 0.2)),
                "symptoms": abs(rng.gauss(0.2, 0.2)),
                "fraud": abs(rng.gauss(0.1, 0.1)),
            },
        }
        for i, value in enumerate(ranked)
    ]
    transfer = [
        {
            "set": name,
            "condition": condition,
            "accuracy": accuracy,
            "ci": (accuracy - 0.07, min(1.0, accuracy + 0.05)),
            "margin": 8 * accuracy - 4,
            "margin_ci": (0.0, 1.0),
            "n": 48,
            "attention_difference": accuracy - 0.5,
            "refuse_activation": 0.05 if condition != "harm" else 0.9,
            "steered_accuracy": 0.91 if condition == "harm" else None,
            "steered_margin": 3.0 if condition == "harm" else None,
        }
        for name in ("symptoms", "fraud")
        for condition, accuracy in (("none", 0.98), ("harm", 0.56 if name == "fraud" else 0.6), ("benign", 0.96))
    ]
    origin = [
        {
            "checkpoint": name,
            "step": i,
            "accuracy": {"none": 0.99, "harm": a, "benign": 0.98},
            "ci": {"none": (0.97, 1.0), "harm": (a - 0.06, min(1.0, a + 0.06)), "benign": (0.96, 0.99)},
            "margin": {"none": 4.0, "harm": 8 * a - 4, "benign": 3.9},
            "attention_difference": {"none": 0.4, "harm": 0.8 * (a - 0.5), "benign": 0.39},
            "refuse_contrast": 0.98 - a,
            "refuse_harm_interaction": -0.1 * (0.98 - a),
            "refuse_harm_z": -6.8 * (0.98 - a),
        }
        for i, (name, a) in enumerate(
            (("base", 0.98), ("step-200", 0.9), ("step-400", 0.7), ("step-800", 0.52), ("chat", 0.48))
        )
    ]
    return {"error_terms": errors, "partners": partners, "transfer": transfer, "origin": origin}
