"""From what a configuration names to a lab that is ready: model, items, letter form, and the source of features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from qklens.analyses.fidelity import measure_fidelity
from qklens.data.items import Dataset, load_dataset
from qklens.dictionaries.config import Fidelity
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.formats.detect import load_dictionary
from qklens.dictionaries.random_control import random_control
from qklens.dictionaries.training.harvest import stream_rows
from qklens.errors import QklensError
from qklens.models.loading import load_subject
from qklens.models.subject import Subject
from qklens.studies.config import LabConfig
from qklens.studies.dictionary_fit import check_belongs, fixed_prompts, measure, refuse_two_models
from qklens.studies.fidelity_record import hold_to_record
from qklens.studies.lab import MIN_ITEMS, Lab
from qklens.studies.letters import choose_letter_form
from qklens.studies.resources import SourceChoice, model_folder, source_choice

_NARROW = 512


def open_lab(config: LabConfig) -> Lab:
    """Load the model and the items, and choose the letter form; the lab has no source yet.

    Raises:
        QklensError: bad input of any kind.
    """
    torch.manual_seed(config.seed)
    folder = model_folder(config.model)
    dataset = sample_items(load_dataset(config.data), config.items, config.seed)
    subject = load_subject(folder, device=config.device, dtype=config.dtype)
    return Lab(subject, dataset, choose_letter_form(subject, dataset.items), config.seed)


def load_source(lab: Lab, folder: Path | None, *, losses: bool = True) -> tuple[Crosscoder | None, Fidelity | None]:
    """The dictionary in a folder, of any format that is read directly; nothing for none.

    It is checked against the model, measured again on its recorded batch where it has one (L0 and variance unexplained,
    one pass), and measured on the lab's prompts; `losses` says whether loss recovered is.

    Raises:
        QklensError: a damaged dictionary, one of another model, layer or site, or one that is not what it was.
    """
    if folder is None:
        return None, None
    source = load_dictionary(folder, lab.subject.device)
    check_belongs(source.config, lab.subject, folder)
    with threads_for(lab.subject):
        hold_to_record([lab.subject], source, folder, losses=False)
        return source, measure(lab, source, folder, losses=losses)


def ready_lab(config: LabConfig) -> Lab:
    """A lab with its source: the configuration's dictionary, the contrast directions of its items, or a control."""
    choice = source_choice(config)
    if choice.folder is not None:
        refuse_two_models(choice.folder)
    lab = open_lab(config)
    use_source(lab, choice, *load_source(lab, choice.folder))
    return lab


def use_source(lab: Lab, choice: SourceChoice, loaded: Crosscoder | None, fidelity: Fidelity | None) -> Fidelity | None:
    """Give a lab its source, and say how well it writes the lab's prompts, if it is no set of directions.

    Args:
        lab: the bench.
        choice: which source.
        loaded: its dictionary, from `load_source`.
        fidelity: the same dictionary's.
    """
    lab.source = loaded or lab.fit_directions(whitened=choice.whitened)
    if choice.law is None:
        return fidelity
    with threads_for(lab.subject):
        tokens = fixed_prompts(lab)
        rows = stream_rows(lab.subject, tokens, lab.source.layers)
        lab.source = random_control(lab.source, rows, seed=lab.seed, law=choice.law)
        return measure_fidelity(lab.subject, lab.source, tokens) if loaded else None


@contextmanager
def threads_for(subject: Subject) -> Iterator[None]:
    """One thread for narrow models: their products are too small to share, and a second thread is mostly waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if subject.d_model < _NARROW else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sample_items(dataset: Dataset, items: int | None, seed: int) -> Dataset:
    """A seeded sample of a set's items, in file order; the whole set for None or where it has no more than `items`.

    Raises:
        QklensError: fewer items than a study needs.
    """
    if items is None or items >= len(dataset.items):
        return dataset
    if items < MIN_ITEMS:
        raise QklensError(f"--items {items}: expected at least {MIN_ITEMS}")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset.items))[:items])
    return Dataset(dataset.name, tuple(dataset.items[i] for i in chosen), dataset.sha256)
