"""What many features do over many passages, in one pass and bounded memory: counts, extremes and a fair sample.

Passages are handed over one by one, `pos feature` for the features asked for, and are not kept. Of each feature these
are: at how many tokens it is active; a histogram of log₁₀ |activation|; the passages with its largest (and its most
negative) activations, one token each; and a uniform sample of the tokens where it is active. The first token of a
passage is left out, as in `fidelity`: its stream is an outlier in many models. The sample does not depend on how
passages are batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BEFORE, AFTER = 14, 6
"""Tokens of context around an example."""
BINS_PER_DECADE = 5
_LOWEST, _HIGHEST = -8, 8
SAMPLED = 100


@dataclass(frozen=True)
class Found:
    """One token at which a feature was looked at.

    Attributes:
        passage: which passage.
        position: the token in it.
        activation: there.
        context: activations from `BEFORE` tokens before it to `AFTER` after it; zero outside the passage.
        decile: of a sampled token, which tenth of the active tokens it stands for, 0 the weakest.
    """

    passage: int
    position: int
    activation: float
    context: tuple[float, ...]
    decile: int | None = None


@dataclass(frozen=True)
class Histogram:
    """Counts of log₁₀ |activation| between rising edges, from the first to the last bin that is not empty."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class _Kept:
    """The entries of largest key, per feature; of equal keys those that came first."""

    def __init__(self, n_features: int, k: int) -> None:
        self.key = torch.full((n_features, k), -torch.inf, dtype=torch.float64)
        self.place = torch.full((n_features, k, 2), -1)
        self.context = torch.zeros(n_features, k, BEFORE + 1 + AFTER)

    def add(self, key: Float[Tensor, "feature n"], passage: int, position: Tensor, padded: Tensor) -> None:
        """Take candidates of one passage; `position` is `feature n`, `padded` the passage with margins."""
        rows = (key > self.key[:, -1:]).any(dim=1).nonzero()[:, 0]
        if not len(rows):
            return
        k = self.key.shape[1]
        keys = torch.cat([self.key[rows], key[rows].double()], dim=1)
        order = keys.sort(dim=1, descending=True, stable=True).indices[:, :k]
        at = position[rows]
        new = torch.stack([torch.full_like(at, passage), at], dim=-1)
        self.key[rows] = keys.gather(1, order)
        places = torch.cat([self.place[rows], new], dim=1)
        self.place[rows] = places.gather(1, order[..., None].expand(-1, -1, 2))
        offsets = torch.arange(BEFORE + 1 + AFTER)
        context = padded[at[..., None] + offsets, rows[:, None, None]]
        contexts = torch.cat([self.context[rows], context], dim=1)
        self.context[rows] = contexts.gather(1, order[..., None].expand(-1, -1, len(offsets)))

    def of(self, feature: int) -> list[Found]:
        """A feature's entries, largest key first."""
        found = []
        for slot in range(int((self.key[feature] > -torch.inf).sum())):
            passage, position = self.place[feature, slot].tolist()
            context = self.context[feature, slot]
            found.append(Found(passage, position, float(context[BEFORE]), tuple(context.tolist())))
        return found


class CardTally:
    """One group's tally of some features; see the module.

    Args:
        n_features: how many features.
        k: examples from each end.
        seed: of the sample.
    """

    def __init__(self, n_features: int, k: int, seed: int = 0) -> None:
        self.tokens, self._seed = 0, seed
        self.active = torch.zeros(n_features, dtype=torch.long)
        self.sum = torch.zeros(n_features, dtype=torch.float64)
        self.largest, self.least = (torch.zeros(n_features) for _ in range(2))
        self._bins = torch.zeros(n_features, (_HIGHEST - _LOWEST) * BINS_PER_DECADE, dtype=torch.long)
        self._top, self._bottom, self._sample = (_Kept(n_features, n) for n in (k, k, SAMPLED))

    def add(self, passage: int, values: Float[Tensor, "pos feature"]) -> None:
        """Take one passage's activations; passages are numbered by the caller, each once."""
        values = values.detach().float().cpu()
        inner = values[1:]
        if not len(inner):
            return
        hit = inner != 0
        self.tokens += len(inner)
        self.active += hit.sum(dim=0)
        self.sum += inner.double().sum(dim=0)
        position, feature = hit.nonzero(as_tuple=True)
        size = inner[position, feature].abs().log10()
        bins = ((size - _LOWEST) * BINS_PER_DECADE).floor().long().clamp(0, self._bins.shape[1] - 1)
        self._bins += torch.bincount(feature * self._bins.shape[1] + bins, minlength=self._bins.numel()).view_as(
            self._bins
        )
        padded = torch.nn.functional.pad(values, (0, 0, BEFORE, AFTER))
        for kept, sign in ((self._top, 1), (self._bottom, -1)):
            most, at = (sign * inner).max(dim=0)
            kept.add(most.masked_fill(most <= 0, -torch.inf)[:, None], passage, at[:, None] + 1, padded)
        self.largest = torch.maximum(self.largest, inner.amax(dim=0))
        self.least = torch.minimum(self.least, inner.amin(dim=0))
        drawn = torch.from_numpy(np.random.default_rng([self._seed, passage]).random(len(inner)))
        priority = drawn[:, None].expand(-1, hit.shape[1]).masked_fill(~hit, -torch.inf).T
        self._sample.add(priority, passage, torch.arange(1, len(values)).expand(hit.shape[1], -1), padded)

    def histogram(self, feature: int) -> Histogram:
        """The feature's histogram; no edges where it was never active."""
        used = self._bins[feature].nonzero()[:, 0]
        if not len(used):
            return Histogram((), ())
        low, high = int(used[0]), int(used[-1]) + 1
        edges = tuple(round(_LOWEST + i / BINS_PER_DECADE, 9) for i in range(low, high + 1))
        return Histogram(edges, tuple(self._bins[feature, low:high].tolist()))

    def top(self, feature: int) -> list[Found]:
        """The passages in which it is most active, at the token where."""
        return self._top.of(feature)

    def bottom(self, feature: int) -> list[Found]:
        """Likewise most negative; empty for a source whose activations are never negative."""
        return self._bottom.of(feature)

    def deciles(self, feature: int) -> list[Found]:
        """One token at random from each tenth of those where it is active, weakest first; by |activation|.

        The tenths are those of the sample of 100 tokens, and exact where it is active at no more.
        """
        found = self._sample.of(feature)  # in random order, so the first of each tenth is drawn at random
        order = sorted(range(len(found)), key=lambda i: (abs(found[i].activation), i))
        tenths: dict[int, int] = {}
        for rank, i in enumerate(order):
            tenth = rank * 10 // len(order)
            tenths[tenth] = min(i, tenths.get(tenth, i))
        return [_in_decile(found[i], tenth) for tenth, i in sorted(tenths.items())]


def _in_decile(found: Found, decile: int) -> Found:
    return Found(found.passage, found.position, found.activation, found.context, decile)


def place_sums(
    values: Float[Tensor, "pos feature"], places: Sequence[str | None], names: Sequence[str]
) -> tuple[Int[Tensor, " place"], Int[Tensor, "place feature"], Float[Tensor, "place feature"]]:
    """Tokens, active tokens and summed activation by place, the first token left out."""
    index = torch.tensor([names.index(place) if place in names else -1 for place in places])
    index[0] = -1
    indicator = (index[None] == torch.arange(len(names))[:, None]).double()
    values = values.detach().double().cpu()
    return indicator.sum(dim=1).long(), (indicator @ (values != 0).double()).long(), indicator @ values
