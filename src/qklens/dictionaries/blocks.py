"""A block of rows at a time, so that the dense activations of many rows never exist at once."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor, cat

from qklens.dictionaries.source import FeatureSource, Stream

ENTRIES_AT_ONCE = 1 << 24
"""64 MiB in float32."""


def blocks(n: int, each: int) -> Iterator[tuple[int, int]]:
    """Ranges of n things, of which as many are taken at once as have `ENTRIES_AT_ONCE` entries, and at least one.

    Args:
        n: things.
        each: entries of one of them.
    """
    step = max(1, ENTRIES_AT_ONCE // max(each, 1))
    for begin in range(0, n, step):
        yield begin, min(begin + step, n)


def count_and_error(source: FeatureSource, layer: int, stream: Stream) -> tuple[int, Float[Tensor, "row d_model"]]:
    """How many activations of some rows are not zero, and what they leave of the stream, e = x − x̂, in its dtype.

    Args:
        source: what encodes.
        layer: whose stream it writes.
        stream: rows of all layers that `encode` reads.
    """
    count, errors = 0, []
    for begin, end in blocks(len(stream(layer)), len(source.labels)):

        def some(m: int, begin: int = begin, end: int = end) -> Tensor:
            return stream(m)[begin:end]

        activations = source.encode(layer, some)
        count += int(activations.count_nonzero())
        errors.append(source.error(layer, some, activations))
        del activations  # or two blocks of them would meet
    return count, cat(errors) if errors else stream(layer)
