"""A dictionary learned from a planted model's activations alone: a weakly causal crosscoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.readings import read_streams
from qklens.bench.planted.mechanisms import SELECTING_LAYERS
from qklens.bench.planted.words import planted_items
from qklens.data.render import CONDITIONS, ORDERS, LetterForm, render, render_open
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.finish import as_crosscoder
from qklens.dictionaries.training.rows import HeldRows
from qklens.dictionaries.training.trainer import Trainer
from qklens.interventions.engine import Workset
from qklens.models.subject import Subject

TRAINING = TrainingConfig(
    kind="crosscoder",
    layers=SELECTING_LAYERS,
    features=128,
    activation="batch_topk",
    k=2,
    first_k=8,
    sparsity_warmup_steps=300,
    steps=600,
    batch=256,
    learning_rate=3e-3,
    auxiliary_weight=0.03,
    dead_after_steps=100,
)
"""Few active features a row leave them less mixed, and beginning with more helps: on five models of seeds 1 and 2 the
roles' best features have a mean cos of 0.88 with the planted directions, and 0.13 with another role's (k = 2 from the
first step with 64 features: 0.78, 0.21; k = 3: 0.67, 0.17)."""
_ANSWERS = 4


def learned_dictionary(subject: Subject) -> Crosscoder:
    """Learn a dictionary of the layers that may select the answer, from the tokens of the bench's prompts that matter.

    These are the options' tokens and the answer's, which is the last of the open prompts; an answer's row counts four
    times, since there are few.
    """
    return learn(_activations(subject, SELECTING_LAYERS), subject.sha256 or "")


def _activations(subject: Subject, layers: tuple[int, ...]) -> dict[int, Float[Tensor, "row d_model"]]:
    asked = [
        render(subject.tokenizer, item, condition, order, LetterForm("", ""))
        for item in planted_items()
        for condition in CONDITIONS
        for order in ORDERS
    ]
    alone = [
        render_open(subject.tokenizer, text)
        for item in planted_items()
        for text in (item.question, item.harmful_intent, item.benign_intent)
    ]
    prompts = [*asked, *alone]
    places = [[*p.span("correct"), *p.span("incorrect"), *[-1] * _ANSWERS] for p in asked] + [[-1] * _ANSWERS] * len(
        alone
    )
    streams = read_streams(Workset(subject, prompts), layers)
    return {
        layer: torch.cat([stream[layer][at] for stream, at in zip(streams, places, strict=True)]).float()
        for layer in layers
    }


def learn(
    rows: Mapping[int, Float[Tensor, "row d_model"]], model_sha256: str, training: TrainingConfig = TRAINING
) -> Crosscoder:
    """A crosscoder of some layers' rows at the same tokens."""
    config = training.model_copy(update={"layers": tuple(sorted(rows))})
    trained = Trainer(HeldRows([rows[layer] for layer in config.layers]), config).run()
    return as_crosscoder(trained.learner, trained.scale, name="learned", model_sha256=model_sha256)
