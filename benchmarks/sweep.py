"""A query-side steering sweep at the answer position: qklens beside other tools, same results, CPU seconds, one run.

    make rivals MODEL=DIR                                       # makes the environments and runs this
    python -m benchmarks.sweep --model DIR --items 129 --slow-items 8 --strengths 24 \
        --lens-python .venv-oracle/bin/python --nnsight-python .venv-nnsight/bin/python

`make .venv-oracle/.installed .venv-nnsight/.installed` makes the two environments alone. DIR is a Llama-class model
with safetensors. A random direction, as long as the stream itself at the answer position, is added at each strength to
what W_Q of four heads of one layer reads at the last token: x' = x + s d, then the layer's norm. Keys, values and the
stream stay as they are. The prompts are those of the shipped items under `harm`, rendered by qklens.

Two tables: qklens and transformers with its KV cache on the prompts of all items; everyone, these again, on the prompts
of the first items. Ratios are to qklens on the same prompts. Each contestant (`benchmarks.rivals`) has a process of its
own, one thread, and a warm-up prompt; seconds are CPU time without loading. With --rounds the processes take turns, and
a figure is the rounds' median. A difference above 1e-4 from the table's reference is marked, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.rivals.task import Answer, Task
from qklens import LetterForm, Subject, capture, load_dataset, load_subject, render
from qklens.data.render import ORDERS
from qklens.studies.resources import model_folder

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4
STRONGEST = 4.0
SEED = 1


def make_task(subject: Subject, folder: Path, items: int, strengths: int, orders: int) -> Task:
    """Prompts, direction and strengths, of both signs and never 0; at 30 layers the layer is 12."""
    chosen = [(item, order) for item in load_dataset("harm_pressure").items[:items] for order in ORDERS[:orders]]
    prompts = [render(subject.tokenizer, item, "harm", order, LetterForm("", "")) for item, order in chosen]
    layer = subject.n_layers * 2 // 5
    site = f"resid_pre.{layer}"
    stream = capture(subject, subject.batch([list(p.tokens) for p in prompts[:8]]), [site])[site][:, -1]
    drawn = torch.randn(subject.d_model, generator=torch.Generator().manual_seed(SEED))
    return Task(
        str(folder),
        layer,
        list(range(4)),
        (drawn / drawn.norm() * stream.norm(dim=-1).mean()).tolist(),
        [(-1) ** k * STRONGEST * (k + 1) / strengths for k in range(strengths)],
        [list(p.tokens) for p in prompts],
        [list(p.letter_ids) for p in prompts],
    )


def run(contestant: str, python: str, task: Task, folder: Path) -> Answer:
    """One contestant's answer, from a process of its own."""
    given, answer = folder / "task.json", folder / "answer.json"
    task.save(given)
    subprocess.run(  # noqa: S603
        [python, "-m", f"benchmarks.rivals.{contestant}", str(given), str(answer)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
    )
    return Answer(**json.loads(answer.read_text()))


def compare(contestants: dict[str, str], task: Task, rounds: int) -> dict[str, list[Answer]]:
    """Every contestant's answers, one a round."""
    answers: dict[str, list[Answer]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, python in contestants.items():
                answers[name].append(run(name, python, task, Path(folder)))
    return answers


def off(mine: Answer, reference: Answer) -> tuple[float, float]:
    """The largest differences of the letters' logits and of the margins."""
    pairs = ((mine.letters, reference.letters), (mine.margins, reference.margins))
    logits, margins = (float((torch.tensor(a) - torch.tensor(b)).abs().max()) for a, b in pairs)
    return logits, margins


def table(answers: dict[str, list[Answer]], task: Task, reference: str) -> list[dict[str, object]]:
    """Print one table, and return its rows."""
    print(f"\n{len(task.prompts)} prompts x {len(task.strengths)} strengths; differences from `{reference}`")
    print(f"{'contestant':44}{'prompts':>8}{'CPU s':>9}{'ratio':>8}{'logits off':>12}{'margins off':>13}")
    rows: list[dict[str, object]] = []
    for name, rounds in answers.items():
        first = rounds[0]
        seconds = statistics.median(a.seconds for a in rounds)
        ratio = statistics.median(a.seconds / b.seconds for a, b in zip(rounds, answers["ours"], strict=True))
        logits, margins = off(first, answers[reference][0])
        agrees = max(logits, margins) <= TOLERANCE
        row = f"{first.about['by']:44}{len(task.prompts):8}{seconds:9.2f}{ratio:8.2f}{logits:12.1e}{margins:13.1e}"
        print(f"{row}{'' if agrees else '  OFF'}")
        rows.append(
            {"contestant": name, "prompts": len(task.prompts), "seconds": [a.seconds for a in rounds], "ratio": ratio}
            | {"logits_off": logits, "margins_off": margins, "agrees": agrees, "reference": reference}
            | {"about": first.about}
        )
    for rounds in answers.values():
        if "note" in rounds[0].about:
            print(f"  {rounds[0].about['by']}: {rounds[0].about['note']}")
    return rows


def main() -> int:
    """Print the tables; 1 when a contestant's numbers are other numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="organism")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--slow-items", type=int, default=4)
    parser.add_argument("--strengths", type=int, default=24)
    parser.add_argument("--orders", type=int, choices=[1, 2], default=2, help="of the options")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lens-python", help="of an environment with TransformerLens")
    parser.add_argument("--nnsight-python", help="of an environment with nnsight")
    parser.add_argument("--json", type=Path, help="where tables and the KV cache row's logits go as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    folder = model_folder(chosen.model).resolve()
    subject = load_subject(folder)
    task = make_task(subject, folder, chosen.items, chosen.strengths, chosen.orders)
    some = chosen.slow_items * chosen.orders
    few = replace(task, prompts=task.prompts[:some], letters=task.letters[:some])
    del subject
    fast = dict.fromkeys(("ours", "cached", "batched"), sys.executable)
    everyone = fast | {"plain": sys.executable}
    for name, option, python in (
        ("lens", "--lens-python", chosen.lens_python),
        ("traced", "--nnsight-python", chosen.nnsight_python),
    ):
        if python:
            everyone[name] = str(Path(python).absolute())
        else:
            print(f"no {option}: benchmarks.rivals.{name} is left out")
    print(f"{folder.name}, layer {task.layer}, heads {task.heads}, one thread, CPU seconds, {chosen.rounds} rounds")
    whole = compare(fast, task, chosen.rounds)
    rows = table(whole, task, "cached")
    margins = torch.tensor(whole["cached"][0].margins)
    moved = margins.amax(dim=0) - margins.amin(dim=0)
    print(f"  over the strengths a margin moves by {moved.median():.2f}, at most {moved.max():.2f}")
    answers = compare(everyone, few, chosen.rounds)
    rows += table(answers, few, "plain")
    if chosen.json:
        chosen.json.write_text(
            json.dumps(
                {"task": asdict(task), "rows": rows, "margins": margins.tolist(), "letters": whole["cached"][0].letters}
            )
        )
    return int(not all(row["agrees"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
