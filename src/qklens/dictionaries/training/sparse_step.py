"""Loss and gradients of one batch, written by hand so that only active pairs of rows and features are touched.

Per row x of S streams, scaled to mean square 1, with f the features' activations and e = x − x̂:

    L = 1/n Σ_rows [ Σ_l ‖e^l‖² + λ Σ_i φ(f_i) + α · min(1, dead / k_aux) · ‖e − ê‖² ]

φ(f) = f for relu, 1[z > t] for jumprelu; counting kinds have none. ê is what the k_aux strongest dead features write;
e is a constant in that term. The derivative of a jump 1[z > t] by t is −1/ε · 1[|z − t| < ε/2] (Rajamanoharan et al.
2024); t is learnt as log t. Derivatives by f, at active pairs: ⟨−2/n e_r, d_i⟩ + λ/n. Everything else follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qklens.dictionaries.training.codes import DENSE_SHARE, Code, DenseCode, SparseCode, pairs_code
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.layout import Group, Layout
from qklens.dictionaries.training.parallel import Ranks
from qklens.dictionaries.training.selection import batch_topk_codes, topk_code
from qklens.dictionaries.training.weights import GroupWeights, Weights


@dataclass(eq=False)
class Pieces:
    """What the gradient of a group's matrices is summed from, a block of features at a time.

    Attributes:
        code: activations.
        to_before: derivative by the pre-activations, at the code's pairs.
        to_rows: derivative of the loss by what the group writes.
        read: rows as the encoder reads them.
        features: where the code's features stand in the group; None is all of them, in order.
    """

    code: Code
    to_before: Tensor
    to_rows: Float[Tensor, "row written"]
    read: Float[Tensor, "row read"]
    features: Int[Tensor, " some"] | None = None

    def decoder_block(self, begin: int, end: int) -> Float[Tensor, "block written"]:
        """Σ_r f_ri ∂L/∂x̂_r."""
        return self.code.summed(self.code.values, self.to_rows, begin, end)

    def encoder_block(self, begin: int, end: int) -> Float[Tensor, "block read"]:
        """Σ_r ∂L/∂z_ri (x_r − b)."""
        return self.code.summed(self.to_before, self.read, begin, end)


@dataclass(eq=False)
class GroupGradient:
    """Gradients of one group's weights; matrices in pieces.

    Attributes:
        main: of the loss of the rows.
        dead: of the auxiliary loss, over dead features alone.
        encoder_bias: whole.
        log_threshold: whole, for jumprelu alone.
        fired: which features were active.
        count: active pairs.
    """

    main: Pieces
    dead: Pieces | None
    encoder_bias: Float[Tensor, " feature"]
    log_threshold: Float[Tensor, " feature"] | None
    fired: Bool[Tensor, " feature"]
    count: int

    def block(self, matrix: str, begin: int, end: int) -> Float[Tensor, "block column"]:
        """The gradient of some rows of `encoder` or `decoder`."""
        total = getattr(self.main, f"{matrix}_block")(begin, end)
        if self.dead is not None and self.dead.features is not None:
            low, high = torch.searchsorted(self.dead.features, torch.tensor([begin, end])).tolist()
            if low < high:
                extra = getattr(self.dead, f"{matrix}_block")(low, high)
                total.index_add_(0, self.dead.features[low:high] - begin, extra)
        return total


@dataclass(eq=False)
class Gradient:
    """Everything one batch says.

    Attributes:
        groups: by group.
        bias: of b.
        squares: Σ e² over this process's rows, by column.
        penalty: Σ φ(f) over this process's rows.
        auxiliary: Σ ‖e − ê‖² over this process's rows, weighted.
        cut: the largest pre-activation left out, for batch_topk.
        error: e.
    """

    groups: list[GroupGradient]
    bias: Float[Tensor, " column"]
    squares: Tensor
    penalty: float
    auxiliary: float
    cut: float
    error: Float[Tensor, "row column"]


@dataclass(frozen=True)
class StepNumbers:
    """What the schedules give at a step, and which features are dead.

    Attributes:
        sparsity: λ.
        k: active features.
        dead: by group.
    """

    sparsity: float
    k: int
    dead: tuple[Bool[Tensor, " feature"], ...]


class GradientMaker:
    """Makes gradients; keeps the room for pre-activations from one batch to the next."""

    def __init__(self, config: TrainingConfig, layout: Layout, ranks: Ranks) -> None:
        self.config, self.layout, self.ranks = config, layout, ranks
        self._room: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, weights: Weights, rows: Float[Tensor, "row column"], now: StepNumbers) -> Gradient:
        """The gradient of this process's part of the batch, for the mean over the whole batch."""
        n = len(rows) * self.ranks.world
        centred = rows - weights.bias
        befores = self._before(weights, centred)
        codes, cut = self._codes(weights, befores, now)
        error = centred.clone()
        for own, group, code in zip(weights.groups, self.layout.groups, codes, strict=True):
            error[:, group.written_columns] -= code.decode(own.decoder)
        to_rows = error * (-2.0 / n)
        found = Gradient([], to_rows.sum(dim=0), error.pow(2).sum(dim=0), 0.0, 0.0, cut, error)
        for i, (group, code) in enumerate(zip(self.layout.groups, codes, strict=True)):
            self._add_group(found, weights.groups[i], group, code, befores[i], centred, to_rows, now.sparsity / n)
        if self.config.auxiliary_weight:
            for i, group in enumerate(self.layout.groups):
                if now.dead[i].any():
                    self._add_auxiliary(found, i, weights.groups[i], group, centred, now.dead[i], n)
        for i, group in enumerate(self.layout.groups):
            found.bias[group.read_columns] -= found.groups[i].encoder_bias @ weights.groups[i].encoder
        return found

    def _before(self, weights: Weights, centred: Tensor) -> list[Tensor]:
        if not self._room or self._room[0].shape[0] != len(centred) or self._room[0].dtype != centred.dtype:
            shape = (len(centred), self.config.features)
            self._room = [centred.new_empty(shape) for _ in self.layout.groups]
        for room, group, own in zip(self._room, self.layout.groups, weights.groups, strict=True):
            torch.addmm(own.encoder_bias, centred[:, group.read_columns], own.encoder.T, out=room)
        return self._room

    def _codes(self, weights: Weights, befores: list[Tensor], now: StepNumbers) -> tuple[list[Code], float]:
        if self.config.activation == "topk":
            return [topk_code(before, now.k) for before in befores], 0.0
        if self.config.activation == "batch_topk":
            count = now.k * len(befores) * len(befores[0]) * self.ranks.world
            codes, cut = batch_topk_codes(befores, count, self.ranks)
            return list(codes), cut
        if self.config.activation == "relu":
            return [pairs_code(before, before > 0) for before in befores], 0.0
        # Pairs a little below their threshold are held too, at 0: the threshold learns from them.
        codes = []
        for before, own in zip(befores, weights.groups, strict=True):
            threshold = _threshold(own)
            code = pairs_code(before, before > threshold - self.config.bandwidth / 2)
            code.values = code.values * (code.values > code.spread(threshold))
            codes.append(code)
        return codes, 0.0

    def _add_group(
        self,
        found: Gradient,
        own: GroupWeights,
        group: Group,
        code: Code,
        before: Tensor,
        centred: Tensor,
        to_rows: Tensor,
        sparsity: float,
    ) -> None:
        written = to_rows[:, group.written_columns].contiguous()
        to_code = code.products(written)
        on = code.values > 0
        to_log = None
        if own.log_threshold is None:
            to_before = (to_code + sparsity) * on if sparsity else to_code * on
            found.penalty += float(code.values.sum()) if sparsity else 0.0
        else:
            to_before = to_code * on
            threshold = _threshold(own)
            numbers = before if isinstance(code, DenseCode) else _at_pairs(before, code)
            near = (numbers - code.spread(threshold)).abs() < self.config.bandwidth / 2
            jump = (to_code * code.spread(threshold) + sparsity) * near
            to_log = code.by_feature(jump) * (-threshold / self.config.bandwidth)
            found.penalty += float(on.sum())
        read = centred[:, group.read_columns].contiguous()
        counts = code.by_feature(on.to(centred.dtype))
        pieces = Pieces(code, to_before, written, read)
        found.groups.append(
            GroupGradient(pieces, None, code.by_feature(to_before), to_log, counts > 0, int(counts.sum()))
        )

    def _add_auxiliary(
        self, found: Gradient, index: int, own: GroupWeights, group: Group, centred: Tensor, dead: Tensor, n: int
    ) -> None:
        """Dead features alone, by the same products: their own small encoder and decoder."""
        features = dead.nonzero()[:, 0]
        wanted = self.config.auxiliary_k or max(1, centred.shape[1] // 2)
        k = min(wanted, len(features))
        weight = self.config.auxiliary_weight * min(1.0, len(features) / wanted)
        read, error = centred[:, group.read_columns].contiguous(), found.error[:, group.written_columns].contiguous()
        before = torch.addmm(own.encoder_bias[features], read, own.encoder[features].T)
        sparse = topk_code(before, k)
        code: Code = sparse
        if k > DENSE_SHARE * len(features):
            dense = torch.zeros_like(before)
            dense[sparse_rows(sparse), sparse.features] = sparse.values
            code = DenseCode(dense)
        left = error - code.decode(own.decoder[features])
        to_rows = left * (-2.0 * weight / n)
        to_before = code.products(to_rows) * (code.values > 0)
        found.groups[index].dead = Pieces(code, to_before, to_rows, read, features)
        found.groups[index].encoder_bias.index_add_(0, features, code.by_feature(to_before))
        found.auxiliary += weight * float(left.pow(2).sum())


def sparse_rows(code: SparseCode) -> Int[Tensor, " pair"]:
    """The row of each pair."""
    counts = code.offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _at_pairs(before: Tensor, code: Code) -> Tensor:
    assert isinstance(code, SparseCode)
    return before[sparse_rows(code), code.features]


def _threshold(own: GroupWeights) -> Tensor:
    if own.log_threshold is None:
        raise ValueError("only jumprelu has thresholds")
    return own.log_threshold.exp()
