"""Activations of a batch, sparse or dense, and the products that training needs of them.

With code A (row × feature), decoder W (feature × column) and a gradient G (row × column):

    decode       A W                      what the features write
    products     ⟨G_r, W_i⟩                at the pairs (r, i) that the code holds
    summed       Σ_r v_ri G_r              for a block of features; v are numbers at the pairs

`SparseCode` holds its pairs in the order of rows and never makes a row × feature matrix: each product is one weighted
sum of matrix rows (`embedding_bag`) over rows or, after a sort, over features.

| activation | code |
|---|---|
| topk, batch_topk | sparse, always |
| relu, jumprelu | sparse up to `DENSE_SHARE` of all pairs, dense above: in the first steps half are active |
| auxiliary loss | the same bound on its k of the dead features; its matrix has columns for dead features alone |

The bound is where both cost the same: CPU time of sparse over dense was 0.33, 0.45, 0.57, 1.15, 2.04 and 3.83 at 1/128,
1/64 ... 1/4 active (`python -m benchmarks.code_crossover`: d 576, 8,192 features, one thread; 2026-11-23).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

DENSE_SHARE = 1 / 16
"""Share of active pairs above which a code is dense."""


class SparseCode:
    """A code by its pairs.

    Attributes:
        features: of each pair; pairs lie in the order of rows.
        offsets: where each row's pairs begin, and the end of the last.
        values: of each pair.
    """

    def __init__(
        self,
        features: Int[Tensor, " pair"],
        offsets: Int[Tensor, " row_and_one"],
        values: Float[Tensor, " pair"],
        n_features: int,
    ) -> None:
        self.features, self.offsets, self.values, self.n_features = features, offsets, values, n_features
        self._sorted: tuple[Tensor, Tensor, Tensor] | None = None

    def decode(self, weights: Float[Tensor, "feature column"]) -> Float[Tensor, "row column"]:
        """A W, a weighted sum of k rows of W for each row."""
        with torch.enable_grad():
            self._leaf = self.values.detach().requires_grad_()
            self._decoded = _bags(self.features, weights.detach(), self.offsets, self._leaf)
        return self._decoded.detach()

    def products(self, gradient: Float[Tensor, "row column"]) -> Float[Tensor, " pair"]:
        """⟨G_r, W_i⟩: the derivative of ⟨G, A W⟩ by the code's own values."""
        return torch.autograd.grad(self._decoded, self._leaf, gradient)[0]

    def summed(
        self, values: Float[Tensor, " pair"], rows: Float[Tensor, "row column"], begin: int, end: int
    ) -> Float[Tensor, "block column"]:
        """Σ_r v_ri G_r: for each feature a weighted sum of the rows in which it is active."""
        order, row_of, starts = self._by_feature()
        low, high = int(starts[begin]), int(starts[end])
        if low == high:
            return rows.new_zeros(end - begin, rows.shape[1])
        return _bags(row_of[low:high], rows, starts[begin : end + 1] - low, values[order[low:high]])

    def by_feature(self, values: Float[Tensor, " pair"]) -> Float[Tensor, " feature"]:
        """Σ_r v_ri."""
        return values.new_zeros(self.n_features).index_add_(0, self.features, values)

    def spread(self, per_feature: Float[Tensor, " feature"]) -> Float[Tensor, " pair"]:
        """A number a feature, at the pairs."""
        return per_feature[self.features]

    def kept(self, keep: Bool[Tensor, " pair"]) -> SparseCode:
        """The pairs of a mask."""
        before = torch.cat([keep.new_zeros(1, dtype=torch.long), keep.cumsum(0)])
        return SparseCode(self.features[keep], before[self.offsets], self.values[keep], self.n_features)

    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs in the order of features, their rows, and where each feature's begin."""
        if self._sorted is None:
            small = self.features.to(torch.int16) if self.n_features <= 1 << 15 else self.features.to(torch.int32)
            ordered, order = small.sort(stable=True)
            counts = self.offsets.diff()
            rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
            edges = torch.arange(self.n_features + 1, device=counts.device)
            self._sorted = order, rows[order], torch.searchsorted(ordered.long(), edges)
        return self._sorted


class DenseCode:
    """A code as a matrix, on purpose: above `DENSE_SHARE` it is cheaper. It is as large as the pre-activations."""

    def __init__(self, values: Float[Tensor, "row feature"]) -> None:
        self.values = values

    def decode(self, weights: Float[Tensor, "feature column"]) -> Float[Tensor, "row column"]:
        """A W."""
        self._weights = weights
        return self.values @ weights

    def products(self, gradient: Float[Tensor, "row column"]) -> Float[Tensor, "row feature"]:
        """G Wᵀ."""
        return gradient @ self._weights.T

    def summed(
        self, values: Float[Tensor, "row feature"], rows: Float[Tensor, "row column"], begin: int, end: int
    ) -> Float[Tensor, "block column"]:
        """Vᵀ G."""
        return values[:, begin:end].T @ rows

    def by_feature(self, values: Float[Tensor, "row feature"]) -> Float[Tensor, " feature"]:
        """Σ_r v_ri."""
        return values.sum(dim=0)

    def spread(self, per_feature: Float[Tensor, " feature"]) -> Float[Tensor, "1 feature"]:
        """A number a feature."""
        return per_feature[None]


Code = SparseCode | DenseCode
"""Both hold numbers at pairs of rows and features; `values` and what `products` gives have the same form."""


def pairs_code(
    before: Float[Tensor, "row feature"], keep: Bool[Tensor, "row feature"], dense_share: float = DENSE_SHARE
) -> Code:
    """The code of a mask: its values are `before` there, and zero elsewhere where it is dense."""
    count = int(keep.sum())
    if count > dense_share * keep.numel():
        return DenseCode(before * keep)
    rows, features = keep.nonzero().unbind(1)
    return SparseCode(features, row_offsets(rows, len(before)), before[rows, features], before.shape[1])


def row_offsets(rows: Int[Tensor, " pair"], n: int) -> Int[Tensor, " row_and_one"]:
    """Where each row's pairs begin, of pairs in the order of rows."""
    return torch.searchsorted(rows, torch.arange(n + 1, device=rows.device))


def _bags(indices: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
