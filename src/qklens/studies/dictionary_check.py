"""`qklens dict check`: a dictionary's fidelity on a fixed batch, beside what is recorded with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from qklens.analyses.fidelity import measure_fidelity
from qklens.analyses.text_windows import text_windows
from qklens.dictionaries.batch_file import save_batch
from qklens.dictionaries.config import CONFIG_FILE, Fidelity, Tolerance
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.formats.detect import is_native, load_dictionary
from qklens.errors import QklensError
from qklens.files import write_json
from qklens.models.subject import Subject
from qklens.strict import Strict
from qklens.studies.dictionary_fit import FVU_LIMIT, check_belongs, recorded_batch, refuse_deviations
from qklens.studies.neutral import MOST_WINDOWS, WINDOW

NEUTRAL = "neutral.txt"


class DictionaryCheck(Strict):
    """What was measured, on what, and what was recorded.

    Attributes:
        dictionary: what the dictionary is.
        model: the model that it was measured in.
        measured_on: the recorded batch, or the shipped neutral text.
        tokens: how many tokens that is.
        measured: fidelity now.
        recorded: fidelity in the configuration, where its batch is recorded too.
        tolerance: how far the two may lie apart.
    """

    dictionary: dict[str, Any]
    model: str
    measured_on: str
    tokens: int
    measured: Fidelity
    recorded: Fidelity | None
    tolerance: Tolerance | None


def check_dictionary(subject: Subject, folder: Path, *, record: bool = False) -> DictionaryCheck:
    """Measure a dictionary in a model and hold it against its record.

    Args:
        subject: the model.
        folder: a dictionary of any format that is read directly.
        record: write what was measured into a dictionary that has no record, with the batch.

    Raises:
        QklensError: a dictionary of another model, outside the recorded tolerance, or that writes no stream at all.
    """
    dictionary = load_dictionary(folder, subject.device)
    if record:
        _refuse_record(dictionary, folder)
    check_belongs(dictionary.config, subject, folder)
    batch = recorded_batch(subject, dictionary, folder)
    sequences = neutral_batch(subject) if batch is None else batch
    measured = measure_fidelity(subject, dictionary, sequences)
    refuse_deviations(measured, dictionary, folder)
    for layer, fvu in measured.fraction_variance_unexplained.items():
        if not fvu <= FVU_LIMIT:
            raise QklensError(
                f"{folder}: leaves {fvu:.2f} of the variance of resid_pre.{layer} unexplained in {subject.name}; "
                f"expected at most {FVU_LIMIT:.2f}: it is for another model, layer or site, or lost a scale on its way"
            )
    if record:
        record_fidelity(dictionary, folder, measured, sequences)
    config = dictionary.config
    return DictionaryCheck(
        dictionary=dictionary.describe(),
        model=subject.name,
        measured_on=NEUTRAL if batch is None else "recorded batch",
        tokens=sum(map(len, sequences)),
        measured=measured,
        recorded=None if config.batch is None else config.fidelity,
        tolerance=None if config.batch is None else config.batch.tolerance,
    )


def record_fidelity(
    dictionary: Crosscoder,
    folder: Path,
    measured: Fidelity,
    sequences: Sequence[Sequence[int]],
    tolerance: Tolerance | None = None,
) -> Crosscoder:
    """Store fidelity and the batch that it was measured on in a dictionary's directory, the configuration last."""
    batch = save_batch(folder, sequences, tolerance or Tolerance())
    config = dictionary.config.model_copy(update={"fidelity": measured, "batch": batch})
    write_json(folder / CONFIG_FILE, config.model_dump(mode="json"))
    return replace(dictionary, config=config)


def neutral_batch(subject: Subject) -> list[list[int]]:
    """Windows of the shipped neutral text, for dictionaries that record no batch."""
    path = Path(str(files("qklens"))) / "data" / "shipped" / NEUTRAL
    return [list(window.tokens) for window in text_windows(subject, path, WINDOW, MOST_WINDOWS)]


def _refuse_record(dictionary: Crosscoder, folder: Path) -> None:
    if not is_native(folder):
        raise QklensError(
            f"{folder}: --record writes into a qklens dictionary; run `qklens dict convert {folder} OUT` first"
        )
    if dictionary.config.batch is not None:
        raise QklensError(f"{folder}: has a record already; leave --record out, or remove it from {CONFIG_FILE}")
