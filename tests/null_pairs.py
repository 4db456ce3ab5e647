"""Populations whose nulls are known, and pairs drawn from each null by other means than the code under test."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from qklens.analyses.nulls import NullName, Pairs, Population, null_tests
from qklens.models.scores import Rotation, ScoreMaps, offset_rotation, score_maps

WIDTH, CLUSTERS, CLUSTER, DEAD = 32, 8, 32, 256
HELD = {"query": 1, "key": 3}
HELD_FEATURE = 2 * CLUSTER
SMALL = 6
HEAD = 2
Head = tuple[ScoreMaps, Rotation]


def one_head(subject) -> Head:
    return score_maps(subject, 1), offset_rotation(subject, 1, torch.tensor([4, 9]))


def clustered(seed: int) -> Population:
    """Eight clusters of 32 features alike in frequency and norm, each about a direction of its own; then dead ones.

    Halved three times at the median they fall into the clusters, so that the cell `matched` draws from is known.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    vectors, frequency = [], []
    for cluster in range(CLUSTERS):
        around = torch.nn.functional.normalize(2 * draw(WIDTH) + draw(CLUSTER, WIDTH), dim=-1)
        vectors.append(around * (0.3 * 2.0**cluster) * (1 + 0.02 * draw(CLUSTER, 1).clamp(-2, 2)))
        frequency.append(0.5 ** (CLUSTERS - cluster) * (1 + 0.02 * draw(CLUSTER).clamp(-2, 2)))
    alive = torch.arange(CLUSTERS * CLUSTER + DEAD) < CLUSTERS * CLUSTER
    root = draw(WIDTH, WIDTH) * 0.7 ** torch.arange(WIDTH)
    return Population(
        torch.cat([*vectors, 50 + draw(DEAD, WIDTH)]), torch.cat([*frequency, torch.zeros(DEAD)]), alive, root
    )


def small(seed: int) -> Population:
    """Too few features to draw from; always active."""
    whole = clustered(seed)
    return Population(whole.vectors[:SMALL], torch.ones(SMALL), torch.ones(SMALL).bool(), whole.covariance_root)


def of_cluster(cluster: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Indices drawn from one cluster."""
    return cluster * CLUSTER + torch.randint(0, CLUSTER, (n,), generator=generator)


def coloured(features: Population, n: int, generator: torch.Generator) -> torch.Tensor:
    """Gaussian directions with the population's covariance, by its symmetric root."""
    values, basis = torch.linalg.eigh(features.covariance_root @ features.covariance_root.T)
    return torch.randn(n, WIDTH, generator=generator) @ (basis * values.clamp(min=0).sqrt()) @ basis.T


def coloured_alike(features: Population, n: int, generator: torch.Generator) -> torch.Tensor:
    """Of 50 such directions each time, the one along which the residual's spread is nearest to a low one."""
    covariance = features.covariance_root @ features.covariance_root.T
    drawn = torch.nn.functional.normalize(coloured(features, 50 * n, generator), dim=-1)
    spread = torch.einsum("rd,de,re->r", drawn, covariance, drawn).log().view(n, 50)
    low = (0.1 * torch.linalg.eigvalsh(covariance)[-1]).log()
    nearest = (spread - low).abs().argmin(dim=1)
    return drawn.view(n, 50, WIDTH)[torch.arange(n), nearest]


def drawn_pairs(null: NullName, queries: Population, keys: Population, n: int, seed: int) -> Pairs:
    """Pairs of the null itself.

    What a null holds is the same whatever the seed, so that pairs of another null are told from its own: one query
    (key) for `fixed_query` (`fixed_key`), one cluster a side for `matched` (or one spread, in a small source).
    """
    generator = torch.Generator().manual_seed(seed)
    sides, frequencies = [], []
    for side, features in (("query", queries), ("key", keys)):
        plain = null in ("random_dictionary", "rotated") or features.is_small
        held = null == f"fixed_{side}"
        index = torch.randint(0, CLUSTERS * CLUSTER, (n,), generator=generator)
        if null == "matched":
            index = of_cluster(HELD[side], n, generator)
        elif held:
            index = torch.full((n,), HELD_FEATURE)
        if null == "random_dictionary":
            vectors = torch.randn(n, WIDTH, generator=generator)
        elif null == "matched" and plain:
            vectors = coloured_alike(features, n, generator)
        elif plain and not held:
            vectors = coloured(features, n, generator)
        else:
            vectors = features.vectors[index % len(features.vectors)]
        sides.append(vectors)
        frequencies.append(torch.ones(n) if plain else features.frequency[index])
    return Pairs(*sides, *frequencies)


def planted_pair(null: NullName, head: Head, queries: Population, keys: Population, sign: float, seed: int) -> Pairs:
    """A pair of the null with one side turned until the interaction is the null's mean + sign · 4 sd.

    The turned side keeps its norm and its part across what the head reads. A unit direction reaches no further than
    the length of what the head makes of the other side, so pairs are drawn until 4 sd are within reach.
    """
    maps, turn = head
    side = "query" if null == "fixed_key" else "key"
    for attempt in range(50):
        pair = drawn_pairs(null, queries, keys, 1, 1000 * seed + attempt)
        (reference,) = null_tests(null, maps, HEAD, turn, queries, keys, pair, n=5000, seed=10**6 + seed)
        wanted = float(reference.draws.mean() + sign * 4 * reference.draws.std())
        held, turned = (pair.key, pair.query) if side == "query" else (pair.query, pair.key)
        reach = reached(head, held[0], side)
        cosine = wanted / float(reach.norm())
        if abs(cosine) < 0.99:
            break
    else:
        raise AssertionError("no pair reaches 4 sd")
    axis = reach / reach.norm()
    across = torch.nn.functional.normalize(turned[0] - (turned[0] @ axis) * axis, dim=0)
    planted = turned.norm() * (cosine * axis + (1 - cosine**2) ** 0.5 * across)[None]
    return replace(pair, **{side: planted})


def joined(*parts: Pairs) -> Pairs:
    """Pairs of several kinds as one family of tests."""
    return Pairs(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Pairs)))


def reached(head: Head, held: torch.Tensor, side: str) -> torch.Tensor:
    """The vector g of the stream with ⟨g, unit direction⟩ = virtual interaction, for one direction held."""
    maps, turn = head
    unit = held / held.norm()
    if side == "key":
        return maps.scale * turn(maps.query(unit[None], HEAD))[0] @ maps.key_side.weight[maps.kv_head(HEAD)]
    basis = turn(maps.query(torch.eye(WIDTH), HEAD))
    return maps.scale * basis @ maps.key(unit, HEAD)
