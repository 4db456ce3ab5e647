"""Some features' activations on passages, a batch at a time: no table of all features over all tokens is ever made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.analyses.passages import Group, Passage
from qklens.dictionaries.source import FeatureSource, check_layer
from qklens.errors import QklensError
from qklens.models.batch import Batch, left_padded
from qklens.models.copies import Reads
from qklens.models.passes import run_pass
from qklens.models.subject import Subject

_TOKENS_AT_ONCE = 4096
_ENTRIES_AT_ONCE = 1 << 25
Values = Iterator[tuple[int, Float[Tensor, "_pos _feature"]]]


@dataclass(frozen=True)
class Passages:
    """The passages of one group with the features' activations on them.

    Attributes:
        group: the text, or a condition.
        passages: the passages.
        values: (passage, `pos feature`) of the chosen features, each passage once, in any order; see `read_values`.
    """

    group: Group
    passages: Sequence[Passage]
    values: Callable[[], Values]


class ScaleMean:
    """The mean scale of the final norm over the tokens that were read."""

    def __init__(self) -> None:
        self.sum, self.n = 0.0, 0

    def value(self) -> float:
        """The mean."""
        if not self.n:
            raise QklensError("a feature card needs at least one passage of text of two tokens")
        return self.sum / self.n


def read_values(
    subject: Subject,
    source: FeatureSource,
    layer: int,
    features: Int[Tensor, " feature"],
    passages: Sequence[Passage],
    scale: ScaleMean | None = None,
    base: Subject | None = None,
) -> Values:
    """Some features' activations on passages, batch by batch; what a batch holds of all features is dropped after it.

    Args:
        subject: the model.
        source: the features.
        layer: which site resid_pre.layer is written.
        features: indices of the chosen ones.
        passages: what to read.
        scale: takes the final norm's scales at all tokens but the first.
        base: the model whose stream stands before the subject's, for a source that reads both side by side.
    """
    check_layer(source, layer)
    most = min(_TOKENS_AT_ONCE, max(1, _ENTRIES_AT_ONCE // len(source.labels)))
    order = sorted(range(len(passages)), key=lambda i: (len(passages[i].tokens), i))
    norm = subject.final_norm(torch.float32)
    while order:
        n = 1
        while n < len(order) and len(passages[order[n]].tokens) * (n + 1) <= most:
            n += 1
        index, order = order[:n], order[n:]
        batch = left_padded([passages[i].tokens for i in index], subject.pad_id, subject.device)
        streams: dict[int, Tensor] = {}
        sinks = {m: _keep(streams, m) for m in {*source.reads(layer), layer, subject.n_layers}}
        run_pass(subject, batch, reads=Reads(sinks, {}))
        if base is not None:
            beside: dict[int, Tensor] = {}
            run_pass(base, batch, reads=Reads({layer: _keep(beside, layer)}, {}))
            streams[layer] = torch.cat([beside[layer], streams[layer]], dim=-1)
        chosen = source.encode(layer, streams.__getitem__)[..., features.to(subject.device)]
        if scale is not None:
            final = streams[subject.n_layers]
            inner = (batch.attention_mask == 1) & (batch.position_ids > 0)
            scales = norm.scale(final[inner.to(final.device)].float().to(_device(norm.gamma, final)))
            scale.sum, scale.n = scale.sum + float(scales.double().sum()), scale.n + len(scales)
        yield from _unpadded(batch, index, chosen)


def _keep(streams: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
    def sink(stream: Tensor) -> None:
        streams[layer] = stream

    return sink


def _device(gamma: Tensor | None, like: Tensor) -> torch.device:
    return like.device if gamma is None else gamma.device


def _unpadded(batch: Batch, index: Sequence[int], values: Tensor) -> Values:
    for row, i in enumerate(index):
        yield i, values[row, batch.padding(row) :]
