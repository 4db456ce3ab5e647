"""`qklens dict`: check, convert and export dictionaries; `train` and `show` have modules of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qklens.cli import dict_show, dict_train, show, show_dict
from qklens.cli.options import BaseModel, Device, Dtype, Json, Model
from qklens.errors import QklensError

dict_app = typer.Typer(no_args_is_help=True, help="Dictionaries: train, check, convert, export, show.")
dict_app.command("train")(dict_train.train)
dict_app.command("show")(dict_show.show_feature)

Directory = Annotated[Path, typer.Argument(help="A dictionary directory, of qklens or of another tool.")]
New = Annotated[Path, typer.Argument(help="A directory that is new or empty.")]
Layer = Annotated[
    int | None, typer.Option(min=0, help="L, where it reads resid_pre.L (resid_post.L is resid_pre.L+1).")
]


@dict_app.command()
def check(
    dictionary: Directory,
    model: Model = "organism",
    base_model: BaseModel = None,
    record: Annotated[bool, typer.Option("--record", help="Store what is measured where nothing is recorded.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Measure L0, variance unexplained and loss recovered again; refuse what lies outside the recorded tolerance."""
    from qklens.models.loading import load_subject
    from qklens.studies.dictionary_check import check_dictionary
    from qklens.studies.dictionary_fit import refuse_one_model, refuse_two_models
    from qklens.studies.opening import threads_for
    from qklens.studies.resources import model_folder

    _refuse_missing(dictionary)
    base = None
    if base_model is None:
        refuse_two_models(dictionary)
    else:
        refuse_one_model(dictionary)
        base = load_subject(model_folder(base_model), device=device, dtype=dtype)
    subject = load_subject(model_folder(model), device=device, dtype=dtype)
    with threads_for(subject):
        found = check_dictionary(subject, dictionary, base=base, record=record)
    if as_json:
        show.as_json(found.model_dump(mode="json"))
    else:
        show_dict.check(found, recorded_now=record)


@dict_app.command()
def convert(source: Directory, out: New, layer: Layer = None) -> None:
    """Write another tool's dictionary as qklens' own; `.pt` files are opened in a process of their own."""
    from torch import float32

    from qklens.dictionaries.crosscoder import save_crosscoder
    from qklens.dictionaries.formats.detect import convert as converted
    from qklens.dictionaries.formats.export import refuse_full
    from qklens.files import whole_folder

    _refuse_missing(source)
    refuse_full(out)
    dictionary = converted(source, layer)
    with whole_folder(out) as folder:
        save_crosscoder(dictionary, folder, float32)
    show_dict.converted(dictionary, out)


@dict_app.command()
def export(
    dictionary: Directory,
    out: New,
    to: Annotated[str, typer.Option(help="The format: saelens.")] = "saelens",
    layer: Layer = None,
) -> None:
    """Write a dictionary of one layer for another tool, exactly; of a crosscoder the first layer's features."""
    from qklens.dictionaries.formats.detect import load_dictionary
    from qklens.dictionaries.formats.export import export_saelens

    if to != "saelens":
        raise QklensError(f"--to {to!r} is not known; expected 'saelens'")
    _refuse_missing(dictionary)
    export_saelens(load_dictionary(dictionary), out, layer)
    sys.stdout.write(f"{out}: written for SAELens\n")


def _refuse_missing(folder: Path) -> None:
    if not folder.is_dir():
        raise QklensError(f"{folder}: no such directory; expected a dictionary's")
