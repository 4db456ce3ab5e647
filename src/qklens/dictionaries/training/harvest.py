"""Rows of activations from models that read a corpus: resid_pre of every real token but each sequence's first.

A row holds the layers of one model side by side, or one layer of the base and of the chat model, at the same token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qklens.dictionaries.training.corpus import Corpus
from qklens.dictionaries.training.shards import Manifest
from qklens.errors import QklensError
from qklens.models.batch import Batch, left_padded
from qklens.models.copies import Reads
from qklens.models.passes import run_pass
from qklens.models.subject import Subject

CHUNK_ROWS = 1 << 13
"""About as many rows as a chunk, and so a shard, has."""
_SEQUENCES = 64


class ModelRows:
    """Rows that are made when they are asked for; a `RowSource`.

    Raises:
        QklensError: a layer that does not exist, models of different width, or tokenizers that differ.
    """

    def __init__(self, subjects: Sequence[Subject], corpus: Corpus, layers: Sequence[int]) -> None:
        for subject in subjects:
            for layer in layers:
                if layer >= subject.n_layers:
                    raise QklensError(
                        f"--layers {layer}: model {subject.name!r} has layers 0 to {subject.n_layers - 1}"
                    )
        check_pair(subjects)
        self.subjects, self.corpus, self.layers = tuple(subjects), corpus, tuple(layers)
        self._chunks: list[list[Sequence[int]]] = [[]]
        rows = 0
        for sequence in corpus.sequences:
            if rows >= CHUNK_ROWS:
                self._chunks.append([])
                rows = 0
            self._chunks[-1].append(sequence)
            rows += len(sequence) - 1

    @property
    def n_chunks(self) -> int:
        """Chunks of an epoch."""
        return len(self._chunks)

    @property
    def width(self) -> int:
        """Columns of a row."""
        return len(self.subjects) * len(self.layers) * self.subjects[0].d_model

    @property
    def manifest(self) -> Manifest:
        """What shards of these rows hold."""
        return Manifest(
            models=tuple(subject.sha256 or "" for subject in self.subjects),
            corpus=self.corpus.sha256,
            layers=self.layers,
            dtype=str(self.subjects[0].dtype).removeprefix("torch."),
            width=self.width,
            shards=self.n_chunks,
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest: models, corpus, layers and dtype."""
        return hashlib.sha256(self.manifest.model_dump_json().encode()).hexdigest()

    def name(self, index: int) -> str:
        """Which part of the corpus."""
        return f"chunk {index} of {self.n_chunks} of the corpus"

    def chunk(self, index: int) -> Float[Tensor, "row column"]:
        """Run the models over a part of the corpus."""
        return rows_of(self.subjects, self._chunks[index], self.layers)


def rows_of(
    subjects: Sequence[Subject], sequences: Sequence[Sequence[int]], layers: Sequence[int]
) -> Float[Tensor, "row column"]:
    """The rows of some sequences, on the CPU in the models' dtype.

    Raises:
        QklensError: a sequence longer than the model's context.
    """
    parts = []
    for batches in zip(*(batches_by_length(subject, sequences) for subject in subjects), strict=True):
        streams = [_streams(subject, batch, layers) for subject, batch in zip(subjects, batches, strict=True)]
        parts.append(torch.cat([x for own in streams for x in own], dim=1))
    return torch.cat(parts)


def stream_rows(
    subject: Subject, sequences: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, Float[Tensor, "row d_model"]]:
    """`rows_of` one model by layer, in float32.

    Raises:
        QklensError: a sequence longer than the model's context.
    """
    return side_by_side([subject], sequences, layers)


def side_by_side(
    subjects: Sequence[Subject], sequences: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, Float[Tensor, "row column"]]:
    """`rows_of` models by layer, in float32, the models' streams side by side in their order.

    Raises:
        QklensError: a sequence longer than the model's context.
    """
    rows = rows_of(subjects, sequences, layers).float().unflatten(1, (len(subjects), len(layers), -1))
    return {layer: rows[:, :, i].flatten(1) for i, layer in enumerate(layers)}


def batches_by_length(subject: Subject, sequences: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """Sequences of about the same length together, shortest first."""
    ordered = sorted(sequences, key=len)
    for start in range(0, len(ordered), _SEQUENCES):
        yield left_padded(ordered[start : start + _SEQUENCES], subject.pad_id, subject.device)


def after_first(batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Real tokens but each sequence's first, whose stream is an outlier in many models."""
    return (batch.attention_mask == 1) & (batch.position_ids > 0)


def _streams(subject: Subject, batch: Batch, layers: Sequence[int]) -> list[Float[Tensor, "row d_model"]]:
    """resid_pre of some layers at all tokens but the first, from one pass."""
    inner = after_first(batch)
    found: dict[int, Tensor] = {}

    def keep(layer: int, x: Tensor) -> None:
        found[layer] = x[inner.to(x.device)].cpu()

    run_pass(subject, batch, reads=Reads({layer: partial(keep, layer) for layer in layers}, {}))
    return [found[layer] for layer in layers]


def check_pair(subjects: Sequence[Subject]) -> None:
    """Refuse models whose streams or tokens cannot stand side by side.

    Raises:
        QklensError: streams of different width, or different vocabularies.
    """
    first = subjects[0]
    for other in subjects[1:]:
        if other.d_model != first.d_model:
            raise QklensError(
                f"{first.name} has a stream of {first.d_model} numbers, {other.name} of {other.d_model}; a crosscoder "
                "over checkpoints needs two of one model"
            )
        if other.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise QklensError(
                f"{first.name} and {other.name} have different vocabularies; a crosscoder over checkpoints needs the "
                "same tokens in both"
            )
