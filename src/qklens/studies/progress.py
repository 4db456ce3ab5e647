"""Progress on stderr: one bar over the stages of a study or the steps of a table, and nothing on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Tick = Callable[[int], Callable[[], None]]
"""Called with the number of steps, it gives what to call after each."""


def silent(_: int) -> Callable[[], None]:
    """A `Tick` that shows nothing."""
    return lambda: None


class StageProgress:
    """Shows which stage runs and how many are done."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        """A bar over `total` stages; `quiet` shows nothing."""
        self.console = Console(stderr=True, quiet=quiet)
        self.total = total

    @contextmanager
    def running(self) -> Iterator[StageProgress]:
        """The bar, while stages run."""
        columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            self._progress, self._task = progress, progress.add_task("start", total=self.total)
            yield self

    def begin(self, stage: str) -> None:
        """A stage begins."""
        self._progress.update(self._task, description=stage)

    def end(self, stage: str, seconds: float, note: str) -> None:
        """A stage is done."""
        self._progress.advance(self._task)
        if not self.console.is_terminal:
            self.console.print(f"{stage:13} {note or f'{seconds:.1f} s'}")


@contextmanager
def stepping(description: str) -> Iterator[Tick]:
    """One bar for a table under way: called with the number of steps, it gives what to call after each.

    Without a terminal a line says what runs, once the first step is done: input that is refused before leaves one line
    on stderr, the refusal.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:

        def begin(total: int) -> Callable[[], None]:
            task = progress.add_task(description, total=total)

            def step() -> None:
                if not console.is_terminal and not progress.tasks[task].completed:
                    console.print(f"{description} ...")
                progress.advance(task)

            return step

        yield begin
