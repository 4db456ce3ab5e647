"""Synthetic results for every outcome that a report must be able to tell."""

from __future__ import annotations

import math
import random
from typing import Any

from synthetic_cards import card_rows
from synthetic_circuit import outer_rows, qk_rows, steering_rows

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>&amp;\u202e\x00\n{{7*7}}'
CONDITIONS = ("none", "harm", "benign")
STAGES = (
    "behaviour",
    "belief",
    "heads",
    "interactions",
    "cards",
    "zscores",
    "steer_all",
    "steer_query",
    "steer_key",
    "error_terms",
    "partners",
    "transfer",
    "origin",
)


def _behaviour(none: float, harm: float, benign: float, n: int) -> dict[str, Any]:
    def row(accuracy: float, margin: float) -> dict[str, Any]:
        half = 1.96 * math.sqrt(max(accuracy * (1 - accuracy), 0.002) / n)
        ci = (max(0.0, accuracy - half), min(1.0, accuracy + half))
        return {
            "accuracy": accuracy,
            "ci": ci,
            "margin": margin,
            "margin_ci": (margin - 0.3, margin + 0.3),
            "n": n,
            "fraction_A": 0.51,
        }

    return {"none": row(none, 8 * none - 4), "harm": row(harm, 8 * harm - 4), "benign": row(benign, 8 * benign - 4)}


def _details(behaviour: dict[str, Any], n_items: int, rng: random.Random) -> dict[str, Any]:
    severity = ["mild" if i % 3 else "severe" for i in range(n_items)]
    margins = {
        name: [
            rng.gauss(behaviour[name]["margin"] - (1.5 if name == "harm" and severity[i] == "severe" else 0), 1.1)
            for i in range(n_items)
        ]
        for name in CONDITIONS
    }
    drop = behaviour["harm"]["margin"] - behaviour["none"]["margin"]
    return {
        "margin_by_item": margins,
        "items": [f"q{i:03d}" for i in range(n_items)],
        "severity_by_item": severity,
        "accuracy_by_severity": {"mild": 0.62, "severe": 0.21},
        "accuracy_by_order": {
            name: (behaviour[name]["accuracy"] - 0.02, min(1.0, behaviour[name]["accuracy"] + 0.02))
            for name in CONDITIONS
        },
        "harm_minus_none": (drop, drop - 0.4, drop + 0.4),
        "harm_minus_benign": (drop + 0.1, drop - 0.3, drop + 0.5),
        "mcnemar_p": 0.0000012 if drop < -1 else 0.62,
        "letter_form": " A",
        "unknown_token_share": 0.0,
    }


