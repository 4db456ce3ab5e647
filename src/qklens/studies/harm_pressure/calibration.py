"""How often a verdict of a given strength is right: counted on planted models, where the truth is known.

A verdict's distance says how far it lies from the thresholds of its rule, in typical errors. Verdicts of the bench's
development seeds that name a mechanism are cut into four groups by distance; neighbours that would make confidence fall
as distance grows are pooled (isotonic regression); and

    confidence = (right + ½) / (n + 1)

of the group that a distance falls in. Nearer to a threshold than any verdict of the bench, nothing was counted: there
it goes in a straight line to one half at the threshold itself. `undetermined` is counted by itself in the same way. The
counts ship beside this file; `qklens bench planted` writes its own and says what held-out seeds make of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path

from qklens.files import read_json
from qklens.strict import Strict

UNDETERMINED = "undetermined"
_GROUPS = 4


class Group(Strict):
    """Verdicts of like strength.

    Attributes:
        least: the least distance that belongs here.
        n: how many there were.
        right: how many of them named what was planted.
    """

    least: float
    n: int
    right: int

    @property
    def confidence(self) -> float:
        """The posterior mean of the share that is right, under Jeffreys' prior."""
        return (self.right + 0.5) / (self.n + 1)


class Calibration(Strict):
    """The counts.

    Attributes:
        made: on what.
        named: verdicts that name a mechanism, by rising distance.
        undetermined: those that name none, likewise.
    """

    made: str
    named: tuple[Group, ...]
    undetermined: tuple[Group, ...]

    def confidence(self, mechanism: str, distance: float) -> float:
        """How often a verdict like this was right, to three digits."""
        groups, distance = self.undetermined if mechanism == UNDETERMINED else self.named, max(distance, 0.0)
        reached = [group for group in groups if group.least <= distance]
        if reached:
            return round(reached[-1].confidence, 3)
        first = groups[0]
        half = min(0.5, first.confidence)
        return round(half + (first.confidence - half) * distance / first.least, 3)


def fit(verdicts: Iterable[tuple[str, float, bool]], made: str) -> Calibration:
    """Count verdicts of known truth.

    Args:
        verdicts: mechanism, distance, and whether it was right.
        made: where they are from.
    """
    found = list(verdicts)
    sides = [[(distance, right) for m, distance, right in found if (m == UNDETERMINED) == none] for none in (0, 1)]
    return Calibration(made=made, named=_groups(sides[0]), undetermined=_groups(sides[1]))


def _groups(verdicts: list[tuple[float, bool]]) -> tuple[Group, ...]:
    left, size, pooled = sorted(verdicts), max(1, -(-len(verdicts) // _GROUPS)), list[Group]()
    while left:
        # Equal distances stay together.
        n = sum(distance <= left[min(size, len(left)) - 1][0] for distance, _ in left)
        some, left = left[:n], left[n:]
        pooled.append(Group(least=some[0][0], n=len(some), right=sum(right for _, right in some)))
        while len(pooled) > 1 and pooled[-1].confidence <= pooled[-2].confidence:
            last, before = pooled.pop(), pooled.pop()
            pooled.append(Group(least=before.least, n=before.n + last.n, right=before.right + last.right))
    return tuple(pooled) or (Group(least=0.0, n=0, right=0),)


@cache
def shipped_calibration() -> Calibration:
    """The counts that ship."""
    path = Path(str(files("qklens"))) / "studies" / "harm_pressure" / "calibration.json"
    return Calibration.model_validate(read_json(path))
