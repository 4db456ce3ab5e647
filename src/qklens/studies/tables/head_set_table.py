"""The fewest heads whose steering brings the margin back under harm, and the curve from one head to all of them.

The heads and their order are chosen on the discovery half; every other number is of the report half. Each set is
measured with the other heads free and with them frozen at their own rows of the unsteered run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from qklens.analyses.head_search import (
    Method,
    Restoration,
    Restored,
    find_fewest,
    restoration_curve,
    share_of,
)
from qklens.data.render import CONDITIONS, Condition
from qklens.errors import QklensError
from qklens.interventions.direction import Direction, random_direction
from qklens.interventions.steer import Head, Steer
from qklens.strict import Strict
from qklens.studies.lab import Half, Lab
from qklens.studies.progress import Tick, silent
from qklens.studies.steer_spec import SteerSpec

Interval = tuple[float, float]
N_DRAWS = 10


class HeadSet(Strict):
    """One set of heads; every number but one is of the report half."""

    heads: list[Head]
    discovery_share: float = Field(description="the share on the half that chose the heads and their order")
    margin: float = Field(description="mean under harm with these heads steered, in logits")
    accuracy: float
    accuracy_ci: Interval = Field(description="Wilson")
    share: float | None = Field(
        description="of the margin lost under harm, the others free; null where the report half lost nothing"
    )
    share_ci: Interval | None = Field(description="95% bootstrap over items")
    share_frozen: float | None = Field(description="the same, all other heads held at their own answer rows")
    share_frozen_ci: Interval | None
    others: float | None = Field(
        description="share - share_frozen: what the other heads add, or take, by looking elsewhere"
    )
    others_ci: Interval | None


class Beside(Strict):
    """What stands beside the smallest set, at equal norm, strength and position; the mean over draws, and its range."""

    control: Literal["random", "unrelated", "random_heads", "benign"] = Field(
        description="random directions, an unrelated feature, as many other heads, or the same edit under benign"
    )
    draws: int
    margin: float
    accuracy: float
    accuracy_range: Interval
    share: float | None = Field(description="of the margin lost under harm; null under benign")
    share_range: Interval | None


class HeadSetTable(Strict):
    """The whole of a search for the fewest heads."""

    model: dict[str, Any]
    data: dict[str, Any]
    dictionary: dict[str, Any]
    seed: int
    spec: SteerSpec | None = Field(default=None, description="what was asked for, where a spec asked for it")
    method: Method
    steering: dict[str, Any] = Field(description="the spec, with all candidates as its heads")
    margin: dict[Condition, float] = Field(description="report half, nothing steered")
    accuracy: dict[Condition, float]
    order: list[Head] = Field(description="candidates as they were taken, discovery half")
    smallest: list[Head] = Field(
        description="the fewest that restore 90% of the best there; empty where nothing restores anything"
    )
    sets: list[HeadSet] = Field(description="the first one, two, ... of the order; last, all candidates")
    beside: list[Beside] = Field(description="controls of the smallest set, report half")


def head_set_table(
    lab: Lab,
    steer: Steer,
    method: Method = "greedy",
    *,
    unrelated: Direction | None = None,
    draws: int = N_DRAWS,
    tick: Tick = silent,
) -> HeadSetTable:
    """Search for the fewest of a steering's heads that bring the margin back.

    Args:
        lab: model and items; its source is not asked.
        steer: what is done to heads; its own heads, or all heads of its layers, are the candidates.
        method: `greedy`, or by `attribution`.
        unrelated: another direction to put beside the steered one, already at equal norm.
        draws: how many random directions, and random sets of heads.
        tick: given the number of steps, what to call after each.

    Raises:
        QklensError: a side that has no heads, a strength that changes nothing, fewer candidates than two, or a
            discovery half whose margin does not fall under harm.
    """
    candidates = _candidates(lab, steer)
    steer.check(
        lab.subject, [p for half in ("discovery", "report") for c in ("harm", "benign") for p in lab.prompts(c, half)]
    )
    benches: dict[Half, Restoration] = {half: _bench(lab, steer, half) for half in ("discovery", "report")}
    lost = float(benches["discovery"].lost.mean())
    if lost <= 0:
        raise QklensError(
            f"the margin does not fall under harm on the discovery half (it rises by {-lost:.2f} logits), so there is "
            "nothing to restore; choose other items or another model"
        )
    step = tick(len(candidates) + 2 if method == "greedy" else 3)
    found = find_fewest(benches["discovery"], candidates, method, step)
    rows = restoration_curve(benches["report"], found.sets, lab.seed)
    step()
    return HeadSetTable(
        model=lab.subject.describe(),
        data={**lab.dataset.describe(), "letter_form": lab.form.name},
        dictionary=lab.source.describe(),
        seed=lab.seed,
        method=method,
        steering=replace(steer, heads=tuple(candidates), layers=()).describe(),
        margin={c: float(lab.work(c, "report").margins().mean()) for c in CONDITIONS},
        accuracy={c: _accuracy(lab.work(c, "report").margins()) for c in CONDITIONS},
        order=list(found.order),
        smallest=list(found.smallest),
        sets=[_head_set(row, share) for row, share in zip(rows, found.shares, strict=True)],
        beside=_beside(lab, steer, benches["report"], found.smallest, unrelated, draws) if found.smallest else [],
    )


def _candidates(lab: Lab, steer: Steer) -> list[Head]:
    """The heads to choose among.

    Raises:
        QklensError: see `head_set_table`.
    """
    if steer.side == "residual":
        raise QklensError("side 'residual' edits the stream for all heads, so no set of them is smallest; use 'query'")
    if steer.is_identity:
        raise QklensError(f"strength {steer.strength:g} with mode {steer.mode!r} changes nothing; choose another")
    every = [(layer, head) for layer in steer.layers for head in range(lab.subject.n_heads)]
    found = list(steer.heads or every)
    if len(found) < 2:
        raise QklensError(f"{len(found)} head to choose among; name at least two, or a layer")
    return found


def _bench(lab: Lab, steer: Steer, half: Half) -> Restoration:
    return Restoration(
        lab.work("harm", half),
        lab.work("none", half).margins(),
        lambda heads: replace(steer, heads=tuple(heads), layers=()),
    )


def _beside(
    lab: Lab, steer: Steer, bench: Restoration, heads: Sequence[Head], unrelated: Direction | None, draws: int
) -> list[Beside]:
    """The smallest set's controls, all in one sweep but for that of the benign prompts."""
    at = replace(steer, heads=tuple(heads), layers=())
    directions = [random_direction(steer.direction, lab.seed + i) for i in range(draws)]
    kinds: dict[Literal["random", "unrelated", "random_heads"], list[Steer]] = {
        "random": [replace(at, direction=d) for d in directions],
        "unrelated": [] if unrelated is None else [replace(at, direction=unrelated)],
        "random_heads": [replace(at, heads=some) for some in _other_sets(lab, steer, heads, draws)],
    }
    points = [point for some in kinds.values() for point in some]
    swept = bench.work.margins_each(points, idle_ok=True)
    harmed, rows, begin = bench.work.margins(), [], 0
    for kind, some in kinds.items():
        margins = swept[begin : begin + len(some)]
        begin += len(some)
        shares = [share_of(m - harmed, bench.lost) for m in margins]
        rows += [_control(kind, margins, [s for s in shares if s is not None])] if some else []
    benign = lab.work("benign", "report").margins_each([at], idle_ok=True)
    return [*rows, _control("benign", benign, [])]


