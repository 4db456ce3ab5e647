"""`qklens dict show`: one feature of a dictionary, from what it is active on and what it writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qklens.cli import show
from qklens.cli.options import BaseModel, Data, Device, Dtype, Items, Json, Model, Seed


def show_feature(
    dictionary: Annotated[
        str, typer.Argument(help="A dictionary directory, `organism`, `directions[:whitened]`, or a random: control.")
    ],
    feature: Annotated[str, typer.Argument(help="The feature's label, as L2/271.")],
    model: Model = "organism",
    base_model: BaseModel = None,
    layer: Annotated[int | None, typer.Option(help="Show it at resid_pre of this layer; else the first.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text to look for it in; else the neutral text.")] = None,
    run: Annotated[Path | None, typer.Option(help="A finished study's folder, for the roles that it holds.")] = None,
    top: Annotated[int, typer.Option(min=1, max=100, help="Examples and list entries from each end.")] = 8,
    label_url: Annotated[
        str | None, typer.Option(help="Ask this OpenAI-compatible API for a label, as http://localhost:8000/v1.")
    ] = None,
    label_model: Annotated[str | None, typer.Option(help="The model to ask there; a key is QKLENS_LABEL_KEY.")] = None,
    data: Data = "harm_pressure",
    items: Items = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """What is this feature? Examples, density, direct logits, neighbours, and roles in a study.

    With --label-url the top examples are sent to that API; the key is read from the environment and never printed.
    """
    from qklens.cli import show_card
    from qklens.cli.feature_label import NoLabelError, ask_label, label_endpoint
    from qklens.studies import cards
    from qklens.studies.config import LabConfig

    endpoint = label_endpoint(label_url, label_model)
    config = LabConfig(
        model=model, dictionary=dictionary, data=data, items=items, seed=seed, device=device, dtype=dtype
    )  # fmt: skip
    shown = cards.show_card(config, feature, layer=layer, text=text, run=run, k=top, base_model=base_model)
    if endpoint is not None:
        try:
            label = ask_label(shown.card, endpoint)
            shown = shown.model_copy(update={"card": shown.card.model_copy(update={"label": label})})
        except NoLabelError as error:
            sys.stderr.write(f"qklens: {error}\n")
    if as_json:
        show.as_json(shown.model_dump(mode="json"))
    else:
        show_card.card(shown, top)
