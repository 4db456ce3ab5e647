"""What every contestant is given and hands back, and how it is timed. Needs only torch, so that it runs anywhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

About = dict[str, str | int]
Sweep = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Task:
    """A sweep of a direction added to what some heads' W_Q reads at the last token: x' = x + s d, then the norm.

    Attributes:
        model: the model's directory.
        layer: d is added to the stream that enters this layer, for its queries alone.
        heads: only these heads' queries are computed anew.
        vector: d.
        strengths: each s.
        prompts: token ids.
        letters: of each prompt, the ids of the correct and of the incorrect letter.
    """

    model: str
    layer: int
    heads: list[int]
    vector: list[float]
    strengths: list[float]
    prompts: list[list[int]]
    letters: list[list[int]]

    @property
    def d(self) -> Tensor:
        """The direction."""
        return torch.tensor(self.vector)

    def save(self, path: Path) -> None:
        """Write it; the floats survive exactly."""
        path.write_text(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Answer:
    """What a contestant hands back.

    Attributes:
        seconds: CPU seconds of all prompts and strengths, of all threads; loading and one prompt's warm-up left out.
        letters: the two letters' logits at the last position, by strength and prompt.
        margins: correct minus incorrect; the timed result of a contestant that gives margins, else from `letters`.
        about: who it was, and what it has to say.
    """

    seconds: float
    letters: list[list[list[float]]]
    margins: list[list[float]]
    about: About

    def save(self, path: Path) -> None:
        """Write it."""
        path.write_text(json.dumps(asdict(self)))


def arguments() -> tuple[Task, Path]:
    """The task named first on the command line, and where the answer goes; one thread from here on."""
    torch.set_num_threads(1)
    task, answer = map(Path, sys.argv[1:])
    return Task(**json.loads(task.read_text())), answer


@torch.no_grad()
def compete(load: Callable[[Task, About], Sweep]) -> None:
    """Time a contestant that takes prompts one by one; `load` makes what turns tokens into logits `strength vocab`."""
    task, path = arguments()
    about: About = {}
    sweep = load(task, about)
    sweep(task.prompts[0])
    begin = time.process_time()
    rows = [sweep(tokens)[:, ids] for tokens, ids in zip(task.prompts, task.letters, strict=True)]
    seconds = time.process_time() - begin
    letters = torch.stack(rows, dim=1)
    Answer(seconds, letters.tolist(), (letters[..., 0] - letters[..., 1]).tolist(), about).save(path)
