"""From what share of active pairs on is a dense code cheaper than a sparse one?

    python -m benchmarks.code_crossover

A training step needs three products of a code (`qklens.dictionaries.training.codes`): what it writes, the derivative at
its pairs, and the sum over rows for each feature, twice. Both kinds of code are given the same pairs; CPU seconds of
one thread, the best of some rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qklens.dictionaries.training.codes import Code, DenseCode, SparseCode, pairs_code

SHARES = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)


def step(code: Code, weights: Tensor, rows: Tensor, features: int) -> None:
    """The products of one step."""
    error = rows - code.decode(weights)
    to_code = code.products(error)
    code.summed(code.values, error, 0, features)
    code.summed(to_code, rows, 0, features)


def seconds(call: Callable[[], None], rounds: int) -> float:
    """The least CPU time of some rounds."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    """Print a line for each share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 576, "features": 8192, "batch": 512, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    before = torch.rand(options.batch, options.features, generator=draw)
    rows = torch.randn(options.batch, options.width, generator=draw)
    weights = torch.randn(options.features, options.width, generator=draw)
    print("active   sparse s   dense s   sparse / dense")
    for share in SHARES:
        keep = before < share
        times = []
        for limit, kind in ((1.0, SparseCode), (0.0, DenseCode)):

            def once(limit: float = limit, kind: type = kind, keep: Tensor = keep) -> None:
                code = pairs_code(before, keep, limit)
                assert isinstance(code, kind)
                step(code, weights, rows, options.features)

            times.append(seconds(once, options.rounds))
        print(f"1/{round(1 / share):<6}{times[0]:10.3f}{times[1]:10.3f}{times[0] / times[1]:14.2f}")


if __name__ == "__main__":
    main()
