"""sparsify's own `Trainer.fit`, over a model that looks its activations up.

    python -m benchmarks.rivals.train_sparsify TASK ANSWER

Its loss is FVU itself; its Adam is torch's. The schedule is taken out, so that the learning rate is constant.
"""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version

import torch
from sparsify import SaeConfig, TrainConfig, Trainer
from torch import Tensor, nn

from benchmarks.rivals.training_task import Meter, arguments


class _Lookup(nn.Module):
    """A "model" whose only layer's output is the rows whose numbers are its tokens."""

    def __init__(self, rows: Tensor, meter: Meter) -> None:
        super().__init__()
        self.rows, self.meter, self.timed = rows, meter, False
        self.layer = nn.Identity()
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.timed:
            self.meter.step()
        return self.layer(self.rows[input_ids])


def main() -> None:
    """Train, and write what the meter saw."""
    task, answer = arguments()
    answer = answer.absolute()
    meter, tensors = Meter(f"sparsify {version('eai-sparsify')}"), task.load()
    rows, unit, order = tensors.pop("rows"), tensors.pop("encoder"), tensors.pop("order")
    model = _Lookup(rows, meter)
    batches = [{"input_ids": ids} for ids in order.split(task.batch)]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        config = TrainConfig(
            SaeConfig(num_latents=len(unit), k=task.k),
            batch_size=1,
            optimizer="adam",
            lr=task.learning_rate,
            hookpoints=["layer"],
            log_to_wandb=False,
            save_every=10**9,
        )
        trainer = Trainer(config, batches, model)  # pyright: ignore
        trainer.lr_schedulers = []
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = task.learning_rate
        coder = trainer.saes["layer"]
        coder.encoder.weight.data.copy_(unit)
        coder.W_dec.data.copy_(unit)
        del unit
        coder.register_forward_hook(lambda _, __, out: meter.fvu.append(float(out.fvu)))
        model.timed = True
        meter.ready()
        trainer.fit()
        os.chdir("/")
    meter.save(answer)


if __name__ == "__main__":
    main()
