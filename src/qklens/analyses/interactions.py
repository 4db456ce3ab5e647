"""Which pairs of sources make a head look where it looks: exact, signed terms of the attention score.

With the norms' scales at their observed values, the score from query p to key j is the sum over query sources i and key
sources k of c ⟨q_i(p), k_k(j)⟩. Sources are the dictionary's features, its `bias` (with the projection's own bias) and
its `error`. For a weighting w of key tokens the term is Σ_j w_j c ⟨q_i, k_k(j)⟩:

- realised on a span: w = softmax of the scores within the span (the gradient of its logsumexp);
- contrastive: w(correct) − w(incorrect), in which constants cancel as they do in the softmax;
- share: w(correct) − the head's whole pattern, the gradient of log attention on the correct option.

All values are in score units (before softmax, after the model's scale); negative lowers attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qklens.data.render import Prompt
from qklens.dictionaries.source import FeatureSource, Parts, write_parts
from qklens.errors import QklensError
from qklens.models.scores import Rotation, ScoreMaps, rotation, score_maps
from qklens.models.subject import Subject

BIAS, ERROR = "bias", "error"


@dataclass(frozen=True, eq=False)
class PromptParts:
    """One prompt's stream at a layer, written by a source.

    Attributes:
        residual: the stream itself.
        parts: activations, directions, bias and error at every token.
        sigma: the input norm's observed scale at every token.
        turn: the rotations at every token's position.
    """

    residual: Float[Tensor, "pos d_model"]
    parts: Parts
    sigma: Float[Tensor, " pos"]
    turn: Rotation


@dataclass(frozen=True, eq=False)
class HeadLens:
    """One head of one model seen through one source.

    Attributes:
        maps: the layer's linear maps.
        head: the query head.
        names: labels of all sources, features first, then `bias` and `error`.
        query_features: W_Q γ dᵢ.
        key_features: W_K γ dᵢ.
    """

    subject: Subject
    source: FeatureSource
    maps: ScoreMaps
    head: int
    names: tuple[str, ...]
    query_features: Float[Tensor, "feature d_head"]
    key_features: Float[Tensor, "feature d_head"]

    @property
    def layer(self) -> int:
        """The head's layer."""
        return self.maps.layer

    def query(self, prompt: PromptParts, position: int) -> Float[Tensor, "source d_head"]:
        """Head-space vectors of all query sources at a position; their sum is the head's query there."""
        parts, sigma = prompt.parts, prompt.sigma[position]
        bias = self.maps.query(parts.bias, self.head) / sigma + self.maps.query_bias[self.head]
        error = self.maps.query(parts.error[position], self.head) / sigma
        features = parts.activations[position, :, None].to(error) * self.query_features / sigma
        return prompt.turn.at(position)(torch.cat([features, bias[None], error[None]]))

    def keys(self, prompt: PromptParts, weights: Float[Tensor, " pos"]) -> Float[Tensor, "source d_head"]:
        """Head-space vectors of all key sources, summed over tokens with weights."""
        parts, maps, turn = prompt.parts, self.maps, prompt.turn
        where = weights.nonzero()[:, 0]
        w, sigma = weights[where].to(prompt.sigma), prompt.sigma[where]
        cos, sin = turn.cos[where], turn.sin[where]
        spread = (w / sigma)[:, None] * parts.activations[where].to(sigma)
        features = Rotation(spread.T @ cos, spread.T @ sin)(self.key_features)
        here = Rotation(cos, sin)
        bias = here(maps.key(parts.bias, self.head) / sigma[:, None] + maps.key_bias[maps.kv_head(self.head)])
        error = here(maps.key(parts.error[where], self.head) / sigma[:, None])
        return torch.cat([features, (w @ bias)[None], (w @ error)[None]])

    def scores(self, prompt: PromptParts, position: int) -> Float[Tensor, " k_pos"]:
        """The head's scores from a position to every token up to it; −∞ after it."""
        maps, sigma = self.maps, prompt.sigma
        query = maps.query(prompt.residual[position], self.head) / sigma[position] + maps.query_bias[self.head]
        query = prompt.turn.at(position)(query)
        key = maps.key(prompt.residual, self.head) / sigma[:, None] + maps.key_bias[maps.kv_head(self.head)]
        scores = maps.scale * prompt.turn(key) @ query
        return scores.masked_fill(torch.arange(len(scores), device=scores.device) > position, float("-inf"))

    def terms(self, prompt: PromptParts, position: int, weights: Float[Tensor, " pos"]) -> Float[Tensor, "query key"]:
        """All pair terms at a position for a weighting of key tokens; they sum to Σ_j w_j u(p, j)."""
        return self.maps.scale * self.query(prompt, position) @ self.keys(prompt, weights).T

    def terms_by_token(self, prompt: PromptParts, position: int) -> Float[Tensor, "k_pos query key"]:
        """Pair terms from a position to every token, for the sources active anywhere in the prompt."""
        parts, maps = prompt.parts, self.maps
        query = self.query(prompt, position)
        query = query[query.abs().sum(dim=1) > 0]
        used = (parts.activations != 0).any(dim=0).nonzero()[:, 0]
        features = parts.activations[:, used, None] * self.key_features[used] / prompt.sigma[:, None, None]
        bias = maps.key(parts.bias, self.head) / prompt.sigma[:, None] + maps.key_bias[maps.kv_head(self.head)]
        error = maps.key(parts.error, self.head) / prompt.sigma[:, None]
        turn = Rotation(prompt.turn.cos[:, None], prompt.turn.sin[:, None])
        keys = turn(torch.cat([features.to(error), bias[:, None], error[:, None]], dim=1))
        return maps.scale * torch.einsum("qd,tkd->tqk", query, keys)


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
    directions = source.directions(layer).to(maps.query_weight)
    return HeadLens(
        subject=subject,
        source=source,
        maps=maps,
        head=head,
        names=(*source.labels, BIAS, ERROR),
        query_features=maps.query(directions, head),
        key_features=maps.key(directions, head),
    )


