"""Dictionaries of a planted model: its directions, the same with a fifth of them missing, and a learned one.

They are weakly causal crosscoders over the layers that may select the answer. The named directions are the decoder, and
the rows of their pseudo-inverse the encoder, so that without noise every activation is the planted amount. Each layer
reads the directions anew, but for those of the roles, which stand in the stream before these layers: they are read at
the first and written at all, so that a role is one feature wherever heads select. The bias is `constant`, and the mean
of what no named direction writes. Each direction stands twice, once with either sign; a missing one lacks both. Where a
role's direction is missing no feature can stand for it: the role counts as not held, and what it is given instead as
wrong.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from qklens.bench.planted.blueprint import CONSTANT, CONSTANT_AMOUNT, NAMES, ROLE_DIRECTIONS
from qklens.bench.planted.folder import Planted, Spec
from qklens.bench.planted.learned import learned_dictionary
from qklens.bench.planted.mechanisms import SELECTING_LAYERS
from qklens.bench.planted.words import planted_items
from qklens.data.render import CONDITIONS, LetterForm, render
from qklens.dictionaries.activation import Threshold
from qklens.dictionaries.config import CONFIG_FILE, FORMAT, DictionaryConfig
from qklens.dictionaries.crosscoder import Crosscoder, save_crosscoder
from qklens.models.subject import Subject

DictionaryKind = Literal["planted", "missing", "learned"]
DICTIONARY_KINDS: tuple[DictionaryKind, ...] = get_args(DictionaryKind)
MISSING_SHARE = 0.2
MATCH = 0.5
"""|cos| from which a feature stands for a planted direction; two planted ones have about 0.05, never 0.3."""
_LEAST = 0.1
FEATURES = tuple((name, sign) for name in NAMES if name != CONSTANT for sign in (1, -1))
"""Direction and sign of each feature of a layer, in order."""


def kept_features(planted: Planted, kind: DictionaryKind) -> list[int]:
    """Which of `FEATURES` the dictionary has."""
    gone = missing_directions(planted.truth.spec) if kind == "missing" else frozenset()
    return [i for i, (name, _) in enumerate(FEATURES) if name not in gone]


def missing_directions(spec: Spec) -> frozenset[str]:
    """The fifth of the directions, in both signs, that a dictionary with missing ones lacks; roles are not spared.

    They are the first by a hash of the model's name and the direction's, so that each model lacks others. What such a
    direction writes becomes error.
    """
    names = [name for name in NAMES if name != CONSTANT]
    names.sort(key=lambda name: hashlib.sha256(f"{spec.name} lacks {name}".encode()).digest())
    return frozenset(names[: round(MISSING_SHARE * len(names))])


def write_dictionary(planted: Planted, subject: Subject, kind: DictionaryKind, folder: Path) -> Path:
    """The dictionary's directory, written unless it is there."""
    if (folder / CONFIG_FILE).is_file():
        return folder
    if kind == "learned":
        save_crosscoder(learned_dictionary(subject), folder, torch.float32)
        return folder
    kept = kept_features(planted, kind)
    vectors = planted.basis.vectors
    dual = torch.linalg.pinv(vectors).T
    rows = [(NAMES.index(FEATURES[i][0]), FEATURES[i][1]) for i in kept]
    decoder_rows = torch.stack([sign * vectors[at] for at, sign in rows]).float()
    encoder_rows = torch.stack([sign * dual[at] for at, sign in rows]).float()
    layers, n = SELECTING_LAYERS, len(kept)
    lasting = torch.tensor([FEATURES[i][0] in ROLE_DIRECTIONS.values() for i in kept])[:, None]
    encoder, decoder = dict[int, Tensor](), dict[int, Tensor]()
    for place, layer in enumerate(layers):
        first = place == 0
        encoder[layer] = encoder_rows.clone() if first else encoder_rows.where(~lasting, 0.0)
        decoder[layer] = torch.zeros(n * len(layers), subject.d_model)
        decoder[layer][:n] = decoder_rows if first else decoder_rows.where(lasting, 0.0)
        if not first:
            decoder[layer][place * n : (place + 1) * n] = decoder_rows.where(~lasting, 0.0)
    biases = _biases(planted, subject, dual)
    config = DictionaryConfig(
        format=FORMAT,
        name=f"{kind} directions",
        layers=layers,
        features_per_layer=n,
        d_model=subject.d_model,
        activation=Threshold(threshold=_LEAST),
        site="resid_pre",
        model_sha256=subject.sha256 or "",
        training={"features": [list(FEATURES[i]) for i in kept]},
        fidelity=None,
    )
    save_crosscoder(
        Crosscoder(
            config=config,
            encoder=encoder,
            encoder_bias={layer: torch.zeros(n) for layer in layers},
            decoder=decoder,
            decoder_bias=biases,
        ),
        folder,
        torch.float32,
    )
    return folder


def role_features(planted: Planted, dictionary: Crosscoder, layer: int) -> dict[str, dict[str, float]]:
    """For each role, the features that stand for its planted direction at a layer, and their cos with it."""
    decoder = torch.nn.functional.normalize(dictionary.directions(layer).double(), dim=-1)
    found: dict[str, dict[str, float]] = {}
    for role, name in ROLE_DIRECTIONS.items():
        cosines = (decoder @ torch.nn.functional.normalize(planted.basis[name].double(), dim=-1)).tolist()
        found[role] = {label: cos for label, cos in zip(dictionary.labels, cosines, strict=True) if cos >= MATCH}
    return found


def _biases(planted: Planted, subject: Subject, dual: Tensor) -> dict[int, Tensor]:
    """Per layer, `constant` and the mean over tokens of the stream outside the named directions' span."""
    constant, rows = CONSTANT_AMOUNT * planted.basis[CONSTANT], list[tuple[Tensor, ...]]()
    for item in planted_items()[::4]:
        for condition in CONDITIONS:
            prompt = render(subject.tokenizer, item, condition, "correct_first", LetterForm("", ""))
            batch = subject.batch([prompt.tokens])
            rows.append(subject.model(batch.input_ids, output_hidden_states=True).hidden_states)
    found = {}
    for layer in SELECTING_LAYERS:
        left = torch.cat([states[layer][0] for states in rows]).double().mean(dim=0) - constant
        found[layer] = (constant + left - left @ dual.T @ planted.basis.vectors).float()
    return found
