"""`qklens data corpus`: chats of this domain to train a dictionary on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qklens.cli import show
from qklens.cli.options import Data, Device, Dtype, Json, Model, Seed
from qklens.errors import QklensError, nearest


def write_corpus(
    out: Annotated[Path, typer.Argument(help="The .jsonl file to write; the same command goes on with it.")],
    model: Model = "organism",
    template: Annotated[bool, typer.Option("--template", help="Template answers; no model is loaded.")] = False,
    count: Annotated[
        list[str] | None,
        typer.Option(help="Chats of a kind, as mcq=300, or of every kind, as 30; repeat. Else 40 of every kind."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy; else answers are drawn, with the seed.")] = 0.0,
    most_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 48,
    data: Data = "harm_pressure",
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Write chats to train a dictionary on, the answers by the model itself.

    Kinds: harmless, harmful, refusal, mcq, symptoms, fraud. Harmful turns are the items' short statements of intent.
    """
    from pydantic import ValidationError

    from qklens.data.corpus import KINDS
    from qklens.data.corpus_file import CorpusRequest
    from qklens.data.corpus_file import write_corpus as write
    from qklens.models.loading import load_subject
    from qklens.studies.opening import threads_for
    from qklens.studies.progress import stepping
    from qklens.studies.resources import model_folder

    counts = dict.fromkeys(KINDS, 40 if count is None else 0)
    for text in count or ():
        kind, equals, number = text.rpartition("=")
        if not number.isdecimal() or (equals and kind not in KINDS):
            hint = nearest(kind, KINDS) if equals else ""
            raise QklensError(f"--count {text!r}: expected a number, or kind=number with one of {list(KINDS)}{hint}")
        counts |= {kind: int(number)} if equals else dict.fromkeys(KINDS, int(number))
    try:
        request = CorpusRequest.model_validate(
            {"counts": counts, "data": data, "seed": seed, "temperature": temperature, "most_tokens": most_tokens}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise QklensError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from error
    subject = None if template else load_subject(model_folder(model), device=device, dtype=dtype)
    with stepping("corpus") as tick:
        if subject is None:
            manifest = write(out, request, None, tick=tick)
        else:
            with threads_for(subject):
                manifest = write(out, request, subject, tick=tick)
    if as_json:
        show.as_json(manifest.model_dump(mode="json", by_alias=True))
        return
    kinds = ", ".join(f"{n} {kind}" for kind, n in manifest.rows.items())
    left = f"; {manifest.empty} left out, which the model answered with nothing" if manifest.empty else ""
    sys.stdout.write(f"{out}: {sum(manifest.rows.values())} chats ({kinds}), answers by {manifest.answers}{left}\n")
