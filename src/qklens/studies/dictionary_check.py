"""`qklens dict check`: a dictionary's fidelity on a fixed batch, beside what is recorded with it or stated of it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from qklens.analyses.text_windows import text_windows
from qklens.dictionaries.config import (
    CONFIG_FILE,
    DiffFidelity,
    Fidelity,
    Tolerance,
)  # fmt: skip
from qklens.dictionaries.formats.detect import is_native
from qklens.errors import QklensError
from qklens.models.subject import Subject
from qklens.strict import Strict
from qklens.studies.dictionary_fit import card_of, load_for, refuse_unlike_card
from qklens.studies.fidelity_record import allowed, fidelity_of, hold_to_record, record_fidelity
from qklens.studies.neutral import MOST_WINDOWS, WINDOW

NEUTRAL = "neutral.txt"


class DictionaryCheck(Strict):
    """What was measured, on what, and what it was held against.

    Attributes:
        dictionary: what the dictionary is.
        model: the model that it was measured in.
        base_model: the model beside it, for a crosscoder over two checkpoints.
        measured_on: the recorded batch, or the shipped neutral text.
        tokens: how many tokens that is.
        measured: fidelity now.
        held_against: in words; nothing where nothing is recorded or stated.
        recorded: the fidelity that it was held against.
        tolerance: how far the two may lie apart, where they are of the same batch.
    """

    dictionary: dict[str, Any]
    model: str
    base_model: str | None
    measured_on: str
    tokens: int
    measured: Fidelity | DiffFidelity
    held_against: str | None
    recorded: Fidelity | DiffFidelity | None
    tolerance: Tolerance | None


def check_dictionary(
    subject: Subject, folder: Path, *, base: Subject | None = None, record: bool = False
) -> DictionaryCheck:
    """Measure a dictionary in its model and hold it against its record, or else against what its card states.

    Args:
        subject: the model; of a crosscoder over two checkpoints the chat model.
        folder: a dictionary of any format that is read directly.
        base: the base model of a crosscoder over two checkpoints, and of no other.
        record: write what was measured into a dictionary that has no record, with the batch.

    Raises:
        QklensError: a dictionary of another model, outside the recorded tolerance, far from its card, or that writes no
            stream at all.
    """
    subjects = [subject] if base is None else [base, subject]
    if record and not is_native(folder):
        raise QklensError(
            f"{folder}: --record writes into a qklens dictionary; run `qklens dict convert {folder} OUT` first"
        )
    dictionary = load_for(subjects, folder)
    if record and dictionary.config.batch is not None:
        raise QklensError(f"{folder}: has a record already; leave --record out, or remove it from {CONFIG_FILE}")
    held = hold_to_record(subjects, dictionary, folder)
    if held is None:
        sequences = neutral_batch(subject)
        measured = fidelity_of(subjects, dictionary, sequences)
    else:
        sequences, measured = held[0].sequences, held[1]
    refuse_unlike_card(measured, dictionary, folder, NEUTRAL if held is None else "the recorded batch")
    config = dictionary.config
    held_against = card_of(config) if config.fidelity is not None else None
    if held is not None:
        held_against = "the record of the same batch"
    if record:
        record_fidelity(subjects, dictionary, folder, measured, sequences)
    return DictionaryCheck(
        dictionary=dictionary.describe(),
        model=subject.name,
        base_model=None if base is None else base.name,
        measured_on=NEUTRAL if held is None else "recorded batch",
        tokens=sum(map(len, sequences)),
        measured=measured,
        held_against=held_against,
        recorded=config.fidelity,
        tolerance=None if held is None else allowed(subjects, dictionary),
    )


def neutral_batch(subject: Subject) -> list[list[int]]:
    """Windows of the shipped neutral text, for dictionaries that record no batch."""
    path = Path(str(files("qklens"))) / "data" / "shipped" / NEUTRAL
    return [list(window.tokens) for window in text_windows(subject, path, WINDOW, MOST_WINDOWS)]
