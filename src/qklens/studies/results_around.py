"""The tables of `results.json` on what lies around the circuit: error terms, partners, other sets, and training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qklens.strict import Strict
from qklens.studies.result_types import Condition, Estimate, HeadIndex, Interval

ErrorPlace = Literal["query", "options", "prompt", "both"]


class ErrorTerms(Strict):
    """How much of refuse-and-redirect's effect on one head's score runs through the dictionary's error."""

    layer: int
    head: int
    condition: Condition
    through: dict[str, float] = Field(description="key side: features, bias, error; sums to the total")
    ci: dict[str, Interval]
    total: float


class ErrorEffect(Strict):
    """What replacing the error that the selecting heads read does, and what is lost of steering refuse-and-redirect."""

    place: ErrorPlace | None = Field(
        description="where: the query at the answer, the keys of both options, all keys, query and all keys; null: "
        "nowhere, the row that the others are compared with"
    )
    error: Literal["zero", "mean", "other_item", "random"] | None = Field(
        description="what stands in; random is the control: as much noise, in a random direction, beside the error"
    )
    draws: int = Field(description="random draws, of which the numbers are means")
    edit_norm: float = Field(description="norm of the edit over the norm of the stream, mean over edited tokens")
    margin: Estimate = Field(description="under harm, unsteered")
    attention: Estimate = Field(description="attention difference, mean over the heads, under harm, unsteered")
    margin_change: Estimate = Field(description="paired, from the error as it is")
    attention_change: Estimate
    benign_margin_change: Estimate | None = Field(description="the same edit under benign; random: one draw")
    steering_margin: Estimate = Field(description="steered less unsteered, in this state of the error")
    steering_attention: Estimate
    lost_margin: Estimate | None = Field(
        description="share of steering's effect that is lost by replacing the error; null where the effect's interval "
        "includes zero"
    )
    lost_attention: Estimate | None


class Partner(Strict):
    """A key feature ranked by its virtual interaction with refuse-and-redirect at the selected heads."""

    feature: str
    value: float = Field(description="mean over the heads")
    z: float = Field(description="its place among all features that are alive: (value - mean) / sd")
    rank: int = Field(description="1 is the most negative; negative ranks count from the positive end")
    role: str | None
    top_tokens: list[str] = Field(description="tokens on which it is most active in the study's prompts")
    activation: dict[str, float] = Field(description="mean activation on the intent tokens of each set")


class TransferSteering(Strict):
    """The main set's steering of refuse-and-redirect on the query side, unchanged, on another set."""

    strength: float
    accuracy: float
    ci: Interval
    margin: float
    margin_change: Estimate = Field(description="paired, steered less unsteered")
    attention_difference: float = Field(description="mean over the selected heads, steered")
    unrelated: float | None = Field(description="accuracy with an unrelated feature at equal norm; under pressure only")
    random: Estimate | None = Field(description="accuracy with ten random directions: mean, lowest, highest")


class Transfer(Strict):
    """The same circuit on another set of withholding, all its items."""

    set: str
    condition: Condition
    accuracy: float
    ci: Interval
    margin: float
    margin_ci: Interval
    n: int
    attention_difference: float = Field(description="mean over the selected heads")
    attention_ci: Interval
    margin_change: Estimate | None = Field(description="paired, from none; null under none")
    margin_minus_benign: Estimate | None = Field(description="paired; under harm only")
    attention_change: Estimate | None = Field(description="paired, from none; null under none")
    refuse_activation: float
    role_activation: dict[str, Estimate] = Field(
        description="each role's feature where it plays: at the answer (need-answer, refuse-and-redirect), on both "
        "options (harm-detection), on the correct less the incorrect one (correct-answer)"
    )
    steered_accuracy: float | None
    steered_margin: float | None
    steering: TransferSteering | None = Field(description="under harm, and under benign as its control")


class PushedToken(Strict):
    """A token on which a feature is active."""

    token: str = Field(description="decoded; foreign text")
    span: Literal["intent", "option"]
    activation: float


class PushedAway(Strict):
    """A key feature active on another set's intents or options, by its term with refuse-and-redirect."""

    set: str
    feature: str
    role: str | None
    rank: int = Field(description="1 is the most negative of those active there")
    of: int = Field(description="how many features are active on a tenth of the set's prompts or more")
    ranked_by: Literal["realised", "virtual"] = Field(
        description="virtual where refuse-and-redirect is active on no prompt of the set, so that nothing is realised"
    )
    realised: Estimate = Field(description="mean score per intent or option token under pressure, mean over heads")
    heads: list[HeadIndex]
    virtual: list[float] = Field(description="weights alone, one a head")
    z: dict[str, list[float]] = Field(description="of the virtual one against random_pairs and matched, one a head")
    active_share: float = Field(description="share of the pressed prompts where it is active on intent or options")
    activation: dict[Condition, float] = Field(description="mean on the intent's tokens")
    tokens: list[PushedToken]


class OriginHead(Strict):
    """Refuse-and-redirect x harm-detection at one head of one checkpoint: virtual, and against both nulls."""

    layer: int
    head: int
    value: float
    z: dict[str, float]


class Origin(Strict):
    """One checkpoint between base and post-trained."""

    checkpoint: str
    step: int = Field(description="position in the order of training, base is 0")
    accuracy: dict[Condition, float]
    ci: dict[Condition, Interval]
    accuracy_drop: Estimate = Field(description="none less harm, paired")
    margin: dict[Condition, float]
    margin_drop: Estimate = Field(description="benign less harm, paired")
    attention_difference: dict[Condition, float] = Field(description="mean over the selected heads")
    attention_ci: dict[Condition, Interval]
    attention_drop: Estimate = Field(description="none less harm, paired")
    refuse_contrast: float = Field(description="harm - benign activation of refuse-and-redirect at the answer")
    refuse_contrast_ci: Interval
    refuse_harm_realised: Estimate = Field(
        description="what refuse-and-redirect x harm-detection adds to the score of an option token under harm"
    )
    refuse_harm_interaction: float = Field(description="virtual, mean over selected heads, this checkpoint's weights")
    refuse_harm_z: float = Field(description="against random_pairs, mean over heads")
    refuse_harm_matched_z: float = Field(description="against matched, mean over heads")
    by_head: list[OriginHead]
    unexplained: dict[str, float] = Field(
        description="by layer of the heads: share of this checkpoint's variance that the last one's dictionary leaves"
    )


class Milestone(Strict):
    """The first checkpoint at which a part of the circuit has appeared; null where the last does not show it."""

    event: str
    checkpoint: str | None
    step: int | None
    value: float | None
    interval: Interval | None
    rule: str