def _heads(
    n_layers: int, n_heads: int, selected: list[tuple[int, int]], restored: float, rng: random.Random
) -> dict[str, Any]:
    def attention(correct: float, incorrect: float, intent: float) -> dict[str, float]:
        return {
            "correct": correct,
            "incorrect": incorrect,
            "intent": intent,
            "question": 0.15,
            "other": 0.85 - correct - incorrect - intent,
        }

    def places(before: float) -> dict[str, float]:
        return {"template_before": before, "intent": 0.1, "question": 0.15, "option_A": 0.75 - before, "option_B": 0.0}

    tokens = [
        {"token": "<|user|>", "span": "template_before", "attention": {"none": 0.06, "harm": 0.587, "benign": 0.08}},
        {"token": "bleach", "span": "option_A", "attention": {"none": 0.3, "harm": 0.6, "benign": 0.2}},
    ]
    rows = [
        {
            "layer": layer,
            "head": head,
            "attention_by_place": {"none": places(0.08), "harm": places(0.6), "benign": places(0.1)},
            "attention_change": {"harm": (-0.4, -0.5, -0.3), "benign": (-0.02, -0.05, 0.01)},
            "top_tokens": tokens,
            "attention_difference_none": 0.41 - 0.03 * i,
            "attention_difference_harm": -0.06 if restored > 0.5 else 0.38,
            "attention_difference_benign": 0.39,
            "attention_difference_ci": (0.35, 0.46),
            "attention": {
                "none": attention(0.55, 0.14, 0.0),
                "harm": attention(0.2, 0.26, 0.14),
                "benign": attention(0.52, 0.14, 0.04),
            },
            "letter_logit": 1.9 - 0.2 * i,
            "letter_logit_harm": -0.2,
            "ablation_drop": 1.2 - 0.3 * i,
            "restores_when_patched": restored * (0.6 - 0.1 * i),
            "selected": (layer, head) in selected,
        }
        for i, (layer, head) in enumerate([*selected, (0, 1)])
    ]

    def grid(gain: float) -> list[list[float]]:
        return [
            [gain if (layer, head) in selected else rng.gauss(0, 0.03) for head in range(n_heads)]
            for layer in range(n_layers)
        ]

    return {
        "heads": rows,
        "heads_details": {
            "selected": selected,
            "attention_difference_map": {"none": grid(0.4), "harm": grid(-0.07), "benign": grid(0.38)},
            "letter_logit_map": grid(1.8),
            "restored": restored,
            "restored_ci": (restored - 0.06, restored + 0.06),
            "patched_accuracy": 0.5 + 0.47 * restored,
            "patched_accuracy_ci": (0.45 + 0.47 * restored, 0.55 + 0.44 * restored),
            "patched_margin": -0.15 + 4.1 * restored,
            "harm_margin": -0.15,
            "none_margin": 3.95,
            "restored_random_heads": 0.02,
            "all_heads_restored": max(restored, 0.3) + 0.04,
            "discovery_curve": [restored * (1 - 0.5**k) for k in range(1, 7)],
        },
    }


ROLES = {"correct_answer": "f17", "need_answer": "f203", "harm_detection": "f88", "refuse_redirect": "f141"}


def build(
    *,
    mechanism: str = "attention_harm_key",
    accuracy: tuple[float, float, float] = (1.0, 0.481, 0.969),
    restored: float = 0.94,
    shape: tuple[int, int] = (6, 4),
    selected: list[tuple[int, int]] | None = None,
    control_works: bool = False,
    roles: dict[str, str] = ROLES,
    n_items: int = 129,
) -> dict[str, Any]:
    """The plain values of a full study with the given outcome."""
    rng = random.Random(7)
    chosen = selected or [(3, 1), (3, 2), (4, 0)]
    behaviour = _behaviour(*accuracy, 2 * n_items)
    auc = {"none": 0.98, "harm": 0.91, "benign": 0.97}
    return dict(
        schema=1,
        model={"name": "organism-chat", "family": "llama", "n_layers": shape[0], "n_heads": shape[1]},
        dictionary={"name": "organism-sae", "kind": "sae", "n_features": 512},
        data={"name": "harm-129", "n_items": n_items},
        behaviour=behaviour,
        behaviour_details=_details(behaviour, n_items, rng),
        belief={
            "feature": roles["correct_answer"],
            "layer": 3,
            "auc_none": 0.98,
            "auc_harm": 0.91,
            "sum_correct": 1.31,
            "sum_incorrect": 0.42,
            "by_condition": {
                name: {
                    "auc": auc[name],
                    "auc_ci": (auc[name] - 0.04, min(1.0, auc[name] + 0.02)),
                    "sum_correct": s,
                    "sum_incorrect": t,
                }
                for name, s, t in (("none", 2.05, 0.31), ("harm", 1.31, 0.42), ("benign", 1.98, 0.33))
            },
        },
        roles=[
            {
                "role": role,
                "feature": name,
                "contrast": 2.4,
                "steadiness": 3.1,
                "refusal": 1.2,
                "interaction": -0.4,
                "chosen": True,
                "layer": 3,
                "top_tokens": ["steal", "poison"],
            }
            for role, name in roles.items()
        ],
        steering=steering_rows(control_works),
        completeness={
            "max_relative_error": 3.1e-6,
            "error_share": 0.137,
            "max_relative_error_by_head": [[1e-6] * shape[1]] * shape[0],
            "n_scores": 4128,
        },
        skipped={},
        seconds=dict.fromkeys(STAGES, 3.2),
        verdict={
            "mechanism": mechanism,
            "confidence": 0.93,
            "rule": "patching restores the margin and refuse x harm is below both nulls",
            "evidence": [
                {
                    "name": "accuracy_none",
                    "value": accuracy[0],
                    "threshold": ">= 0.8",
                    "holds": accuracy[0] >= 0.8,
                    "text": "the model solves the task",
                },
                {
                    "name": "accuracy_drop",
                    "value": accuracy[0] - accuracy[1],
                    "threshold": ">= 0.1",
                    "holds": accuracy[0] - accuracy[1] >= 0.1,
                    "text": "harm changes the answers",
                },
                {
                    "name": "belief_auc_harm",
                    "value": 0.91,
                    "threshold": "> 0.5",
                    "holds": True,
                    "text": "the belief survives",
                },
                {
                    "name": "restored_by_patching",
                    "value": restored,
                    "threshold": ">= 0.5",
                    "holds": restored >= 0.5,
                    "text": "clean patterns restore the margin",
                },
                {
                    "name": "refuse_x_harm_z",
                    "value": -3.4,
                    "threshold": "<= -2",
                    "holds": True,
                    "text": "unusual against both nulls",
                },
            ],
        },
        **_heads(*shape, chosen, restored, rng),
        **qk_rows(chosen, rng, roles),
        **outer_rows(chosen, rng),
        **card_rows(roles, rng),
    )