def write_prompts(
    subject: Subject,
    source: FeatureSource,
    maps: ScoreMaps,
    streams: Sequence[dict[int, Float[Tensor, "_pos d_model"]]],
) -> list[PromptParts]:
    """Decompose prompts' streams at a layer, all tokens at once; serves all heads of that layer."""
    device, lengths = maps.query_weight.device, [len(stream[maps.layer]) for stream in streams]
    joined = {
        layer: torch.cat([s[layer] for s in streams]).to(device) for layer in {maps.layer, *source.reads(maps.layer)}
    }
    residual = joined[maps.layer]
    parts = write_parts(source, maps.layer, lambda layer: joined[layer])
    turn = rotation(subject, torch.arange(max(lengths)))
    each = zip(
        residual.split(lengths),
        parts.activations.split(lengths),
        parts.error.split(lengths),
        maps.sigma(residual).split(lengths),
        strict=True,
    )
    return [
        PromptParts(x, Parts(a, parts.directions, parts.bias, e), sigma, turn.at(slice(len(x))))
        for x, a, e, sigma in each
    ]


def within_span(scores: Float[Tensor, " k_pos"], positions: Sequence[int]) -> Float[Tensor, " k_pos"]:
    """Softmax of the scores within a span, zero elsewhere: the gradient of the span's logsumexp.

    Raises:
        QklensError: the span is empty.
    """
    if not positions:
        raise QklensError("a span without tokens has no score")
    weights = torch.zeros_like(scores)
    index = torch.tensor(list(positions), device=scores.device)
    weights[index] = scores[index].softmax(dim=0)
    return weights


def contrast_weights(scores: Tensor, prompt: Prompt) -> Tensor:
    """w(correct) − w(incorrect)."""
    return within_span(scores, prompt.span("correct")) - within_span(scores, prompt.span("incorrect"))


def share_weights(scores: Tensor, prompt: Prompt) -> Tensor:
    """w(correct) − the head's pattern: the gradient of log attention on the correct option."""
    return within_span(scores, prompt.span("correct")) - scores.softmax(dim=0)


def realised_weights(scores: Tensor, prompt: Prompt) -> Tensor:
    """w(correct)."""
    return within_span(scores, prompt.span("correct"))


WEIGHTINGS: dict[str, Callable[[Tensor, Prompt], Tensor]] = {
    "realised": realised_weights,
    "contrastive": contrast_weights,
    "share": share_weights,
}


@dataclass(frozen=True, eq=False)
class PairMeans:
    """Mean pair terms over prompts, for the sources that were ever active.

    Attributes:
        names: labels of all sources.
        query: source index of each entry.
        key: source index of each entry.
        value: mean term, prompts without the pair counting as zero.
        total: mean weighted score; the values sum to it.
    """

    names: tuple[str, ...]
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    total: float

    def top(self, k: int) -> list[tuple[str, str, float]]:
        """The k most negative and the k most positive pairs, by signed value."""
        order = np.argsort(self.value, kind="stable")
        chosen = [i for i in order[:k] if self.value[i] < 0] + [i for i in order[::-1][:k] if self.value[i] > 0]
        return [(self.names[self.query[i]], self.names[self.key[i]], float(self.value[i])) for i in chosen]

    def between(self, query: int, key: int) -> float:
        """The mean term of one pair."""
        found = self.value[(self.query == query) & (self.key == key)]
        return float(found.sum())

    def shares(self) -> dict[str, float]:
        """Sums by kind of source, query side first: `feature x bias` and so on; they sum to `total`."""
        n = len(self.names) - 2
        kinds = np.array(["feature"] * n + [BIAS, ERROR])
        sums = {f"{a} x {b}": 0.0 for a in ("feature", BIAS, ERROR) for b in ("feature", BIAS, ERROR)}
        for a in ("feature", BIAS, ERROR):
            for b in ("feature", BIAS, ERROR):
                inside = (kinds[self.query] == a) & (kinds[self.key] == b)
                sums[f"{a} x {b}"] = float(self.value[inside].sum())
        return sums

    def error_share(self) -> float:
        """Share of Σ|term| with an error on either side."""
        error = len(self.names) - 1
        size = np.abs(self.value)
        touched = (self.query == error) | (self.key == error)
        return float(size[touched].sum() / max(size.sum(), 1e-12))


def mean_terms(lens: HeadLens, prompts: Sequence[Prompt], written: Sequence[PromptParts], weighting: str) -> PairMeans:
    """Mean pair terms at the answer position over prompts."""
    n = len(lens.names)
    flat: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for prompt, parts in zip(prompts, written, strict=True):
        position = prompt.spans["answer"][0]
        weights = WEIGHTINGS[weighting](lens.scores(parts, position), prompt)
        query, key = lens.query(parts, position), lens.keys(parts, weights)
        rows, columns = query.abs().sum(dim=1).nonzero()[:, 0], key.abs().sum(dim=1).nonzero()[:, 0]
        terms = lens.maps.scale * query[rows] @ key[columns].T
        flat.append((rows[:, None] * n + columns[None]).flatten().cpu().numpy())
        values.append(terms.double().flatten().cpu().numpy())
    index, inverse = np.unique(np.concatenate(flat), return_inverse=True)
    sums = np.bincount(inverse, weights=np.concatenate(values)) / len(prompts)
    return PairMeans(lens.names, index // n, index % n, sums, float(sums.sum()))
