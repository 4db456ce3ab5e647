"""Does a dictionary belong to this model, and does it write the stream as well as its card says?

Asked before anything is written: a dictionary of another model, layer, site or activation function, or one that lost a
scale or a bias on its way, would run to the end and explain nothing. On the batch that is recorded with it the numbers
must come out again; on the run's own prompts it must do nearly as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qklens.analyses.fidelity import measure_fidelity
from qklens.data.render import CONDITIONS
from qklens.dictionaries.config import (
    CONFIG_FILE,
    MEAN_SQUARE,
    SIDES,
    DictionaryConfig,
    DiffFidelity,
    Fidelity,
    over_two_checkpoints,
    read_config,
)
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.formats.detect import load_dictionary
from qklens.dictionaries.model_diff import ModelDiff, ModelDiffConfig, load_model_diff
from qklens.dictionaries.training.harvest import check_pair
from qklens.errors import QklensError
from qklens.models.subject import Subject
from qklens.studies.lab import Lab

FVU_LIMIT = 0.9
"""Above this share of variance unexplained, a dictionary does not write the stream at all."""
CARD_FACTOR, CARD_SLACK = 2.0, 0.05
"""How much worse than its card a dictionary may be on other text: factor x card + slack."""
L0_FACTOR = 2.0
"""How far L0 on other text may lie from the card's. The organism's is 0.88 to 0.98 of its record on the study's prompts
and on the neutral text, and 2.2 to 3.1 of it in another model (its base)."""
SQUARE_FACTOR = 4.0
"""How far from 1 the mean square of a stream may lie, times the scale that made it 1 in training, on other text."""
PROMPTS = 96
"""How many of the run's prompts fidelity is measured on, spread over conditions; it takes two passes a layer."""


def load_for(subjects: Sequence[Subject], folder: Path) -> Crosscoder | ModelDiff:
    """The dictionary in a folder for one model, or for a base and a chat model, once it is known to belong to them.

    Raises:
        QklensError: a damaged dictionary, one of another model, or of another number of models.
    """
    subject = subjects[-1]
    if len(subjects) == 1:
        dictionary = load_dictionary(folder, subject.device)
        check_belongs(dictionary.config, subject, folder)
        return dictionary
    refuse_one_model(folder)
    diff = load_model_diff(folder, subject.device)
    check_belongs_to_both(diff.config, subjects[0], subject, folder)
    return diff


def refuse_one_model(folder: Path) -> None:
    """Refuse a dictionary of one model beside `--base-model`.

    Raises:
        QklensError: names the flag.
    """
    if not over_two_checkpoints(folder):
        raise QklensError(
            f"{folder}: is a dictionary of one model, and --base-model is for a crosscoder over two checkpoints; leave "
            "it out"
        )


def refuse_two_models(folder: Path) -> None:
    """Refuse a crosscoder over two checkpoints without `--base-model`, before a model is loaded.

    Raises:
        QklensError: names the flag.
    """
    if over_two_checkpoints(folder):
        read_config(folder)


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


def check_belongs_to_both(config: ModelDiffConfig, base: Subject, chat: Subject, folder: Path) -> None:
    """Refuse a crosscoder over two checkpoints that is not of these two.

    Raises:
        QklensError: names the file, what was found and what the models have; the two models change places, too.
    """
    file = folder / CONFIG_FILE
    check_pair((base, chat))
    if config.d_model != chat.d_model or not 0 <= config.layer < chat.n_layers:
        raise QklensError(
            f"{file}: is of resid_pre.{config.layer} with {config.d_model} dimensions, {chat.name} has layers 0 to "
            f"{chat.n_layers - 1} and {chat.d_model} dimensions; it belongs to other models"
        )
    trained_on = dict(zip(SIDES, (config.base_sha256, config.chat_sha256), strict=True))
    for side, flag, subject in zip(SIDES, ("--base-model", "--model"), (base, chat), strict=True):
        wanted = trained_on[side]
        if wanted and subject.sha256 and wanted != subject.sha256:
            swapped = "; the two are swapped" if subject.sha256 in trained_on.values() else ""
            raise QklensError(
                f"{file}: its {side} model has model_sha256 {wanted[:12]}, that of {flag} ({subject.name}) is "
                f"{subject.sha256[:12]}{swapped}; give the two checkpoints that it was trained on"
            )


