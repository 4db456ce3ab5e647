"""A study with its report: run or resume the stages, then write results, figures and the one-file page."""

from __future__ import annotations

from qklens.report.figures import draw, write_figures
from qklens.report.page import write_report
from qklens.studies.config import StudyConfig
from qklens.studies.harm_pressure.study import run_study
from qklens.studies.results import Results


def study_with_report(config: StudyConfig, *, command: str = "", quiet: bool = False) -> Results:
    """Run the harm-pressure study and write everything into `config.out`.

    Raises:
        QklensError: bad input of any kind; nothing is half-written.
    """
    results, manifest = run_study(config, command=command, quiet=quiet)
    drawn = draw(results)
    write_figures(results, config.out / "figures", drawn)
    write_report(results, manifest, config.out / "report.html", drawn)
    return results
