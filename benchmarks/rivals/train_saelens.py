"""SAELens' own `SAETrainer.fit`, as it is by default; with SPARSE=1 in the environment its sparse activations.

    python -m benchmarks.rivals.train_saelens TASK ANSWER

By default the decoder's norm is free there, activations are rescaled by it, and the gradient of all weights together
is clipped to norm 1; at the first step the decoder's norm is 1, as everywhere. Sparse activations cannot be rescaled on
the CPU (the backward pass of that product is missing), and are not.

With CONSTRAINED=1 the same trainer does what the others do: before each step of Adam the gradient's part along each
decoder row is taken off, after it the row is scaled to norm 1, and nothing is clipped. What is then left of a
difference between curves is arithmetic, not algorithm.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

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


def _constrain(optimizer: torch.optim.Optimizer, decoder: nn.Parameter) -> None:
    """Keep decoder rows at norm 1, and gradients as they are."""

    def take_off(*_: object) -> None:
        if decoder.grad is not None:
            along = torch.linalg.vecdot(decoder.grad, decoder.data)
            decoder.grad -= along[:, None] * decoder.data

    def scale(*_: object) -> None:
        decoder.data /= torch.linalg.vector_norm(decoder.data, dim=1, keepdim=True)

    optimizer.register_step_pre_hook(take_off)
    optimizer.register_step_post_hook(scale)
    nn.utils.clip_grad_norm_ = lambda *_, **__: torch.zeros(())


def main() -> None:
    """Train, and write what the meter saw."""
    task, answer = arguments()
    sparse, constrained = (os.environ.get(name) == "1" for name in ("SPARSE", "CONSTRAINED"))
    how = ", use_sparse_activations" if sparse else ", decoder at norm 1, no clipping" if constrained else ""
    meter = Meter(f"SAELens {version('sae-lens')}{how}")
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
    if constrained:
        _constrain(trainer.optimizer, sae.W_dec)
    meter.ready()
    trainer.fit()
    meter.save(answer)


if __name__ == "__main__":
    main()
