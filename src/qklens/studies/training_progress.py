"""Progress of training on stderr: a bar with loss, L0, FVU and dead features; TensorBoard where it is wanted."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qklens.dictionaries.training.parallel import is_first
from qklens.dictionaries.training.trainer import Report
from qklens.errors import QklensError
from qklens.files import check_folder


@contextmanager
def training_progress(
    steps: int, tensorboard: Path | None = None
) -> Iterator[tuple[Report, Callable[[int], Callable[[], None]]]]:
    """What to call with each step's metrics, and a `Tick` for the shards that are cached before.

    Raises:
        QklensError: TensorBoard is wanted and not installed, or its folder cannot be written.
    """
    if not is_first():
        yield lambda _, __: None, lambda _: lambda: None
        return
    writer = _writer(tensorboard)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        training = progress.add_task("training", total=steps, metrics="", visible=False)

        def report(step: int, metrics: dict[str, float]) -> None:
            line = f"L0 {metrics['l0']:.1f}  FVU {metrics['fvu']:.3f}  dead {100 * metrics['dead']:.1f}%"
            progress.update(training, completed=step + 1, metrics=line, visible=True)
            if not console.is_terminal:
                console.print(f"step {step}  loss {metrics['loss']:.4g}  {line}", highlight=False)
            if writer is not None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)

        def caching(shards: int) -> Callable[[], None]:
            task = progress.add_task("activations", total=shards, metrics="")
            return lambda: progress.advance(task)

        yield report, caching
    if writer is not None:
        writer.close()


def _writer(folder: Path | None) -> Any:  # noqa: ANN401
    if folder is None:
        return None
    check_folder(folder, "--tensorboard")
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
    except OSError as error:
        raise QklensError(
            f"--tensorboard {folder}: cannot be written ({error.strerror or error}); choose another --tensorboard"
        ) from error
    except ImportError as error:
        raise QklensError(
            f"--tensorboard {folder}: needs the package 'tensorboard': pip install 'qklens[tensorboard]'"
        ) from error
