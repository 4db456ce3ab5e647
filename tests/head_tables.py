"""Tables of heads on few items, for tests."""

from __future__ import annotations

import numpy as np

from qklens.data.items import Dataset
from qklens.data.render import LetterForm
from qklens.studies.lab import Lab
from qklens.studies.tables.head_table import HeadCandidate, HeadTable, head_table

FOLDS = 3


def table_of(lab: Lab, folds: int = FOLDS) -> HeadTable:
    return head_table(lab, folds=folds, tick=lambda _: lambda: None)


def lab_of(subject, items, n=6) -> Lab:
    return Lab(subject, Dataset("few", tuple(items[:n]), "0"), LetterForm("", ""), 0)


def row(table: HeadTable, head: tuple[int, int]) -> HeadCandidate:
    return next(r for r in table.heads if (r.layer, r.head) == head)


def by_item(values: list[float]) -> np.ndarray:
    return np.array(values).reshape(-1, 2).mean(axis=1)
