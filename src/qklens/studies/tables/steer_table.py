"""A sweep of steering: strengths x layers x head subsets x sides, each row beside its three controls.

Whatever is chosen is chosen on the discovery half; every row is measured on the report half. All points of a condition,
the controls' among them, go through one sweep, so that each shared beginning is run once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.statistics import Interval, bootstrap_mean, item_means, wilson
from qklens.data.render import Condition
from qklens.errors import NothingChangedError, QklensError
from qklens.interventions.engine import Workset
from qklens.interventions.steer import Head, Steer
from qklens.studies.head_names import head_name
from qklens.studies.lab import Lab
from qklens.studies.neutral import neutral_prompts, on_neutral
from qklens.studies.progress import Tick, silent
from qklens.studies.steer_spec import SteerSpec
from qklens.studies.tables.steer_plan import Place, SteerPlan
from qklens.studies.tables.steer_rows import Clean, Cost, Measured, RandomDraws, RowControls, SteerRow, SteerTable

_MAIN, _UNRELATED = 0, -1


def steer_table(
    lab: Lab, spec: SteerSpec, named: Mapping[str, str] = MappingProxyType({}), *, tick: Tick = silent
) -> SteerTable:
    """Run a sweep.

    Args:
        lab: model, items and source.
        spec: what to sweep.
        named: a feature that a person gave the direction's role.
        tick: given the number of steps, what to call after each.

    Raises:
        QklensError: a direction, layer, head or token that does not exist, a strength that overflows, margins that are
            not finite, or an edit that changes nothing.
    """
    plan = SteerPlan(lab, spec, named)
    plan.check_names()
    step = tick(len(plan.conditions) + 2)
    places, read = plan.places, plan.read
    plan.check_sizes()
    step()
    rows = [(place, strength) for place in places for strength in spec.strengths]
    swept, cost = {}, {}
    for condition in plan.conditions:
        only = condition not in spec.conditions
        points = _points(plan, rows, only_main=only)
        swept[condition], cost[condition] = _sweep(plan, condition, points, read, idle_ok=only)
        step()
    prompts, about = neutral_prompts(lab.subject)
    points = [[on_neutral(steer) for steer in some] for some in _points(plan, rows)]
    divergence, cost["neutral"] = _divergence(Workset(lab.subject, prompts), points)
    step()
    result = _Result(lab, read, swept, divergence)
    result.refuse_overflow(rows)
    return SteerTable(
        model=lab.subject.describe(),
        dictionary=lab.source.describe(),
        data={**lab.dataset.describe(), "letter_form": lab.form.name},
        seed=lab.seed,
        spec=spec,
        feature=plan.direction.label,
        heads=list(plan.chosen) if "chosen" in vars(plan) else None,
        typical={layer: plan.direction.typical[layer] for layer in plan.direction.layers},
        norms={layer: float(plan.direction.vectors[layer].norm()) for layer in plan.direction.layers},
        unrelated=plan.controls.unrelated.label if plan.controls else None,
        neutral=about,
        clean={condition: result.clean(condition) for condition in plan.conditions},
        cost=cost,
        rows=[
            SteerRow(
                **result.measured(condition, number, plan.read_at(place), _MAIN).model_dump(),
                condition=condition,
                side=place.side,
                layers=list(place.layers),
                heads=None if place.heads is None else list(place.heads),
                strength=strength,
                controls=result.controls(condition, number, plan.read_at(place)) if spec.controls else None,
            )
            for condition in spec.conditions
            for number, (place, strength) in enumerate(rows)
        ],
    )


@dataclass(frozen=True, eq=False)
class _Swept:
    """One condition: the clean run, and each row's points by direction, the steered one first."""

    clean_margins: Float[Tensor, " prompt"]
    clean_attention: Float[Tensor, "prompt head"]
    margins: Float[Tensor, "row direction prompt"]
    attention: Float[Tensor, "row direction prompt head"]


def _points(plan: SteerPlan, rows: Sequence[tuple[Place, float]], *, only_main: bool = False) -> list[list[Steer]]:
    """By row, the edit along each direction."""
    directions = plan.directions[:1] if only_main else plan.directions
    return [[plan.steer(place, strength, d) for d in directions] for place, strength in rows]


def _sweep(
    plan: SteerPlan, condition: Condition, points: Sequence[Sequence[Steer]], read: Sequence[Head], *, idle_ok: bool
) -> tuple[_Swept, Cost]:
    """Every point of a condition in one sweep, the clean run's attention as a point without edits before them.

    Where a condition is only a control an edit may find nothing to change, as a feature that is never active there.
    """
    work = plan.lab.work(condition, "report")
    before = work.ran.column_layers
    clean, edits = work.margins(), _edits(points)
    found = work.sweep([(), *edits], read, idle_ok=True)
    if not idle_ok:
        own = [steer for some in points for steer in some[: _MAIN + 1] if not steer.is_identity]
        idle = next((s for s, did in zip(edits, found.changed[1:], strict=True) if s in own and not did), None)
        if idle is not None:
            raise NothingChangedError(
                f"strength {idle.strength:g}, mode {idle.mode!r}: {idle.direction.label!r} changes no value at "
                f"{', '.join(map(str, idle.tokens))} in any of {len(work)} prompts under {condition!r}; choose other "
                "tokens, or mode 'add'"
            )
    swept = _Swept(
        clean,
        found.attention[0],
        _by_row(points, found.margins[1:], clean),
        _by_row(points, found.attention[1:], found.attention[0]),
    )
    return swept, _cost(work, len(edits), before)


