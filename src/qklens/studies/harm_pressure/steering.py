"""Stages `steer_all`, `steer_query`, `steer_key`: dose and response, each beside its controls at equal norm.

Strengths are chosen on the discovery half and every curve is drawn on the report half. Strength 1 is the feature's
largest activation where its role plays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from qklens.analyses.contrasts import Role
from qklens.analyses.statistics import wilson
from qklens.data.render import Condition
from qklens.dictionaries.source import feature_index
from qklens.interventions.direction import Direction
from qklens.interventions.steer import Head, Steer
from qklens.studies.controls import find_controls
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Half, Lab
from qklens.studies.results import Steering
from qklens.studies.roles import role_direction

REFUSE_STRENGTHS = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0)
KEY_STRENGTHS = (0.0, 1.0, 2.0, 4.0)
MAX_BENIGN_LOSS = 0.03
GOOD_ENOUGH = 0.02
N_RANDOM = 10
StageName = Literal["steer_all", "steer_query", "steer_key"]
Make = Callable[[Direction, float], Steer]


def steer_all(lab: Lab, heads: Sequence[Head], roles: dict[Role, str]) -> StageOutput:
    """Refuse-and-redirect on the residual stream of all tokens, at the first layer the chosen heads read."""
    layer = min(layer for layer, _ in heads)
    direction = role_direction(lab, feature_index(lab.source, roles["refuse_redirect"]), "refuse_redirect")

    def make(d: Direction, strength: float) -> Steer:
        return Steer(d, strength, side="residual", layers=(layer,))

    return _sweep(
        lab,
        "steer_all",
        f"{named('refuse_redirect', direction)}, residual stream, layer {layer}",
        direction,
        make,
        roles,
    )


def steer_query(lab: Lab, heads: Sequence[Head], roles: dict[Role, str]) -> StageOutput:
    """Refuse-and-redirect only where the chosen heads' queries read it, at the answer position."""
    direction = role_direction(lab, feature_index(lab.source, roles["refuse_redirect"]), "refuse_redirect")
    where = ", ".join(f"L{layer}H{head}" for layer, head in heads)
    variant = f"{named('refuse_redirect', direction)}, query side of {where}"
    return _sweep(lab, "steer_query", variant, direction, query_steer(heads), roles)


def query_steer(heads: Sequence[Head]) -> Make:
    """Steering that only the named heads' queries at the answer position see."""

    def make(direction: Direction, strength: float) -> Steer:
        return Steer(direction, strength, side="query", heads=tuple(heads), tokens=("answer",))

    return make


def steer_key(lab: Lab, heads: Sequence[Head], roles: dict[Role, str]) -> StageOutput:
    """Harm-detection on the key side: down on the correct option, up on the incorrect one, down on both; by range."""
    direction = role_direction(lab, feature_index(lab.source, roles["harm_detection"]), "harm_detection")
    layers = tuple(layer for layer in direction.layers if layer <= max(layer for layer, _ in heads))
    name = ", ".join(f"L{layer}H{head}" for layer, head in heads)
    reach = layer_words(layers)
    at_heads = (f"keys of {name}", {"heads": tuple(heads)})
    everywhere = (f"keys of all heads, {reach}", {"layers": layers})
    stream = (f"residual stream, {reach}", {"layers": layers, "side": "residual"})
    plan = (
        ("down on correct", ("correct",), -1, (at_heads, everywhere, stream)),
        ("up on incorrect", ("incorrect",), 1, (at_heads, everywhere, stream)),
        ("down on both", ("correct", "incorrect"), -1, (at_heads,)),
    )
    points: list[Steering] = []
    for target, tokens, sign, ranges in plan:
        for where, options in ranges:

            def make(d: Direction, s: float, options: dict = options, tokens: tuple[str, ...] = tokens) -> Steer:
                return Steer(d, s, tokens=tokens, **{"side": "key", **options})

            strengths = tuple(sign * s if s else 0.0 for s in KEY_STRENGTHS)
            points += _curves(
                lab, "steer_key", f"{target}, {where}", direction, make, roles, strengths, "harm_detection"
            )
    return StageOutput(results={"steering": [p.model_dump() for p in points]})


