"""qklens explains, and changes, where an attention head looks and why, in terms of features.

The public names below load on first use, so that `import qklens` is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qklens.data.items import Item, load_dataset
    from qklens.data.render import LetterForm, Prompt, render
    from qklens.dictionaries.crosscoder import load_crosscoder
    from qklens.dictionaries.directions import Directions
    from qklens.dictionaries.source import FeatureSource
    from qklens.errors import QklensError
    from qklens.interventions.direction import Direction
    from qklens.interventions.engine import Workset
    from qklens.interventions.patch import HeadAblation, PatternPatch, ScoreShift
    from qklens.interventions.steer import Steer
    from qklens.models.selfcheck import self_check
    from qklens.models.subject import Subject, load_subject
    from qklens.report.run import study_with_report
    from qklens.studies.config import StudyConfig
    from qklens.studies.results import Results

_HOME = {
    "Direction": "interventions.direction",
    "Directions": "dictionaries.directions",
    "FeatureSource": "dictionaries.source",
    "HeadAblation": "interventions.patch",
    "Item": "data.items",
    "LetterForm": "data.render",
    "PatternPatch": "interventions.patch",
    "Prompt": "data.render",
    "QklensError": "errors",
    "Results": "studies.results",
    "ScoreShift": "interventions.patch",
    "Steer": "interventions.steer",
    "StudyConfig": "studies.config",
    "Subject": "models.subject",
    "Workset": "interventions.engine",
    "load_crosscoder": "dictionaries.crosscoder",
    "load_dataset": "data.items",
    "load_subject": "models.subject",
    "render": "data.render",
    "self_check": "models.selfcheck",
    "study_with_report": "report.run",
}

__all__ = [
    "Direction",
    "Directions",
    "FeatureSource",
    "HeadAblation",
    "Item",
    "LetterForm",
    "PatternPatch",
    "Prompt",
    "QklensError",
    "Results",
    "ScoreShift",
    "Steer",
    "StudyConfig",
    "Subject",
    "Workset",
    "load_crosscoder",
    "load_dataset",
    "load_subject",
    "render",
    "self_check",
    "study_with_report",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOME:
        raise AttributeError(f"module 'qklens' has no attribute {name!r}")
    return getattr(import_module(f"qklens.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
