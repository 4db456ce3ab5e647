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
    features=256,
    activation="batch_topk",
    k=1,
    first_k=8,
    sparsity_warmup_steps=1200,
    steps=2400,
    batch=256,
    learning_rate=3e-3,
    auxiliary_weight=0.03,
    dead_after_steps=100,
)
"""Few active features a row leave them less mixed, and beginning with more helps. On ten models of seeds 0 to 2 the
best features' mean cos with need, correct, harm and refuse is 0.87, 0.96, 1.00 and 0.98 (three seeds); with 128
features, k = 2 and 600 steps 0.69, 0.85, 0.97 and 0.91. `need` is hardest: it stands beside `ask` wherever a letter is
asked for.
"""
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
