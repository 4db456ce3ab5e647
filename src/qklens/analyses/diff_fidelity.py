"""How well does a crosscoder over two checkpoints stand in for either's stream? The quantities of `fidelity`.

Both models read the same tokens; loss recovered is each model's own, with its stream replaced by what the crosscoder
writes there from both.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from qklens.analyses.fidelity import next_token_loss, replacer
from qklens.dictionaries.blocks import count_and_error
from qklens.dictionaries.config import SIDES, Checkpoint, DiffFidelity
from qklens.dictionaries.source import FeatureSource, fraction_variance_unexplained
from qklens.dictionaries.training.harvest import after_first, batches_by_length, side_by_side
from qklens.errors import QklensError
from qklens.models.batch import Batch
from qklens.models.edits import Edit, VectorEdit
from qklens.models.subject import Subject


def measure_diff_fidelity(
    base: Subject,
    chat: Subject,
    source: FeatureSource,
    scale: Float[Tensor, " side"],
    sequences: Sequence[Sequence[int]],
    *,
    losses: bool = True,
) -> DiffFidelity:
    """Measure a source of both streams side by side, a `ModelDiff` or its control, on token sequences.

    Args:
        base: the model whose stream comes first.
        chat: the other.
        source: what stands in for their streams, at one layer.
        scale: by which each stream was multiplied in training.
        sequences: token ids.
        losses: whether loss recovered is measured too, which takes three passes of each model more.

    Raises:
        QklensError: there is no sequence of at least two tokens.
    """
    usable = [s for s in sequences if len(s) > 1]
    if not usable:
        raise QklensError("fidelity needs at least one sequence of two tokens")
    (layer,) = source.layers
    rows = side_by_side([base, chat], usable, (layer,))[layer].to(base.device)
    count, error = count_and_error(source, layer, lambda _: rows)
    unexplained: dict[Checkpoint, float] = {}
    squares: dict[Checkpoint, float] = {}
    recovered: dict[Checkpoint, float | None] = {}
    streams = zip(SIDES, (base, chat), rows.chunk(2, 1), error.chunk(2, 1), scale.tolist(), strict=True)
    for side, subject, x, left, factor in streams:
        squares[side] = factor**2 * float(x.double().pow(2).mean())
        unexplained[side] = fraction_variance_unexplained(x, left)
        if losses:
            recovered[side] = _recovered(subject, layer, usable, x, x - left)
    return DiffFidelity(
        l0=count / len(rows), fraction_variance_unexplained=unexplained, mean_square=squares, loss_recovered=recovered
    )


def _recovered(
    subject: Subject, layer: int, sequences: Sequence[Sequence[int]], rows: Tensor, written: Tensor
) -> float | None:
    """Loss recovered in one model by rows that are known already, in the order of `side_by_side`."""
    clean = next_token_loss(subject, sequences, lambda _: [])
    mean = rows.mean(dim=0)
    blank = next_token_loss(subject, sequences, replacer(layer, lambda x, _: mean.to(x).expand_as(x)))
    counts = [int(after_first(batch).sum()) for batch in batches_by_length(subject, sequences)]
    pieces = iter(written.split(counts))

    def rebuilt(batch: Batch) -> list[Edit]:
        piece = next(pieces)
        return [VectorEdit(layer, "residual", after_first(batch), lambda x, _: piece.to(x))]

    return (blank - next_token_loss(subject, sequences, rebuilt)) / (blank - clean) if blank > clean else None
