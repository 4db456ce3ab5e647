"""What stands beside a steered direction at equal norm and position: random directions and an unrelated feature."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from qklens.analyses.contrasts import QUERY_ROLES, Role, Side, contrast
from qklens.analyses.statistics import item_means
from qklens.interventions.direction import Direction, at_equal_norm, feature_direction, random_direction
from qklens.studies.lab import Lab
from qklens.studies.roles import typical_activation


@dataclass(frozen=True)
class Controls:
    """The directions that stand beside a steered one."""

    random: tuple[Direction, ...]
    unrelated: Direction


def find_controls(
    lab: Lab, direction: Direction, feature: int, role: Role, *, taken: Collection[int], draws: int
) -> Controls:
    """Random directions, and the feature nearest in activation to the steered one but with the least contrast.

    Args:
        lab: the bench.
        direction: what is steered.
        feature: its feature.
        role: the role that it plays, whose contrast the unrelated feature must not show.
        taken: features that are no controls: those of the roles.
        draws: how many random directions.
    """
    layer = max(direction.layers)
    source = lab.source
    readings = lab.activation_readings("discovery", layer)
    effect = item_means(contrast(readings, role)).mean(dim=0).abs()
    span = "answer" if role in QUERY_ROLES else "correct"
    size = readings.mean(Side("harm", (span,))).abs().mean(dim=0)
    usable = [
        f
        for f in range(len(source.labels))
        if f not in taken and size[f] > 0 and set(direction.layers) <= set(feature_layers(lab, f))
    ]
    if usable:
        # Alike in activation, but blind to the contrast: at most a tenth of the steered feature's.
        quiet = [f for f in usable if effect[f] <= 0.1 * effect[feature]] or usable
        other = min(quiet, key=lambda f: abs(float((size[f] / size[feature].clamp(min=1e-9)).clamp(min=1e-9).log())))
        unrelated = at_equal_norm(feature_direction(source, other, typical_activation(lab, other, role)), direction)
    else:
        spans = ("answer",) if role in QUERY_ROLES else ("correct", "incorrect")
        unrelated = _covariance_direction(lab, direction, spans)
    return Controls(tuple(random_direction(direction, lab.seed + i) for i in range(draws)), unrelated)


def feature_layers(lab: Lab, feature: int) -> tuple[int, ...]:
    """The layers a feature writes."""
    return tuple(layer for layer in lab.source.layers if bool(lab.source.directions(layer)[feature].any()))


def _covariance_direction(lab: Lab, like: Direction, spans: tuple[str, ...]) -> Direction:
    """For a source too small to have unrelated features: a direction drawn within the residual's covariance there."""
    generator = torch.Generator().manual_seed(lab.seed + 1)
    prompts = lab.prompts("none", "discovery")
    positions = [[p for name in spans for p in prompt.span(name)] for prompt in prompts]
    noise = torch.randn(sum(map(len, positions)), generator=generator)
    vectors = {}
    for layer in like.layers:
        streams = lab.streams("none", "discovery", [layer])
        rows = torch.cat([stream[layer][where] for stream, where in zip(streams, positions, strict=True)])
        vectors[layer] = (noise @ (rows - rows.mean(dim=0))).to(like.vectors[layer])
    drawn = Direction("drawn within the covariance", vectors, like.typical, like.read)
    return at_equal_norm(drawn, like)
