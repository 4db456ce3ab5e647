"""What a dictionary's weights alone do not say, as `dictionary.json` holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationError, model_validator

from qklens.dictionaries.activation import Activation
from qklens.errors import QklensError, nearest
from qklens.files import read_json
from qklens.strict import Strict, first_complaint

CONFIG_FILE, WEIGHTS_FILE, BATCH_FILE = "dictionary.json", "dictionary.safetensors", "fidelity.safetensors"
FORMAT = "qklens-dictionary-2"
TWO_CHECKPOINTS = "qklens-model-diff-1"
"""The format of `model_diff`."""
FIGURES = ("l0", "fraction_variance_unexplained", "loss_recovered")
MEAN_SQUARE = "mean_square"
"""Of two checkpoints alone."""


Figures = dict[str, dict[str, float | None]]
"""What is measured (`l0`, …) by site, in words."""


class Fidelity(Strict):
    """Quality per layer: measured on a fixed batch where one is recorded, else what a card states, in part or whole."""

    l0: dict[int, float] = Field(default_factory=dict)
    fraction_variance_unexplained: dict[int, float] = Field(default_factory=dict)
    loss_recovered: dict[int, float | None] = Field(default_factory=dict)

    def by_site(self) -> Figures:
        """The same by `resid_pre.L`."""
        return {
            f"resid_pre.{layer}": {name: of[layer] for name in FIGURES if layer in (of := getattr(self, name))}
            for layer in {**self.l0, **self.fraction_variance_unexplained}
        }


Checkpoint = Literal["base", "chat"]
SIDES: tuple[Checkpoint, ...] = get_args(Checkpoint)


class DiffFidelity(Strict):
    """Quality of a crosscoder over two checkpoints.

    Attributes:
        l0: active features a token.
        fraction_variance_unexplained: by side.
        mean_square: of each side's stream times its scale, about 1: what norms in the two are compared by.
        loss_recovered: by side, each in its own model.
    """

    l0: float
    fraction_variance_unexplained: dict[Checkpoint, float]
    mean_square: dict[Checkpoint, float]
    loss_recovered: dict[Checkpoint, float | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _both_sides(self) -> DiffFidelity:
        for name in ("fraction_variance_unexplained", "mean_square"):
            missing = [side for side in SIDES if side not in getattr(self, name)]
            if missing:
                raise ValueError(f"{name} of {missing[0]} is missing")
        return self

    def by_site(self) -> Figures:
        """The same by checkpoint."""
        sides: Figures = {f"resid_pre of {side}": {"l0": self.l0} for side in SIDES}
        for name in (*FIGURES[1:], MEAN_SQUARE):
            for side, value in getattr(self, name).items():
                sides[f"resid_pre of {side}"][name] = value
        return sides


class Tolerance(Strict):
    """How far what is measured on the recorded batch may lie from the record, to either side.

    Measured over float32 and float64, one and two threads, and batches of 1 to 64 sequences: in four layers L0 did not
    change, variance unexplained by 2e-7 of itself, loss recovered by 3e-8, activations by 8e-7; in thirty layers by
    1.4e-5, 7e-6, 1.2e-5 and 1.3e-6. The limits leave room for other machines, and for short batches, in which one
    feature that crosses its threshold counts. Half precision changes more; see `HALF`.

    Attributes:
        l0: share of the recorded L0.
        fraction_variance_unexplained: share of the recorded one, and of a scaled stream's mean square.
        loss_recovered: difference.
        activation: share of the largest activation at a token.
    """

    l0: NonNegativeFloat = 1e-3
    fraction_variance_unexplained: NonNegativeFloat = 1e-3
    loss_recovered: NonNegativeFloat = 1e-3
    activation: NonNegativeFloat = 1e-3

    def widened(self, other: Tolerance) -> Tolerance:
        """The wider of two, one by one."""
        return Tolerance(**{name: max(getattr(self, name), getattr(other, name)) for name in Tolerance.model_fields})


HALF = Tolerance(l0=0.02, fraction_variance_unexplained=0.05, loss_recovered=0.01, activation=0.1)
"""Where the model runs in bfloat16 or float16; bfloat16 changed them in thirty layers by 7e-4, 0.014, 6e-4, 0.026."""


def tolerance_in(dtype: str) -> Tolerance:
    """How far the same dictionary may come out elsewhere, by the dtype that its model runs in."""
    return HALF if dtype in ("bfloat16", "float16") else Tolerance()


class Batch(Strict):
    """The tokens that fidelity was measured on, which lie beside the configuration.

    Attributes:
        sha256: of the token ids and lengths, and of the activations at some of them.
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
        stated: where fidelity was stated, in words, if it was.
    """

    format: str
    model: str
    site: str
    sha256: str
    folded: tuple[str, ...]
    stated: str = ""


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


def over_two_checkpoints(folder: Path) -> bool:
    """Whether a directory holds a crosscoder over two checkpoints, by its configuration's format."""
    path = folder / CONFIG_FILE
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and content.get("format") == TWO_CHECKPOINTS


Config = TypeVar("Config", bound=Strict)


def validated(kind: type[Config], path: Path) -> Config:
    """A configuration file as what it should be.

    Raises:
        QklensError: names the key that is unknown (with the nearest), missing or wrong.
    """
    content = read_json(path)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = first_complaint(error)
        place = list(map(str, first["loc"]))
        if place[:1] == ["activation"]:
            del place[1:2]  # which of the activation functions, as pydantic counts them
        known = [*kind.model_fields, *Source.model_fields, *Batch.model_fields, "k", "threshold"]
        hint = nearest(place[-1], known) if first["type"] == "extra_forbidden" else ""
        key = ".".join(place)
        raise QklensError(f"{path}: key {key!r}: {first['msg']}{hint}") from error


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
    if over_two_checkpoints(folder):
        raise QklensError(
            f"{path}: is a crosscoder over two checkpoints, which needs the streams of both; expected a dictionary of "
            "one model; `qklens dict check` and `dict show` read it with --base-model B, where B is the other model"
        )
    config = validated(DictionaryConfig, path)
    if not config.layers or list(config.layers) != sorted(set(config.layers)):
        raise QklensError(f"{path}: layers are {list(config.layers)}; expected distinct layers in rising order")
    if config.batch is not None and config.fidelity is None:
        raise QklensError(f"{path}: records a batch but no fidelity measured on it; expected both or neither")
    return config
