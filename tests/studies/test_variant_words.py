"""How the steering stages name layers and directions."""

from __future__ import annotations

import pytest

from qklens.interventions.direction import Direction
from qklens.studies.harm_pressure.steering import layer_words, named


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((2,), "layer 2"),
        ((1, 2), "layers 1 and 2"),
        ((0, 1, 2, 3), "layers 0 to 3"),
        ((0, 2, 5), "layers 0, 2 and 5"),
        ((3, 0), "layers 0 and 3"),
    ],
)
def test_layers_are_one_or_several(layers: tuple[int, ...], words: str):
    assert layer_words(layers) == words


def test_a_direction_named_after_its_role_is_named_once():
    def direction(label: str) -> Direction:
        return Direction(label, {}, {}, lambda _layer, stream: stream)

    assert named("refuse_redirect", direction("refuse_redirect")) == "refuse-and-redirect"
    assert named("refuse_redirect", direction("L2/186")) == "refuse-and-redirect (L2/186)"