def fixed_prompts(lab: Lab) -> list[tuple[int, ...]]:
    """Prompts of the discovery half that fidelity and a control's densities are measured on, all conditions alike."""
    by_condition = [lab.prompts(condition, "discovery") for condition in CONDITIONS]
    prompts = [prompt.tokens for rows in zip(*by_condition, strict=True) for prompt in rows]
    chosen = np.linspace(0, len(prompts) - 1, min(PROMPTS, len(prompts))).round().astype(int)
    return [prompts[i] for i in chosen]


def card_of(config: DictionaryConfig | ModelDiffConfig) -> str:
    """What messages call the place where fidelity is stated."""
    source = config.source if isinstance(config, DictionaryConfig) and config.batch is None else None
    return f"its card ({source.stated})" if source and source.stated else "its card"


def refuse_unlike_card(
    measured: Fidelity | DiffFidelity, dictionary: Crosscoder | ModelDiff, folder: Path, on: str
) -> None:
    """Hold what was measured on some text against what the dictionary's card states of other text.

    Raises:
        QklensError: it leaves more of the variance unexplained than any dictionary may, or far more than its card says;
            or without a recorded batch its L0 is far from the card's, to either side.
    """
    config = dictionary.config
    card = card_of(config)
    stated = config.fidelity.by_site() if config.fidelity else {}
    for site, now in measured.by_site().items():
        promised = stated.get(site, {}).get("fraction_variance_unexplained")
        limit = FVU_LIMIT if promised is None else min(FVU_LIMIT, CARD_FACTOR * promised + CARD_SLACK)
        fvu = now["fraction_variance_unexplained"]
        if fvu is None or not fvu <= limit:
            says = "its card gives no figure" if promised is None else f"{card} says {promised:.2f}"
            raise QklensError(
                f"{folder}: leaves {fvu:.2f} of the variance of {site} unexplained on {on}, {says}; expected at most "
                f"{limit:.2f}: it is for another model, layer or site, or for other text"
            )
        square = now.get(MEAN_SQUARE, 1.0)
        if square is None or not 1 / SQUARE_FACTOR <= square <= SQUARE_FACTOR:
            raise QklensError(
                f"{folder}: times its scale {site} has mean square {square:.3g} on {on}, expected about 1: norms in "
                "the two checkpoints cannot be compared by these scales"
            )
        # On its recorded batch it has done what it did; L0 on other text then says nothing of the dictionary.
        promised, l0 = stated.get(site, {}).get("l0") if config.batch is None else None, now["l0"]
        if promised and l0 is not None and not promised / L0_FACTOR <= l0 <= promised * L0_FACTOR:
            raise QklensError(
                f"{folder}: has {l0:.4g} active features a token at {site} on {on}, {card} says {promised:.4g}; "
                f"expected {promised / L0_FACTOR:.4g} to {promised * L0_FACTOR:.4g}: its activation function, "
                "threshold or scale is not the published one, or it is for another model, layer or site"
            )


def measure(lab: Lab, dictionary: Crosscoder, folder: Path, *, losses: bool = True) -> Fidelity:
    """Measure a dictionary on prompts of the discovery half, all conditions, and hold it against its card.

    Raises:
        QklensError: it leaves more of the variance unexplained than any dictionary may, or far more than its card says.
    """
    measured = measure_fidelity(lab.subject, dictionary, fixed_prompts(lab), losses=losses)
    refuse_unlike_card(measured, dictionary, folder, "this run's prompts")
    return measured
