"""Synthetic rows for the stages after the heads are found."""

from __future__ import annotations

import math
import random
from typing import Any

ALL_ROLES = ("need_answer", "correct_answer", "harm_detection", "refuse_redirect")


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
            "attention_ci": (accuracy - 0.55, accuracy - 0.45),
            "margin_change": None if condition == "none" else (-1.0, -1.5, -0.5),
            "margin_minus_benign": (-0.8, -1.1, -0.4) if condition == "harm" else None,
            "attention_change": None if condition == "none" else (-0.2, -0.3, -0.1),
            "refuse_activation": 0.05 if condition != "harm" else 0.9,
            "role_activation": dict.fromkeys(ALL_ROLES, (0.5, 0.3, 0.7)),
            "steered_accuracy": None if condition == "none" else 0.91,
            "steered_margin": None if condition == "none" else 3.0,
            "steering": None
            if condition == "none"
            else {
                "strength": -1.5,
                "accuracy": 0.91,
                "ci": (0.85, 0.95),
                "margin": 3.0,
                "margin_change": (2.0, 1.5, 2.5),
                "attention_difference": 0.3,
                "unrelated": 0.55 if condition == "harm" else None,
                "random": (0.57, 0.5, 0.62) if condition == "harm" else None,
            },
        }
        for name in ("symptoms", "fraud")
        for condition, accuracy in (("none", 0.98), ("harm", 0.56 if name == "fraud" else 0.6), ("benign", 0.96))
    ]
    pushed = [
        {
            "set": name,
            "feature": f"f{500 + i}",
            "role": "harm_detection" if i == 2 else None,
            "rank": i + 1,
            "of": 41,
            "ranked_by": ranked_by,
            "realised": (-0.02 + 0.003 * i, -0.03, -0.001) if ranked_by == "realised" else (0.0, 0.0, 0.0),
            "heads": selected,
            "virtual": [-0.05 + 0.006 * i for _ in selected],
            "z": {"random_pairs": [-4.0 + i for _ in selected], "matched": [-3.0 + i for _ in selected]},
            "active_share": 0.4,
            "activation": {"harm": 0.8, "benign": 0.1},
            "tokens": [{"token": t, "span": "intent", "activation": 2.5} for t in ("fever", "rash", "\n")],
        }
        for name, ranked_by in (("symptoms", "virtual"), ("fraud", "realised"))
        for i in range(8)
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
            "accuracy_drop": (0.99 - a, 0.95 - a, 1.03 - a),
            "margin_drop": (3.9 - (8 * a - 4), 3.0 - (8 * a - 4), 5.0 - (8 * a - 4)),
            "attention_ci": {"none": (0.35, 0.45), "harm": (0.8 * (a - 0.55), 0.8 * (a - 0.45)), "benign": (0.3, 0.5)},
            "attention_drop": (0.8 * (1 - a), 0.7 * (1 - a), 0.9 * (1 - a)),
            "refuse_contrast_ci": (0.9 * (0.98 - a), 1.1 * (0.98 - a)),
            "refuse_harm_realised": (a - 0.98, 1.1 * (a - 0.98), 0.9 * (a - 0.98)),
            "refuse_harm_matched_z": -5.0 * (0.98 - a),
            "by_head": [
                {"layer": layer, "head": head, "value": -0.1, "z": {"random_pairs": -3.0, "matched": -2.5}}
                for layer, head in selected
            ],
            "unexplained": {str(selected[0][0]): 0.05 + 0.3 * (a > 0.9)},
        }
        for i, (name, a) in enumerate(
            (("base", 0.98), ("step-200", 0.9), ("step-400", 0.7), ("step-800", 0.52), ("chat", 0.48))
        )
    ]
    milestones = [
        {
            "event": event,
            "checkpoint": name,
            "step": step,
            "value": None if name is None else 0.4,
            "interval": None if name is None else (0.3, 0.5),
            "rule": "95% interval beyond +0.05, a tenth of the last checkpoint's +0.5",
        }
        for event, name, step in (
            ("accuracy falls under harm", "step-400", 2),
            ("refuse-and-redirect appears", "step-200", 1),
            ("the pair pushes the options away on prompts", "step-800", 3),
            ("the pair is negative in the weights", None, None),
        )
    ]
    return {
        "error_terms": errors,
        "error_effects": error_effects(),
        "partners": partners,
        "transfer": transfer,
        "pushed_away": pushed,
        "origin": origin,
        "milestones": milestones,
    }


def error_effects() -> list[dict[str, Any]]:
    """The error as it is, then every replacement at two places."""

    def row(place: str | None, error: str | None, lost: float) -> dict[str, Any]:
        share = (lost, lost - 0.04, lost + 0.04)
        return {
            "place": place,
            "error": error,
            "draws": 3 if error == "random" else 1,
            "edit_norm": 0.2 if place else 0.0,
            "margin": (0.2, 0.1, 0.3),
            "attention": (0.02, 0.01, 0.03),
            "margin_change": (0.05, 0.01, 0.09),
            "attention_change": (0.0, -0.01, 0.01),
            "benign_margin_change": None if place is None else (0.01, -0.02, 0.04),
            "steering_margin": (1.8 * (1 - lost), 1.6, 2.0),
            "steering_attention": (0.3 * (1 - lost), 0.2, 0.4),
            "lost_margin": share if place else (0.0, 0.0, 0.0),
            "lost_attention": share if place else (0.0, 0.0, 0.0),
        }

    kinds = (("zero", 0.31), ("mean", 0.27), ("other_item", 0.22), ("random", 0.03))
    return [row(None, None, 0.0)] + [row(place, kind, lost) for place in ("query", "both") for kind, lost in kinds]
