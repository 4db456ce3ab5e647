"""`qklens bench planted`: the study on models whose mechanism is known, and how often it is right.

The whole bench crosses mechanisms, levels of noise and seeds: 8 × 3 × 5 models. Architecture and dictionary are
balanced over them as in a Latin square,

    architecture  (mechanism + noise + seed) mod 4        dictionary  (mechanism + noise + 2 seed) mod 3

so that each mechanism meets every architecture, dictionary and layout, each seed and each level all dictionaries. The
small bench has one of these models a mechanism. Seeds 0 to 2 are those that rules, thresholds and the confidence's
calibration were set on; 3 and 4 are held out, and their layouts are seen nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from qklens.bench.planted.dictionaries import DICTIONARY_KINDS, DictionaryKind
from qklens.bench.planted.folder import Spec
from qklens.bench.planted.mechanisms import MECHANISMS
from qklens.bench.planted.noise import LEVELS
from qklens.bench.planted.runs import Run, run_one
from qklens.bench.planted.weights import ARCHITECTURES
from qklens.errors import QklensError
from qklens.files import write_json
from qklens.studies.harm_pressure.calibration import shipped_calibration

DEVELOPMENT, HELD_OUT = (0, 1, 2), (3, 4)
SEEDS = DEVELOPMENT + HELD_OUT
Task = tuple[Spec, DictionaryKind]


def tasks(seeds: Sequence[int], *, small: bool = False) -> list[Task]:
    """What the bench runs, in order.

    Raises:
        QklensError: no seeds, or a negative one.
    """
    if not seeds or min(seeds) < 0:
        raise QklensError(f"--seeds {list(seeds)}: expected numbers from 0, as 0,1,2")
    found: list[Task] = []
    for seed in seeds:
        for noise in range(len(LEVELS)):
            for place, mechanism in enumerate(MECHANISMS):
                if small and (noise, seed) != (place % len(LEVELS), seeds[place % len(seeds)]):
                    continue
                architecture = ARCHITECTURES[(place + noise + seed) % len(ARCHITECTURES)]
                spec = Spec(mechanism=mechanism, architecture=architecture, noise=noise, seed=seed)
                found.append((spec, DICTIONARY_KINDS[(place + noise + 2 * seed) % len(DICTIONARY_KINDS)]))
    return found


def run_bench(
    seeds: Sequence[int], out: Path, *, small: bool, processes: int, tick: Callable[[int, int, Run], None]
) -> dict[str, Any]:
    """Run, or resume, the bench and write `results.json` into `out`; `tick` after each run.

    Raises:
        QklensError: bad seeds, or a folder that cannot be written.
    """
    todo = tasks(seeds, small=small)
    runs: list[Run] = []
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for run in pool.map(_run, todo, [out] * len(todo)):
            runs.append(run)
            tick(len(runs), len(todo), run)
    groups = {"development": DEVELOPMENT, "held_out": HELD_OUT}
    results = {
        "schema": 1,
        "seeds": list(seeds),
        "small": small,
        "all": summary(runs),
        **{name: summary(r for r in runs if r.spec.seed in some) for name, some in groups.items()},
        "runs": [run.model_dump(mode="json") for run in runs],
    }
    write_json(out / "results.json", results)
    return results


def _run(task: Task, out: Path) -> Run:
    return run_one(*task, out)


def summary(runs: Iterable[Run]) -> dict[str, Any]:
    """Verdicts and their confusion matrix, false attention verdicts, recovery, and the confidence's Brier score."""
    runs = list(runs)
    confusion = Counter((run.spec.mechanism, run.expected, run.mechanism) for run in runs)
    right = [run.mechanism == run.expected for run in runs]
    guarded = [run for run in runs if run.spec.mechanism in ("late_flip", "belief_change", "decoy")]
    brier = [(run.confidence(shipped_calibration()) - ok) ** 2 for run, ok in zip(runs, right, strict=True)]
    return {
        "n": len(runs),
        "right": sum(right),
        "confusion": [
            {"planted": planted, "expected": expected, "verdict": verdict, "n": n}
            for (planted, expected, verdict), n in sorted(confusion.items())
        ],
        "false_attention": sum(run.mechanism.startswith("attention") for run in guarded),
        "heads": _recovery((run.planted_heads, run.found_heads) for run in runs if run.planted_heads),
        "features": _recovery((run.planted_features, run.found_features) for run in runs),
        "signs": {"right": sum(sum(run.signs) for run in runs), "n": sum(len(run.signs) for run in runs)},
        "brier": sum(brier) / len(brier) if brier else None,
    }


def _recovery(pairs: Iterable[tuple[Sequence[Any], Sequence[Any]]]) -> dict[str, Any]:
    planted = found = both = 0
    for truth, got in pairs:
        planted, found, both = planted + len(truth), found + len(got), both + len(set(truth) & set(got))
    return {
        "planted": planted,
        "found": found,
        "recall": both / planted if planted else None,
        "precision": both / found if found else None,
    }
