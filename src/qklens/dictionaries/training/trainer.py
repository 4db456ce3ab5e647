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

from qklens.dictionaries.config import BATCH_FILE, CONFIG_FILE, WEIGHTS_FILE
from qklens.dictionaries.training.buffer import ShuffleBuffer
from qklens.dictionaries.training.checkpoint import Facts, load_checkpoint, prune_checkpoints, save_checkpoint
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.layout import layout_of
from qklens.dictionaries.training.learner import Learner, StepMetrics
from qklens.dictionaries.training.memory import refuse_too_large
from qklens.dictionaries.training.parallel import Ranks
from qklens.dictionaries.training.rows import RowSource
from qklens.dictionaries.training.shards import refuse_difference
from qklens.errors import QklensError
from qklens.files import atomic_write, foreign_entry, read_json, remove_left_over, write_json

Report = Callable[[int, dict[str, float]], None]
"""Called with the step and its metrics: loss, fvu, l0, dead."""
_IDENTITY, _METRICS = "run.json", "metrics.jsonl"


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
                checkpoint, rows that do not fit the kind, or more features than memory has room for.
        """
        self.config, self.keeping, self.ranks = config, keeping, ranks or Ranks()
        n_streams = layout_of(config, 1).n_streams
        if source.width % n_streams:
            raise QklensError(f"rows have {source.width} columns; expected a multiple of {n_streams} streams")
        self.layout = layout_of(config, source.width // n_streams)
        self.device = torch.device(device)
        refuse_too_large(config, self.layout, self.ranks.world, self.device)
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
        if keeping is not None and self.ranks.first:
            self._tidy(keeping.folder)

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

    def _restore(self, tensors: dict[str, Tensor], facts: Facts) -> None:
        where = f"{self.keeping.folder / 'checkpoints'}" if self.keeping else "checkpoint"
        # Drawn only to say which tensors there must be; every number of theirs is overwritten.
        bias = torch.zeros(self.layout.width, device=self.device)
        self.scale = torch.zeros(self.layout.n_streams, device=self.device)
        self.learner = Learner(self.config, self.layout, bias, self.ranks)
        self.learner.step, self.learner.threshold = facts.step, facts.threshold
        for name, own in self._tensors().items():
            found = tensors.get(name)
            if found is None or (found.shape, found.dtype) != (own.shape, own.dtype):
                said = "is missing" if found is None else f"is {tuple(found.shape)} {found.dtype}"
                raise QklensError(
                    f"{where}: tensor {name!r} {said}; expected {tuple(own.shape)} {own.dtype}: the checkpoint is of "
                    f"another run; remove {where} to begin anew"
                )
            own.copy_(found)
        self.buffer.restore(
            {n.removeprefix("buffer."): t for n, t in tensors.items() if n.startswith("buffer.")}, where
        )
        self._lines = list(facts.metrics)

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the buffer, by name."""
        learner = self.learner
        tensors = {"scale": self.scale}
        for name, weights in learner.weights.tensors().items():
            moments = learner.moments[name]
            tensors |= {f"weights.{name}": weights, f"mean.{name}": moments.mean, f"square.{name}": moments.square}
        return tensors | {f"last_fired.{i}": last for i, last in enumerate(learner.last_fired)}

    def _keep(self, keeping: Keeping) -> None:
        if self.ranks.first:
            tensors = self._tensors() | {f"buffer.{name}": tensor for name, tensor in self.buffer.state().items()}
            facts = Facts(step=self.learner.step, threshold=self.learner.threshold, metrics=tuple(self._lines))
            save_checkpoint(keeping.folder / "checkpoints", tensors, facts)
            self._write_metrics(keeping.folder)
        self.ranks.wait()

    def _write_metrics(self, folder: Path) -> None:
        atomic_write(folder / _METRICS, "".join(f"{line}\n" for line in self._lines))

    def _tidy(self, folder: Path) -> None:
        """What a run that was killed at any moment has too much or too little of beside its last checkpoint."""
        prune_checkpoints(folder / "checkpoints")
        remove_left_over(folder, [_IDENTITY, _METRICS, WEIGHTS_FILE, CONFIG_FILE, BATCH_FILE])
        if self.learner.step:
            self._write_metrics(folder)

    def _claim(self, keeping: Keeping, source: RowSource) -> None:
        """Write what this run is, or compare it with what is there."""
        path = keeping.folder / _IDENTITY
        identity = {
            "training": self.config.model_dump(mode="json"),
            **json.loads(json.dumps(keeping.identity)),
            "activations": source.fingerprint,
            "processes": self.ranks.world,
        }
        self.ranks.wait()
        if path.is_file():
            found = read_json(path)
            if not isinstance(found, dict):
                raise QklensError(
                    f"{path}: holds a {type(found).__name__}; expected an object with what the run is of; remove "
                    f"{keeping.folder} to begin anew"
                )
            refuse_difference(found, identity, f"--out {keeping.folder}")
        elif self.ranks.first:
            if (other := foreign_entry(keeping.folder, path.name)) is not None:
                raise QklensError(
                    f"--out {keeping.folder}: holds {other.name!r} and no {_IDENTITY}; expected a new or empty folder, "
                    "or a run to go on with; choose another"
                )
            write_json(path, identity)
        self.ranks.wait()


def _named(found: StepMetrics, rows: Tensor) -> dict[str, float]:
    variance = float((rows - rows.mean(dim=0)).pow(2).sum())
    fvu = float(found.squares.sum()) / max(variance, torch.finfo(rows.dtype).tiny)
    return {"loss": found.loss, "fvu": fvu, "l0": found.l0, "dead": found.dead}
