"""A small run of training for a process of its own, which may be killed at a step or in the middle of a write."""

from __future__ import annotations

import os
import resource
import signal
import stat
import sys
from pathlib import Path

import torch

from qklens.dictionaries.crosscoder import save_crosscoder
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.finish import as_crosscoder
from qklens.dictionaries.training.parallel import join_ranks, leave_ranks
from qklens.dictionaries.training.rows import HeldRows
from qklens.dictionaries.training.trainer import Keeping, Trainer
from qklens.errors import QklensError

STEPS, EVERY = 42, 7


def train(
    folder: Path,
    kill_at_step: int = -1,
    kill_at_write: int = -1,
    activation: str = "batch_topk",
    most_bytes: int = 0,
    checkpoints: int = STEPS // EVERY,
) -> None:
    """Train to the end, or be killed; exit status 3 and `error.txt` beside the folder for what is refused."""
    torch.set_num_threads(1)
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    if kill_at_write >= 0:
        _die_in_write(kill_at_write)
    rows = torch.randn(900, 16, generator=torch.Generator().manual_seed(0))
    config = TrainingConfig.parse({
        "kind": "crosscoder", "layers": (0, 1), "features": 64, "activation": activation, "k": 3,
        "steps": checkpoints * EVERY, "batch": 32, "learning_rate": 3e-3, "dead_after_steps": 8, "auxiliary_k": 4,
        "buffer_rows": 300, "seed": 1,
    })  # fmt: skip
    ranks = join_ranks()
    keeping = Keeping(folder, {"corpus": "noise"}, checkpoint_every=EVERY, metrics_every=1)

    def report(step: int, _: dict[str, float]) -> None:
        if step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        trained = Trainer(HeldRows([rows, rows.roll(1, dims=1)], 100), config, keeping=keeping, ranks=ranks).run(report)
    except QklensError as error:
        (folder.parent / "error.txt").write_text(str(error))
        sys.exit(3)
    if ranks.first:
        made = as_crosscoder(trained.learner, trained.scale, name="x", model_sha256="ab" * 32)
        save_crosscoder(made, folder, dtype=torch.float32)
    leave_ranks()


def _die_in_write(number: int) -> None:
    """Kill this process when it syncs for the n-th time, with the file that is synced half there."""
    sync, seen = os.fsync, 0

    def dying(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                os.truncate(f"/proc/self/fd/{descriptor}", found.st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = dying


if __name__ == "__main__":
    train(Path(sys.argv[1]), activation=sys.argv[2])
