"""One update: gradients of a batch, then Adam on every weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.dictionaries.training import schedule
from qklens.dictionaries.training.adam import Moments, adam_rows, block_size, scale_to_one, without_radial, zero_moments
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.layout import Layout
from qklens.dictionaries.training.parallel import Ranks
from qklens.dictionaries.training.sparse_step import Gradient, GradientMaker, StepNumbers
from qklens.dictionaries.training.weights import Weights, first_weights
from qklens.errors import QklensError

_THRESHOLD_MEMORY = 0.98


@dataclass(frozen=True)
class StepMetrics:
    """What one update saw, over the whole batch.

    Attributes:
        loss: L, see `sparse_step`.
        l0: active features a row, of all groups.
        dead: share of features that count as dead.
        squares: Σ e², by column.
    """

    loss: float
    l0: float
    dead: float
    squares: Float[Tensor, " column"]


class Learner:
    """Weights, Adam's moments and what else changes from step to step.

    Attributes:
        weights: the master weights.
        moments: Adam's, by the names of `Weights.tensors`.
        last_fired: per group, the step at which each feature was last active.
        threshold: running mean of batch_topk's cut, the threshold at inference.
        step: updates done.
    """

    def __init__(
        self,
        config: TrainingConfig,
        layout: Layout,
        bias: Float[Tensor, " column"],
        ranks: Ranks | None = None,
    ) -> None:
        """Begin with random weights, the same on every process."""
        self.config, self.layout, self.ranks = config, layout, ranks or Ranks()
        generator = torch.Generator().manual_seed(config.seed)
        self.weights: Weights = first_weights(config, layout, bias, generator)
        self.moments: dict[str, Moments] = {name: zero_moments(t) for name, t in self.weights.tensors().items()}
        self.last_fired = [torch.zeros(config.features, dtype=torch.long, device=bias.device) for _ in layout.groups]
        self.threshold = 0.0
        self.step = 0
        self._gradient = GradientMaker(config, layout, self.ranks)

    @torch.no_grad()
    def fit_encoders(self, rows: Float[Tensor, "row column"]) -> None:
        """Scale all encoders by c = Σ ⟨x, x̂⟩ / Σ ‖x̂‖², before the first step.

        Features overlap, most where several layers' groups write one layer: without this the first reconstructions are
        too long, and training ends at a worse place. Not for jumprelu, whose thresholds are given at the first scale.
        """
        if self.config.activation == "jumprelu":
            return
        now = StepNumbers(0.0, schedule.active(self.config, 0), tuple(last < 0 for last in self.last_fired))
        centred = rows - self.weights.bias
        written = centred - self._gradient(self.weights, rows, now).error
        power = float(written.pow(2).sum())
        if power > 0:
            for group in self.weights.groups:
                group.encoder.mul_(float((centred * written).sum()) / power)

    def update(self, rows: Float[Tensor, "row column"]) -> StepMetrics:
        """One step on a batch, the whole of it; each process takes its part.

        Raises:
            QklensError: the loss is not a number; weights are as before the step.
        """
        now = StepNumbers(
            schedule.sparsity(self.config, self.step),
            schedule.active(self.config, self.step),
            tuple(self.step - last > self.config.dead_after_steps for last in self.last_fired),
        )
        gradient = self._gradient(self.weights, self.ranks.part(rows), now)
        metrics = self._metrics(gradient, now, len(rows))
        if not math.isfinite(metrics.loss):
            raise QklensError(
                f"step {self.step}: the loss is {metrics.loss}; lower the learning rate (now "
                f"{self.config.learning_rate:g}), or check the activations"
            )
        self._apply(gradient)
        for last, group in zip(self.last_fired, gradient.groups, strict=True):
            last[self.ranks.either(group.fired)] = self.step
        memory = _THRESHOLD_MEMORY if self.step else 0.0
        self.threshold = memory * self.threshold + (1 - memory) * gradient.cut
        self.step += 1
        return metrics

    def _metrics(self, gradient: Gradient, now: StepNumbers, n: int) -> StepMetrics:
        counts = [float(group.count) for group in gradient.groups]
        extra = gradient.penalty * now.sparsity + gradient.auxiliary
        sums = torch.tensor([extra, sum(counts)], dtype=torch.float64, device=gradient.squares.device)
        self.ranks.add(sums)
        squares = self.ranks.add(gradient.squares)
        dead = sum(int(flags.sum()) for flags in now.dead) / (len(now.dead) * self.config.features)
        return StepMetrics((float(squares.sum()) + float(sums[0])) / n, float(sums[1]) / n, dead, squares)

    @torch.no_grad()
    def _apply(self, gradient: Gradient) -> None:
        rate = schedule.learning_rate(self.config, self.step)

        def update(name: str, weights: Tensor, change: Tensor, begin: int = 0) -> Tensor:
            return adam_rows(
                self.config, weights, self.moments[name], change, step=self.step, learning_rate=rate, begin=begin
            )

        for i, (own, group) in enumerate(zip(self.weights.groups, gradient.groups, strict=True)):
            parts = self.layout.groups[i].parts
            for matrix, weights in (("encoder", own.encoder), ("decoder", own.decoder)):
                size = block_size(weights.shape[1])
                for begin in range(0, self.config.features, size):
                    end = min(begin + size, self.config.features)
                    change = self.ranks.add(group.block(matrix, begin, end))
                    if matrix == "decoder":
                        change = without_radial(change, weights[begin:end], parts)
                    rows = update(f"{i}.{matrix}", weights, change, begin)
                    if matrix == "decoder":
                        scale_to_one(rows, parts)
            update(f"{i}.encoder_bias", own.encoder_bias, self.ranks.add(group.encoder_bias))
            if own.log_threshold is not None and group.log_threshold is not None:
                update(f"{i}.log_threshold", own.log_threshold, self.ranks.add(group.log_threshold))
        update("bias", self.weights.bias, self.ranks.add(gradient.bias))
