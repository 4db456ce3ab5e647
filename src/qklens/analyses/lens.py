"""One head seen through one source: where every source of the stream lands in head space, and what pairs of them score.

With the norms' scales at their observed values, the score from query p to key j is the sum over query sources i and key
sources k of c ⟨q_i(p), k_k(j)⟩. Sources are the dictionary's features, its `bias` (with the biases of norm and
projection) and its `error`. All values are in score units, before the softmax and after the model's scale; a negative
one lowers attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.analyses.written import WrittenPrompt
from qklens.dictionaries.source import FeatureSource
from qklens.errors import QklensError
from qklens.models.scores import ScoreMaps, score_maps
from qklens.models.subject import Subject
from qklens.models.trace import HeadMap

BIAS, ERROR = "bias", "error"


@dataclass(frozen=True, eq=False)
class Sources:
    """The sources that are there on one side, and their vectors in head space; all others are zero.

    Attributes:
        index: rising; features, then `bias` and `error`, which are always there.
        vectors: their sum is the head's query, or the weighted sum of its keys.
    """

    index: Int[Tensor, " source"]
    vectors: Float[Tensor, "source d_head"]

    def of(self, source: int) -> Float[Tensor, " d_head"]:
        """One source's vector, zero where it is not there."""
        return self.rows(torch.tensor([source], device=self.index.device))[0]

    def rows(self, sources: Int[Tensor, " some"]) -> Float[Tensor, "some d_head"]:
        """The same of some sources, one a row."""
        place = torch.searchsorted(self.index, sources).clamp(max=len(self.index) - 1)
        return self.vectors[place] * (self.index[place] == sources)[:, None]


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """All pair terms from one query token to every key token, for the sources that are there.

    Attributes:
        query: query sources.
        key: key source of each column; a source stands once for every token at which it is active.
        position: key token of each column.
        value: c ⟨q_i(p), k_k(j)⟩; summed over the columns of one token it is the score of that token.
    """

    query: Int[Tensor, " query"]
    key: Int[Tensor, " column"]
    position: Int[Tensor, " column"]
    value: Float[Tensor, "query column"]

    def scores(self, n_tokens: int) -> Float[Tensor, " k_pos"]:
        """Σ of all pair terms, by key token."""
        return self.value.new_zeros(n_tokens).index_add(0, self.position, self.value.sum(dim=0))


