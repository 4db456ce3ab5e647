"""qklens explains, and changes, where an attention head looks and why, in terms of features.

The public names below load on first use, so that `import qklens` is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qklens.analyses.decompose import Decomposition, decompose
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
    from qklens.models.batch import Batch, left_padded
    from qklens.models.loading import load_subject
    from qklens.models.selfcheck import self_check
    from qklens.models.sites import Capture, Site, capture
    from qklens.models.subject import Subject
    from qklens.models.trace import Trace, trace
    from qklens.report.run import study_with_report
    from qklens.studies.config import StudyConfig
    from qklens.studies.results import Results

_HOME = {
    "Batch": "models.batch",
    "Capture": "models.sites",
    "Decomposition": "analyses.decompose",
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
    "Site": "models.sites",
    "Steer": "interventions.steer",
    "StudyConfig": "studies.config",
    "Subject": "models.subject",
    "Trace": "models.trace",
    "Workset": "interventions.engine",
    "capture": "models.sites",
    "decompose": "analyses.decompose",
    "left_padded": "models.batch",
    "load_crosscoder": "dictionaries.crosscoder",
    "load_dataset": "data.items",
    "load_subject": "models.loading",
    "render": "data.render",
    "self_check": "models.selfcheck",
    "study_with_report": "report.run",
    "trace": "models.trace",
}

__all__ = [
    "Batch",
    "Capture",
    "Decomposition",
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
    "Site",
    "Steer",
    "StudyConfig",
    "Subject",
    "Trace",
    "Workset",
    "capture",
    "decompose",
    "left_padded",
    "load_crosscoder",
    "load_dataset",
    "load_subject",
    "render",
    "self_check",
    "study_with_report",
    "trace",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOME:
        raise AttributeError(f"module 'qklens' has no attribute {name!r}")
    return getattr(import_module(f"qklens.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
