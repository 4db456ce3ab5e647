"""The points of a sweep, and what each touches in a batch: the first column and the first layer that must run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol, runtime_checkable

from qklens.data.render import Prompt
from qklens.interventions.steer import Steer
from qklens.models.batch import Batch
from qklens.models.edits import Edit, PatternEdit, ScoreEdit, VectorEdit
from qklens.models.subject import Subject


@runtime_checkable
class Intervention(Protocol):
    """A frozen value that turns into edits for each batch."""

    def edits(self, subject: Subject, prompts: Sequence[Prompt], batch: Batch, index: Sequence[int]) -> list[Edit]:
        """The edits of one pass over some prompts; `index` gives their places in the workset."""
        ...

    def describe(self) -> dict[str, Any]:
        """The spec as echoed into results."""
        ...


Point = Intervention | Sequence[Intervention]
"""One point of a sweep: an intervention, or several that act together."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A point's edits in one batch.

    Attributes:
        place: which point of the sweep it is.
        groups: the edits of each intervention.
        start: the first column that they touch.
        layer: the first layer that they look at or change.
    """

    place: int
    groups: tuple[tuple[Edit, ...], ...]
    start: int
    layer: int

    @property
    def edits(self) -> list[Edit]:
        """All edits, in order."""
        return [edit for group in self.groups for edit in group]


def plan(
    subject: Subject,
    prompts: Sequence[Prompt],
    batch: Batch,
    index: Sequence[int],
    place: int,
    point: Sequence[Intervention],
) -> Planned:
    """The edits of a point in one batch; an intervention that says that it changes nothing makes none."""
    groups = tuple(() if is_identity(i) else tuple(i.edits(subject, prompts, batch, index)) for i in point)
    edits = [edit for group in groups for edit in group]
    return Planned(
        place,
        groups,
        min((_first_column(edit, batch) for edit in edits), default=batch.width - 1),
        min((_first_layer(edit) for edit in edits), default=subject.n_layers - 1),
    )


def several(point: Point) -> list[Intervention]:
    """A point's interventions."""
    return [point] if isinstance(point, Intervention) else list(point)


def is_identity(intervention: Intervention) -> bool:
    """Whether it says itself that it changes nothing."""
    return isinstance(intervention, Steer) and intervention.is_identity


def any_of(groups: Sequence[Sequence[Edit]], changed: Sequence[bool]) -> list[bool]:
    """For each intervention, whether any of its edits changed a value."""
    ends = [0, *accumulate(map(len, groups))]
    return [any(changed[begin:end]) for begin, end in pairwise(ends)]


def _first_column(edit: Edit, batch: Batch) -> int:
    """The first column that an edit touches; most patches and score shifts act at the last one."""
    if isinstance(edit, PatternEdit) and edit.first is not None:
        return edit.first
    if isinstance(edit, VectorEdit | ScoreEdit) and edit.mask is not None:
        return int(edit.mask.any(dim=0).nonzero()[0])
    return batch.width - 1


def _first_layer(edit: Edit) -> int:
    """The first layer whose stream an edit looks at or changes."""
    return min((edit.layer, *(edit.sees if isinstance(edit, VectorEdit | ScoreEdit) else ())))
