"""Which features of a batch are active, from pre-activations z.

    topk        the k largest z of each row, where positive
    batch_topk  the k · n largest z of n rows, where positive   (Bussmann et al. 2024)

Both are exact, and look closely at few of the numbers: features are put in sets, and each set's maximum is taken in one
sweep. The k-th largest maximum is at most the k-th largest number, so the k largest numbers lie in the k sets with the
largest maxima.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.dictionaries.training.codes import SparseCode, row_offsets
from qklens.dictionaries.training.parallel import Ranks

_SETS_PER_K = 16


def topk_code(before: Float[Tensor, "row feature"], k: int) -> SparseCode:
    """The k largest of each row; where they are not positive their value is 0."""
    values, features = largest(before, k)
    n = len(before)
    offsets = torch.arange(0, n * values.shape[1] + 1, values.shape[1], device=before.device)
    return SparseCode(features.flatten(), offsets, values.flatten().relu_(), before.shape[1])


def largest(before: Float[Tensor, "row feature"], k: int) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """Each row's k largest numbers and where they stand, in no order."""
    sets = _n_sets(before.shape[1], k)
    if not sets:
        values, at = before.topk(k, dim=1, sorted=False)
        return values, at
    chosen = _maxima(before, sets).topk(k, dim=1, sorted=False).indices
    members = torch.arange(0, before.shape[1], sets, device=before.device)
    at = (chosen[:, :, None] + members).flatten(1)
    values, place = before.gather(1, at).topk(k, dim=1, sorted=False)
    return values, at.gather(1, place)


def batch_topk_codes(
    befores: list[Float[Tensor, "row feature"]], count: int, ranks: Ranks
) -> tuple[list[SparseCode], float]:
    """The codes of the `count` largest positive numbers over all groups and processes, and the largest left out.

    Args:
        befores: pre-activations of each group of features.
        count: how many are kept, over all processes.
        ranks: the processes.
    """
    bound = _lower_bound(befores, count, ranks)
    found = [_above(before, bound) for before in befores]
    values = ranks.gathered(torch.cat([code.values for code in found]))
    cut = float(values.kthvalue(len(values) - count).values) if len(values) > count else bound
    return [code.kept(code.values > cut) for code in found], cut


def _lower_bound(befores: list[Tensor], count: int, ranks: Ranks) -> float:
    """At most the largest number left out, and not below 0: the same of the sets' maxima."""
    maxima = []
    for before in befores:
        sets = _n_sets(before.shape[1], 1)
        maxima.append((_maxima(before, sets) if sets else before).flatten())
    mine = torch.cat(maxima)
    mine = mine.topk(min(count + 1, len(mine)), sorted=False).values
    everyone = ranks.gathered(mine)
    if len(everyone) <= count:
        return 0.0
    return max(0.0, float(everyone.kthvalue(len(everyone) - count).values))


def _above(before: Tensor, bound: float) -> SparseCode:
    """Every pair above a bound, found in the sets whose maximum is."""
    sets = _n_sets(before.shape[1], 1)
    if not sets:
        rows, features = (before > bound).nonzero().unbind(1)
        return SparseCode(features, row_offsets(rows, len(before)), before[rows, features], before.shape[1])
    set_rows, chosen = (_maxima(before, sets) > bound).nonzero().unbind(1)
    at = chosen[:, None] + torch.arange(0, before.shape[1], sets, device=before.device)
    numbers = before[set_rows[:, None], at]
    which, member = (numbers > bound).nonzero().unbind(1)
    rows, features = set_rows[which], at[which, member]
    return SparseCode(features, row_offsets(rows, len(before)), numbers[which, member], before.shape[1])


def _maxima(before: Tensor, sets: int) -> Tensor:
    """The maximum of each set: feature i lies in set i mod `sets`, so that a sweep reads memory in order."""
    return before.unflatten(1, (-1, sets)).amax(dim=1)


def _n_sets(features: int, k: int) -> int:
    """How many sets pay off, or 0: at least `_SETS_PER_K` times k of at least four members each."""
    sets = features
    while sets % 2 == 0 and sets // 2 >= _SETS_PER_K * k and sets > features // 16:
        sets //= 2
    return sets if sets * 4 <= features else 0
