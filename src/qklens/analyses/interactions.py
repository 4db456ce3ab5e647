"""Which pairs of sources make a head look where it looks: mean signed terms over prompts, in bounded memory.

    M[i, k] = Σ_p w_p c ⟨q_i(p), Σ_j w_j k_k(j)⟩

The table of all pairs is never held: it is kept as the vectors that it is a product of, and walked in blocks of rows.
Sums over one side (marginals, shares by kind) need no pair at all, because they are products of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.analyses.lens import BIAS, ERROR, HeadLens, Sources
from qklens.analyses.weighting import Weighed, Weighting
from qklens.analyses.written import WrittenPrompt
from qklens.data.render import Prompt
from qklens.errors import QklensError

Side = Literal["query", "key"]
SOURCE_KINDS = ("feature", BIAS, ERROR)
_BLOCK_ENTRIES = 1 << 22
"""Pairs held at a time, in float64."""


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of the table: query sources, key sources, and the mean term of every pair of them."""

    query: Int[Tensor, " query"]
    key: Int[Tensor, " key"]
    value: Float[Tensor, "query key"]


@dataclass(frozen=True, eq=False)
class PairTerms:
    """The mean pair terms of one head over prompts, held as what they are products of.

    Attributes:
        names: labels of all sources; the last two are `bias` and `error`.
        scale: the model's own score scale c.
        query: one a prompt.
        key: one a prompt, summed over key tokens with the weighting.
        weights: w_p, how much each prompt counts: one over their number, negative where they are taken off.
        logsumexp: what the weighting is the gradient of, one a prompt; None where the head does not see a span, or
            where the weights are the gradient of nothing.
    """

    names: tuple[str, ...]
    scale: float
    query: tuple[Sources, ...]
    key: tuple[Sources, ...]
    weights: tuple[float, ...]
    logsumexp: tuple[float | None, ...]

    def minus(self, other: PairTerms) -> PairTerms:
        """Every term less the other's: harm − none, for example."""
        return replace(
            self,
            query=(*self.query, *other.query),
            key=(*self.key, *other.key),
            weights=(*self.weights, *(-w for w in other.weights)),
            logsumexp=(*self.logsumexp, *other.logsumexp),
        )

    def blocks(self, entries: int = _BLOCK_ENTRIES) -> Iterator[Block]:
        """The table by blocks of rows, at most `entries` pairs (or one row) at a time, in float64."""
        rows = torch.cat([q.index for q in self.query]).unique()
        columns = torch.cat([k.index for k in self.key]).unique()
        places = [torch.searchsorted(columns, k.index) for k in self.key]
        for part in rows.split(max(1, entries // len(columns))):
            value = torch.zeros(len(part), len(columns), dtype=torch.float64, device=part.device)
            for query, key, place, weight in zip(self.query, self.key, places, self.weights, strict=True):
                inside = (query.index >= part[0]) & (query.index <= part[-1])
                row = torch.searchsorted(part, query.index[inside])
                terms = (weight * self.scale * query.vectors[inside]) @ key.vectors.T
                value[row[:, None], place] += terms.double()
            yield Block(part, columns, value)

    def top(self, k: int, *, features_only: bool = False) -> list[tuple[str, str, float]]:
        """The k most negative and the k most positive pairs, by signed value: exact, over all pairs; ties by index.

        `features_only` leaves out pairs with bias or error on a side.
        """
        ends = [self._extreme(k, largest, features_only) for largest in (False, True)] if k > 0 else []
        return [(self.names[q], self.names[key], value) for end in ends for value, q, key in end]

    def between(self, query: int, key: int) -> float:
        """The mean term of one pair."""
        return self.of_pairs([(query, key)])[0]

    def of_pairs(self, pairs: Sequence[tuple[int, int]]) -> list[float]:
        """The mean terms of some pairs, (query, key) each."""
        return (torch.tensor(self.weights, dtype=torch.float64) @ self.by_prompt(pairs)).tolist()

    def by_prompt(self, pairs: Sequence[tuple[int, int]]) -> Float[Tensor, "prompt pair"]:
        """The terms of some pairs on each prompt, before the mean."""
        device = self.query[0].index.device
        first, second = (
            torch.tensor([pair[side] for pair in pairs], dtype=torch.long, device=device) for side in (0, 1)
        )
        rows = [
            self.scale * (q.rows(first) * k.rows(second)).sum(dim=1) for q, k in zip(self.query, self.key, strict=True)
        ]
        return torch.stack(rows).double().cpu()

    def marginal(self, side: Side) -> Float[Tensor, " source"]:
        """Each source's sum over all sources of the other side, signed; they sum to `total`. On the CPU, float64."""
        others = self.key if side == "query" else self.query
        return self._against(side, [other.vectors.sum(dim=0) for other in others])

    def against(self, side: Side, source: int) -> Float[Tensor, " source"]:
        """The terms of every source of a side with one source of the other side: a column or a row of the table."""
        others = self.key if side == "query" else self.query
        return self._against(side, [other.of(source) for other in others])

    def _against(self, side: Side, others: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(len(self.names), dtype=torch.float64)
        mine = self.query if side == "query" else self.key
        for sources, other, weight in zip(mine, others, self.weights, strict=True):
            value = weight * self.scale * sources.vectors @ other
            total.index_add_(0, sources.index.cpu(), value.double().cpu())
        return total

    @cached_property
    def _by_kind(self) -> dict[tuple[str, str], float]:
        sums = {(a, b): 0.0 for a in SOURCE_KINDS for b in SOURCE_KINDS}
        for query, key, weight in zip(self.query, self.key, self.weights, strict=True):
            kinds = [torch.stack([v[:-2].sum(dim=0), v[-2], v[-1]]) for v in (query.vectors, key.vectors)]
            values = (weight * self.scale * kinds[0] @ kinds[1].T).double()
            for i, a in enumerate(SOURCE_KINDS):
                for j, b in enumerate(SOURCE_KINDS):
                    sums[a, b] += float(values[i, j])
        return sums

    @property
    def total(self) -> float:
        """The mean weighted score; all pairs sum to it."""
        return sum(self._by_kind.values())

    def shares(self) -> dict[str, float]:
        """Sums by kind of source, query side first: `feature x bias` and so on; they sum to `total`."""
        return {f"{a} x {b}": value for (a, b), value in self._by_kind.items()}

    def absolute_shares(self) -> dict[str, float]:
        """Share of Σ|term| over all pairs, by kind of source as in `shares`; they sum to 1."""
        n = len(self.names) - 2
        size = {(a, b): 0.0 for a in SOURCE_KINDS for b in SOURCE_KINDS}
        for block in self.blocks():
            rows, columns = ((index - n + 1).clamp(min=0) for index in (block.query, block.key))
            for i, a in enumerate(SOURCE_KINDS):
                for j, b in enumerate(SOURCE_KINDS):
                    size[a, b] += float(block.value[rows == i][:, columns == j].abs().sum())
        whole = max(sum(size.values()), 1e-12)
        return {f"{a} x {b}": value / whole for (a, b), value in size.items()}

    def error_share(self) -> float:
        """Share of Σ|term| with an error on either side."""
        return sum(share for name, share in self.absolute_shares().items() if ERROR in name)

    def searched(self) -> int:
        """How many pairs of features there are to choose from."""
        sides = (torch.cat([s.index[:-2] for s in side]).unique() for side in (self.query, self.key))
        return prod(len(side) for side in sides)

    def _extreme(self, k: int, largest: bool, features_only: bool) -> list[tuple[float, int, int]]:
        sign, n = -1.0 if largest else 1.0, len(self.names) - 2
        best: list[tuple[float, int, int]] = []
        for block in self.blocks():
            if features_only:
                block.value[block.query >= n] = 0
                block.value[:, block.key >= n] = 0
            flat = (sign * block.value).flatten()
            bound = best[-1][0] if len(best) == k else 0.0
            found = (flat < bound).nonzero()[:, 0]
            if len(found) > k:
                found = found[flat[found] <= flat[found].topk(k, largest=False).values[-1]]
                found = found[flat[found].argsort(stable=True)[:k]]
            width = len(block.key)
            best += [(float(flat[i]), int(block.query[i // width]), int(block.key[i % width])) for i in found.tolist()]
            best = sorted(best)[:k]
        return [(sign * value, query, key) for value, query, key in best]


def mean_terms(
    lens: HeadLens,
    prompts: Sequence[Prompt],
    written: Sequence[WrittenPrompt],
    weighting: Weighting,
    calm: tuple[Sequence[Prompt], Sequence[WrittenPrompt]] | None = None,
) -> PairTerms:
    """Mean pair terms at the answer position over prompts.

    Args:
        lens: the head.
        prompts: what was asked.
        written: the same, as their sources.
        weighting: over which tokens.
        calm: the same items and orders without pressure, which the weighting fits; tokens are weighed as in these, see
            `Weighting.carried`.

    Raises:
        QklensError: there is no prompt, or a prompt lacks the weighting's span.
    """
    if not prompts:
        raise QklensError("mean pair terms need at least one prompt")
    queries, keys, values = [], [], []
    for i, (prompt, parts) in enumerate(zip(prompts, written, strict=True)):
        if calm is None:
            weighed = weighting.weigh(lens, prompt, parts)
        else:
            of, before = calm[0][i], calm[1][i]
            weighed = Weighed(weighting.carried(weighting.weigh(lens, of, before).weights, of, prompt), None)
        queries.append(lens.query(parts, prompt.spans["answer"][0]))
        keys.append(lens.keys(parts, weighed.weights))
        values.append(weighed.logsumexp)
    counts = tuple(1 / len(prompts) for _ in prompts)
    return PairTerms(lens.names, lens.maps.scale, tuple(queries), tuple(keys), counts, tuple(values))


def refuse_silence(
    lens: HeadLens, prompts: Sequence[Prompt], written: Sequence[WrittenPrompt], weighting: Weighting, terms: PairTerms
) -> None:
    """Raise where there are no pairs of features to speak of: no prompt shows the head its spans, or nothing is active.

    Args:
        lens: the head.
        prompts: those of the terms.
        written: the same, as their sources.
        weighting: over which tokens.
        terms: what `mean_terms` made of them.

    Raises:
        QklensError: names the head and its window, or the side, the span and the source.
    """
    spans = weighting.spans()
    if all(value is None for value in terms.logsumexp):
        window = f" (its window is {lens.maps.window} tokens)" if lens.maps.window else ""
        raise QklensError(
            f"head L{lens.layer}H{lens.head}{window} does not see {' and '.join(map(repr, spans))} from the answer in "
            f"any of {len(prompts)} prompts; choose another span or head"
        )
    at_answer = [prompt.spans["answer"] for prompt in prompts]
    sides = [("query", "the answer position", at_answer)]
    sides += [("key", f"span {name}", [prompt.span(name, weighting.parts) for prompt in prompts]) for name in spans]
    for side, where, places in sides:
        if not any(len(one.active.features_at(p)) for one, p in zip(written, places, strict=True)):
            raise QklensError(
                f"no feature of dictionary {lens.source.name!r} is active at {where} in any of {len(prompts)} prompts "
                f"(layer {lens.layer}, {side} side); choose another span, layer or dictionary"
            )
