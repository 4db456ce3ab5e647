"""The loop: rows, updates, metrics, checkpoints; a killed run goes on bit for bit (with the same number of threads)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.dictionaries.training.buffer import ShuffleBuffer
from qklens.dictionaries.training.checkpoint import load_checkpoint, save_checkpoint
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.layout import layout_of
from qklens.dictionaries.training.learner import Learner, StepMetrics
from qklens.dictionaries.training.parallel import Ranks
from qklens.dictionaries.training.rows import RowSource
from qklens.dictionaries.training.shards import refuse_difference
from qklens.errors import QklensError
from qklens.files import atomic_write, read_json, write_json

Report = Callable[[int, dict[str, float]], None]
"""Called with the step and its metrics: loss, fvu, l0, dead."""


@dataclass(frozen=True)
class Keeping:
    """What a run leaves on disk, and how often.

    Attributes:
        folder: of the run.
        identity: what the run is of (model, corpus, ...); another one is refused.
        checkpoint_every: steps.
        metrics_every: steps.
    """

    folder: Path
    identity: dict[str, Any]
    checkpoint_every: int = 500
    metrics_every: int = 50


@dataclass(frozen=True, eq=False)
class Trained:
    """What training gives.

    Attributes:
        learner: the weights.
        scale: by which each stream was multiplied.
        metrics: of the last step.
    """

    learner: Learner
    scale: Float[Tensor, " stream"]
    metrics: dict[str, float]


class Trainer:
    """One run of training."""

    def __init__(
        self,
        source: RowSource,
        config: TrainingConfig,
        *,
        keeping: Keeping | None = None,
        ranks: Ranks | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Begin, or go on from the last checkpoint.

        Raises:
            QklensError: the folder holds a run of another configuration, model or corpus (names both sides), a damaged
                checkpoint, or rows that do not fit the kind.
        """
        self.config, self.keeping, self.ranks = config, keeping, ranks or Ranks()
        n_streams = layout_of(config, 1).n_streams
        if source.width % n_streams:
            raise QklensError(f"rows have {source.width} columns; expected a multiple of {n_streams} streams")
        self.layout = layout_of(config, source.width // n_streams)
        self.device = torch.device(device)
        self.buffer = ShuffleBuffer(source, config.buffer_rows, config.seed)
        self._lines: list[str] = []
        found = None
        if keeping is not None:
            self._claim(keeping, source)
            found = load_checkpoint(keeping.folder / "checkpoints")
        if found is None:
            self._begin()
        else:
            self._restore(*found)

    def run(self, report: Report = lambda _, __: None) -> Trained:
        """Train to the last step.

        Raises:
            QklensError: NaN in rows or loss, a shard that was altered, or a full disk.
        """
        metrics: dict[str, float] = {}
        every = self.keeping.metrics_every if self.keeping else 50
        while (step := self.learner.step) < self.config.steps:
            rows = self.buffer.take(self.config.batch).to(self.device, torch.float32)
            rows = (rows.unflatten(1, (-1, self.layout.d_model)) * self.scale[:, None]).flatten(1)
            found = self.learner.update(rows)
            last = self.learner.step == self.config.steps
            if step % every == 0 or last:
                metrics = _named(found, rows)
                self._lines.append(json.dumps({"step": step, **metrics}))
                report(step, metrics)
            if self.keeping and (self.learner.step % self.keeping.checkpoint_every == 0 or last):
                self._keep(self.keeping)
        return Trained(self.learner, self.scale, metrics)

    def _begin(self) -> None:
        rows = self.buffer.waiting().to(self.device, torch.float32).unflatten(1, (-1, self.layout.d_model))
        squares = rows.pow(2).mean(dim=(0, 2))
        if not (squares > 0).all():
            raise QklensError("activations of a layer are all zero; check the corpus and the layers")
        self.scale = squares.rsqrt()
        bias = rows.mean(dim=0) * self.scale[:, None]
        self.learner = Learner(self.config, self.layout, bias.flatten(), self.ranks)
        self.learner.fit_encoders((rows[: self.config.batch] * self.scale[:, None]).flatten(1))

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.scale = tensors["scale"].to(self.device)
        self.learner = Learner(self.config, self.layout, tensors["weights.bias"].to(self.device), self.ranks)
        self.learner.step, self.learner.threshold = facts["step"], facts["threshold"]
        for name, weights in self.learner.weights.tensors().items():
            weights.copy_(tensors[f"weights.{name}"])
            self.learner.moments[name].mean.copy_(tensors[f"mean.{name}"])
            self.learner.moments[name].square.copy_(tensors[f"square.{name}"])
        for i, last in enumerate(self.learner.last_fired):
            last.copy_(tensors[f"last_fired.{i}"])
        self.buffer.restore({n.removeprefix("buffer."): t for n, t in tensors.items() if n.startswith("buffer.")})
        self._lines = list(facts["metrics"])

    def _keep(self, keeping: Keeping) -> None:
        if self.ranks.first:
            learner = self.learner
            tensors = {"scale": self.scale}
            for name, weights in learner.weights.tensors().items():
                moments = learner.moments[name]
                tensors |= {f"weights.{name}": weights, f"mean.{name}": moments.mean, f"square.{name}": moments.square}
            tensors |= {f"last_fired.{i}": last for i, last in enumerate(learner.last_fired)}
            tensors |= {f"buffer.{name}": tensor for name, tensor in self.buffer.state().items()}
            facts = {"threshold": learner.threshold, "metrics": self._lines}
            save_checkpoint(keeping.folder / "checkpoints", learner.step, tensors, facts)
            atomic_write(keeping.folder / "metrics.jsonl", "".join(f"{line}\n" for line in self._lines))
        self.ranks.wait()

    def _claim(self, keeping: Keeping, source: RowSource) -> None:
        """Write what this run is, or compare it with what is there."""
        path = keeping.folder / "run.json"
        identity = {
            "training": self.config.model_dump(mode="json"),
            **json.loads(json.dumps(keeping.identity)),
            "activations": source.fingerprint,
            "processes": self.ranks.world,
        }
        self.ranks.wait()
        if path.is_file():
            refuse_difference(read_json(path), identity, f"--out {keeping.folder}")
        elif self.ranks.first:
            # Names with a dot in front are what a run left that was killed while it wrote `run.json`.
            if keeping.folder.is_dir() and any(not p.name.startswith(".") for p in keeping.folder.iterdir()):
                raise QklensError(f"--out {keeping.folder}: is not empty and holds no run; choose another folder")
            write_json(path, identity)
        self.ranks.wait()


def _named(found: StepMetrics, rows: Tensor) -> dict[str, float]:
    variance = float((rows - rows.mean(dim=0)).pow(2).sum())
    fvu = float(found.squares.sum()) / max(variance, torch.finfo(rows.dtype).tiny)
    return {"loss": found.loss, "fvu": fvu, "l0": found.l0, "dead": found.dead}
