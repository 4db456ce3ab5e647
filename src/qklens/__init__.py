"""qklens explains, and changes, where an attention head looks and why, in terms of features.

The public names below load on first use, so that `import qklens` is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qklens.analyses.decompose import Decomposition, decompose
    from qklens.analyses.interactions import PairTerms, mean_terms
    from qklens.analyses.lens import head_lens
    from qklens.analyses.nulls import null_tests
    from qklens.analyses.on_text import heads_on_text
    from qklens.analyses.partners import rank_partners
    from qklens.analyses.weighting import Weighting
    from qklens.analyses.written import write_prompts
    from qklens.data.items import Item, load_dataset
    from qklens.data.render import LetterForm, Prompt, render
    from qklens.dictionaries.directions import Directions
    from qklens.dictionaries.formats.detect import load_dictionary
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
    from qklens.studies.config import LabConfig, StudyConfig
    from qklens.studies.opening import open_lab, ready_lab
    from qklens.studies.results import Results
    from qklens.studies.steer_spec import SteerSpec
    from qklens.studies.tables.fewest import fewest_table
    from qklens.studies.tables.head_table import HeadTable, head_table
    from qklens.studies.tables.pair_table import PairRequest, pair_table
    from qklens.studies.tables.partner_table import PartnerRequest, partner_table
    from qklens.studies.tables.steer_table import steer_table

_HOME = {
    "Batch": "models.batch",
    "Capture": "models.sites",
    "Decomposition": "analyses.decompose",
    "Direction": "interventions.direction",
    "Directions": "dictionaries.directions",
    "FeatureSource": "dictionaries.source",
    "HeadAblation": "interventions.patch",
    "HeadTable": "studies.tables.head_table",
    "Item": "data.items",
    "LabConfig": "studies.config",
    "LetterForm": "data.render",
    "PairRequest": "studies.tables.pair_table",
    "PairTerms": "analyses.interactions",
    "PartnerRequest": "studies.tables.partner_table",
    "PatternPatch": "interventions.patch",
    "Prompt": "data.render",
    "QklensError": "errors",
    "Results": "studies.results",
    "ScoreShift": "interventions.patch",
    "Site": "models.sites",
    "Steer": "interventions.steer",
    "SteerSpec": "studies.steer_spec",
    "StudyConfig": "studies.config",
    "Subject": "models.subject",
    "Trace": "models.trace",
    "Weighting": "analyses.weighting",
    "Workset": "interventions.engine",
    "capture": "models.sites",
    "decompose": "analyses.decompose",
    "head_lens": "analyses.lens",
    "head_table": "studies.tables.head_table",
    "heads_on_text": "analyses.on_text",
    "left_padded": "models.batch",
    "load_dataset": "data.items",
    "load_dictionary": "dictionaries.formats.detect",
    "load_subject": "models.loading",
    "mean_terms": "analyses.interactions",
    "null_tests": "analyses.nulls",
    "open_lab": "studies.opening",
    "pair_table": "studies.tables.pair_table",
    "partner_table": "studies.tables.partner_table",
    "rank_partners": "analyses.partners",
    "ready_lab": "studies.opening",
    "render": "data.render",
    "self_check": "models.selfcheck",
    "fewest_table": "studies.tables.fewest",
    "steer_table": "studies.tables.steer_table",
    "study_with_report": "report.run",
    "trace": "models.trace",
    "write_prompts": "analyses.written",
}

__all__ = [
    "Batch",
    "Capture",
    "Decomposition",
    "Direction",
    "Directions",
    "FeatureSource",
    "HeadAblation",
    "HeadTable",
    "Item",
    "LabConfig",
    "LetterForm",
    "PairRequest",
    "PairTerms",
    "PartnerRequest",
    "PatternPatch",
    "Prompt",
    "QklensError",
    "Results",
    "ScoreShift",
    "Site",
    "Steer",
    "SteerSpec",
    "StudyConfig",
    "Subject",
    "Trace",
    "Weighting",
    "Workset",
    "capture",
    "decompose",
    "fewest_table",
    "head_lens",
    "head_table",
    "heads_on_text",
    "left_padded",
    "load_dataset",
    "load_dictionary",
    "load_subject",
    "mean_terms",
    "null_tests",
    "open_lab",
    "pair_table",
    "partner_table",
    "rank_partners",
    "ready_lab",
    "render",
    "self_check",
    "steer_table",
    "study_with_report",
    "trace",
    "write_prompts",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOME:
        raise AttributeError(f"module 'qklens' has no attribute {name!r}")
    return getattr(import_module(f"qklens.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
