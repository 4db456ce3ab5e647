"""Training a TopK SAE beside sparsify and SAELens: same rows, first weights, order and Adam; rows a CPU second, memory.

    make train-rivals                                           # makes the environments and runs this
    make train-rivals TRAINING=--curves                         # losses and memory alone, where other programs run too
    python -m benchmarks.dictionary_training --sparsify-python .venv-sparsify/bin/python \
        --saelens-python .venv-saelens/bin/python

Rows are sums of 24 of 4,000 directions, drawn as words are (the r-th as often as 1/r), and noise; centred, mean square
1.
Each contestant (`benchmarks.rivals.train_*`) runs its own trainer in a process of its own, one thread: dense
activations in memory, batches in the order that qklens' shuffling buffer draws, which qklens' time includes; Adam at a
constant rate, no auxiliary loss, no dead features yet. Contestants take turns within a round. Rows a CPU second leave
out the first steps and the last; a figure is the rounds' median. "peak" is the most memory resident; "beyond" is that
less what imports, rows and first weights had taken when training began. FVU is each step's own batch before its
update; "off" is the largest difference between a contestant's curve and ours, relative to ours. SAELens trains another
algorithm by default (free decoder norm, clipped gradients); its "constrained" run is the same algorithm, and its curve
the one to compare. With --curves nothing is timed, and `dictionary_training.json` beside this file is written: each
contestant's curve and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.rivals.training_task import WARM, TrainingTask
from qklens.dictionaries.training.buffer import ShuffleBuffer
from qklens.dictionaries.training.rows import HeldRows

ROOT = Path(__file__).resolve().parents[1]
CURVES = Path(__file__).with_suffix(".json")
PLANTED, ACTIVE = 4000, 24


def make_rows(n: int, width: int, draw: torch.Generator) -> Tensor:
    """Rows of the form above."""
    directions = normalize(torch.randn(PLANTED, width, generator=draw), dim=1)
    often = 1 / torch.arange(1, PLANTED + 1)
    rows = torch.empty(n, width)
    for part in rows.split(4096):
        which = torch.multinomial(often.expand(len(part), -1), ACTIVE, generator=draw)
        amounts = torch.rand(which.shape, generator=draw) + 0.5
        part.copy_(torch.nn.functional.embedding_bag(which, directions, per_sample_weights=amounts, mode="sum"))
        part += 0.1 * torch.randn(part.shape, generator=draw) / width**0.5 * ACTIVE**0.5
    rows -= rows.mean(dim=0)
    return rows * rows.pow(2).mean().rsqrt()


def make_task(folder: Path, options: argparse.Namespace) -> TrainingTask:
    """Rows, their order and the first weights, on disk."""
    draw = torch.Generator().manual_seed(0)
    n = options.rows // options.batch * options.batch
    rows = make_rows(n, options.width, draw)
    unit = normalize(torch.randn(options.features, options.width, generator=draw), dim=1)
    numbers = ShuffleBuffer(HeldRows([torch.arange(float(n))[:, None]], options.batch), options.buffer, 0)
    order = torch.cat([numbers.take(options.batch)[:, 0].long() for _ in range(options.steps)])
    tensors = folder / "tensors.safetensors"
    save_file({"rows": rows, "order": order, "encoder": unit}, tensors)
    return TrainingTask(
        str(tensors), options.k, options.batch, options.steps, options.learning_rate, options.buffer, seed=0
    )


def run(contestant: str, python: str, folder: Path, **variables: str) -> dict[str, Any]:
    """One contestant's meter, from a process of its own."""
    answer = folder / "answer.json"
    ended = subprocess.run(  # noqa: S603
        [python, "-m", f"benchmarks.rivals.{contestant}", str(folder / "task.json"), str(answer)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise SystemExit(f"{ended.stderr}\nbenchmarks.rivals.{contestant} ended with {ended.returncode}")
    return json.loads(answer.read_text())


def speed(meter: dict[str, Any], batch: int) -> float:
    """Rows a CPU second."""
    began = meter["began"]
    return batch * (len(began) - 1 - WARM) / (began[-1] - began[WARM])


def off(ours: list[float], theirs: list[float]) -> float:
    """The largest difference of two curves, relative to ours."""
    return max(abs(b / a - 1) for a, b in zip(ours, theirs, strict=True))


def write_curves(path: Path, options: argparse.Namespace, meters: dict[str, dict[str, Any]]) -> None:
    """Print and write what does not depend on what else runs on the machine."""
    names = ("width", "features", "k", "batch", "steps", "rows", "buffer", "learning_rate")
    found: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat()}
    found["options"] = {name: getattr(options, name) for name in names}
    found["contestants"] = {}
    for name, meter in meters.items():
        apart = off(meters["ours"]["fvu"], meter["fvu"])
        found["contestants"][name] = {
            "by": meter["by"],
            "largest_difference": apart,
            "peak_mib": round(meter["peak"]),
            "beyond_mib": round(meter["peak"] - meter["before"]),
            "fvu": [round(value, 7) for value in meter["fvu"]],
        }
        print(f"{meter['by']:45} FVU {meter['fvu'][0]:.4f} to {meter['fvu'][-1]:.4f}, off {apart:.1e}")
    path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 576, "features": 8192, "k": 32, "batch": 2048, "steps": 40, "rows": 32768}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--buffer", type=int, default=16384, help="rows of qklens' shuffling buffer")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sparsify-python", help="of an environment with eai-sparsify")
    parser.add_argument("--saelens-python", help="of an environment with sae-lens")
    parser.add_argument("--json", type=Path, help="where every meter goes as JSON")
    parser.add_argument("--curves", action="store_true", help="losses and memory alone, into the file beside this one")
    options = parser.parse_args()
    contestants: dict[str, tuple[str, str, dict[str, str]]] = {"ours": ("train_ours", sys.executable, {})}
    for name, python in (("sparsify", options.sparsify_python), ("saelens", options.saelens_python)):
        if not python:
            print(f"no --{name}-python: {name} is left out")
            continue
        python = str(Path(python).absolute())
        contestants[name] = (f"train_{name}", python, {})
        if name == "saelens":
            contestants["saelens, sparse"] = ("train_saelens", python, {"SPARSE": "1"})
            contestants["saelens, constrained"] = ("train_saelens", python, {"CONSTRAINED": "1"})
    meters: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        task = make_task(folder, options)
        task.save(folder / "task.json")
        for _ in range(options.rounds):
            for name, (module, python, variables) in contestants.items():
                meters[name].append(run(module, python, folder, **variables))
    if options.curves:
        write_curves(CURVES, options, {name: rounds[0] for name, rounds in meters.items()})
        return 0
    print(f"d {options.width}, {options.features} features, k {options.k}, batch {options.batch}, one thread")
    heads = (("rows / CPU s", 13), ("ours is", 9), ("peak MiB", 10), ("beyond", 8), ("FVU: first", 12), ("last", 8))
    print(" " * 38 + "".join(f"{words:>{width}}" for words, width in heads) + f"{'off':>9}")
    ours = meters["ours"]
    for rounds in meters.values():
        first = rounds[0]
        rate = statistics.median(speed(m, options.batch) for m in rounds)
        pairs = zip(ours, rounds, strict=True)
        ratio = statistics.median(speed(a, options.batch) / speed(b, options.batch) for a, b in pairs)
        peak, beyond = max(m["peak"] for m in rounds), max(m["peak"] - m["before"] for m in rounds)
        apart = off(ours[0]["fvu"], first["fvu"])
        print(f"{first['by']:38}{rate:13.0f}{ratio:9.2f}{peak:10.0f}{beyond:8.0f}{first['fvu'][0]:12.4f}"
              f"{first['fvu'][-1]:8.4f}{apart:9.1e}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "meters": meters}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