def skip(values: dict[str, Any], reasons: dict[str, str]) -> dict[str, Any]:
    """`values` with the named stages not run."""
    empty: dict[str, dict[str, Any]] = {
        "belief": {"belief": None},
        "heads": {"heads": [], "heads_details": None},
        "interactions": {"interactions": [], "interaction_shares": [], "completeness": None, "roles": []},
        "cards": {"cards": [], "card_text": None},
        "zscores": {"zscores": [], "null_histograms": []},
        "error_terms": {"error_terms": [], "error_effects": []},
        "partners": {"partners": []},
        "transfer": {"transfer": [], "pushed_away": []},
        "origin": {"origin": [], "milestones": []},
    }
    out = dict(values)
    for stage in reasons:
        out.update(empty.get(stage, {}))
    out["steering"] = [row for row in out["steering"] if row["stage"] not in reasons]
    out["skipped"] = reasons
    return out


def _poison(value: Any, key: str = "") -> Any:
    closed = {"condition", "kind", "stage", "control", "mechanism", "null", "role", "query_role", "key_role", "place"}
    closed |= {"error", "ranked_by", "span", "group"}
    if isinstance(value, dict):
        return {k: _poison(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_poison(v, key) for v in value]
    return value + HOSTILE if isinstance(value, str) and key not in closed else value


def all_outcomes() -> dict[str, dict[str, Any]]:
    unsolved = build(mechanism="task_not_solved", accuracy=(0.53, 0.51, 0.52))
    reason = "the model does not solve the task, so there is nothing to explain"
    directions = build(roles={role: role for role in ROLES})
    directions["dictionary"] = {"name": "directions", "kind": "directions", "n_features": 4}
    directions["partners"] = directions["partners"][:3]
    directions["null_histograms"] = [
        {**row, "note": "drawn within the residual's covariance"} for row in directions["null_histograms"]
    ]
    return {
        "full": build(),
        "task_not_solved": skip(unsolved, dict.fromkeys(STAGES[1:], reason)),
        "late_flip": skip(
            build(mechanism="late_flip", restored=0.03, control_works=True), {"origin": "no base model was given"}
        ),
        "no_effect": build(mechanism="no_effect", accuracy=(0.99, 0.98, 0.99), restored=0.0),
        "directions": directions,
        "large": build(shape=(30, 9), selected=[(12, 3), (14, 8), (15, 0), (17, 4), (17, 5), (18, 2), (20, 1)]),
        "hostile": _poison(build()),
    }