@dataclass(frozen=True, eq=False)
class HeadLens:
    """One head of one model seen through one source.

    Attributes:
        subject: the model.
        source: the source.
        maps: the layer's linear maps.
        head: the query head.
        names: labels of all sources, features first, then `bias` and `error`.
        directions: the features' directions at the head's input.
    """

    subject: Subject
    source: FeatureSource
    maps: ScoreMaps
    head: int
    names: tuple[str, ...]
    directions: Float[Tensor, "feature d_model"]

    @property
    def layer(self) -> int:
        """The head's layer."""
        return self.maps.layer

    def query(self, prompt: WrittenPrompt, position: int) -> Sources:
        """Head-space vectors of the query sources at a token, from either end; their sum is the head's query there."""
        maps, head, there = self.maps, self.head, prompt.active
        position %= there.n_tokens
        scales = prompt.scales.at(position)
        side = HeadMap(maps.query_side, head, scales.sigma, maps.query_rms(scales, head), prompt.turn.at(position))
        here = there.position == position
        feature, value = there.feature[here], there.value[here].to(scales.sigma)
        features = side.place(value[:, None] * maps.query(self.directions[feature], head))
        bias = side(prompt.bias[None]) + side.constant
        return self._sources(feature, features, bias, side(prompt.error[position][None]))

    def keys(self, prompt: WrittenPrompt, weights: Float[Tensor, " pos"]) -> Sources:
        """Head-space vectors of the key sources, summed over tokens with weights."""
        feature, position, vectors = self._key_features(prompt, weights != 0)
        index, inverse = feature.unique(return_inverse=True)
        w = weights.to(vectors)
        summed = vectors.new_zeros(len(index), vectors.shape[1]).index_add(0, inverse, w[position, None] * vectors)
        bias, error = self._key_rest(prompt)
        return self._sources(index, summed, (w @ bias)[None], (w @ error)[None])

    def terms_by_token(self, prompt: WrittenPrompt, position: int) -> TokenTerms:
        """Pair terms from a position to every token."""
        everywhere = torch.ones(len(prompt.residual), dtype=torch.bool, device=prompt.residual.device)
        feature, where, vectors = self._key_features(prompt, everywhere)
        bias, error = self._key_rest(prompt)
        query, tokens = self.query(prompt, position), everywhere.nonzero()[:, 0]
        n = len(self.directions)
        return TokenTerms(
            query.index,
            torch.cat([feature, torch.full_like(tokens, n), torch.full_like(tokens, n + 1)]),
            torch.cat([where, tokens, tokens]),
            self.maps.scale * query.vectors @ torch.cat([vectors, bias, error]).T,
        )

    def scores(self, prompt: WrittenPrompt, position: int) -> Float[Tensor, " k_pos"]:
        """The head's scores from a position to every token, as they meet the softmax; −∞ where it does not see."""
        maps, head = self.maps, self.head
        query = maps.whole_query(prompt.residual[position], head, prompt.scales.at(position))
        key = maps.whole_key(prompt.residual, head, prompt.scales)
        scores = maps.capped(maps.scale * prompt.turn(key) @ prompt.turn.at(position)(query))
        first, end = maps.visible(position, len(scores))
        hidden = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        hidden[first:end] = False
        return scores.masked_fill(hidden, float("-inf"))

    def pattern(self, scores: Float[Tensor, " k_pos"]) -> Float[Tensor, " k_pos"]:
        """The head's pattern row from its `scores`."""
        return self.maps.pattern(scores, self.head)

    def _key_features(self, prompt: WrittenPrompt, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Feature, token and head-space vector of every activation at some tokens."""
        maps, head, there = self.maps, self.head, prompt.active
        here = tokens[there.position]
        feature, position = there.feature[here], there.position[here]
        used, inverse = feature.unique(return_inverse=True)
        scales = prompt.scales.at(position)
        size = there.value[here].to(scales.sigma) / (scales.sigma * maps.key_rms(scales, head))
        projected = maps.key(self.directions[used], head)[inverse]
        return feature, position, prompt.turn.at(position)(size[:, None] * projected)

    def _key_rest(self, prompt: WrittenPrompt) -> tuple[Tensor, Tensor]:
        """Bias and error at every token, in head space."""
        maps, head, scales = self.maps, self.head, prompt.scales
        sigma, rms = scales.sigma[:, None], maps.key_rms(scales, head)[:, None]
        bias = prompt.turn((maps.key(prompt.bias, head) / sigma + maps.key_constant(head)) / rms)
        return bias, prompt.turn(maps.key(prompt.error, head) / (sigma * rms))

    def _sources(self, feature: Tensor, features: Tensor, bias: Tensor, error: Tensor) -> Sources:
        rest = torch.tensor([len(self.directions), len(self.directions) + 1], device=feature.device)
        return Sources(torch.cat([feature, rest]), torch.cat([features, bias, error]))


def head_lens(subject: Subject, source: FeatureSource, layer: int, head: int) -> HeadLens:
    """A lens on one head.

    Raises:
        QklensError: no such head, or the source does not write this head's input.
    """
    subject.check_head(layer, head)
    if layer not in source.layers:
        raise QklensError(
            f"dictionary {source.name!r} does not write resid_pre.{layer}, the input of head L{layer}H{head}; it "
            f"writes layers {list(source.layers)}"
        )
    maps = score_maps(subject, layer)
    return HeadLens(
        subject=subject,
        source=source,
        maps=maps,
        head=head,
        names=(*source.labels, BIAS, ERROR),
        directions=source.directions(layer).to(maps.query_side.weight),
    )
