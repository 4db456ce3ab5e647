"""Does a dictionary belong to this model, and does it write the stream as well as its card says?

Asked before anything is written: a dictionary of another model, layer, site or activation function, or one that lost a
scale or a bias on its way, would run to the end and explain nothing. On the batch that is recorded with it the numbers
must come out again; on the run's own prompts it must do nearly as well.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from qklens.analyses.fidelity import measure_fidelity
from qklens.data.render import CONDITIONS
from qklens.dictionaries.batch_file import load_batch
from qklens.dictionaries.config import CONFIG_FILE, DictionaryConfig, Fidelity
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.errors import QklensError
from qklens.models.subject import Subject
from qklens.studies.lab import Lab

FVU_LIMIT = 0.9
"""Above this share of variance unexplained, a dictionary does not write the stream at all."""
CARD_FACTOR, CARD_SLACK = 2.0, 0.05
"""How much worse than its card a dictionary may be on the run's prompts: factor x card + slack."""
PROMPTS = 96
"""How many of the run's prompts fidelity is measured on, spread over conditions; it takes two passes a layer."""


def check_belongs(config: DictionaryConfig, subject: Subject, folder: Path) -> None:
    """Refuse a dictionary whose width, layers or recorded model are not this model's.

    Raises:
        QklensError: names the file, what was found and what the model has.
    """
    file = folder / CONFIG_FILE if config.source is None else folder
    if config.d_model != subject.d_model:
        raise QklensError(
            f"{file}: its vectors have {config.d_model} dimensions, {subject.name}'s stream has {subject.d_model}; it "
            "belongs to another model"
        )
    outside = [layer for layer in config.layers if not 0 <= layer < subject.n_layers]
    if outside:
        last = "; that is its last layer's output, which no head reads" if outside == [subject.n_layers] else ""
        raise QklensError(
            f"{file}: writes resid_pre.{outside[0]}, {subject.name} has layers 0 to {subject.n_layers - 1}"
            f"{last or '; it belongs to another model'}"
        )
    if config.model_sha256 and subject.sha256 and config.model_sha256 != subject.sha256:
        raise QklensError(
            f"{file}: was trained on weights with model_sha256 {config.model_sha256[:12]}, {subject.name}'s are "
            f"{subject.sha256[:12]}; use a dictionary of this model, or --dictionary directions (an empty model_sha256 "
            "lets it try)"
        )


def fixed_prompts(lab: Lab) -> list[tuple[int, ...]]:
    """Prompts of the discovery half that fidelity and a control's densities are measured on, all conditions alike."""
    by_condition = [lab.prompts(condition, "discovery") for condition in CONDITIONS]
    prompts = [prompt.tokens for rows in zip(*by_condition, strict=True) for prompt in rows]
    chosen = np.linspace(0, len(prompts) - 1, min(PROMPTS, len(prompts))).round().astype(int)
    return [prompts[i] for i in chosen]


def recorded_batch(subject: Subject, dictionary: Crosscoder, folder: Path) -> list[list[int]] | None:
    """The token sequences that the dictionary's fidelity was measured on; nothing where none are recorded.

    Raises:
        QklensError: a batch that is missing, damaged, or of another model's tokens.
    """
    batch = dictionary.config.batch
    weight: Tensor = subject.unembedding.weight  # pyright: ignore[reportAssignmentType]
    return None if batch is None else load_batch(folder, batch, len(weight))


def deviations(measured: Fidelity, dictionary: Crosscoder) -> list[str]:
    """What lies outside the recorded tolerance, one clause each; nothing without a record."""
    recorded, batch = dictionary.config.fidelity, dictionary.config.batch
    if recorded is None or batch is None:
        return []
    tolerance, found = batch.tolerance, []
    quantities = (
        ("L0", measured.l0, recorded.l0, lambda l0: tolerance.l0 * l0),
        (
            "the fraction of variance unexplained",
            measured.fraction_variance_unexplained,
            recorded.fraction_variance_unexplained,
            lambda _: tolerance.fraction_variance_unexplained,
        ),
        ("loss recovered", measured.loss_recovered, recorded.loss_recovered, lambda _: tolerance.loss_recovered),
    )
    for name, now, then, most in quantities:
        for layer, value in now.items():
            promised = then.get(layer)
            if value is None and promised is None:
                continue
            if value is None or promised is None or not abs(value - promised) <= most(promised):
                found.append(f"{name} at resid_pre.{layer} is {_shown(value)}, recorded as {_shown(promised)}")
    return found


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}"


def refuse_deviations(measured: Fidelity, dictionary: Crosscoder, folder: Path) -> None:
    """Raise where fidelity on the recorded batch is outside the recorded tolerance.

    Raises:
        QklensError: names the first quantity with both numbers.
    """
    found = deviations(measured, dictionary)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise QklensError(
            f"{folder}: {found[0]}{more}: on its recorded batch the dictionary does not do what it did; its weights, "
            "activation function, site or the model have changed"
        )


def measure(lab: Lab, dictionary: Crosscoder, folder: Path, *, losses: bool = True) -> Fidelity:
    """Measure a dictionary on prompts of the discovery half, all conditions, and hold it against its card.

    Raises:
        QklensError: it leaves more of the variance unexplained than any dictionary may, or far more than its card says.
    """
    measured = measure_fidelity(lab.subject, dictionary, fixed_prompts(lab), losses=losses)
    card = dictionary.config.fidelity
    for layer, fvu in measured.fraction_variance_unexplained.items():
        promised = card.fraction_variance_unexplained.get(layer) if card else None
        limit = FVU_LIMIT if promised is None else min(FVU_LIMIT, CARD_FACTOR * promised + CARD_SLACK)
        if not fvu <= limit:
            says = "its card gives no figure" if promised is None else f"its card says {promised:.2f}"
            raise QklensError(
                f"{folder}: leaves {fvu:.2f} of the variance of resid_pre.{layer} unexplained on this run's prompts, "
                f"{says}; expected at most {limit:.2f}: it is for another model, layer or site, or for other text"
            )
    return measured
