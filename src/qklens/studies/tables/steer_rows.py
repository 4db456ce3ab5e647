"""What `qklens steer --json` holds."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from qklens.analyses.statistics import Interval
from qklens.data.render import Condition
from qklens.interventions.steer import Head
from qklens.models.edits import Side
from qklens.strict import Strict
from qklens.studies.neutral import NeutralText
from qklens.studies.steer_spec import SteerSpec


class Measured(Strict):
    """What one steered run gives on the half of the items that chose nothing."""

    accuracy: float = Field(description="share of prompts with a margin above 0")
    ci: Interval = Field(description="Wilson 95% interval of the accuracy over prompts")
    margin: float = Field(description="mean logit(correct letter) - logit(incorrect letter)")
    margin_ci: Interval = Field(description="95% bootstrap over items, both orders of one together")
    attention_difference: float = Field(
        description="attention from the answer on the correct - incorrect option, mean over prompts and over the "
        "steered heads; over the answer-selection heads where all heads or the stream are steered"
    )
    kl: float = Field(description="KL(clean || steered) of the next token on neutral text, nats, mean over windows")
    kl_ci: Interval = Field(description="95% bootstrap over windows")


class RandomDraws(Strict):
    """The same edit along random directions of equal norm: the mean over draws, and the lowest and highest draw."""

    draws: int
    accuracy: float
    accuracy_range: Interval
    margin: float
    margin_range: Interval
    attention_difference: float
    attention_difference_range: Interval
    kl: float
    kl_range: Interval


class RowControls(Strict):
    """The controls of one row, at its strength and place."""

    random: RandomDraws = Field(description="random directions of equal norm, under the row's condition")
    unrelated: Measured = Field(description="an unrelated feature at equal norm, under the row's condition")
    benign: Measured = Field(description="the same edit under the benign condition")


class SteerRow(Measured):
    """One strength at one place under one condition."""

    condition: Condition
    side: Side
    layers: list[int] = Field(description="resid_pre layers that are edited")
    heads: list[Head] | None = Field(description="null where all heads of the layers, or the stream, are steered")
    strength: float
    controls: RowControls | None


class Clean(Strict):
    """The same prompts without an edit."""

    accuracy: float
    ci: Interval
    margin: float
    margin_ci: Interval
    attention_difference: dict[str, float] = Field(description="by head, as L2H4, of all heads that rows speak of")


class Cost(Strict):
    """What one sweep has run: tokens, padding too, times layers."""

    points: int = Field(description="edits, those of the controls included")
    tokens_x_layers: int
    whole_prompts: int = Field(description="tokens x layers of as many runs of whole prompts")


class SteerTable(Strict):
    """The whole of `qklens steer --json`."""

    model: dict[str, Any]
    dictionary: dict[str, Any]
    data: dict[str, Any]
    seed: int
    spec: SteerSpec = Field(description="every key, defaults filled in; given again it gives the same rows")
    feature: str = Field(description="what is steered: the label of the direction's feature")
    heads: list[Head] | None = Field(
        description="the answer-selection heads, chosen on the other half; null if not needed"
    )
    typical: dict[int, float] = Field(description="per layer, the activation that unit activation_max counts as 1")
    norms: dict[int, float] = Field(description="per layer, the norm of the direction and of its controls")
    unrelated: str | None = Field(description="the label of the unrelated feature")
    neutral: NeutralText
    clean: dict[Condition, Clean]
    cost: dict[str, Cost] = Field(description="by condition, and on neutral text")
    rows: list[SteerRow]
