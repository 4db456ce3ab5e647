"""Is a pair's interaction extreme? Null distributions of the virtual interaction at one head, and z against them.

    z = (interaction − mean of null) / sd of null
    p = (1 + #{|null − mean| ≥ |interaction − mean|}) / (1 + n)

Negative z: the pair suppresses attention more than pairs of the null do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qklens.analyses.written import WrittenPrompt
from qklens.errors import NoSpreadError, QklensError
from qklens.models.norms import NormMap
from qklens.models.scores import Rotation, ScoreMaps, virtual_interaction

NullName = Literal["random_pairs", "matched", "fixed_query", "fixed_key", "rotated", "random_dictionary"]
NULLS: tuple[NullName, ...] = get_args(NullName)
MIN_PAIRS = 30
SMALL_SOURCE = 32
_CELL, _POOL = 32, 50
_BLOCK = 1 << 14
_ROUNDING = 1e-5
"""A null may draw the pair itself, as `fixed_query` does with its own key: a tie, whichever way its last bit falls."""
_OF_THE_PAIR = ("matched", "fixed_query", "fixed_key")


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

    def through(self, norm: NormMap) -> Population:
        """The same features and covariance as a norm reads them, C d and C S; equal to this one under RMSNorm."""
        if not norm.centred:
            return self
        return replace(self, vectors=norm.centre(self.vectors), covariance_root=norm.centre(self.covariance_root.T).T)

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
        """Alive features like a given one in frequency and norm, drawn with replacement from its `cell`.

        Directions are always active, so where the source is small they are matched by how much the residual varies
        along them: of 50 n directions drawn within its covariance, the n nearest in log standard deviation. (Of 8 n the
        nearest to a low one are not alike enough: z then has a standard deviation of 0.73 to 1.14, by the head.)
        """
        if self.is_small:
            wanted = self.spread(like[None]).log()
            kept, off = self.vectors.new_empty(0, self.vectors.shape[1]).to(self.covariance_root), wanted[:0]
            for _ in range(_POOL):  # n at a time, since all of them may have no room
                drawn = self.from_covariance(n, generator)
                kept, off = torch.cat([kept, drawn]), torch.cat([off, (self.spread(drawn).log() - wanted).abs()])
                nearest = off.argsort(stable=True)[:n]
                kept, off = kept[nearest], off[nearest]
            return kept
        alike = self.cell(like, frequency)
        return self.vectors[alike[torch.randint(0, len(alike), (n,), generator=generator).to(alike.device)]]

    def cell(self, like: Float[Tensor, " d_model"], frequency: float) -> Int[Tensor, " alike"]:
        """Alive features like one of this direction and frequency: at least 32 where there are as many.

        All are halved at the median of log frequency or log norm, whichever spreads more, as long as both halves hold
        32. Cells do not overlap, so each member is as likely a draw of its own cell as any other: p of a member is
        uniform. Of the nearest neighbours of each feature that would not hold.
        """
        pool = self.alive.nonzero()[:, 0]
        points = _coordinates(self.frequency[pool], self.vectors[pool].norm(dim=-1))
        target = _coordinates(points.new_tensor([frequency]), like.norm().to(points)[None])[0]
        width = points.std(dim=0).clamp(min=1e-6)
        points, target = points / width, target / width
        while (side := _halves(points)) is not None:
            axis, cut, compare = side
            mine = compare(points[:, axis], cut) == compare(target[axis], cut)
            pool, points = pool[mine], points[mine]
        return pool


_Compare = Callable[[Tensor, Tensor], Tensor]


def _halves(points: Float[Tensor, "feature axis"]) -> tuple[int, Tensor, _Compare] | None:
    """Where to part some points: the axis that spreads more and can be parted, its cut, and what is below it."""
    spread = points.std(dim=0)
    # All of them together spread alike on both axes, which have that as their unit; rounding must not choose.
    for axis in (0, 1) if spread[0] >= (1 - 1e-4) * spread[1] else (1, 0):
        # Between two values, so that rounding cannot part a feature from itself; where many are equal, beside them.
        cut = points[:, axis].sort().values[(len(points) - 1) // 2 :][:2].mean()
        for compare in (torch.le, torch.lt):
            below = int(compare(points[:, axis], cut).sum())
            if min(below, len(points) - below) >= _CELL:
                return axis, cut, compare
    return None


def _coordinates(frequency: Tensor, norm: Tensor) -> Tensor:
    return torch.stack([frequency.clamp(min=1e-6).log(), norm.clamp(min=1e-6).log()], dim=-1)


def population(
    vectors: Float[Tensor, "feature d_model"], places: Sequence[tuple[WrittenPrompt, Sequence[int]]]
) -> Population:
    """A population from what is active, and how the residual varies, at one side's tokens.

    Args:
        vectors: the features' directions at the head's input.
        places: prompts and the tokens of them that belong to this side.

    Raises:
        QklensError: there is no token on this side.
    """
    if not any(len(positions) for _, positions in places):
        raise QklensError("a null's population needs at least one token on each side")
    places = [(written, positions) for written, positions in places if len(positions)]
    counts = torch.zeros(len(vectors), dtype=torch.long)
    for written, positions in places:
        counts += torch.bincount(written.active.features_at(positions).cpu(), minlength=len(vectors))
    residual = torch.cat([written.residual[list(positions)] for written, positions in places]).float()
    centred = residual - residual.mean(dim=0)
    vectors = vectors.to(residual)
    counts = counts.to(vectors.device)
    return Population(
        vectors=vectors,
        frequency=counts / len(residual),
        alive=(counts > 0) & (vectors.norm(dim=-1) > 0),
        covariance_root=torch.linalg.qr(centred, mode="r").R.T / max(len(centred) - 1, 1) ** 0.5,
    )


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of directions to test, with how often each is active on its side.

    Attributes:
        query: query directions.
        key: key directions.
        query_frequency: share of query tokens at which each is active; used by `matched` alone.
        key_frequency: the same on the key side.
    """

    query: Float[Tensor, "pair d_model"]
    key: Float[Tensor, "pair d_model"]
    query_frequency: Float[Tensor, " pair"]
    key_frequency: Float[Tensor, " pair"]

    def __len__(self) -> int:
        return len(self.query)

    def through(self, norm: NormMap) -> Pairs:
        """The same pairs as a norm reads them."""
        return replace(self, query=norm.centre(self.query), key=norm.centre(self.key))


