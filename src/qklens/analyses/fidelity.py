"""How well does a source stand in for the residual stream? L0, variance left, and loss recovered, on given text.

    loss recovered = (L_mean − L_source) / (L_mean − L_clean)

L is the next-token cross-entropy with resid_pre.layer replaced, at every token but the first, by its mean or by the
source's reconstruction. Where the mean predicts no worse than the stream, there is no loss to recover, and no share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qklens.dictionaries.blocks import count_and_error
from qklens.dictionaries.config import Fidelity
from qklens.dictionaries.source import FeatureSource, check_width, fraction_variance_unexplained
from qklens.dictionaries.training.harvest import after_first, batches_by_length, stream_rows
from qklens.errors import QklensError
from qklens.models.batch import Batch
from qklens.models.copies import Reads
from qklens.models.edits import Edit, VectorEdit
from qklens.models.passes import run_pass
from qklens.models.subject import Subject


def measure_fidelity(
    subject: Subject, source: FeatureSource, sequences: Sequence[Sequence[int]], *, losses: bool = True
) -> Fidelity:
    """Measure a source on token sequences.

    Args:
        subject: the model.
        source: what stands in for its stream.
        sequences: token ids.
        losses: whether loss recovered is measured too, which takes two passes a layer more than one pass in all.

    Raises:
        QklensError: there is no sequence of at least two tokens.
    """
    usable = [s for s in sequences if len(s) > 1]
    if not usable:
        raise QklensError("fidelity needs at least one sequence of two tokens")
    rows = stream_rows(subject, usable, source.layers)
    l0, fvu, recovered = {}, {}, {}
    clean = next_token_loss(subject, usable, lambda _: []) if losses else 0.0
    for layer in source.layers:
        check_width(source, layer, rows[layer])
        count, error = count_and_error(source, layer, lambda m: rows[m].to(subject.device))
        l0[layer] = count / len(rows[layer])
        fvu[layer] = fraction_variance_unexplained(rows[layer], error.cpu())
        if not losses:
            continue
        mean = rows[layer].mean(dim=0).to(subject.device)
        blank = next_token_loss(subject, usable, replacer(layer, lambda x, _, mean=mean: mean.to(x).expand_as(x)))

        def rebuilt(x: Tensor, stream: Callable[[int], Tensor], layer: int = layer) -> Tensor:
            return x - count_and_error(source, layer, lambda m: x if m == layer else stream(m))[1]

        kept = blank - next_token_loss(subject, usable, replacer(layer, rebuilt, source.reads(layer)))
        recovered[layer] = kept / (blank - clean) if blank > clean else None
    return Fidelity(l0=l0, fraction_variance_unexplained=fvu, loss_recovered=recovered)


def replacer(
    layer: int, change: Callable[[Tensor, Callable[[int], Tensor]], Tensor], sees: tuple[int, ...] = ()
) -> Callable[[Batch], list[Edit]]:
    """The edit of any batch that changes resid_pre.layer at every token but the first."""
    return lambda batch: [VectorEdit(layer, "residual", after_first(batch), change, sees=sees)]


def next_token_loss(
    subject: Subject, sequences: Sequence[Sequence[int]], edits: Callable[[Batch], list[Edit]]
) -> float:
    """Mean next-token cross-entropy over all tokens, of passes with edits."""
    norm, unembed = subject.family.final_norm(subject.model), subject.unembedding
    total, count = 0.0, 0
    for batch in batches_by_length(subject, sequences):
        kept: list[Tensor] = []
        run_pass(subject, batch, edits(batch), Reads({subject.n_layers: kept.append}, {}))
        with torch.no_grad():
            logits = unembed(norm(kept[0][:, :-1])).float()
        targets = batch.input_ids[:, 1:].masked_fill(batch.attention_mask[:, :-1] == 0, -100)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += int((targets != -100).sum())
    return total / count
