"""SAELens' own `SAETrainer.fit`, as it is by default; with SPARSE=1 in the environment its sparse activations.

    python -m benchmarks.rivals.train_saelens TASK ANSWER

The decoder's norm is free there, and activations are rescaled by it; at the first step it is 1, as everywhere. Sparse
activations cannot be rescaled on the CPU (the backward pass of that product is missing), and are not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version

from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.rivals.training_task import Meter, arguments, unexplained


def _taken(rows: Tensor, order: Tensor, batch: int, meter: Meter) -> Iterator[Tensor]:
    for part in order.split(batch):
        meter.step()
        yield rows[part]


class _Measured(SAETrainer):
    meter: Meter

    def step(self, batch: Tensor) -> object:
        found = super().step(batch)
        self.meter.fvu.append(unexplained(batch, batch - found.sae_out.detach()))
        return found


def main() -> None:
    """Train, and write what the meter saw."""
    task, answer = arguments()
    sparse = os.environ.get("SPARSE") == "1"
    meter = Meter(f"SAELens {version('sae-lens')}{', use_sparse_activations' if sparse else ''}")
    tensors = task.load()
    rows, unit, order = tensors.pop("rows"), tensors.pop("encoder"), tensors.pop("order")
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=unit.shape[1], d_sae=len(unit), k=task.k, use_sparse_activations=sparse,
                              rescale_acts_by_decoder_norm=not sparse)
    )  # fmt: skip
    sae.W_enc.data.copy_(unit.T)
    sae.W_dec.data.copy_(unit)
    del unit
    trainer = _Measured(
        SAETrainerConfig(
            total_training_samples=task.steps * task.batch,
            train_batch_size_samples=task.batch,
            lr=task.learning_rate,
            lr_end=task.learning_rate,
        ),
        sae,
        _taken(rows, order, task.batch, meter),
    )
    trainer.meter = meter
    meter.ready()
    trainer.fit()
    meter.save(answer)


if __name__ == "__main__":
    main()
