"""Is a pair's interaction extreme? Null distributions of the virtual interaction at one head, and z against them.

    z = (interaction − mean of null) / sd of null
    p = (1 + #{|null − mean| ≥ |interaction − mean|}) / (1 + n)

Negative z: the pair suppresses attention more than pairs of the null do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qklens.errors import QklensError
from qklens.models.scores import Rotation, ScoreMaps, virtual_interaction

NullName = Literal["random_pairs", "matched", "fixed_query", "fixed_key", "rotated", "random_dictionary"]
NULLS: tuple[NullName, ...] = get_args(NullName)
MIN_PAIRS = 30
SMALL_SOURCE = 32
_NEIGHBOURS = 64


@dataclass(frozen=True, eq=False)
class Population:
    """The features that pairs are drawn from, on one side.

    Attributes:
        vectors: decoder directions at the head's input.
        frequency: share of tokens on which each is active.
        alive: features active at least once on this side's tokens.
        covariance_root: S with S Sᵀ = covariance of the residual at this side's tokens.
    """

    vectors: Float[Tensor, "feature d_model"]
    frequency: Float[Tensor, " feature"]
    alive: Bool[Tensor, " feature"]
    covariance_root: Float[Tensor, "d_model rank"]

    @property
    def is_small(self) -> bool:
        """Too few features to draw random pairs from."""
        return int(self.alive.sum()) < SMALL_SOURCE

    def from_covariance(self, n: int, generator: torch.Generator) -> Tensor:
        """Directions drawn within the residual's covariance."""
        noise = torch.randn(n, self.covariance_root.shape[1], generator=generator).to(self.covariance_root)
        return noise @ self.covariance_root.T

    def spread(self, directions: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
        """Standard deviation of the residual along unit directions: ‖Sᵀ d̂‖."""
        unit = torch.nn.functional.normalize(directions.to(self.covariance_root), dim=-1)
        return (unit @ self.covariance_root).norm(dim=-1).clamp(min=1e-12)

    def alive_sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Alive features drawn with replacement; from the covariance where the source is small."""
        if self.is_small:
            return self.from_covariance(n, generator)
        pool = self.alive.nonzero()[:, 0]
        return self.vectors[pool[torch.randint(0, len(pool), (n,), generator=generator).to(pool.device)]]

    def matched_sample(self, like: Tensor, frequency: float, n: int, generator: torch.Generator) -> Tensor:
        """Alive features near a given one in log frequency and log norm; the nearest 64 are drawn with replacement.

        Directions are always active, so where the source is small they are matched by how much the residual varies
        along them: of 8 n directions drawn within its covariance, the n nearest in log standard deviation.
        """
        if self.is_small:
            drawn = self.from_covariance(8 * n, generator)
            off = (self.spread(drawn).log() - self.spread(like[None]).log()).abs()
            return drawn[off.argsort()[:n]]
        pool = self.alive.nonzero()[:, 0]

        def coordinates(freq: Tensor, norm: Tensor) -> Tensor:
            return torch.stack([freq.clamp(min=1e-6).log(), norm.clamp(min=1e-6).log()], dim=-1)

        points = coordinates(self.frequency[pool], self.vectors[pool].norm(dim=-1))
        target = coordinates(torch.tensor([frequency]).to(points), like.norm().to(points)[None])
        distance = ((points - target) / points.std(dim=0).clamp(min=1e-6)).norm(dim=-1)
        nearest = pool[distance.argsort()[: min(_NEIGHBOURS, len(pool))]]
        return self.vectors[nearest[torch.randint(0, len(nearest), (n,), generator=generator).to(pool.device)]]


def population(
    vectors: Float[Tensor, "feature d_model"],
    activations: Float[Tensor, "row feature"],
    residual: Float[Tensor, "row d_model"],
) -> Population:
    """A population from activations and residuals at one side's tokens."""
    centred = residual.float() - residual.float().mean(dim=0)
    return Population(
        vectors=vectors.float(),
        frequency=(activations.abs() > 0).float().mean(dim=0),
        alive=(activations.abs() > 0).any(dim=0) & (vectors.norm(dim=-1) > 0),
        covariance_root=centred.T / max(len(centred) - 1, 1) ** 0.5,
    )


@dataclass(frozen=True, eq=False)
class NullTest:
    """One pair against one null."""

    null: NullName
    value: float
    z: float
    p: float
    draws: Float[Tensor, " pair"]
    note: str | None


def null_test(
    null: NullName,
    maps: ScoreMaps,
    head: int,
    turn: Rotation,
    queries: Population,
    keys: Population,
    pair: tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]],
    frequencies: tuple[float, float],
    *,
    n: int = 1000,
    seed: int = 0,
) -> NullTest:
    """Test one (query direction, key direction) pair against a null.

    `random_pairs`: random alive features on both sides (the source study's). `matched`: both sides alike in frequency
    and norm. `fixed_query`, `fixed_key`: that side held. `rotated`: both directions replaced by draws within the
    residual's covariance at that side's tokens. `random_dictionary`: isotropic directions.

    Raises:
        QklensError: an unknown null, fewer than 30 pairs, or a null without spread.
    """
    if n < MIN_PAIRS:
        raise QklensError(f"null {null!r} with {n} pairs; expected at least {MIN_PAIRS}")
    generator = torch.Generator().manual_seed(seed)
    query, key = pair
    sample: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "random_pairs": lambda: (queries.alive_sample(n, generator), keys.alive_sample(n, generator)),
        "matched": lambda: (
            queries.matched_sample(query, frequencies[0], n, generator),
            keys.matched_sample(key, frequencies[1], n, generator),
        ),
        "fixed_query": lambda: (query.expand(n, -1), keys.alive_sample(n, generator)),
        "fixed_key": lambda: (queries.alive_sample(n, generator), key.expand(n, -1)),
        "rotated": lambda: (queries.from_covariance(n, generator), keys.from_covariance(n, generator)),
        "random_dictionary": lambda: (_isotropic(query, n, generator), _isotropic(key, n, generator)),
    }
    if null not in sample:
        raise QklensError(f"null {null!r} is unknown; expected one of {list(NULLS)}")
    draws = virtual_interaction(maps, head, turn, *sample[null]()).cpu()
    value = float(virtual_interaction(maps, head, turn, query[None], key[None])[0])
    mean, spread = float(draws.mean()), float(draws.std())
    if spread == 0:
        raise QklensError(
            f"null {null!r} at layer {maps.layer} head {head} has no spread; the head's scores are constant"
        )
    extreme = int(((draws - mean).abs() >= abs(value - mean)).sum())
    small = (queries.is_small or keys.is_small) and null in ("random_pairs", "matched", "fixed_query", "fixed_key")
    note = "the source is small: random directions come from the residual's covariance" if small else None
    return NullTest(null, value, (value - mean) / spread, (1 + extreme) / (1 + n), draws, note)


def _isotropic(like: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, like.shape[-1], generator=generator).to(like)
