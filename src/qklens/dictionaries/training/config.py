"""Every number that changes what training gives; it is kept with the dictionary."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from qklens.errors import QklensError, nearest
from qklens.strict import Strict, complaint, first_complaint

Kind = Literal["sae", "crosscoder", "model_diff"]
"""An SAE on one layer, a weakly causal crosscoder over layers, or a crosscoder over two checkpoints at one layer."""
TrainedActivation = Literal["relu", "topk", "batch_topk", "jumprelu"]
_NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Strict):
    """How a dictionary is trained.

    Attributes:
        kind: what is trained.
        layers: resid_pre of these layers, in rising order.
        features: of each reading layer.
        activation: which features count, see `selection`.
        k: active features a row: of each reading layer's (`topk`), or of them all on average (`batch_topk`, where it
            counts once a reading layer).
        sparsity: λ of the L1 (`relu`) or the L0 (`jumprelu`) penalty, for rows of mean square 1.
        steps: updates.
        batch: rows of each, over all processes.
        learning_rate: Adam's, at its highest.
        beta1: Adam's, of the mean.
        beta2: Adam's, of the square.
        epsilon: Adam's.
        warmup_steps: in which the learning rate rises from 0.
        decay: share of the steps, at the end, in which it falls to 0.
        sparsity_warmup_steps: in which λ rises from 0, or k falls from `first_k`.
        first_k: k at the first step; None is k.
        first_threshold: tᵢ at the first step, for `jumprelu`.
        bandwidth: width ε of the kernel that stands for the derivative of a jump, for `jumprelu`.
        auxiliary_weight: α of the loss in which dead features explain what is left (AuxK; Gao et al. 2024); 0 is none.
        auxiliary_k: how many of them a row; None is half of the row's width.
        dead_after_steps: steps without being active after which a feature counts as dead.
        buffer_rows: rows among which the next batch is drawn.
        seed: of the first weights and the order of rows.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    kind: Kind
    layers: tuple[Annotated[int, Field(ge=0)], ...]
    features: PositiveInt
    activation: TrainedActivation
    k: PositiveInt | None = None
    sparsity: PositiveFloat | None = None
    steps: PositiveInt
    batch: PositiveInt
    learning_rate: PositiveFloat
    beta1: _Share = 0.9
    beta2: _Share = 0.999
    epsilon: PositiveFloat = 1e-8
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: _Share = 0.2
    sparsity_warmup_steps: Annotated[int, Field(ge=0)] = 0
    first_k: PositiveInt | None = None
    first_threshold: PositiveFloat = 0.1
    bandwidth: PositiveFloat = 0.1
    auxiliary_weight: _NonNegative = 1 / 32
    auxiliary_k: PositiveInt | None = None
    dead_after_steps: PositiveInt = 500
    buffer_rows: PositiveInt = 1 << 16
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @field_validator("layers")
    @classmethod
    def _rising(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError(f"is {list(layers)}; expected distinct layers in rising order")
        return layers

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        if self.kind != "crosscoder" and len(self.layers) != 1:
            raise ValueError(f"kind {self.kind!r} has one layer, layers are {list(self.layers)}; try kind 'crosscoder'")
        counted = self.activation in ("topk", "batch_topk")
        wanted, other = ("k", "sparsity") if counted else ("sparsity", "k")
        if getattr(self, wanted) is None:
            raise ValueError(f"activation {self.activation!r} needs {wanted!r}; give a number")
        if getattr(self, other) is not None or (not counted and self.first_k is not None):
            raise ValueError(
                f"activation {self.activation!r} takes {wanted!r} alone; leave out 'k', 'first_k'"
                if wanted == "sparsity"
                else f"activation {self.activation!r} takes no 'sparsity'"
            )
        for name in ("k", "first_k"):
            if (value := getattr(self, name)) is not None and value > self.features:
                raise ValueError(f"{name} is {value}, features are {self.features}; expected no more than those")
        return self

    @classmethod
    def parse(cls, given: dict[str, object], where: str = "training") -> TrainingConfig:
        """A configuration from keys and values.

        Raises:
            QklensError: a key that is unknown (names the nearest), missing or wrong, or a combination that cannot be.
        """
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise explained(error, where, cls.model_fields) from error


def explained(error: ValidationError, where: str, known: object) -> QklensError:
    """One line for what a configuration has wrong."""
    first = first_complaint(error)
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        key = ""  # a combination of keys, which names them itself
    if first["type"] == "extra_forbidden":
        last = str(first["loc"][-1])
        names = list(known) if not isinstance(known, str) else []  # pyright: ignore[reportArgumentType]
        return QklensError(f"{where}: key {key!r} is unknown{nearest(last, names) or f'; expected one of {names}'}")
    if first["type"] == "missing":
        return QklensError(f"{where}: key {key!r} is missing; give it")
    said = complaint(first["type"], first["msg"], first["input"])
    return QklensError(f"{where}: key {key!r} {said}" if key else f"{where}: {said}")
