"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qklens.errors import QklensError
from qklens.studies.head_names import head_named

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable output on stdout.")]
Model = Annotated[
    str, typer.Option(help="A directory, a .gguf file, owner/name@<commit>, or `organism[:<checkpoint>]`.")
]
BaseModel = Annotated[
    str | None, typer.Option(help="For a crosscoder over two checkpoints: the base model, beside --model.")
]
Dictionary = Annotated[
    str | None, typer.Option(help="A dictionary directory, of qklens or of another tool, or `directions`.")
]
Data = Annotated[str, typer.Option(help="A .jsonl or .csv file, or a shipped set's name.")]
Items = Annotated[int | None, typer.Option(help="Use a seeded sample of this many items.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seeds every draw.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1, mps; `auto` spreads over all GPUs.")]
Dtype = Annotated[str, typer.Option(help="The model's dtype; analyses use float32 or better.")]
Role = Annotated[
    list[str] | None,
    typer.Option("--role", help="Name a role's feature, as refuse_redirect=L3/1187; repeat. Others are found."),
]
Heads = Annotated[list[str] | None, typer.Option("--heads", help="Heads, as L2H4 or 2.4, joined by commas; repeat.")]


def roles(given: list[str] | None) -> dict[str, str]:
    """What `--role` says, by role.

    Raises:
        QklensError: not of the form role=feature, or a role named twice.
    """
    found: dict[str, str] = {}
    for text in given or ():
        role, equals, feature = text.partition("=")
        if not (role and equals and feature):
            raise QklensError(f"--role {text!r}: expected role=feature, as refuse_redirect=L3/1187")
        if role in found:
            raise QklensError(f"--role {role} is given twice ({found[role]!r} and {feature!r}); give it once")
        found[role] = feature
    return found


def heads(given: list[str] | None) -> tuple[tuple[int, int], ...]:
    """What `--heads` says, in order, each once.

    Raises:
        QklensError: not of the form L2H4 or 2.4.
    """
    found = []
    for text in (part for some in given or () for part in listed(some)):
        head = head_named(text)
        if head is None:
            raise QklensError(f"--heads {text!r}: expected layer and head, as L2H4 or 2.4, joined by commas")
        found.append(head)
    return tuple(dict.fromkeys(found))


def check_figure(path: Path) -> None:
    """Refuse a figure's name before the work that it would show.

    Raises:
        QklensError: not an .svg file in a folder that is there.
    """
    if path.suffix != ".svg":
        raise QklensError(f"--figure {path}: expected a name that ends in .svg")
    if path.is_dir() or not path.parent.is_dir():
        raise QklensError(f"--figure {path}: expected a file in a folder that exists")


def check_out(path: Path) -> None:
    """Refuse the name of a file of results before the work that it would hold.

    Raises:
        QklensError: not a .json file in a folder that is there.
    """
    if path.suffix != ".json":
        raise QklensError(f"--out {path}: expected a name that ends in .json")
    if path.is_dir() or not path.parent.is_dir():
        raise QklensError(f"--out {path}: expected a file in a folder that exists")


def listed(text: str) -> list[str]:
    """The parts of a list joined by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]
