"""What ranking a dictionary costs beyond its product, in memory and from disk, one thread; all in one run.

    python -m benchmarks.partners --model DIR --features 65536 --stream 1048576 --rounds 7

The readers are those of every head of the model for a random direction held on the query side; without --model they are
random, 270 in 576 dimensions. Runs alternate within a round; each figure is its best round. "Wall" is what a user waits
for; "thread" is CPU time of the one computing thread, which other programs on the machine disturb less. The product's
rate is the better of one call and the ranking's own tiles without any ranking. Streaming reads ahead in a second
thread, and runs in a process of its own: VmHWM is that process's peak, imports included, RssAnon what it allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qklens import load_subject
from qklens.analyses.partners import _TILE, rank_partners
from qklens.dictionaries.config import CONFIG_FILE, WEIGHTS_FILE
from qklens.dictionaries.decoder_file import open_decoder
from qklens.dictionaries.unit import unit_directions
from qklens.models.scores import offset_rotation, score_maps, virtual_reader
from qklens.studies.resources import model_folder

K = 50
STORED = {"float16": ("F16", torch.float16), "float32": ("F32", torch.float32)}


def readers_of(model: str | None) -> torch.Tensor:
    """One reader a head, `head d_model`."""
    generator = torch.Generator().manual_seed(0)
    if model is None:
        return torch.randn(270, 576, generator=generator)
    subject = load_subject(model_folder(model))
    held = torch.randn(subject.d_model, generator=generator)
    rows = []
    for layer in range(subject.n_layers):
        maps, turn = score_maps(subject, layer), offset_rotation(subject, layer, torch.arange(5, 40))
        rows += [virtual_reader(maps, head, turn, held, "query") for head in range(subject.n_heads)]
    return torch.stack(rows)


def best(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of wall and of thread time of each run's best round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            wall, thread = time.perf_counter(), time.thread_time()
            run()
            times[name].append((time.perf_counter() - wall, time.thread_time() - thread))
    return {name: (min(w for w, _ in rows), min(t for _, t in rows)) for name, rows in times.items()}


def product(rows: torch.Tensor, readers: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The product alone: one call, and the ranking's tiles with nothing done to them."""
    whole = torch.empty(len(readers), len(rows))
    tile = torch.empty(len(readers), _TILE)

    def tiles() -> None:
        for part in rows.split(_TILE):
            torch.mm(readers, part.T, out=tile[:, : len(part)])

    return {"product, one call": lambda: torch.mm(readers, rows.T, out=whole), "product, tiles": tiles}


def table(times: dict[str, tuple[float, float]], operations: float) -> None:
    """Print seconds, rate and share of the better product."""
    fastest = [min(times[name][i] for name in times if name.startswith("product")) for i in (0, 1)]
    print(f"{'':34}{'wall s':>9}{'GFLOP/s':>9}{'share':>7}{'thread s':>10}{'GFLOP/s':>9}{'share':>7}")
    for name, (wall, thread) in times.items():
        row = f"{name:34}{wall:9.3f}{operations / wall / 1e9:9.1f}{fastest[0] / wall:7.0%}"
        print(f"{row}{thread:10.3f}{operations / thread / 1e9:9.1f}{fastest[1] / thread:7.0%}")


def write_dictionary(folder: Path, n_features: int, d_model: int, dtype: str) -> None:
    """A dictionary of random rows, written block by block; its encoder is left out, because nothing here reads it."""
    code, stored = STORED[dtype]
    size = n_features * d_model * stored.itemsize
    header = json.dumps(
        {"decoder.0": {"dtype": code, "shape": [n_features, d_model], "data_offsets": [0, size]}}
    ).encode()
    block = torch.randn(min(n_features, 1 << 14), d_model, generator=torch.Generator().manual_seed(1)).to(stored)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for begin in range(
            0, n_features, len(block)
        ):  # rows differ from block to block by a turn, and stay cheap to make
            file.write(block[: n_features - begin].roll(begin // len(block), dims=1).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    config = {
        "format": "qklens-dictionary-2", "name": "benchmark", "layers": [0], "features_per_layer": n_features,
        "d_model": d_model, "activation": {"kind": "threshold", "threshold": 0.0}, "site": "resid_pre",
        "model_sha256": "0" * 64, "training": {}, "fidelity": None,
    }  # fmt: skip
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def stream(folder: Path, cold: bool) -> None:
    """Rank a dictionary on disk, and print seconds of wall, of the computing thread and of all threads, and MiB."""
    readers = load_file(folder / "readers.safetensors")["readers"]
    file = open_decoder(folder)
    descriptor = os.open(file.path, os.O_RDONLY)
    if cold:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    wall, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
    rank_partners(file.blocks(file.layers), [readers], K)
    spent = [time.perf_counter() - wall, time.thread_time() - thread, time.process_time() - process]
    memory = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps([*spent, *(int(memory[key].split()[0]) / 1024 for key in ("VmHWM", "RssAnon"))]))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--features", type=int, default=1 << 16)
    parser.add_argument("--stream", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the dictionary of the stream is written and deleted")
    parser.add_argument("--one", choices=["cold", "warm"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.one:
        stream(chosen.folder, chosen.one == "cold")
        return
    readers = readers_of(chosen.model)
    n_heads, d_model = readers.shape
    raw = torch.randn(chosen.features, d_model, generator=torch.Generator().manual_seed(2))
    units = unit_directions(raw)
    print(f"{chosen.features} features, {n_heads} heads, d_model {d_model}, k {K}, one thread, {chosen.rounds} rounds")
    runs = product(units.rows, readers) | {
        "ranking, unit directions": lambda: rank_partners([[units]], [readers], K),
        "ranking, scaling included": lambda: rank_partners([[unit_directions(raw)]], [readers], K),
        "one matmul and topk, one end": lambda: (units.rows @ readers.T).topk(K, dim=0),
    }
    times = best(runs, chosen.rounds)
    table(times, 2 * chosen.features * n_heads * d_model)
    rate = [chosen.features / min(times[name][i] for name in times if name.startswith("product")) for i in (0, 1)]
    del raw, units, runs
    print(f"\n{chosen.stream} features from disk; the product of as many at the rate above is the share's 100%")
    heading = f"{'':20}{'wall s':>8}{'share':>7}{'thread s':>10}{'share':>7}{'all threads s':>15}"
    print(f"{heading}{'VmHWM MiB':>11}{'RssAnon MiB':>13}")
    for dtype in STORED:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            write_dictionary(Path(folder), chosen.stream, d_model, dtype)
            save_file({"readers": readers}, Path(folder) / "readers.safetensors")
            for how in ("cold", "warm"):
                command = [sys.executable, "-m", "benchmarks.partners", "--one", how, "--folder", folder]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
                wall, thread, everything, peak, allocated = json.loads(printed)
                shares = [chosen.stream / rate[i] / spent for i, spent in enumerate((wall, thread))]
                row = f"{f'{dtype}, {how} cache':20}{wall:8.2f}{shares[0]:7.0%}{thread:10.2f}{shares[1]:7.0%}"
                print(f"{row}{everything:15.2f}{peak:11.0f}{allocated:13.0f}", flush=True)


if __name__ == "__main__":
    main()
