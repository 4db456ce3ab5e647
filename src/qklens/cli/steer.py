"""`qklens steer`: a sweep of steering from flags or from a file, each row beside its controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qklens.cli import options, show, show_steer
from qklens.cli.options import Data, Device, Dictionary, Dtype, Items, Json, Model, Role, Seed
from qklens.errors import QklensError, nearest

if TYPE_CHECKING:
    from qklens.studies.config import LabConfig
    from qklens.studies.steer_spec import SteerSpec

_Words = list[str] | None


def steer(
    direction: Annotated[str | None, typer.Option(help="A role, as refuse_redirect, or a label, as L2/271.")] = None,
    strengths: Annotated[str | None, typer.Option(help="Numbers joined by commas, as -4,-2,-1,0.")] = None,
    mode: Annotated[str | None, typer.Option(help="add, scale, clamp or ablate.")] = None,
    unit: Annotated[str | None, typer.Option(help="raw, activation_max or resid_norm.")] = None,
    sides: Annotated[_Words, typer.Option(help="query, key, value or residual, joined by commas; repeat.")] = None,
    layers: Annotated[_Words, typer.Option(help="A range of layers, as 2 or 0-2; repeat for others.")] = None,
    heads: Annotated[
        _Words, typer.Option(help="A subset: chosen, all, or heads as L2H4,L2H6; repeat for others.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Spans, `all`, or positions as -1, joined by commas.")] = None,
    norm: Annotated[str | None, typer.Option(help="recomputed or frozen.")] = None,
    key_scope: Annotated[str | None, typer.Option(help="group or head.")] = None,
    conditions: Annotated[str | None, typer.Option(help="none, harm or benign, joined by commas.")] = None,
    controls: Annotated[bool | None, typer.Option("--controls/--no-controls", help="Controls beside rows.")] = None,
    draws: Annotated[int | None, typer.Option(help="Random directions.")] = None,
    spec: Annotated[Path | None, typer.Option(help="A YAML or JSON file that says all of the above.")] = None,
    fewest: Annotated[
        str | None, typer.Option(help="Search for the fewest heads that do it: greedy or attribution.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the results to this .json.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw dose and response to this .svg.")] = None,
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
    """What does steering do? Strengths x layers x head subsets x sides, each beside its controls.

    By default refuse-and-redirect on the query side of the answer-selection heads, which are found first.
    """
    from qklens.studies.config import LabConfig
    from qklens.studies.opening import ready_lab, threads_for
    from qklens.studies.progress import stepping
    from qklens.studies.spec_file import read_spec
    from qklens.studies.steer_spec import SteerSpec
    from qklens.studies.tables.steer_table import steer_table

    given = {
        "direction": direction, "strengths": _numbers(strengths), "mode": mode, "unit": unit, "sides": _flat(sides),
        "layers": layers, "heads": None if heads is None else [options.listed(some) for some in heads],
        "tokens": _tokens(tokens), "norm": norm, "key_scope": key_scope,
        "conditions": None if conditions is None else options.listed(conditions), "controls": controls, "draws": draws,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    if spec is not None and given:
        flag = next(iter(given)).replace("_", "-")
        raise QklensError(f"--spec {spec} and --{flag} contradict each other; say it in the file, or leave --spec")
    if figure is not None:
        options.check_figure(figure)
    if out is not None:
        options.check_out(out)
    asked = SteerSpec.parse(given) if spec is None else read_spec(spec)
    config = LabConfig(
        model=model, dictionary=dictionary, data=data, items=items, seed=seed, device=device, dtype=dtype,
        roles=options.roles(role),
    )  # fmt: skip
    if fewest is not None:
        _fewest(config, asked, fewest, out, figure, as_json=as_json)
        return
    lab = ready_lab(config)
    with threads_for(lab.subject), stepping("steer") as tick:
        table = steer_table(lab, asked, config.roles, tick=tick)
    if out is not None:
        from qklens.files import write_json

        write_json(out, table.model_dump(mode="json"))
    if figure is not None:
        from qklens.report.figures.dose import write_dose_response

        write_dose_response(table, figure)
    if as_json:
        show.as_json(table.model_dump(mode="json"))
    else:
        show_steer.sweep(table, [path for path in (out, figure) if path is not None])


def _fewest(
    config: LabConfig, spec: SteerSpec, method: str, out: Path | None, figure: Path | None, *, as_json: bool
) -> None:
    from qklens.analyses.head_search import METHODS
    from qklens.cli.show_head_sets import head_sets
    from qklens.files import write_json
    from qklens.studies.opening import ready_lab, threads_for
    from qklens.studies.progress import stepping
    from qklens.studies.tables.fewest import fewest_table

    if method not in METHODS:
        raise QklensError(f"--fewest {method!r}: expected one of {list(METHODS)}{nearest(method, METHODS)}")
    if figure is not None:
        raise QklensError("--figure draws dose and response, and --fewest steers at one strength; give one")
    lab = ready_lab(config)
    with threads_for(lab.subject), stepping("heads") as tick:
        table = fewest_table(lab, spec, METHODS[METHODS.index(method)], config.roles, tick=tick)
    if out is not None:
        write_json(out, table.model_dump(mode="json"))
    if as_json:
        show.as_json(table.model_dump(mode="json"))
    else:
        head_sets(table)


def _flat(given: list[str] | None) -> list[str] | None:
    return None if given is None else [part for some in given for part in options.listed(some)]


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in options.listed(text)]
    except ValueError as error:
        raise QklensError(f"--strengths {text!r}: expected numbers joined by commas, as -4,-2,-1,0") from error


def _tokens(text: str | None) -> list[str | int] | None:
    """Span names, and positions where a part is a whole number."""
    if text is None:
        return None
    return [int(part) if part.removeprefix("-").isdecimal() else part for part in options.listed(text)]
