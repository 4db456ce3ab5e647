"""What is asked for, as frozen values: what every command opens, and what a study adds to it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from qklens.strict import Strict

SHIPPED_ORGANISM = "organism"


class LabConfig(Strict):
    """What to look at: a model, a source of features, items.

    Attributes:
        model: a model directory, a GGUF file, a hub id, or `organism[:<checkpoint>]`.
        dictionary: what `source_choice` reads, or None for the model's own default.
        data: a shipped set's name or a file.
        items: how many items to use (a seeded sample); None is all.
        seed: seeds every draw.
        device: torch device.
        dtype: the model's dtype; analyses use float32 or better.
        roles: features named by a person, by role; all others are found.
    """

    model: str = SHIPPED_ORGANISM
    dictionary: str | None = None
    data: str = "harm_pressure"
    items: int | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    roles: dict[str, str] = Field(default_factory=dict)


class StudyConfig(LabConfig):
    """The options of `qklens study`, written into the manifest and compared on resume.

    Attributes:
        base_model: the model before post-training, if any.
        checkpoints: checkpoints between base and model, in order of training.
        out: the run directory.
        engine: where passes run.
    """

    base_model: str | None = None
    checkpoints: tuple[str, ...] = ()
    out: Path = Path("runs/harm-pressure")
    engine: Literal["local"] = "local"
