"""One score of one head, prompt by prompt, as the exact sum of signed pairs of sources."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.lens import BIAS, ERROR
from qklens.dictionaries.source import FeatureSource, write_parts
from qklens.errors import QklensError
from qklens.models.trace import HeadMap, Position, Trace


@dataclass(frozen=True, eq=False)
class Decomposition:
    """u(p, j) = Σ over query sources Σ over key sources, on every prompt of a batch.

    Attributes:
        query_names: features active at the query token of any prompt, then `bias` (with the biases of norm and
            projection) and `error`.
        key_names: the same of the key token.
        terms: c ⟨q_i, k_k⟩ in score units; negative lowers attention.
        score: the model's own u.
    """

    query_names: tuple[str, ...]
    key_names: tuple[str, ...]
    terms: Float[Tensor, "batch query key"]
    score: Float[Tensor, " batch"]

    @property
    def error(self) -> float:
        """Completeness: the largest |Σ terms − u|, relative to the largest |u|."""
        off = (self.terms.sum(dim=(1, 2)) - self.score).abs().max()
        return float(off / self.score.abs().max().clamp(min=torch.finfo(self.score.dtype).tiny))

    def top(self, k: int, prompt: int | None = None) -> list[tuple[str, str, float]]:
        """The k most negative and the k most positive pairs of one prompt, or of the mean over prompts."""
        value = (self.terms.mean(dim=0) if prompt is None else self.terms[prompt]).flatten()
        order = value.argsort(stable=True).tolist()
        chosen = [i for i in order[:k] if value[i] < 0] + [i for i in order[::-1][:k] if value[i] > 0]
        n = len(self.key_names)
        return [(self.query_names[i // n], self.key_names[i % n], float(value[i])) for i in chosen]


def decompose(
    prompts: Trace, layer: int, head: int, q_pos: Position, k_pos: Position, source: FeatureSource
) -> Decomposition:
    """Write the score of a head from one token to another as pairs of a source's features, biases and errors.

    Raises:
        QklensError: no such head or token, a layer that was not traced, a key that the query does not see, or a source
            that does not write the layer.
    """
    score = prompts.score(layer, head, q_pos, k_pos)
    if not bool(score.isfinite().all()):
        row = int((~score.isfinite()).nonzero()[0, 0])
        raise QklensError(f"prompt {row}: head L{layer}H{head} does not see the key token from the query token")
    query = _side(prompts, prompts.query_map(layer, head, q_pos), layer, q_pos, source)
    key = _side(prompts, prompts.key_map(layer, head, k_pos), layer, k_pos, source)
    terms = prompts.maps(layer).scale * query[1] @ key[1].transpose(1, 2)
    return Decomposition(query[0], key[0], terms, score.to(terms))


def _side(
    prompts: Trace, side: HeadMap, layer: int, position: Position, source: FeatureSource
) -> tuple[tuple[str, ...], Float[Tensor, "batch source d_head"]]:
    parts = write_parts(source, layer, lambda at: prompts.stream(at, position).to(side.sigma))
    used = (parts.activations != 0).any(dim=0).nonzero()[:, 0]
    projected = side.side.source(parts.directions[used], side.head)
    features = side.place(parts.activations[:, used, None] * projected)
    bias = side(parts.bias.expand(len(features), 1, -1)) + side.constant[:, None]
    return (
        (*(source.labels[i] for i in used.tolist()), BIAS, ERROR),
        torch.cat([features, bias, side(parts.error[:, None])], dim=1),
    )
