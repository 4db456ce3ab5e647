"""What every contestant of `benchmarks.dictionary_training` is given, how it is timed, and what it hands back.

Needs torch and safetensors alone, so that it runs in the rivals' environments too.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

WARM = 5
"""Steps that are not timed: allocators fill, kernels are chosen."""


@dataclass(frozen=True)
class TrainingTask:
    """A TopK SAE to train, with Adam, a constant learning rate and no auxiliary loss.

    Attributes:
        tensors: file with `rows`, the `order` in which batches take them, and `encoder`, whose rows are unit vectors:
            the first weights of encoder and decoder.
        k: active features a row.
        batch: rows of a step.
        steps: how many.
        learning_rate: Adam's.
        buffer_rows: of the shuffling buffer.
        seed: of the order.
    """

    tensors: str
    k: int
    batch: int
    steps: int
    learning_rate: float
    buffer_rows: int
    seed: int

    def load(self) -> dict[str, Tensor]:
        """The tensors."""
        return load_file(self.tensors)

    def save(self, path: Path) -> None:
        """Write it."""
        path.write_text(json.dumps(asdict(self)))


@dataclass
class Meter:
    """Timed at the beginning of every step; the last step ends the time.

    Attributes:
        by: who it is.
        fvu: fraction of variance unexplained, by step.
        began: CPU seconds at the beginning of each step.
        before: MiB that were resident when training began: imports, rows and weights.
        peak: most MiB that were resident until the last step.
    """

    by: str
    fvu: list[float] = field(default_factory=list)
    began: list[float] = field(default_factory=list)
    before: float = 0.0
    peak: float = 0.0

    def ready(self) -> None:
        """Training is about to begin."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.before = pages * resource.getpagesize() / 2**20

    def step(self) -> None:
        """A step begins."""
        self.began.append(time.process_time())
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def save(self, path: Path) -> None:
        """Write it."""
        path.write_text(json.dumps(asdict(self)))


def unexplained(x: Tensor, error: Tensor) -> float:
    """Σ e² / Σ (x − mean)²."""
    return float(error.pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum())


def arguments() -> tuple[TrainingTask, Path]:
    """The task named first on the command line, and where the answer goes; one thread from here on."""
    torch.set_num_threads(1)
    task, answer = map(Path, sys.argv[1:])
    return TrainingTask(**json.loads(task.read_text())), answer
