"""A base and a chat model side by side, with a crosscoder over both: what `--base-model` opens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field

from qklens.dictionaries.model_diff import ModelDiff, load_model_diff
from qklens.dictionaries.random_control import random_control
from qklens.dictionaries.training.harvest import side_by_side
from qklens.errors import QklensError
from qklens.models.loading import load_subject
from qklens.models.subject import Subject
from qklens.strict import Strict
from qklens.studies.config import LabConfig
from qklens.studies.dictionary_fit import check_belongs_to_both, fixed_prompts, refuse_one_model, refuse_unlike_card
from qklens.studies.fidelity_record import fidelity_of, hold_to_record
from qklens.studies.lab import Lab
from qklens.studies.opening import open_lab, threads_for
from qklens.studies.resources import model_folder, source_choice


class Checkpoints(Strict):
    """Whose a feature is."""

    base: str = Field(description="the base model")
    chat: str = Field(description="the chat model")
    norm_base: float = Field(description="length of its decoder direction in base")
    norm_chat: float = Field(description="likewise in chat")
    relative_norm: float = Field(description="chat's share of its length, both streams at mean square 1")
    cosine: float = Field(description="of its two directions")


@dataclass(frozen=True, eq=False)
class Pair:
    """What a lab's source reads besides the lab's own model.

    Attributes:
        base: the base model.
        diff: the crosscoder; the lab's source is itself or its control, whose lengths are the same.
        lab: of the chat model.
    """

    base: Subject
    diff: ModelDiff
    lab: Lab

    def checkpoints(self, feature: int) -> Checkpoints:
        """Whose a feature of the lab's source is."""
        base, chat = self.lab.source.directions(self.diff.config.layer)[feature].chunk(2)
        return Checkpoints(
            base=self.base.name,
            chat=self.lab.subject.name,
            norm_base=float(base.norm()),
            norm_chat=float(chat.norm()),
            relative_norm=float(self.diff.relative_norm()[feature]),
            cosine=float(torch.cosine_similarity(base, chat, dim=0)),
        )


def ready_pair(config: LabConfig, base_model: str) -> tuple[Lab, Pair]:
    """A lab of the chat model whose source is a crosscoder over it and a base model, or that crosscoder's control.

    Raises:
        QklensError: bad input of any kind; a dictionary of one model, or of two others, or one that is not what its
            record says.
    """
    choice = source_choice(config)
    if choice.folder is None:
        raise QklensError(
            "--base-model is for a crosscoder over two checkpoints, and directions are none; leave it out"
        )
    refuse_one_model(choice.folder)
    lab = open_lab(config)
    base = load_subject(model_folder(base_model), device=config.device, dtype=config.dtype)
    diff = load_model_diff(choice.folder, lab.subject.device)
    check_belongs_to_both(diff.config, base, lab.subject, choice.folder)
    lab.source = diff
    with threads_for(lab.subject):
        if hold_to_record([base, lab.subject], diff, choice.folder, losses=False) is None:
            measured = fidelity_of([base, lab.subject], diff, fixed_prompts(lab), losses=False)
            refuse_unlike_card(measured, diff, choice.folder, "the study's prompts")
        if choice.law is not None:
            rows = side_by_side([base, lab.subject], fixed_prompts(lab), diff.layers)
            lab.source = random_control(diff, rows, seed=lab.seed, law=choice.law, streams=2)
    return lab, Pair(base, diff, lab)
