"""`qklens bench`: how often the study is right where the truth is known."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qklens.cli import show
from qklens.cli.options import Json
from qklens.errors import QklensError

_SHORT = {
    "no_effect": "none",
    "task_not_solved": "unsolved",
    "belief_change": "belief",
    "late_flip": "late",
    "attention_answer_key": "answer key",
    "attention_harm_key": "harm key",
    "undetermined": "undeterm.",
}
"""Verdicts as the matrix heads its columns."""
app = typer.Typer(no_args_is_help=True, help="Benches: the study on models whose mechanism is known.")


@app.callback()
def _group() -> None:
    """Benches."""


@app.command()
def planted(
    small: Annotated[bool, typer.Option("--small", help="One model a mechanism.")] = False,
    seeds: Annotated[str, typer.Option(help="Seeds joined by commas; 0 to 2 are for development.")] = "0,1,2,3,4",
    out: Annotated[
        Path, typer.Option(help="Where models, runs, bench.json and the figures go; the same command resumes.")
    ] = Path("runs/bench-planted"),
    processes: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    as_json: Json = False,
) -> None:
    """Does the study name the mechanism that was planted? Confusion matrix, and recovery of heads, features, signs."""
    from qklens.bench.planted.bench import run_bench
    from qklens.bench.planted.runs import Run

    numbers = _seeds(seeds)

    def tick(done: int, whole: int, run: Run) -> None:
        right = "" if run.mechanism == run.expected else f"  (planted: {run.expected})"
        sys.stderr.write(f"{done}/{whole} {run.spec.name} {run.dictionary}: {run.mechanism}{right}\n")

    results = run_bench(numbers, out, small=small, processes=processes, tick=tick)
    if as_json:
        show.as_json(results)
    else:
        sys.stdout.write("\n".join(_lines(results)) + "\n")


def _seeds(text: str) -> list[int]:
    """Seeds in the order given.

    Raises:
        QklensError: a part that is no number of digits, or a seed that stands twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if bad := [part for part in parts if re.fullmatch(r"[0-9]{1,9}", part) is None]:
        raise QklensError(
            f"--seeds: {bad[0][:20]!r} is no whole number from 0 to 999999999; join such numbers by commas, as 0,1,2"
        )
    numbers = [int(part) for part in parts]
    if twice := [n for n in numbers if numbers.count(n) > 1]:
        raise QklensError(f"--seeds: {twice[0]} stands there twice; give each seed once")
    return numbers


def _lines(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name in ("development", "held_out"):
        part = results[name]
        if not part["n"]:
            continue
        lines += [f"{name.replace('_', ' ')} seeds: right verdict in {part['right']} of {part['n']} runs"]
        lines += _matrix(part["confusion"])
        lines.append(f"  attention verdicts where refuse-and-redirect moves no head: {part['false_attention']}")
        lines.append(f"  heads: {_shares(part['heads'])}")
        for kind, row in part["features"].items():
            if row["planted"]:
                held = f"; it holds {100 * row['held']:.0f}% of the roles' directions, mean cos {row['cosine']:.2f}"
                lines.append(f"  features, {kind} dictionary: {_shares(row)}{held}")
        for kind, row in part["signs_by_dictionary"].items():
            if row["planted"]:
                lines.append(
                    f"  signs, {kind} dictionary: {row['right']} of {row['found']} found are right; it holds "
                    f"{row['held']} of {row['planted']} planted pairs"
                )
        lines.append(f"  Brier score {part['brier']:.3f}")
        if part["graded"]["n"]:
            lines.append(f"  graded models: right verdict in {part['graded']['right']} of {part['graded']['n']}")
        lines += [
            f"  confidence {row['confidence']:.3f}: right in {row['right']} of {row['n']}"
            for row in part["reliability"]
        ]
    lines.append(f"{results['cpu_seconds']:.0f} s of processor time")
    return lines


def _matrix(confusion: list[dict[str, Any]]) -> list[str]:
    """The confusion matrix: a row a planted mechanism and right verdict, whose cell is in brackets."""
    counts = {((row["planted"], row["expected"]), row["verdict"]): row["n"] for row in confusion}
    lines = [f"  {'planted, and what is right for it':<34}" + "".join(f"{_SHORT[v]:>11}" for v in _SHORT)]
    for planted, expected in dict.fromkeys(key for key, _ in counts):
        name = planted if planted == expected else f"{planted} ({expected})"
        cells = [(counts.get(((planted, expected), v), 0), v == expected) for v in _SHORT]
        lines.append(f"  {name:<34}" + "".join(f"{f'[{n}]' if right else n or '.':>11}" for n, right in cells))
    return lines


def _shares(row: dict[str, Any]) -> str:
    return f"recall {_number(row['recall'])}, precision {_number(row['precision'])} ({row['planted']} planted)"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
