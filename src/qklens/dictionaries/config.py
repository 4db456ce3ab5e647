"""What a dictionary's weights alone do not say, as `dictionary.json` holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveInt, ValidationError

from qklens.dictionaries.activation import Activation
from qklens.errors import QklensError, nearest
from qklens.files import read_json
from qklens.strict import Strict, first_complaint

CONFIG_FILE, WEIGHTS_FILE, BATCH_FILE = "dictionary.json", "dictionary.safetensors", "fidelity.safetensors"
FORMAT = "qklens-dictionary-2"
TWO_CHECKPOINTS = "qklens-model-diff-1"
"""The format of `model_diff`."""


class Fidelity(Strict):
    """Quality measured on a fixed batch, per layer; re-measured at load where the batch is recorded."""

    l0: dict[int, float]
    fraction_variance_unexplained: dict[int, float]
    loss_recovered: dict[int, float | None]


class Tolerance(Strict):
    """How far measured fidelity may lie from the recorded.

    Attributes:
        l0: share of the recorded L0, to either side.
        fraction_variance_unexplained: difference, to either side.
        loss_recovered: difference, to either side.
    """

    l0: NonNegativeFloat = 0.05
    fraction_variance_unexplained: NonNegativeFloat = 0.01
    loss_recovered: NonNegativeFloat = 0.01


class Batch(Strict):
    """The tokens that fidelity was measured on, which lie beside the configuration.

    Attributes:
        sha256: of the token ids and lengths.
        sequences: how many sequences.
        tokens: how many tokens in all.
        tolerance: within which the same measurement must fall again.
    """

    sha256: str
    sequences: PositiveInt
    tokens: PositiveInt
    tolerance: Tolerance


class Source(Strict):
    """Where a converted dictionary came from.

    Attributes:
        format: the format it was read from.
        model: the model that it names, or nothing where the format does not record one.
        site: the site as it names it.
        sha256: of the files it was read from.
        folded: what was folded into the weights on the way, in words.
    """

    format: str
    model: str
    site: str
    sha256: str
    folded: tuple[str, ...]


class DictionaryConfig(Strict):
    """What the weights alone do not say; nothing that changes numbers has a silent default."""

    format: Literal["qklens-dictionary-2"]
    name: str
    layers: tuple[int, ...]
    features_per_layer: PositiveInt
    d_model: PositiveInt
    activation: Activation
    site: Literal["resid_pre"]
    model_sha256: str
    training: dict[str, Any]
    fidelity: Fidelity | None
    batch: Batch | None = None
    source: Source | None = None


def n_written(config: DictionaryConfig, layer: int) -> int:
    """How many features write a layer: those that read it or an earlier one."""
    return (config.layers.index(layer) + 1) * config.features_per_layer


def read_config(folder: Path) -> DictionaryConfig:
    """The configuration of a dictionary directory, which holds both files.

    Raises:
        QklensError: a missing file, or a key that is unknown, missing or wrong.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise QklensError(
                f"{folder / name}: no such file; expected a dictionary written by qklens, or 'directions'"
            )
    path = folder / CONFIG_FILE
    content = read_json(path)
    if isinstance(content, dict) and content.get("format") == TWO_CHECKPOINTS:
        raise QklensError(
            f"{path}: is a crosscoder over two checkpoints ({TWO_CHECKPOINTS}), which needs the streams of both; "
            "expected a dictionary of one model; read it with qklens.dictionaries.model_diff"
        )
    try:
        config = DictionaryConfig.model_validate(content)
    except ValidationError as error:
        first = first_complaint(error)
        place = list(map(str, first["loc"]))
        if place[:1] == ["activation"]:
            del place[1:2]  # which of the activation functions, as pydantic counts them
        known = [*DictionaryConfig.model_fields, *Source.model_fields, *Batch.model_fields, "k", "threshold"]
        hint = nearest(place[-1], known) if first["type"] == "extra_forbidden" else ""
        key = ".".join(place)
        raise QklensError(f"{path}: key {key!r}: {first['msg']}{hint}") from error
    if not config.layers or list(config.layers) != sorted(set(config.layers)):
        raise QklensError(f"{path}: layers are {list(config.layers)}; expected distinct layers in rising order")
    if config.batch is not None and config.fidelity is None:
        raise QklensError(f"{path}: records a batch but no fidelity measured on it; expected both or neither")
    return config
