"""A dictionary learned from a planted model's activations alone: one sparse autoencoder a layer, in one directory."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.readings import read_streams
from qklens.bench.planted.mechanisms import SELECTING_LAYERS
from qklens.bench.planted.words import planted_items
from qklens.data.render import CONDITIONS, ORDERS, LetterForm, render, render_open
from qklens.dictionaries.activation import Threshold
from qklens.dictionaries.config import FORMAT, DictionaryConfig
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.finish import as_crosscoder
from qklens.dictionaries.training.rows import HeldRows
from qklens.dictionaries.training.trainer import Trainer
from qklens.interventions.engine import Workset
from qklens.models.subject import Subject

TRAINING = TrainingConfig(
    kind="sae",
    layers=(0,),
    features=64,
    activation="batch_topk",
    k=2,
    steps=600,
    batch=256,
    learning_rate=3e-3,
    auxiliary_weight=0.03,
    dead_after_steps=100,
)
"""Of each layer in turn. Fewer active features a row leave them less mixed: on two models of seed 1 the roles' features
have a mean cos of 0.90 with the planted directions at k = 2, and 0.77 at k = 4."""
_ANSWERS = 4


def learned_dictionary(subject: Subject) -> Crosscoder:
    """Learn a dictionary of the layers that may select the answer, from the tokens of the bench's prompts that matter.

    These are the options' tokens and the answer's, which is the last of the open prompts; an answer's row counts four
    times, since there are few.
    """
    rows = _activations(subject, SELECTING_LAYERS)
    return side_by_side([learn_layer(layer, rows[layer], subject.sha256 or "") for layer in SELECTING_LAYERS])


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


def learn_layer(
    layer: int, rows: Float[Tensor, "row d_model"], model_sha256: str, training: TrainingConfig = TRAINING
) -> Crosscoder:
    """A sparse autoencoder of one layer."""
    trained = Trainer(HeldRows([rows]), training.model_copy(update={"layers": (layer,)})).run()
    return as_crosscoder(trained.learner, trained.scale, name="learned", model_sha256=model_sha256)


def side_by_side(single: list[Crosscoder]) -> Crosscoder:
    """Dictionaries of one layer each as one whose features write the layer that they read.

    Each layer's activations are measured in units of its threshold, so that all have the threshold 1.
    """
    layers, n = tuple(one.layers[0] for one in single), single[0].config.features_per_layer
    encoder, bias, decoder = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    for place, (layer, one) in enumerate(zip(layers, single, strict=True)):
        activation = one.config.activation
        if not isinstance(activation, Threshold):
            raise TypeError(f"the trainer gave the activation {activation.kind!r}; expected threshold")
        unit = max(activation.threshold, 1e-6)
        encoder[layer], bias[layer] = one.encoder[layer] / unit, one.encoder_bias[layer] / unit
        decoder[layer] = torch.zeros(n * len(layers), one.config.d_model)
        decoder[layer][place * n : (place + 1) * n] = one.decoder[layer] * unit
    config = DictionaryConfig(
        format=FORMAT,
        name="learned",
        layers=layers,
        features_per_layer=n,
        d_model=single[0].config.d_model,
        activation=Threshold(threshold=1.0),
        site="resid_pre",
        model_sha256=single[0].config.model_sha256,
        training=single[0].config.training,
        fidelity=None,
    )
    centres = {layer: one.decoder_bias[layer] for layer, one in zip(layers, single, strict=True)}
    return Crosscoder(config, encoder, bias, decoder, centres)
