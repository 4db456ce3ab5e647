"""What `results.json` holds: the study's public record, one class per table.

Keys named in the project's contract keep their names and meaning; a stage adds detail beside them. Every number that
was *chosen* with data was chosen on the discovery half of the items; every number here is measured on the report half,
unless its field says otherwise.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from qklens.analyses.feature_card import CardText, FeatureCard
from qklens.analyses.weighting import Kind
from qklens.strict import Strict
from qklens.studies.result_types import Condition, HeadIndex, Interval
from qklens.studies.results_around import (
    ErrorEffect,
    ErrorTerms,
    Milestone,
    Origin,
    Partner,
    PushedAway,
    Transfer,
)


class ConditionBehaviour(Strict):
    """Accuracy and margin of one condition over all items and both option orders."""

    accuracy: float
    ci: Interval = Field(description="Wilson 95% interval of the accuracy over prompts")
    margin: float = Field(description="mean logit(correct letter) - logit(incorrect letter), in logits")
    margin_ci: Interval = Field(description="bootstrap 95% interval over items")
    n: int
    fraction_A: float = Field(description="share of prompts answered with the first letter")  # noqa: N815


class BehaviourDetails(Strict):
    """What the behaviour figure draws beside the contract's table."""

    margin_by_item: dict[Condition, list[float]] = Field(description="mean over both orders, in the order of `items`")
    items: list[str]
    severity_by_item: list[str | None]
    accuracy_by_severity: dict[str, float] = Field(description="under harm")
    accuracy_by_order: dict[Condition, tuple[float, float]] = Field(description="correct option as A, as B")
    harm_minus_none: tuple[float, float, float] = Field(description="paired margin difference, low, high")
    harm_minus_benign: tuple[float, float, float]
    mcnemar_p: float = Field(description="exact, harm against benign, over prompts")
    letter_form: str
    unknown_token_share: float


class BeliefCondition(Strict):
    """How well the correct-answer feature separates the options under one condition."""

    auc: float
    auc_ci: Interval
    sum_correct: float = Field(description="activation summed over the option's tokens, mean over prompts")
    sum_incorrect: float


class BeliefFeature(Strict):
    """A feature that separates the options: chosen on the discovery half under `none`, tested on the other."""

    feature: str
    layer: int
    difference: float = Field(description="discovery half: activation on the correct less on the incorrect option")
    steadiness: float = Field(description="that difference's mean over its standard deviation, over items")
    by_condition: dict[Condition, BeliefCondition]


class Belief(Strict):
    """Does the model still know? The feature is chosen on the discovery half under `none`."""

    feature: str
    layer: int
    auc_none: float
    auc_harm: float
    sum_correct: float = Field(description="under harm")
    sum_incorrect: float = Field(description="under harm")
    by_condition: dict[Condition, BeliefCondition]
    candidates: list[BeliefFeature] = Field(default_factory=list, description="the best eight, best first")


class AttendedToken(Strict):
    """A token, at one place in the prompt, that a head attends to from the answer position."""

    token: str = Field(description="decoded; foreign text")
    span: str = Field(description="where it stands, a key of `attention_by_place`")
    attention: dict[Condition, float] = Field(description="attention on its occurrences there, mean over all prompts")


class HeadRow(Strict):
    """One candidate answer-selection head."""

    layer: int
    head: int
    attention_difference_none: float
    attention_difference_harm: float
    attention_difference_benign: float
    attention_difference_ci: Interval = Field(description="under none, bootstrap over items")
    attention: dict[Condition, dict[str, float]] = Field(
        description="mass from the answer position on correct, incorrect, intent, question, other; sums to 1"
    )
    attention_by_place: dict[Condition, dict[str, float]] = Field(
        description="the same mass by place in the prompt: template_before, intent, question, option_A, option_B, "
        "instruction, template_after (holds the answer position itself), between; sums to 1"
    )
    attention_change: dict[Literal["harm", "benign"], tuple[float, float, float]] = Field(
        description="paired change of the attention difference from none: mean, low, high; 95% bootstrap over items"
    )
    top_tokens: list[AttendedToken] = Field(
        description="the tokens it attends to most under any condition, by their largest mean attention"
    )
    letter_logit: float = Field(description="direct logit attribution of the correct letter, under none")
    letter_logit_harm: float
    ablation_drop: float = Field(description="fall of the margin under none when the head's output is mean-ablated")
    restores_when_patched: float = Field(description="share of the lost margin restored by its pattern from none")
    selected: bool


class HeadsDetails(Strict):
    """The layer x head maps (discovery half) and the joint patch of the selected heads (report half)."""

    selected: list[HeadIndex]
    attention_difference_map: dict[Condition, list[list[float]]] = Field(description="[layer][head]")
    letter_logit_map: list[list[float]]
    restored: float = Field(description="(patched - harm) / (none - harm) of the mean margin, selected heads together")
    restored_ci: Interval
    patched_accuracy: float
    patched_accuracy_ci: Interval
    patched_margin: float
    harm_margin: float
    none_margin: float
    restored_random_heads: float = Field(description="the same patch at as many other heads")
    all_heads_restored: float = Field(description="the same patch at every head")
    discovery_curve: list[float] = Field(description="share restored by the first k ranked heads, discovery half")


