"""The fewest heads that bring the margin back, and how much each number of them restores.

    share(H) = Σ (margin with H − margin under harm) / Σ (margin without harm − margin under harm)      over prompts

`greedy` tries every head that is left beside those already taken and keeps the best, until none adds anything.
`attribution` ranks the heads once, by the letter that the change of each one's output writes when all are edited
together (direct logit attribution, so an effect through later heads or MLPs does not count), and takes them in order.

Heads further down may make up for an edit, or undo it (self-repair). So every set is measured twice: with the other
heads free, and with each of them held at its own answer row of the unedited run. What they differ by is what the
others' looking elsewhere does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.readings import letter_attribution, read_attention, read_patterns
from qklens.analyses.statistics import Array, Interval, bootstrap_ratio, item_means, wilson
from qklens.interventions.engine import Workset
from qklens.interventions.patch import frozen_patterns
from qklens.interventions.points import Intervention
from qklens.interventions.steer import Head

Method = Literal["greedy", "attribution"]
METHODS: tuple[Method, ...] = ("greedy", "attribution")
Make = Callable[[Sequence[Head]], Intervention]
ENOUGH, EACH = 0.9, 12
LEAST = 0.01
"""A head that adds less than this share of what was lost adds nothing."""


@dataclass(frozen=True, eq=False)
class Restoration:
    """Prompts under harm, what they lost, and what is done to heads to get it back.

    Attributes:
        work: the prompts, item by item, both orders of an item next to each other.
        clean: the margins of the same items and orders without harm.
        make: some heads -> the intervention on them.
    """

    work: Workset
    clean: Float[Tensor, " prompt"]
    make: Make

    @property
    def lost(self) -> Float[Tensor, " prompt"]:
        """The margin without harm less the margin under it."""
        return self.clean - self.work.margins()

    def gains(
        self, sets: Sequence[Sequence[Head]], held: Sequence[Intervention | None] = (), *, idle_ok: bool = True
    ) -> Float[Tensor, "set prompt"]:
        """The margin with each set of heads edited less the margin without, all sets side by side.

        Args:
            sets: heads.
            held: for each set, what acts beside the edit, if anything.
            idle_ok: whether an edit may change nothing, as of a head without output; it then gains nothing.

        Raises:
            NothingChangedError: one changes nothing, and may not.
        """
        beside = held or [None] * len(sets)
        points = [
            [self.make(heads), *([] if other is None else [other])] for heads, other in zip(sets, beside, strict=True)
        ]
        return self.work.margins_each(points, idle_ok=idle_ok) - self.work.margins()


@dataclass(frozen=True)
class HeadSearch:
    """What a search chose, on the items that it looked at.

    Attributes:
        method: `greedy` or `attribution`.
        order: heads as they were taken.
        sets: the first one, two, ... of them; last, all candidates.
        shares: what each set restores.
        smallest: the first set that restores 90% of what the best one does; no heads where none restores anything.
    """

    method: Method
    order: tuple[Head, ...]
    sets: tuple[tuple[Head, ...], ...]
    shares: tuple[float, ...]
    smallest: tuple[Head, ...]

    def describe(self) -> dict[str, Any]:
        """As echoed into results."""
        return asdict(self)


@dataclass(frozen=True)
class Restored:
    """What one set of heads restores, on items that did not choose it.

    Attributes:
        heads: the set.
        margin: the mean margin with it.
        accuracy: how many margins are above zero, with Wilson's interval.
        share: of what was lost, with the others free; nothing where nothing was lost. Intervals are bootstrapped over
            items.
        share_frozen: the same with all other heads held at their own rows.
        others: share less share_frozen: what the others add to the set's effect, or take from it, by looking elsewhere.
    """

    heads: tuple[Head, ...]
    margin: float
    accuracy: float
    accuracy_ci: Interval
    share: float | None
    share_ci: Interval | None
    share_frozen: float | None
    share_frozen_ci: Interval | None
    others: float | None
    others_ci: Interval | None

    def as_row(self) -> dict[str, Any]:
        """As a row of a table."""
        return asdict(self)


def find_fewest(
    bench: Restoration, candidates: Sequence[Head], method: Method, step: Callable[[], None] = lambda: None
) -> HeadSearch:
    """Search for the smallest set of heads; `step` is called after each pass over the prompts.

    Raises:
        NothingChangedError: editing all candidates together changes no value.
    """
    lost, every = float(bench.lost.mean()), tuple(candidates)
    least = LEAST * abs(lost)
    together = float(bench.gains([every], idle_ok=False).mean())
    step()
    if method == "greedy":
        order, gains = _greedy(bench, every, least, together, step)
        sets = [tuple(order[:k]) for k in range(1, len(order) + 1)]
    else:
        order = _by_attribution(bench, every)
        sets = nested(order)[:-1]
        gains = bench.gains(sets).mean(dim=1).tolist() if sets else []
        step()
    if not sets or len(sets[-1]) < len(every):
        sets, gains = [*sets, every], [*gains, together]
    best = max(gains)
    enough = (some for some, gain in zip(sets, gains, strict=True) if gain >= ENOUGH * best)
    return HeadSearch(
        method,
        tuple(order),
        tuple(sets),
        tuple(gain / lost for gain in gains),
        next(enough) if best > least else (),
    )


def nested(order: Sequence[Head]) -> list[tuple[Head, ...]]:
    """The first one, two, ... heads; from twelve on each set half as large again as the one before, and last all."""
    sizes = [*range(1, min(len(order), EACH) + 1)]
    while sizes and sizes[-1] < len(order):
        sizes.append(min(len(order), sizes[-1] * 3 // 2))
    return [tuple(order[:k]) for k in sizes]


def restoration_curve(bench: Restoration, sets: Sequence[Sequence[Head]], seed: int) -> list[Restored]:
    """What each set restores, with the others free and held; best on items that did not choose the sets.

    Args:
        bench: the prompts.
        sets: heads.
        seed: of the bootstrap.
    """
    subject, work = bench.work.subject, bench.work
    lowest = min((layer for heads in sets for layer, _ in heads), default=0)
    every = [(layer, head) for layer in range(lowest, subject.n_layers) for head in range(subject.n_heads)]
    rows = read_patterns(work, every)
    held = [frozen_patterns(rows, heads) if len(heads) < len(every) else None for heads in sets]
    free, frozen = bench.gains(sets), bench.gains(sets, held)
    return [_restored(bench, heads, free[i], frozen[i], seed) for i, heads in enumerate(tuple(heads) for heads in sets)]


def share_of(gained: Float[Tensor, " prompt"], lost: Float[Tensor, " prompt"]) -> float | None:
    """Σ gained / Σ lost; nothing where nothing was lost."""
    whole = float(lost.double().sum())
    return float(gained.double().sum()) / whole if whole > 0 else None


def _greedy(
    bench: Restoration, candidates: Sequence[Head], least: float, together: float, step: Callable[[], None]
) -> tuple[list[Head], list[float]]:
    """Heads in the order in which they add most, and the gain of the first one, two, ...; each round is one sweep.

    Once they do 90% of what all do together, a head that adds less than `least` ends it; before, one that adds nothing.
    """
    order: list[Head] = []
    gains: list[float] = []
    while len(order) < len(candidates):
        left = [head for head in candidates if head not in order]
        tried = bench.gains([(*order, head) for head in left]).mean(dim=1)
        step()
        best = int(tried.argmax())
        so_far = gains[-1] if gains else 0.0
        added = float(tried[best]) - so_far
        if added <= 0 or (added < least and so_far >= ENOUGH * together):
            break
        order.append(left[best])
        gains.append(float(tried[best]))
    return order, gains


def _by_attribution(bench: Restoration, candidates: Sequence[Head]) -> list[Head]:
    """Candidates by the letter that the change of each output writes when all are edited; norms as they were."""
    before, after = read_attention(bench.work), read_attention(bench.work, [bench.make(candidates)])
    moved = after.outputs - before.outputs
    score = letter_attribution(bench.work, moved, before.outputs, before.final).mean(dim=0)
    return sorted(candidates, key=lambda head: -float(score[head]))


def _restored(bench: Restoration, heads: tuple[Head, ...], free: Tensor, frozen: Tensor, seed: int) -> Restored:
    lost = bench.lost
    margins = bench.work.margins() + free
    right = int((margins > 0).sum())

    def interval(gained: Tensor) -> Interval | None:
        above, below = (_by_item(values) for values in (gained, lost))
        return None if share_of(gained, lost) is None else bootstrap_ratio(above, below, seed)

    return Restored(
        heads=heads,
        margin=float(margins.mean()),
        accuracy=right / len(margins),
        accuracy_ci=wilson(right, len(margins)),
        share=share_of(free, lost),
        share_ci=interval(free),
        share_frozen=share_of(frozen, lost),
        share_frozen_ci=interval(frozen),
        others=share_of(free - frozen, lost),
        others_ci=interval(free - frozen),
    )


def _by_item(values: Tensor) -> Array:
    return np.asarray(item_means(values.double().numpy()))
