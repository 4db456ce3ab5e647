"""qklens' trainer, its shuffling buffer included.

python -m benchmarks.rivals.train_ours TASK ANSWER
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.rivals.training_task import Meter, arguments
from qklens.dictionaries.training.buffer import ShuffleBuffer
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.rows import HeldRows, RowSource
from qklens.dictionaries.training.trainer import Trainer


class _Timed(ShuffleBuffer):
    def __init__(self, source: RowSource, capacity: int, seed: int, meter: Meter) -> None:
        super().__init__(source, capacity, seed)
        self.meter = meter

    def take(self, n: int) -> Tensor:
        self.meter.step()
        return super().take(n)


def main() -> None:
    """Train, and write what the meter saw."""
    task, answer = arguments()
    meter, tensors = Meter("qklens"), task.load()
    rows, unit = tensors.pop("rows"), tensors.pop("encoder")
    tensors.clear()
    config = TrainingConfig(
        kind="sae",
        layers=(0,),
        features=len(unit),
        activation="topk",
        k=task.k,
        steps=task.steps,
        batch=task.batch,
        learning_rate=task.learning_rate,
        decay=0.0,
        auxiliary_weight=0.0,
        buffer_rows=task.buffer_rows,
        seed=task.seed,
    )
    source = HeldRows([rows], task.batch)
    trainer = Trainer(source, config)
    trainer.buffer = _Timed(source, config.buffer_rows, config.seed, meter)
    own = trainer.learner.weights
    own.groups[0].encoder.copy_(unit)
    own.groups[0].decoder.copy_(unit)
    own.bias.zero_()
    del unit
    update = trainer.learner.update

    def measured(batch: Tensor) -> object:
        found = update(batch)
        meter.fvu.append(float(found.squares.sum() / (batch - batch.mean(dim=0)).pow(2).sum()))
        return found

    trainer.learner.update = measured  # pyright: ignore[reportAttributeAccessIssue]
    meter.ready()
    trainer.run()
    meter.save(answer)


if __name__ == "__main__":
    main()
