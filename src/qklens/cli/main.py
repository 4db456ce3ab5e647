"""`qklens`: results on stdout, progress and notes on stderr; bad input is one line on stderr and exit status 2."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from qklens.cli import bench, options, show, tables
from qklens.cli.data_corpus import write_corpus
from qklens.cli.dict_app import dict_app
from qklens.cli.options import Data, Device, Dictionary, Dtype, Items, Json, Model, Role, Seed
from qklens.cli.steer import steer
from qklens.errors import QklensError, nearest

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(no_args_is_help=True, help="Items and chats: check a data file, write a corpus.")
model_app = typer.Typer(no_args_is_help=True, help="Models: check that one is read exactly.")
data_app.command("corpus")(write_corpus)
app.command()(tables.heads)
app.command()(tables.qk)
app.command()(tables.partners)
app.command()(steer)
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")
app.add_typer(dict_app, name="dict")
app.add_typer(bench.app, name="bench")

# A wrong option or command; typer gives its base class no public name of its own.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_INTERRUPTED = 130

STUDIES = ("harm-pressure",)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"qklens {version('qklens')}\n")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Why does a model look away from the answer it knows? Attention, explained by features."""


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="The study: harm-pressure.")] = "harm-pressure",
    model: Model = "organism",
    base_model: Annotated[str | None, typer.Option(help="The model before post-training.")] = None,
    checkpoint: Annotated[list[str] | None, typer.Option(help="A checkpoint between base and model; repeat.")] = None,
    dictionary: Dictionary = None,
    data: Data = "harm_pressure",
    out: Annotated[Path | None, typer.Option(help="Run directory; the same command on it resumes.")] = None,
    items: Items = None,
    role: Role = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    engine: Annotated[str, typer.Option(help="Where passes run: local.")] = "local",
    as_json: Json = False,
) -> None:
    """Run a study from end to end and write its report."""
    if name not in STUDIES:
        raise QklensError(f"study {name!r} is unknown; expected one of {list(STUDIES)}{nearest(name, STUDIES)}")
    if engine != "local":
        raise QklensError(f"--engine {engine!r} is not available; expected 'local'")
    from qklens.report.run import study_with_report
    from qklens.studies.config import StudyConfig

    folder = out or Path("runs") / f"{name}-{Path(model).name.partition('@')[0].replace(':', '-')}"
    config = StudyConfig(
        model=model,
        base_model=base_model,
        checkpoints=tuple(checkpoint or ()),
        dictionary=dictionary,
        data=data,
        out=folder,
        items=items,
        seed=seed,
        device=device,
        dtype=dtype,
        roles=options.roles(role),
        engine="local",
    )
    results = study_with_report(config, command=" ".join(["qklens", *sys.argv[1:]]))
    if as_json:
        show.as_json(results.model_dump(mode="json", by_alias=True))
    else:
        show.study(results, folder)


@data_app.command("check")
def data_check(
    file: Annotated[str, typer.Argument(help="A .jsonl or .csv file, or a shipped set.")], as_json: Json = False
) -> None:
    """Check a data file; names file, line, field and what is wrong, or prints what it holds."""
    from qklens.data.audit import audit
    from qklens.data.items import load_dataset

    dataset = load_dataset(file)
    report: dict[str, Any] = {**dataset.describe(), **audit(dataset.items)}
    if as_json:
        show.as_json(report)
    else:
        show.data_check(report)


@model_app.command("check")
def model_check(
    model: Annotated[str, typer.Argument(help="As for study: a directory, a .gguf file, a hub id.")],
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Try on a model all that qklens relies on: scores, patterns, edits, padding, layer by layer."""
    from dataclasses import asdict

    from qklens.models.fullcheck import full_check
    from qklens.models.loading import load_subject
    from qklens.studies.resources import model_folder

    subject = load_subject(model_folder(model), device=device, dtype=dtype)
    check = full_check(subject)
    failures = check.failures()
    if as_json:
        show.as_json({**subject.describe(), **asdict(check), "failures": failures})
    else:
        show.model_check(subject.describe(), check)
    if failures:
        more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise QklensError(f"{subject.name}: not read exactly: {failures[0]}{more}; do not trust scores of this model")


def main() -> None:
    """The console script."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its loading reports would stand around our one line
    warnings.showwarning = lambda message, *_, **__: sys.stderr.write(f"qklens: {message}\n")
    try:
        status = app(prog_name="qklens", standalone_mode=False)
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it once more on its way out
        sys.stderr.write(f"qklens: cannot write the output ({error.strerror}); free space or redirect elsewhere\n")
        status = 2
    except QklensError as error:
        sys.stderr.write(f"qklens: {error}\n")
        status = 2
    except _UsageError as error:
        sys.stderr.write(_usage_line(error))
        status = 2
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    if status == _INTERRUPTED:  # typer turns an interrupt into this status and says nothing
        sys.stderr.write("qklens: stopped; the same command resumes\n")
    sys.exit(status)


def _usage_line(error: Any) -> str:  # noqa: ANN401
    """One line for a wrong option; none for a bare command, which has printed its help."""
    message = " ".join(error.format_message().split())
    command = error.ctx.command_path if error.ctx else "qklens"
    return f"qklens: {message.rstrip('.')}; see {command} --help\n" if message else ""


if __name__ == "__main__":
    main()