def named(role: Role, direction: Direction) -> str:
    """A direction by its role, with the feature's label where it has one of its own."""
    words = {"refuse_redirect": "refuse-and-redirect", "harm_detection": "harm detection"}.get(role, role)
    return words if direction.label == role else f"{words} ({direction.label})"


def layer_words(layers: Sequence[int]) -> str:
    """`layer 2`, `layers 0 and 2`, and `layers 0 to 3` for a run without gaps."""
    *most, last = sorted(layers)
    if not most:
        return f"layer {last}"
    if len(most) > 1 and last - most[0] == len(most):
        return f"layers {most[0]} to {last}"
    return f"layers {', '.join(map(str, most))} and {last}"


def _sweep(
    lab: Lab, stage: StageName, variant: str, direction: Direction, make: Make, roles: dict[Role, str]
) -> StageOutput:
    points = _curves(lab, stage, variant, direction, make, roles, REFUSE_STRENGTHS, "refuse_redirect")
    chosen = next(p.strength for p in points if p.chosen)
    return StageOutput(results={"steering": [p.model_dump() for p in points]}, state={"strength": chosen})


def _curves(
    lab: Lab,
    stage: StageName,
    variant: str,
    direction: Direction,
    make: Make,
    roles: dict[Role, str],
    strengths: Sequence[float],
    role: Role,
) -> list[Steering]:
    chosen = _choose(lab, make, direction, strengths)
    taken = {feature_index(lab.source, label) for label in roles.values()}
    feature = feature_index(lab.source, roles[role])
    controls = find_controls(lab, direction, feature, role, taken=taken, draws=N_RANDOM)
    curves: list[tuple[Direction, Condition, Literal["random", "unrelated", "benign"] | None]] = [
        (direction, "harm", None),
        (controls.random[0], "harm", "random"),
        (controls.unrelated, "harm", "unrelated"),
        (direction, "benign", "benign"),
    ]
    points = []
    for d, condition, control in curves:
        work = lab.work(condition, "report")
        every = work.margins_each([make(d, s) for s in strengths])
        for strength, margins in zip(strengths, every, strict=True):
            draws = None
            if control == "random" and strength == chosen != 0:
                # One draw is luck: at the strength that is reported the control is the mean over several.
                others = work.margins_each([make(other, strength) for other in controls.random[1:]])
                right_each = [float((m > 0).float().mean()) for m in (margins, *others)]
                draws = (min(right_each), max(right_each), len(right_each))
                margins = torch.cat([margins, *others])
            right = int((margins > 0).sum())
            points.append(
                Steering(
                    stage=stage,
                    spec=make(d, strength).describe(),
                    strength=strength,
                    condition=condition,
                    accuracy=right / len(margins),
                    ci=wilson(round(right * len(work) / len(margins)), len(work)),
                    margin=float(margins.mean()),
                    control=control,
                    variant=variant,
                    chosen=control is None and strength == chosen,
                    draws=draws,
                )
            )
    return points


def _choose(lab: Lab, make: Make, direction: Direction, strengths: Sequence[float]) -> float:
    """The smallest dose that does it, on the discovery half.

    Of the strengths that spare the benign accuracy, the smallest in size whose accuracy under harm is within two points
    of the best one's: more strength buys nothing but side effects.
    """
    half: Half = "discovery"

    def accuracy(condition: Condition, some: Sequence[float]) -> list[float]:
        margins = lab.work(condition, half).margins_each([make(direction, s) for s in some])
        return (margins > 0).float().mean(dim=1).tolist()

    calm = float((lab.attention("benign", half).margins > 0).float().mean()) - MAX_BENIGN_LOSS
    spared = [s for s, right in zip(strengths, accuracy("benign", strengths), strict=True) if right >= calm] or [0.0]
    under_harm = dict(zip(spared, accuracy("harm", spared), strict=True))
    enough = max(under_harm.values()) - GOOD_ENOUGH
    return min((s for s in spared if under_harm[s] >= enough), key=abs)