def feature_pairs(queries: Population, keys: Population, index: Sequence[tuple[int, int]]) -> Pairs:
    """Pairs of features by their indices, query first."""
    q, k = (torch.tensor([pair[side] for pair in index], device=queries.vectors.device) for side in (0, 1))
    return Pairs(queries.vectors[q], keys.vectors[k], queries.frequency[q], keys.frequency[k])


@dataclass(frozen=True, eq=False)
class NullTest:
    """One pair against one null.

    Attributes:
        null: its name.
        value: the pair's virtual interaction, score units for unit vectors.
        z: in standard deviations of the null from its mean.
        p: empirical, two-sided.
        draws: the null's interactions.
        seed: seeds the draws.
        note: what the reader must know of the null, or nothing.
    """

    null: NullName
    value: float
    z: float
    p: float
    draws: Float[Tensor, " draw"]
    seed: int
    note: str | None


def null_tests(
    null: NullName,
    maps: ScoreMaps,
    head: int,
    turn: Rotation,
    queries: Population,
    keys: Population,
    pairs: Pairs,
    *,
    n: int = 1000,
    seed: int = 0,
) -> list[NullTest]:
    """Test pairs at one head against a null.

    Directions count as the input norm reads them: under LayerNorm without their mean, which nothing sees.

    `random_pairs`: random alive features on both sides (the source study's). `matched`: both sides alike in frequency
    and norm (`Population.cell`). `fixed_query`, `fixed_key`: that side held. `rotated`: both directions turned at
    random within the residual's covariance at that side's tokens (whitened, rotated, coloured again: for a unit vector
    the same as a draw from that covariance). `random_dictionary`: isotropic directions. A null that does not depend on
    the pair is drawn once for all pairs; the others start from the seed for every pair, so that no result depends on
    the pairs beside it.

    Raises:
        QklensError: an unknown null, fewer than 30 draws, or (NoSpreadError) a null without spread.
    """
    if null not in NULLS:
        raise QklensError(f"null {null!r} is unknown; expected one of {list(NULLS)}")
    if n < MIN_PAIRS:
        raise QklensError(f"null {null!r} with {n} pairs; expected at least {MIN_PAIRS}")
    queries, keys, pairs = queries.through(maps.norm), keys.through(maps.norm), pairs.through(maps.norm)
    values = virtual_interaction(maps, head, turn, pairs.query, pairs.key).cpu()
    small = (queries.is_small or keys.is_small) and null in ("random_pairs", "matched", "fixed_query", "fixed_key")
    note = "the source is small: random directions come from the residual's covariance" if small else None

    def draw(pair: int) -> Tensor:
        query, key = pairs.query[pair], pairs.key[pair]
        generator = torch.Generator().manual_seed(seed)
        sample: dict[NullName, Callable[[int], tuple[Tensor, Tensor]]] = {
            "random_pairs": lambda m: (queries.alive_sample(m, generator), keys.alive_sample(m, generator)),
            "matched": lambda m: (
                queries.matched_sample(query, float(pairs.query_frequency[pair]), m, generator),
                keys.matched_sample(key, float(pairs.key_frequency[pair]), m, generator),
            ),
            "fixed_query": lambda m: (query.expand(m, -1), keys.alive_sample(m, generator)),
            "fixed_key": lambda m: (queries.alive_sample(m, generator), key.expand(m, -1)),
            "rotated": lambda m: (queries.from_covariance(m, generator), keys.from_covariance(m, generator)),
            "random_dictionary": lambda m: (_isotropic(query, m, generator), _isotropic(key, m, generator)),
        }
        sizes = [min(_BLOCK, n - begin) for begin in range(0, n, _BLOCK)]
        return torch.cat([virtual_interaction(maps, head, turn, *sample[null](m)).cpu() for m in sizes])

    tests = []
    for pair, value in enumerate(values.tolist()):
        draws = tests[0].draws if tests and null not in _OF_THE_PAIR else draw(pair)
        mean, spread = float(draws.mean()), float(draws.std())
        if spread == 0:
            raise NoSpreadError(
                f"null {null!r} at layer {maps.layer} head {head} has no spread: every pair drawn interacts alike, as "
                "where the answer token is the same in every prompt; leave this null or this head out"
            )
        extreme = int(((draws - mean).abs() >= abs(value - mean) - _ROUNDING * spread).sum())
        tests.append(NullTest(null, value, (value - mean) / spread, (1 + extreme) / (1 + n), draws, seed, note))
    return tests


def tests_or_reasons(
    null: NullName,
    maps: ScoreMaps,
    head: int,
    turn: Rotation,
    populations: tuple[Population, Population],
    features: Sequence[tuple[int, int]],
    *,
    n: int,
    seed: int,
) -> list[NullTest | str]:
    """Each pair of features against a null, or why the null cannot place it: it has no spread; see `null_tests`."""
    queries, keys = populations

    def against(some: Sequence[tuple[int, int]]) -> list[NullTest | str]:
        pairs = feature_pairs(queries, keys, some)
        try:
            return list(null_tests(null, maps, head, turn, queries, keys, pairs, n=n, seed=seed))
        except NoSpreadError as error:
            return [str(error)] if len(some) == 1 else [one for pair in some for one in against([pair])]

    return against(features)


def seed_for(seed: int, layer: int, head: int, null: NullName) -> int:
    """A seed of its own for every head and null, so that no two share their draws; recorded with each test."""
    return int(np.random.SeedSequence([seed, layer, head, NULLS.index(null)]).generate_state(1)[0])


def _isotropic(like: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, like.shape[-1], generator=generator).to(like)
