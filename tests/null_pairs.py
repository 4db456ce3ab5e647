"""Populations whose nulls are known, and pairs drawn from each null by other means than the code under test."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from qklens.analyses.nulls import NullName, Pairs, Population, null_tests
from qklens.models.scores import Rotation, ScoreMaps, offset_rotation, score_maps

WIDTH, CLUSTERS, CLUSTER, DEAD = 32, 5, 64, 40
SMALL = 6
HEAD = 2
Head = tuple[ScoreMaps, Rotation]


def one_head(subject) -> Head:
    return score_maps(subject, 1), offset_rotation(subject, 1, torch.tensor([4, 9]))


def clustered(seed: int) -> Population:
    """Five clusters of 64 features alike in frequency and norm, each about a direction of its own; then dead ones.

    The 64 nearest features of any member are its cluster, so that the neighbourhood `matched` draws from is known.
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
    root = draw(WIDTH, WIDTH) * torch.linspace(0.1, 2, WIDTH)
    return Population(
        torch.cat([*vectors, 50 + draw(DEAD, WIDTH)]), torch.cat([*frequency, torch.zeros(DEAD)]), alive, root
    )


def small(seed: int) -> Population:
    """Too few features to draw from; always active."""
    whole = clustered(seed)
    return Population(whole.vectors[:SMALL], torch.ones(SMALL), torch.ones(SMALL).bool(), whole.covariance_root)


def of_cluster(features: Population, cluster: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Indices drawn from one cluster."""
    return cluster * CLUSTER + torch.randint(0, CLUSTER, (n,), generator=generator)


def coloured(features: Population, n: int, generator: torch.Generator) -> torch.Tensor:
    """Gaussian directions with the population's covariance, by its symmetric root."""
    values, basis = torch.linalg.eigh(features.covariance_root @ features.covariance_root.T)
    return torch.randn(n, WIDTH, generator=generator) @ (basis * values.clamp(min=0).sqrt()) @ basis.T


def drawn_pairs(null: NullName, queries: Population, keys: Population, n: int, seed: int) -> Pairs:
    """Pairs of the null itself; one query (key) is held for `fixed_query` (`fixed_key`), one cluster for `matched`."""
    generator = torch.Generator().manual_seed(seed)
    sides, frequencies = [], []
    for side, features in (("query", queries), ("key", keys)):
        if null == "random_dictionary":
            vectors = torch.randn(n, WIDTH, generator=generator)
        elif null == "rotated" or features.is_small:
            vectors = coloured(features, n, generator)
        elif null == "matched":
            index = of_cluster(features, seed % CLUSTERS, n, generator)
            vectors = features.vectors[index]
        else:
            index = torch.randint(0, CLUSTERS * CLUSTER, (n,), generator=generator)
            vectors = features.vectors[index]
        held = null == f"fixed_{side}"
        plain = null in ("random_dictionary", "rotated") or features.is_small
        frequency = torch.ones(n) if plain else features.frequency[index]
        sides.append(vectors[:1].expand(n, -1) if held else vectors)
        frequencies.append(frequency[:1].expand(n) if held else frequency)
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
