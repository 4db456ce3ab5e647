"""What a study is asked to do: one frozen value, written into the manifest and compared on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qklens.strict import Strict

SHIPPED_ORGANISM = "organism"


class StudyConfig(Strict):
    """The options of `qklens study`.

    Attributes:
        model: a model directory, or `organism`.
        base_model: the model before post-training, if any.
        checkpoints: checkpoints between base and model, in order of training.
        dictionary: a dictionary directory, `directions`, or None for the model's own default.
        data: a shipped set's name or a file.
        out: the run directory.
        items: how many items to use (a seeded sample); None is all.
        seed: seeds every draw.
        device: torch device.
        dtype: the model's dtype; analyses use float32 or better.
        engine: where passes run.
    """

    model: str = SHIPPED_ORGANISM
    base_model: str | None = None
    checkpoints: tuple[str, ...] = ()
    dictionary: str | None = None
    data: str = "harm_pressure"
    out: Path = Path("runs/harm-pressure")
    items: int | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    engine: Literal["local"] = "local"
