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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qklens.data.render import Prompt
from qklens.dictionaries.source import FeatureSource, Parts, write_parts
from qklens.errors import QklensError
from qklens.models.scores import Rotation, Scales, ScoreMaps, rotation, score_maps
from qklens.models.subject import Subject
from qklens.models.trace import HeadMap

BIAS, ERROR = "bias", "error"
Weighting = Literal["realised", "contrastive", "share"]


@dataclass(frozen=True, eq=False)
class PromptParts:
    """One prompt's stream at a layer, written by a source.

    Attributes:
        residual: the stream itself.
        parts: activations, directions, bias and error at every token.
        scales: what the norms divided by at every token.
        turn: the rotations at every token's position.
    """

    residual: Float[Tensor, "pos d_model"]
    parts: Parts
    scales: Scales
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
        parts, maps, head = prompt.parts, self.maps, self.head
        here = prompt.scales.at(position)
        side = HeadMap(maps.query_side, head, here.sigma, maps.query_rms(here, head), prompt.turn.at(position))
        features = side.place(parts.activations[position, :, None].to(here.sigma) * self.query_features)
        return torch.cat([features, side(parts.bias[None]) + side.constant, side(parts.error[position][None])])

    def keys(self, prompt: PromptParts, weights: Float[Tensor, " pos"]) -> Float[Tensor, "source d_head"]:
        """Head-space vectors of all key sources, summed over tokens with weights."""
        parts, maps, head = prompt.parts, self.maps, self.head
        where = weights.nonzero()[:, 0]
        scales, here = prompt.scales.at(where), prompt.turn.at(where)
        w, sigma = weights[where].to(scales.sigma) / maps.key_rms(scales, head), scales.sigma
        # Σ_j w_j a(j)/σ(j) R_j d: the rotations are summed first, one sum a feature; what does not turn sums plainly.
        spread = (w / sigma)[:, None] * parts.activations[where].to(sigma)
        turning, still = self.key_features.split(
            [here.cos.shape[-1], self.key_features.shape[-1] - here.cos.shape[-1]], dim=-1
        )
        turned = Rotation(spread.T @ here.cos, spread.T @ here.sin)(turning)
        features = torch.cat([turned, spread.sum(dim=0)[:, None] * still], dim=-1)
        bias = here(maps.key(parts.bias, head) / sigma[:, None] + maps.key_constant(head))
        error = here(maps.key(parts.error[where], head) / sigma[:, None])
        return torch.cat([features, (w @ bias)[None], (w @ error)[None]])

    def scores(self, prompt: PromptParts, position: int) -> Float[Tensor, " k_pos"]:
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

    def terms(self, prompt: PromptParts, position: int, weights: Float[Tensor, " pos"]) -> Float[Tensor, "query key"]:
        """All pair terms at a position for a weighting of key tokens; they sum to Σ_j w_j u(p, j)."""
        return self.maps.scale * self.query(prompt, position) @ self.keys(prompt, weights).T

    def terms_by_token(self, prompt: PromptParts, position: int) -> Float[Tensor, "k_pos query key"]:
        """Pair terms from a position to every token, for the sources active anywhere in the prompt."""
        parts, maps, head = prompt.parts, self.maps, self.head
        sigma, rms = prompt.scales.sigma, maps.key_rms(prompt.scales, head)
        query = self.query(prompt, position)
        query = query[query.abs().sum(dim=1) > 0]
        used = (parts.activations != 0).any(dim=0).nonzero()[:, 0]
        features = parts.activations[:, used, None] * self.key_features[used] / sigma[:, None, None]
        bias = maps.key(parts.bias, head) / sigma[:, None] + maps.key_constant(head)
        error = maps.key(parts.error, head) / sigma[:, None]
        keys = prompt.turn.between()(torch.cat([features.to(error), bias[:, None], error[:, None]], dim=1))
        return maps.scale * torch.einsum("qd,tkd->tqk", query, keys / rms[:, None, None])


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
    directions = source.directions(layer).to(maps.query_side.weight)
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
    device, lengths = maps.query_side.weight.device, [len(stream[maps.layer]) for stream in streams]
    joined = {
        layer: torch.cat([s[layer] for s in streams]).to(device) for layer in {maps.layer, *source.reads(maps.layer)}
    }
    residual = joined[maps.layer]
    parts = write_parts(source, maps.layer, lambda layer: joined[layer])
    scales, turn = maps.scales(residual), rotation(subject, maps.layer, torch.arange(max(lengths)))
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        PromptParts(
            residual[begin : begin + n],
            Parts(parts.activations[begin : begin + n], parts.directions, parts.bias, parts.error[begin : begin + n]),
            scales.at(slice(begin, begin + n)),
            turn.at(slice(n)),
        )
        for begin, n in zip(begins, lengths, strict=True)
    ]


def within_span(scores: Float[Tensor, " k_pos"], positions: Sequence[int]) -> Float[Tensor, " k_pos"]:
    """Softmax of the scores within a span, zero elsewhere: the gradient of the span's logsumexp.

    A span of which the head sees nothing (a sliding window) has no weight.

    Raises:
        QklensError: the span is empty.
    """
    if not positions:
        raise QklensError("a span without tokens has no score")
    weights = torch.zeros_like(scores)
    index = torch.tensor(list(positions), device=scores.device)
    if bool(scores[index].isfinite().any()):
        weights[index] = scores[index].softmax(dim=0)
    return weights


def realised_weights(scores: Float[Tensor, " k_pos"], prompt: Prompt) -> Float[Tensor, " k_pos"]:
    """w(correct)."""
    return within_span(scores, prompt.span("correct"))


def contrast_weights(scores: Float[Tensor, " k_pos"], prompt: Prompt) -> Float[Tensor, " k_pos"]:
    """w(correct) − w(incorrect)."""
    return realised_weights(scores, prompt) - within_span(scores, prompt.span("incorrect"))


def weights_of(lens: HeadLens, prompt: Prompt, parts: PromptParts, weighting: Weighting) -> Float[Tensor, " k_pos"]:
    """How much each key token counts for a head at the answer position; `share` is w(correct) − the head's pattern."""
    scores = lens.scores(parts, prompt.spans["answer"][0])
    if weighting == "contrastive":
        return contrast_weights(scores, prompt)
    realised = realised_weights(scores, prompt)
    return realised if weighting == "realised" else realised - lens.pattern(scores)


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


def mean_terms(
    lens: HeadLens, prompts: Sequence[Prompt], written: Sequence[PromptParts], weighting: Weighting
) -> PairMeans:
    """Mean pair terms at the answer position over prompts."""
    n = len(lens.names)
    flat: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for prompt, parts in zip(prompts, written, strict=True):
        position = prompt.spans["answer"][0]
        query, key = lens.query(parts, position), lens.keys(parts, weights_of(lens, prompt, parts, weighting))
        rows, columns = query.abs().sum(dim=1).nonzero()[:, 0], key.abs().sum(dim=1).nonzero()[:, 0]
        terms = lens.maps.scale * query[rows] @ key[columns].T
        flat.append((rows[:, None] * n + columns[None]).flatten().cpu().numpy())
        values.append(terms.double().flatten().cpu().numpy())
    index, inverse = np.unique(np.concatenate(flat), return_inverse=True)
    sums = np.bincount(inverse, weights=np.concatenate(values)) / len(prompts)
    return PairMeans(lens.names, index // n, index % n, sums, float(sums.sum()))