def _control(
    kind: Literal["random", "unrelated", "random_heads", "benign"], margins: Tensor, shares: Sequence[float]
) -> Beside:
    accuracies = [_accuracy(m) for m in margins]
    return Beside(
        control=kind,
        draws=len(margins),
        margin=float(margins.mean()),
        accuracy=sum(accuracies) / len(accuracies),
        accuracy_range=(min(accuracies), max(accuracies)),
        share=sum(shares) / len(shares) if shares else None,
        share_range=(min(shares), max(shares)) if shares else None,
    )


def _other_sets(lab: Lab, steer: Steer, heads: Sequence[Head], draws: int) -> list[tuple[Head, ...]]:
    """As many other heads of the same layers, drawn at random; none where there are not as many."""
    others = [
        (layer, head) for layer in steer.layer_list for head in range(lab.subject.n_heads) if (layer, head) not in heads
    ]
    if len(others) < len(heads):
        return []
    generator = torch.Generator().manual_seed(lab.seed)
    return [
        tuple(others[i] for i in torch.randperm(len(others), generator=generator)[: len(heads)].tolist())
        for _ in range(draws)
    ]


def _head_set(row: Restored, discovery_share: float) -> HeadSet:
    return HeadSet(**{**row.as_row(), "heads": list(row.heads), "discovery_share": discovery_share})


def _accuracy(margins: Tensor) -> float:
    return float((margins > 0).double().mean())
