"""What `qklens qk --json` holds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from qklens.analyses.interactions import Side
from qklens.interventions.steer import Head
from qklens.strict import Strict
from qklens.studies.results import RoleCandidate

Listing = Literal["all", "features", "roles"]


class Test(Strict):
    """A pair's virtual interaction against one null."""

    null: str
    z: float | None = Field(description="null, like p and q, where the null has no spread; `note` says why")
    p: float | None = Field(description="empirical, two-sided")
    q: float | None = Field(
        description="Benjamini-Hochberg. For pairs of named roles over all tests of such pairs; for any other over "
        "every pair that was searched, because its p is the extreme of a search by construction"
    )
    n_draws: int
    seed: int | None
    note: str | None


class Pair(Strict):
    """One pair of sources."""

    listed: Listing = Field(
        description="why it is here: at an end of the ranking of all pairs, at an end of pairs of features alone, or "
        "as a pair of roles; the first that holds"
    )
    query: str
    key: str
    query_role: str | None
    key_role: str | None
    value: float = Field(description="mean term, score units, on the half that did not choose it")
    ci: tuple[float, float] = Field(description="95% bootstrap over items")
    value_when_chosen: float = Field(description="the same on the half that ranked it")
    virtual: float | None = Field(description="weights only, unit vectors; null for bias and error")
    tests: list[Test]


class Marginal(Strict):
    """One source's sum over all sources of the other side, exact."""

    source: str
    value: float


class PairReading(Strict):
    """One head under one condition, or one difference of two."""

    layer: int
    head: int
    reading: str
    score: float = Field(description="the mean weighted score; all pairs sum to it")
    logsumexp: float | None = Field(
        description="what the weighted score is the linear part of, mean over prompts: the span's logsumexp "
        "(realised), the correct option's less the incorrect one's, which is the log ratio of attention on them "
        "(contrastive), log attention on the span (share); of a difference, its change; null where no "
        "prompt shows the head its spans"
    )
    logsumexp_ci: tuple[float, float] | None = Field(description="95% bootstrap over items")
    hidden: int = Field(
        description="prompts in which the head sees no token of a span (a sliding window): their terms are zero in the "
        "means, and `logsumexp` leaves out their items"
    )
    by_kind: dict[str, float] = Field(description="sums by kind of source, query side first; they sum to the score")
    absolute_by_kind: dict[str, float] = Field(description="shares of the sum of |term|; they sum to 1")
    error_share: float = Field(description="share of the sum of |term| with an error on either side")
    marginals: dict[Side, list[Marginal]] = Field(description="strongest from both ends, and bias and error always")
    pairs: list[Pair] = Field(
        description="most negative first, then most positive; the same among pairs of features alone; then those of "
        "named roles that both write this layer"
    )


class PairTable(Strict):
    """The whole of `qklens qk --json`."""

    model: dict[str, Any]
    dictionary: dict[str, Any]
    data: dict[str, Any]
    seed: int
    weighting: dict[str, Any]
    heads: list[Head]
    roles: list[RoleCandidate] = Field(description="ranked candidates with their evidence")
    readings: list[PairReading]
