"""A run of training in a process of its own: folder, kind, seconds to sleep after each step."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.finish import as_crosscoder
from qklens.dictionaries.training.parallel import join_ranks, leave_ranks
from qklens.dictionaries.training.rows import HeldRows
from qklens.dictionaries.training.trainer import Keeping, Trainer


def main() -> None:
    folder, kill_at, activation = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    rows = torch.randn(900, 16, generator=torch.Generator().manual_seed(0))
    config = TrainingConfig(
        kind="crosscoder", layers=(0, 1), features=64, activation=activation, k=3, steps=60, batch=32,  # pyright: ignore
        learning_rate=3e-3, dead_after_steps=8, auxiliary_k=4, buffer_rows=300, seed=1,
    )  # fmt: skip
    ranks = join_ranks()
    keeping = Keeping(folder, {"corpus": "noise"}, checkpoint_every=7, metrics_every=1)
    trainer = Trainer(HeldRows([rows, rows.roll(1, dims=1)], 100), config, keeping=keeping, ranks=ranks)

    def report(step: int, _: dict[str, float]) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trained = trainer.run(report)
    if ranks.first:
        from qklens.dictionaries.crosscoder import save_crosscoder

        made = as_crosscoder(trained.learner, trained.scale, name="x", model_sha256="ab" * 32)
        save_crosscoder(made, folder, dtype=torch.float32)
    leave_ranks()


if __name__ == "__main__":
    main()