class InteractionRow(Strict):
    """One (query source, key source) term of the score, mean over prompts."""

    layer: int
    head: int
    query: str
    key: str
    condition: Condition
    value: float
    kind: Kind
    query_role: str | None = None
    key_role: str | None = None
    weighed_as_none: float | None = Field(
        default=None,
        description="of two roles: the same with tokens weighed as the head weighs them without pressure, so that one "
        "which pressure pushes away still counts; none where an option has another number of tokens there",
    )


class InteractionShare(Strict):
    """How a head's score splits by kind of source on both sides; the nine values sum to `score`."""

    layer: int
    head: int
    condition: Condition
    kind: Kind
    score: float
    shares: dict[str, float] = Field(description="'feature x feature', 'feature x bias', ..., query side first")


class ZScore(Strict):
    """One named pair's virtual interaction against one null distribution."""

    layer: int
    head: int
    query: str
    key: str
    value: float
    null: str
    z: float
    p: float
    q: float = Field(description="Benjamini-Hochberg over all tests of the stage")
    query_role: str
    key_role: str
    n_draws: int = Field(description="pairs drawn from the null")
    seed: int = Field(description="seeds those draws; one a head and null")


class NullHistogram(Strict):
    """A null distribution as the figure draws it."""

    layer: int
    head: int
    null: str
    edges: list[float]
    counts: list[int]
    mean: float
    sd: float
    n: int
    note: str | None = None


class Steering(Strict):
    """One point of a dose-response curve."""

    stage: Literal["steer_all", "steer_query", "steer_key"]
    spec: dict[str, Any]
    strength: float
    condition: Condition
    accuracy: float
    ci: Interval
    margin: float
    control: Literal["random", "unrelated", "benign"] | None
    variant: str = Field(description="what is steered, in words; one curve per variant and control")
    chosen: bool = Field(description="the strength chosen on the discovery half")
    draws: tuple[float, float, int] | None = Field(
        default=None, description="random directions at the chosen strength: lowest and highest accuracy, and how many"
    )


class Completeness(Strict):
    """Sum of all pair terms against the model's own score, over all heads."""

    max_relative_error: float
    error_share: float = Field(
        description="share of sum |contrastive term| with an error on either side, mean over selected heads, conditions"
    )
    max_relative_error_by_head: list[list[float]] = Field(description="[layer][head]")
    n_scores: int


class Evidence(Strict):
    """One number that a rule of the verdict read."""

    name: str
    value: float
    threshold: str
    holds: bool
    text: str


Mechanism = Literal[
    "task_not_solved",
    "no_effect",
    "belief_change",
    "late_flip",
    "attention_answer_key",
    "attention_harm_key",
    "undetermined",
]


class Verdict(Strict):
    """The mechanism that the evidence supports."""

    mechanism: Mechanism
    confidence: float = Field(description="how often such a verdict was right on planted models, at most `limit`")
    distance: float = Field(
        default=0.0,
        description="of the check nearest to failing from its threshold, in typical errors; for undetermined, how far "
        "the rule nearest to holding fell short",
    )
    limit: float = Field(default=1.0, description="what the number of items and the patch's interval allow")
    rule: str
    evidence: list[Evidence]
    caveats: list[str] = Field(default_factory=list, description="what the number of items leaves open")


class RoleCandidate(Strict):
    """A feature that may play a role, with the evidence for it (discovery half)."""

    role: str
    feature: str
    contrast: float = Field(description="mean contrast that defines the role, in decoder-norm units")
    contrast_report: float | None = Field(default=None, description="the same on the half that did not rank it")
    steadiness: float = Field(description="that contrast's mean over its standard deviation, over items")
    refusal: float = Field(description="harmful minus benign intent said alone, at the last position, same units")
    interaction: float = Field(description="realised interaction with its partner role at the selected heads")
    chosen: bool
    named: bool = Field(default=False, description="given its role by a person (--role)")
    layer: int
    top_tokens: list[str]


class Results(Strict):
    """The whole of `results.json`."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    model: dict[str, Any]
    dictionary: dict[str, Any]
    data: dict[str, Any]
    behaviour: dict[Condition, ConditionBehaviour]
    behaviour_details: BehaviourDetails
    belief: Belief | None
    heads: list[HeadRow]
    heads_details: HeadsDetails | None
    roles: list[RoleCandidate]
    interactions: list[InteractionRow]
    interaction_shares: list[InteractionShare]
    cards: list[FeatureCard] = Field(default_factory=list, description="of the roles' features; prompts: report half")
    card_text: CardText | None = Field(default=None, description="the text that the cards were read on")
    zscores: list[ZScore]
    null_histograms: list[NullHistogram]
    untested: list[str] = Field(default_factory=list, description="nulls that could place no pair at a head, and why")
    steering: list[Steering]
    error_terms: list[ErrorTerms]
    error_effects: list[ErrorEffect] = Field(default_factory=list)
    completeness: Completeness | None
    partners: list[Partner]
    transfer: list[Transfer]
    pushed_away: list[PushedAway] = Field(default_factory=list)
    origin: list[Origin]
    milestones: list[Milestone] = Field(default_factory=list)
    skipped: dict[str, str] = Field(description="stage -> why it did not run")
    seconds: dict[str, float] = Field(description="wall time by stage")
    verdict: Verdict
