"""Prompts' streams written by a source: x = Σ aᵢ dᵢ + b + e at every token, the activations kept sparse.

A dictionary has many more features than are active at a token, so only the active ones are kept; that bounds what a
prompt costs by its activity and not by the dictionary's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.dictionaries.source import FeatureSource, write_parts
from qklens.models.scores import Rotation, Scales, ScoreMaps, rotation
from qklens.models.subject import Subject

_ENCODED_AT_ONCE = 1 << 26
"""Activations that are dense at the same time while prompts are encoded."""


@dataclass(frozen=True, eq=False)
class Active:
    """Which features are active at which tokens of one prompt; every other activation is zero.

    Attributes:
        position: token of each entry, rising.
        feature: its feature, rising within a token.
        value: its activation.
        n_tokens: tokens of the prompt.
        n_features: features of the source.
    """

    position: Int[Tensor, " entry"]
    feature: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    n_tokens: int
    n_features: int

    def dense(self) -> Float[Tensor, "pos feature"]:
        """All activations."""
        whole = self.value.new_zeros(self.n_tokens, self.n_features)
        whole[self.position, self.feature] = self.value
        return whole

    def of(self, feature: int) -> Float[Tensor, " pos"]:
        """One feature's activation at every token."""
        values = self.value.new_zeros(self.n_tokens)
        mine = self.feature == feature
        values[self.position[mine]] = self.value[mine]
        return values

    def features_at(self, positions: Sequence[int]) -> Int[Tensor, " entry"]:
        """The features active at some tokens, once for every token."""
        return torch.cat([self.feature[self.position == position % self.n_tokens] for position in positions])

    def at(self, positions: Sequence[int]) -> Float[Tensor, "token feature"]:
        """All activations at some tokens, counted from either end."""
        whole = self.value.new_zeros(len(positions), self.n_features)
        for row, position in enumerate(positions):
            here = self.position == position % self.n_tokens
            whole[row, self.feature[here]] = self.value[here]
        return whole


def active(dense: Float[Tensor, "pos feature"]) -> Active:
    """The sparse form of activations."""
    position, feature = dense.nonzero(as_tuple=True)
    return Active(position, feature, dense[position, feature], *dense.shape)


@dataclass(frozen=True, eq=False)
class WrittenPrompt:
    """One prompt's stream at a layer, written by a source.

    Attributes:
        residual: the stream itself.
        active: the features' activations at every token.
        bias: the source's bias.
        error: what the source leaves over at every token.
        scales: what the norms divided by at every token.
        turn: the rotations at every token's position.
    """

    residual: Float[Tensor, "pos d_model"]
    active: Active
    bias: Float[Tensor, " d_model"]
    error: Float[Tensor, "pos d_model"]
    scales: Scales
    turn: Rotation


def write_prompts(
    subject: Subject,
    source: FeatureSource,
    maps: ScoreMaps,
    streams: Sequence[dict[int, Float[Tensor, "_pos d_model"]]],
) -> list[WrittenPrompt]:
    """Write prompts' streams at a layer by a source, as many at once as memory allows; serves all heads of the layer.

    Raises:
        QklensError: the source does not write this layer, or has another width.
    """
    n_features = max(1, len(source.labels))
    turn = rotation(subject, maps.layer, torch.arange(max(len(s[maps.layer]) for s in streams)))
    written: list[WrittenPrompt] = []
    begin = 0
    while begin < len(streams):
        end, tokens = begin, 0
        while end < len(streams) and (
            end == begin or (tokens + len(streams[end][maps.layer])) * n_features <= _ENCODED_AT_ONCE
        ):
            tokens += len(streams[end][maps.layer])
            end += 1
        written += _write(source, maps, turn, streams[begin:end])
        begin = end
    return written


def _write(
    source: FeatureSource, maps: ScoreMaps, turn: Rotation, streams: Sequence[dict[int, Tensor]]
) -> list[WrittenPrompt]:
    device, lengths = maps.query_side.weight.device, [len(stream[maps.layer]) for stream in streams]
    joined = {
        layer: torch.cat([s[layer] for s in streams]).to(device) for layer in {maps.layer, *source.reads(maps.layer)}
    }
    residual = joined[maps.layer]
    parts = write_parts(source, maps.layer, lambda layer: joined[layer])
    scales = maps.scales(residual)
    rows = [slice(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]
    return [
        WrittenPrompt(
            residual[at],
            active(parts.activations[at]),
            parts.bias,
            parts.error[at],
            scales.at(at),
            turn.at(slice(n)),
        )
        for at, n in zip(rows, lengths, strict=True)
    ]
