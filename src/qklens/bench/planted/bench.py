"""`qklens bench planted`: the study on models whose mechanism is known, and how often it is right.

The whole bench crosses mechanisms, levels of noise and seeds: 10 × 3 × 5 models. Architecture and dictionary are
balanced over them as in a Latin square,

    architecture  (mechanism + noise + seed) mod 4        dictionary  (mechanism + noise + 2 seed) mod 3

so that each mechanism meets every architecture, dictionary and layout, each seed and each level all dictionaries. The
small bench has one of these models a mechanism. Seeds 0 to 2 are those that rules, thresholds and the confidence's
calibration were set on; 3 and 4 are held out, and their layouts are seen nowhere else. The full bench also has eight
graded models a seed (`graded`): these say what a confidence is worth near the thresholds, where the others hardly come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from qklens.bench.planted.blueprint import Graded
from qklens.bench.planted.dictionaries import DICTIONARY_KINDS, DictionaryKind
from qklens.bench.planted.figures import write_figures
from qklens.bench.planted.folder import Spec
from qklens.bench.planted.graded import STRENGTHS, WEAK_STRENGTHS
from qklens.bench.planted.mechanisms import MECHANISMS
from qklens.bench.planted.noise import LEVELS
from qklens.bench.planted.runs import ITEMS_FILE, Run, kept_run, run_one
from qklens.bench.planted.weights import ARCHITECTURES
from qklens.bench.planted.words import items_file
from qklens.errors import QklensError
from qklens.files import atomic_write, write_json
from qklens.studies.harm_pressure.calibration import fit, shipped_calibration

DEVELOPMENT, HELD_OUT = (0, 1, 2), (3, 4)
SEEDS = DEVELOPMENT + HELD_OUT
GUARDED = ("late_flip", "belief_change", "decoy", "need_lost", "need_harm")
"""Mechanisms that may never get an attention verdict."""
Task = tuple[Spec, DictionaryKind]


def tasks(seeds: Sequence[int], *, small: bool = False) -> list[Task]:
    """What the bench runs, in order.

    Raises:
        QklensError: no seeds, or a negative one.
    """
    if not seeds or min(seeds) < 0:
        raise QklensError(f"--seeds {list(seeds)}: expected numbers from 0, as 0,1,2")
    seeds, found = list(dict.fromkeys(seeds)), list[Task]()
    for seed in seeds:
        for noise in range(len(LEVELS)):
            for place, mechanism in enumerate(MECHANISMS):
                if small and (noise, seed) != (place % len(LEVELS), seeds[place % len(seeds)]):
                    continue
                architecture = ARCHITECTURES[(place + noise + seed) % len(ARCHITECTURES)]
                spec = Spec(mechanism=mechanism, architecture=architecture, noise=noise, seed=seed)
                found.append((spec, DICTIONARY_KINDS[(place + noise + 2 * seed) % len(DICTIONARY_KINDS)]))
    return found


def graded_tasks(seeds: Sequence[int]) -> list[Task]:
    """The graded models of some seeds, eight each; with the planted directions, since what they test is the verdict."""
    found = list[Task]()
    for seed in seeds:
        n = seed % 5
        wanted: list[tuple[Graded, float]] = [
            ("answer_key_late", STRENGTHS[n]),
            ("answer_key_late", STRENGTHS[n + 5]),
            ("belief_late", STRENGTHS[n]),
            ("belief_late", STRENGTHS[n + 5]),
            ("harm_key_late", STRENGTHS[n + 5]),
            ("answer_key_need", STRENGTHS[n + 5]),
            ("weak_late", WEAK_STRENGTHS[n]),
            ("weak_answer_key", WEAK_STRENGTHS[n + 5]),
        ]
        for place, (mechanism, strength) in enumerate(wanted):
            spec = Spec(
                mechanism=mechanism,
                architecture=ARCHITECTURES[(place + seed) % len(ARCHITECTURES)],
                noise=(place // 2 + seed) % len(LEVELS),
                seed=seed,
                strength=strength,
            )
            found.append((spec, "planted"))
    return found


def run_bench(
    seeds: Sequence[int], out: Path, *, small: bool, processes: int, tick: Callable[[int, int, Run], None]
) -> dict[str, Any]:
    """Run, or resume, the bench and write `bench.json` and the two figures into `out`; `tick` after each run.

    Raises:
        QklensError: bad seeds, or a folder that cannot be written.
    """
    every = [*tasks(seeds, small=small), *([] if small else graded_tasks(seeds))]
    atomic_write(out / ITEMS_FILE, items_file())  # a folder that cannot be written is refused before the work
    done = {task: run for task in every if (run := kept_run(*task, out)) is not None}
    for number, run in enumerate(done.values(), start=1):
        tick(number, len(every), run)
    todo = [task for task in every if task not in done]
    if todo:
        workers = min(processes, len(todo))
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            for task, run in zip(todo, pool.map(_run, todo, [out] * len(todo)), strict=True):
                done[task] = run
                tick(len(done), len(every), run)
    results = results_of([done[task] for task in every], seeds, small=small)
    write_json(out / "bench.json", results)
    write_figures(results, out)
    return results


def results_of(runs: Sequence[Run], seeds: Sequence[int], *, small: bool) -> dict[str, Any]:
    """What `bench.json` holds: summaries of all, development and held-out runs, the calibration, and every run."""
    verdicts = [(run.mechanism, run.distance, run.right) for run in runs if run.spec.seed in DEVELOPMENT]
    return {
        "schema": 2,
        "seeds": list(seeds),
        "small": small,
        "cpu_seconds": round(sum(run.cpu_seconds for run in runs), 1),
        "all": summary(runs),
        "development": summary(run for run in runs if run.spec.seed in DEVELOPMENT),
        "held_out": summary(run for run in runs if run.spec.seed not in DEVELOPMENT),
        "calibration": fit(verdicts, f"qklens bench planted, seeds {list(DEVELOPMENT)}").model_dump(mode="json"),
        "runs": [run.model_dump(mode="json") for run in runs],
    }


def _run(task: Task, out: Path) -> Run:
    return run_one(*task, out)


def summary(runs: Iterable[Run]) -> dict[str, Any]:
    """Verdicts and their confusion matrix, false attention verdicts, recovery, and how well confidence is calibrated.

    Graded models count for confidence, beside the others; all else is of the others. Confidence is by the calibration
    that ships.
    """
    everything, calibration = list(runs), shipped_calibration()
    runs = [run for run in everything if run.spec.strength is None]
    graded = [run for run in everything if run.spec.strength is not None]
    confusion = Counter((run.spec.mechanism, run.expected, run.mechanism) for run in runs)
    guarded = [run for run in runs if run.spec.mechanism in GUARDED]
    given = [(run.confidence(calibration), run.right) for run in everything]
    by_dictionary = {kind: [r for r in runs if r.dictionary == kind] for kind in DICTIONARY_KINDS}
    return {
        "n": len(runs),
        "right": sum(run.right for run in runs),
        "confusion": [
            {"planted": planted, "expected": expected, "verdict": verdict, "n": n}
            for (planted, expected, verdict), n in sorted(confusion.items())
        ],
        "false_attention": sum(run.mechanism.startswith("attention") for run in guarded),
        "heads": _recovery((run.planted_heads, run.found_heads) for run in runs),
        "features": {
            kind: {
                **_features(some),
                "held": _mean([bool(cos) for run in some for cos in run.cosines.values()]),
                "cosine": _mean([cos for run in some for cos in run.cosines.values() if cos]),
            }
            for kind, some in by_dictionary.items()
        },
        "signs": _signs(runs),
        "signs_by_dictionary": {kind: _signs(some) for kind, some in by_dictionary.items()},
        "graded": {"n": len(graded), "right": sum(run.right for run in graded)},
        "brier": _mean([(confidence - right) ** 2 for confidence, right in given]),
        "reliability": [
            {"confidence": confidence, "n": n, "right": sum(right for c, right in given if c == confidence)}
            for confidence, n in sorted(Counter(confidence for confidence, _ in given).items())
        ],
    }


def _features(runs: Sequence[Run]) -> dict[str, Any]:
    """Recall over the roles whose direction the dictionary holds; precision over all roles, each is given a feature."""
    solved = [run for run in runs if run.planted_heads]
    planted, right = sum(len(run.planted_features) for run in solved), sum(len(run.found_features) for run in solved)
    given = sum(len(run.cosines) for run in solved)
    return {"planted": planted, "found": given, "recall": _share(right, planted), "precision": _share(right, given)}


def _signs(runs: Sequence[Run]) -> dict[str, Any]:
    """Recall: of all planted pairs those found; precision: of these, those whose sign is the planted one."""
    pairs = [pair for run in runs for pair in run.signs]
    held, found = sum(pair.held for pair in pairs), [pair for pair in pairs if pair.value is not None]
    right = sum(pair.right for pair in found)
    return {
        "planted": len(pairs),
        "held": held,
        "found": len(found),
        "right": right,
        "recall": _share(len(found), len(pairs)),
        "recall_of_held": _share(len(found), held),
        "precision": _share(right, len(found)),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _recovery(pairs: Iterable[tuple[Sequence[Any], Sequence[Any]]]) -> dict[str, Any]:
    planted = found = both = 0
    for truth, got in pairs:
        planted, found, both = planted + len(truth), found + len(got), both + len(set(truth) & set(got))
    return {
        "planted": planted,
        "found": found,
        "recall": _share(both, planted),
        "precision": _share(both, found),
    }