def _divergence(work: Workset, points: Sequence[Sequence[Steer]]) -> tuple[Float[Tensor, "row direction window"], Cost]:
    edits = _edits(points)
    return _by_row(points, work.divergence(edits), torch.zeros(len(work))), _cost(work, len(edits), 0)


def _edits(points: Sequence[Sequence[Steer]]) -> list[Steer]:
    """The points that are run; those whose strength changes nothing are the clean run, bit for bit."""
    return [steer for some in points for steer in some if not steer.is_identity]


def _by_row(
    points: Sequence[Sequence[Steer]], found: Float[Tensor, "edit *rest"], clean: Float[Tensor, "*rest"]
) -> Float[Tensor, "row direction *rest"]:
    ran = iter(found)
    return torch.stack([torch.stack([clean if s.is_identity else next(ran) for s in some]) for some in points])


def _cost(work: Workset, points: int, before: int) -> Cost:
    whole = points * sum(len(prompt.tokens) for prompt in work.prompts) * work.subject.n_layers
    return Cost(points=points, tokens_x_layers=work.ran.column_layers - before, whole_prompts=whole)


@dataclass(frozen=True, eq=False)
class _Result:
    """What all points gave, and how a row reads it."""

    lab: Lab
    read: tuple[Head, ...]
    swept: Mapping[Condition, _Swept]
    divergence: Float[Tensor, "row direction window"]

    def refuse_overflow(self, rows: Sequence[tuple[Place, float]]) -> None:
        """Raise for a strength at which the model's numbers are no longer finite."""
        for number, (place, strength) in enumerate(rows):
            each = [
                self.divergence[number],
                *(x[number] for s in self.swept.values() for x in (s.margins, s.attention)),
            ]
            if not all(bool(values.isfinite().all()) for values in each):
                dtype = str(self.lab.subject.dtype).removeprefix("torch.")
                raise QklensError(
                    f"strength {strength:g} ({place.words}): the margins are not finite numbers in {dtype}; use a "
                    "smaller strength"
                )

    def clean(self, condition: Condition) -> Clean:
        """A condition without an edit."""
        swept = self.swept[condition]
        accuracy, ci = _accuracy(swept.clean_margins)
        margin, margin_ci = self._margin(swept.clean_margins)
        by_head = swept.clean_attention.mean(dim=0).tolist()
        named = {head_name(head): value for head, value in zip(self.read, by_head, strict=True)}
        return Clean(accuracy=accuracy, ci=ci, margin=margin, margin_ci=margin_ci, attention_difference=named)

    def measured(self, condition: Condition, row: int, heads: Sequence[Head], direction: int) -> Measured:
        """One point; attention is the mean over some heads."""
        margins = self.swept[condition].margins[row, direction]
        accuracy, ci = _accuracy(margins)
        margin, margin_ci = self._margin(margins)
        kl = self.divergence[row, direction].double()
        return Measured(
            accuracy=accuracy,
            ci=ci,
            margin=margin,
            margin_ci=margin_ci,
            attention_difference=float(self._attention(condition, row, heads)[direction]),
            kl=float(kl.mean()),
            kl_ci=bootstrap_mean(kl.numpy(), self.lab.seed),
        )

    def controls(self, condition: Condition, row: int, heads: Sequence[Head]) -> RowControls:
        """The three controls of one row."""
        margins = self.swept[condition].margins[row, 1:_UNRELATED].double()
        accuracies = (margins > 0).double().mean(dim=1)
        attention = self._attention(condition, row, heads)[1:_UNRELATED]
        kl = self.divergence[row, 1:_UNRELATED].double().mean(dim=1)
        return RowControls(
            random=RandomDraws(
                draws=len(margins),
                accuracy=float(accuracies.mean()),
                accuracy_range=_range(accuracies),
                margin=float(margins.mean()),
                margin_range=_range(margins.mean(dim=1)),
                attention_difference=float(attention.mean()),
                attention_difference_range=_range(attention),
                kl=float(kl.mean()),
                kl_range=_range(kl),
            ),
            unrelated=self.measured(condition, row, heads, _UNRELATED),
            benign=self.measured("benign", row, heads, _MAIN),
        )

    def _attention(self, condition: Condition, row: int, heads: Sequence[Head]) -> Float[Tensor, " direction"]:
        columns = [self.read.index(head) for head in heads]
        return self.swept[condition].attention[row][..., columns].double().mean(dim=(1, 2))

    def _margin(self, margins: Tensor) -> tuple[float, Interval]:
        values = margins.double()
        return float(values.mean()), bootstrap_mean(item_means(values.numpy()), self.lab.seed)


def _accuracy(margins: Float[Tensor, " prompt"]) -> tuple[float, Interval]:
    right = int((margins > 0).sum())
    return right / len(margins), wilson(right, len(margins))


def _range(values: Float[Tensor, " draw"]) -> Interval:
    return float(values.min()), float(values.max())
