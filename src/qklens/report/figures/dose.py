"""Dose and response of a steering table: one row of panels for each place and condition."""

from __future__ import annotations

from pathlib import Path

import altair as alt
from altair.utils.schemapi import debug_mode

from qklens.files import atomic_write
from qklens.report.figures import style
from qklens.report.figures.render import to_svg
from qklens.report.figures.steering import panel, unit_words
from qklens.report.figures.style import Drawing
from qklens.report.text import shorten
from qklens.studies.results import Steering
from qklens.studies.tables.steer_rows import Measured, SteerRow, SteerTable
from qklens.studies.tables.steer_words import curve_words


def dose_response(table: SteerTable) -> Drawing:
    """Accuracy and margin over strength, beside a random direction, an unrelated feature and the benign condition."""
    names = list(dict.fromkeys(map(curve_words, table.rows)))
    clean = table.clean.get("none")
    panels: list[Drawing] = []
    for name in names:
        points = [p for row in table.rows if curve_words(row) == name for p in _points(table, row, name)]
        title = f"strength, {unit_words(points)}" if name == names[-1] else None
        panels.append(
            alt.hconcat(
                panel(clean.accuracy if clean else None, points, "accuracy", title),
                panel(clean.margin if clean else None, points, "margin", title),
                spacing=12,
            ).properties(title=style.heading(shorten(name, 95)))
        )
    return style.finish(
        alt.vconcat(*panels, spacing=24),
        f"Does steering {shorten(table.spec.direction, 40)} move the answer?",
        f"{table.model['name']}, report half of {table.data['n_items']} items. Band: 95% Wilson interval. Grey bar: "
        "all random draws.",
    )


def write_dose_response(table: SteerTable, path: Path) -> None:
    """The figure as one SVG file.

    Raises:
        QklensError: the file cannot be written.
    """
    with debug_mode(False):
        atomic_write(path, to_svg(dose_response(table), "steer"))


def _points(table: SteerTable, row: SteerRow, name: str) -> list[Steering]:
    """A row as points of its curve and of its controls'."""

    def point(condition: str, measured: Measured, control: str | None = None) -> Steering:
        return Steering.model_validate(
            {
                "stage": "steer_query",
                "spec": {"unit": table.spec.unit},
                "strength": row.strength,
                "condition": condition,
                "accuracy": measured.accuracy,
                "ci": measured.ci,
                "margin": measured.margin,
                "control": control,
                "variant": name,
                "chosen": False,
            }
        )

    points = [point(row.condition, row)]
    if row.controls is not None:
        random, unrelated = row.controls.random, point(row.condition, row.controls.unrelated, "unrelated")
        mean = {"accuracy": random.accuracy, "margin": random.margin, "control": "random"}
        points += [unrelated.model_copy(update={**mean, "draws": (*random.accuracy_range, random.draws)}), unrelated]
        points.append(point("benign", row.controls.benign, "benign"))
    return points
