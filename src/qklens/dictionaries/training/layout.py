"""Which columns of a row a group of features reads and writes.

A row is P streams of d numbers side by side: one layer (SAE), the layers of a crosscoder, or one layer of the base and
of the chat model. A weakly causal crosscoder has a group a layer, which reads it and writes it and all later ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from qklens.dictionaries.training.config import TrainingConfig


@dataclass(frozen=True)
class Group:
    """Features with the same columns.

    Attributes:
        reads: streams that they read, as a range.
        writes: streams that they write.
        d_model: width of a stream.
        parts: into which a decoder row falls; the sum of their norms is kept at 1, see `adam`.
    """

    reads: range
    writes: range
    d_model: int
    parts: int

    @property
    def read_columns(self) -> slice:
        """Of a row."""
        return slice(self.reads.start * self.d_model, self.reads.stop * self.d_model)

    @property
    def written_columns(self) -> slice:
        """Of a row."""
        return slice(self.writes.start * self.d_model, self.writes.stop * self.d_model)


@dataclass(frozen=True)
class Layout:
    """A row's streams and the groups of features over them."""

    n_streams: int
    d_model: int
    groups: tuple[Group, ...]

    @property
    def width(self) -> int:
        """Columns of a row."""
        return self.n_streams * self.d_model


def layout_of(config: TrainingConfig, d_model: int) -> Layout:
    """The layout of a kind of dictionary."""
    if config.kind == "crosscoder":
        n = len(config.layers)
        columns = [(range(i, i + 1), range(i, n)) for i in range(n)]
    else:
        n = 2 if config.kind == "model_diff" else 1
        columns = [(range(n), range(n))]
    penalised = config.sparsity is not None
    groups = (Group(reads, writes, d_model, len(writes) if penalised else 1) for reads, writes in columns)
    return Layout(n, d_model, tuple(groups))
