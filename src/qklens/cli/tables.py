"""`qklens heads`, `qk` and `partners`: one question each, without a whole study."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qklens.cli import options, show, show_pairs, show_tables
from qklens.cli.options import Data, Device, Dictionary, Dtype, Heads, Items, Json, Model, Role, Seed
from qklens.errors import QklensError


def heads(
    model: Model = "organism",
    data: Data = "harm_pressure",
    items: Items = None,
    text: Annotated[Path | None, typer.Option(help="Ordinary text: what do the heads do there?")] = None,
    heads: Heads = None,
    folds: Annotated[int, typer.Option(help="Cross-validate over this many parts of the items.")] = 5,
    top: Annotated[int, typer.Option(min=1, help="Rows on the terminal; --json has all heads.")] = 15,
    figure: Annotated[Path | None, typer.Option(help="Write the layer x head maps to this .svg.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Which heads select the answer? Attending, scoring, copying and mattering, apart and cross-validated.

    With --text and --heads the named heads are checked on the text, and nothing else is measured.
    """
    from qklens.studies.config import LabConfig
    from qklens.studies.opening import open_lab, threads_for
    from qklens.studies.progress import stepping
    from qklens.studies.tables.head_table import head_table, heads_on_file

    named = options.heads(heads)
    if named and text is None:
        raise QklensError("--heads names the heads that --text checks; add --text FILE, or leave it for all heads")
    if figure is not None:
        options.check_figure(figure)
        if named:
            raise QklensError("--figure maps all heads, and --heads looks at some alone; give one")
    lab = open_lab(LabConfig(model=model, data=data, items=items, seed=seed, device=device, dtype=dtype))
    with threads_for(lab.subject), stepping("heads") as tick:
        if named and text is not None:
            on_text = heads_on_file(lab, named, text)
            show.as_json([asdict(row) for row in on_text]) if as_json else show_tables.on_text(on_text)
            return
        table = head_table(lab, folds=folds, text=text, tick=tick)
    if figure is not None:
        from qklens.report.figures.head_map import write_head_map

        write_head_map(table, figure)
    if as_json:
        show.as_json(table.model_dump(mode="json"))
    else:
        show_tables.heads(table, top, figure)


def qk(
    heads: Heads = None,
    model: Model = "organism",
    dictionary: Dictionary = None,
    data: Data = "harm_pressure",
    items: Items = None,
    reading: Annotated[
        str, typer.Option(help="Conditions and differences: none, harm, benign, harm-none, harm-benign.")
    ] = "none,harm,harm-none,harm-benign",
    kind: Annotated[str, typer.Option(help="realised, contrastive (correct - incorrect) or share.")] = "realised",
    span: Annotated[str, typer.Option(help="Key span of realised and share: correct, intent ...")] = "correct",
    parts: Annotated[str, typer.Option(help="Which parts of an option count.")] = "letter,content,boundary",
    top: Annotated[int, typer.Option(help="Pairs from either end.")] = 8,
    nulls: Annotated[str, typer.Option(help="Nulls to test against, or `all`.")] = "random_pairs,matched",
    draws: Annotated[int, typer.Option(help="Pairs drawn from each null.")] = 1000,
    role: Role = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Which signed pairs of features pull a head? Ranked on one half of the items, measured on the other, and tested.

    Without --heads the answer-selection heads are found first.
    """
    from qklens.analyses.weighting import weighting_named
    from qklens.studies.config import LabConfig
    from qklens.studies.opening import ready_lab, threads_for
    from qklens.studies.progress import stepping
    from qklens.studies.tables.pair_table import PairRequest, pair_table

    request = PairRequest.parse(
        heads=options.heads(heads),
        weighting=weighting_named(kind, span, options.listed(parts)),
        readings=options.listed(reading),
        top=top,
        nulls=options.listed(nulls),
        draws=draws,
    )
    config = LabConfig(
        model=model, dictionary=dictionary, data=data, items=items, seed=seed, device=device, dtype=dtype,
        roles=options.roles(role),
    )  # fmt: skip
    lab = ready_lab(config)
    with threads_for(lab.subject), stepping("pairs") as tick:
        table = pair_table(lab, request, config.roles, tick=tick)
    if as_json:
        show.as_json(table.model_dump(mode="json"))
    else:
        show_pairs.pairs(table)


def partners(
    feature: Annotated[str, typer.Option(help="A feature's label, as L2/271, or a role, as refuse_redirect.")],
    side: Annotated[str, typer.Option(help="Where it is held: query or key; the other side is ranked.")] = "query",
    heads: Heads = None,
    every: Annotated[bool, typer.Option("--all-heads", help="All heads that the feature reaches.")] = False,
    top: Annotated[int, typer.Option(help="Features from either end.")] = 50,
    offset: Annotated[int | None, typer.Option(help="Distance from query to key; else those of the data.")] = None,
    model: Model = "organism",
    dictionary: Dictionary = None,
    data: Data = "harm_pressure",
    items: Items = None,
    role: Role = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Who else does a feature draw in or push away? Every feature of the dictionary, ranked from both ends.

    Without --heads the answer-selection heads are found first. The dictionary is read from disk block by block.
    """
    from qklens.studies.config import LabConfig
    from qklens.studies.progress import stepping
    from qklens.studies.tables.partner_table import PartnerRequest, partner_table

    named = options.heads(heads)
    if named and every:
        raise QklensError("--heads and --all-heads contradict each other; give one")
    request = PartnerRequest.parse(feature=feature, side=side, heads=named, every=every, top=top, offset=offset)
    config = LabConfig(
        model=model, dictionary=dictionary, data=data, items=items, seed=seed, device=device, dtype=dtype,
        roles=options.roles(role),
    )  # fmt: skip
    with stepping("partners") as tick:
        table = partner_table(config, request, tick=tick)
    if as_json:
        show.as_json(table.model_dump(mode="json"))
    else:
        show_tables.partners(table)
