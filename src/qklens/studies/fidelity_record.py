"""A dictionary's record: fidelity on a fixed batch, and activations at a few of its tokens, to hold it to later.

On the same batch the same numbers must come out again, for whatever was done to the files in between: another
activation function or site, a folded scale, a missing bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from qklens.analyses.diff_fidelity import measure_diff_fidelity
from qklens.analyses.fidelity import measure_fidelity
from qklens.analyses.fixed_tokens import activations_at_fixed_tokens
from qklens.dictionaries.batch_file import RecordedBatch, load_batch, save_batch
from qklens.dictionaries.config import (
    CONFIG_FILE,
    FIGURES,
    HALF,
    MEAN_SQUARE,
    DiffFidelity,
    Fidelity,
    Tolerance,
    tolerance_in,
)
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.model_diff import ModelDiff
from qklens.dictionaries.peaks import find_peaks, peak_change
from qklens.errors import QklensError
from qklens.files import write_json
from qklens.models.subject import Subject

AnyDictionary = TypeVar("AnyDictionary", bound=Crosscoder | ModelDiff)
NAMES: dict[str, str] = dict(
    zip(
        (*FIGURES, MEAN_SQUARE),
        ("L0", "the fraction of variance unexplained", "loss recovered", "the scaled stream's mean square"),
        strict=True,
    )
)
_NOISE = 1e-6
"""Variance unexplained below which a share of it says nothing."""


def fidelity_of(
    subjects: Sequence[Subject],
    dictionary: Crosscoder | ModelDiff,
    sequences: Sequence[Sequence[int]],
    *,
    losses: bool = True,
) -> Fidelity | DiffFidelity:
    """Measure a dictionary in its model, or in its base and chat model."""
    if isinstance(dictionary, ModelDiff):
        base, chat = subjects
        return measure_diff_fidelity(base, chat, dictionary, dictionary.scale, sequences, losses=losses)
    return measure_fidelity(subjects[0], dictionary, sequences, losses=losses)


def record_fidelity(
    subjects: Sequence[Subject],
    dictionary: AnyDictionary,
    folder: Path,
    measured: Fidelity | DiffFidelity,
    sequences: Sequence[Sequence[int]],
) -> AnyDictionary:
    """Store fidelity and the batch that it was measured on in a dictionary's directory, the configuration last."""
    peaks = find_peaks(activations_at_fixed_tokens(subjects, dictionary, sequences))
    batch = save_batch(folder, sequences, peaks, tolerance_in(_dtype(subjects)))
    config = dictionary.config.model_copy(update={"fidelity": measured, "batch": batch})
    write_json(folder / CONFIG_FILE, config.model_dump(mode="json"))
    return replace(dictionary, config=config)  # pyright: ignore[reportArgumentType]


def recorded_batch(
    subjects: Sequence[Subject], dictionary: Crosscoder | ModelDiff, folder: Path
) -> RecordedBatch | None:
    """What the dictionary's fidelity was measured on; nothing where none is recorded.

    Raises:
        QklensError: a batch that is missing, damaged, or of another model's tokens.
    """
    batch = dictionary.config.batch
    weight: Tensor = subjects[-1].unembedding.weight  # pyright: ignore[reportAssignmentType]
    return None if batch is None else load_batch(folder, batch, len(weight))


def hold_to_record(
    subjects: Sequence[Subject], dictionary: Crosscoder | ModelDiff, folder: Path, *, losses: bool = True
) -> tuple[RecordedBatch, Fidelity | DiffFidelity] | None:
    """Measure a dictionary on its recorded batch again; nothing where none is recorded.

    Raises:
        QklensError: a batch as `recorded_batch` refuses, or a quantity outside the tolerance, with both numbers.
    """
    batch = recorded_batch(subjects, dictionary, folder)
    if batch is None:
        return None
    measured = fidelity_of(subjects, dictionary, batch.sequences, losses=losses)
    found = deviations(subjects, dictionary, batch, measured)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise QklensError(
            f"{folder}: {found[0]}{more}: on its recorded batch the dictionary does not do what it did; its weights, "
            "activation function, site or the model have changed"
        )
    return batch, measured


def deviations(
    subjects: Sequence[Subject],
    dictionary: Crosscoder | ModelDiff,
    batch: RecordedBatch,
    measured: Fidelity | DiffFidelity,
) -> list[str]:
    """What lies outside the recorded tolerance, one clause each."""
    recorded, tolerance, found = dictionary.config.fidelity, allowed(subjects, dictionary), []
    then = {} if recorded is None else recorded.by_site()
    for site, now in measured.by_site().items():
        for name, value in now.items():
            promised = then.get(site, {}).get(name)
            if value is None and promised is None:
                continue
            if value is None or promised is None or not abs(value - promised) <= _most(name, promised, tolerance):
                found.append(f"{NAMES[name]} at {site} is {_shown(value)}, recorded as {_shown(promised)}")
    changes = peak_change(batch.peaks, activations_at_fixed_tokens(subjects, dictionary, batch.sequences))
    for layer, change in changes.items():
        if not change <= tolerance.activation:
            found.append(
                f"an activation at resid_pre.{layer} differs from the recorded one by {_shown(change)} of the largest "
                f"at its token, at most {tolerance.activation:g} is expected"
            )
    return found


def allowed(subjects: Sequence[Subject], dictionary: Crosscoder | ModelDiff) -> Tolerance:
    """The recorded tolerance, widened where the models now run in half precision."""
    assert dictionary.config.batch is not None
    tolerance = dictionary.config.batch.tolerance
    return tolerance.widened(HALF) if tolerance_in(_dtype(subjects)) == HALF else tolerance


def _most(name: str, promised: float, tolerance: Tolerance) -> float:
    if name == "loss_recovered":
        return tolerance.loss_recovered
    if name == MEAN_SQUARE:
        return tolerance.fraction_variance_unexplained * abs(promised)
    return getattr(tolerance, name) * abs(promised) + (_NOISE if name == "fraction_variance_unexplained" else 0.0)


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.6g}"


def _dtype(subjects: Sequence[Subject]) -> str:
    return str(subjects[-1].dtype).removeprefix("torch.")
