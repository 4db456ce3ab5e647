"""qklens: all strengths of all prompts in one `Workset.margins_each`.

python -m benchmarks.rivals.ours TASK ANSWER
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.rivals.task import About, Answer, Task, arguments
from qklens import Direction, Prompt, Steer, Subject, Workset, load_subject


def prompts(task: Task) -> list[Prompt]:
    """The task's prompts; of their spans only the answer position matters here."""
    return [
        Prompt("", tuple(tokens), {"answer": (len(tokens) - 1,)}, 0, (), (ids[0], ids[1]), "")
        for tokens, ids in zip(task.prompts, task.letters, strict=True)
    ]


def steers(task: Task) -> list[Steer]:
    """One intervention a strength."""
    direction = Direction("random", {task.layer: task.d}, {task.layer: 1.0}, lambda _, stream: stream(task.layer))
    heads = tuple((task.layer, head) for head in task.heads)
    return [Steer(direction, s, side="query", heads=heads, tokens=("answer",), unit="raw") for s in task.strengths]


def letters(subject: Subject, task: Task) -> torch.Tensor:
    """The letters' logits, which `margins_each` keeps to itself, of one strength at a time."""
    work, ids = Workset(subject, prompts(task)), torch.tensor(task.letters)
    return torch.stack([work.logits([steer]).gather(1, ids) for steer in steers(task)])


def main() -> None:
    """Time the margins, then read the logits untimed."""
    task, path = arguments()
    subject = load_subject(Path(task.model))
    Workset(subject, prompts(task)[:1]).margins_each(steers(task))
    begin = time.process_time()
    work = Workset(subject, prompts(task))
    margins = work.margins_each(steers(task))
    seconds = time.process_time() - begin
    tokens = sum(map(len, task.prompts))
    whole = len(task.strengths) * tokens * subject.n_layers
    about: About = {
        "by": f"qklens {version('qklens')}",
        "note": f"{work.ran.column_layers} tokens x layers; whole prompts each time: {whole}",
        "token_layers": work.ran.column_layers,
        "columns_run": work.ran.columns,
    }
    Answer(seconds, letters(subject, task).tolist(), margins.tolist(), about).save(path)


if __name__ == "__main__":
    main()
