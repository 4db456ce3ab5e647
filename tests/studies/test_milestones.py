"""The first checkpoint that shows a thing, by the printed rule."""

from __future__ import annotations

from typing import Any

from qklens.studies.harm_pressure.milestones import milestones
from qklens.studies.results_around import Origin


def row(step: int, fall: float, contrast: float, pair: float, z: float, matched: float, width: float = 0.02) -> Origin:
    def around(value: float) -> tuple[float, float, float]:
        return value, value - width, value + width

    each: dict[str, Any] = dict.fromkeys(("none", "harm", "benign"), 1.0)
    return Origin(
        checkpoint=f"c{step}", step=step, accuracy=each, ci={}, accuracy_drop=around(fall), margin=each,
        margin_drop=around(fall), attention_difference=each, attention_ci={}, attention_drop=around(fall),
        refuse_contrast=contrast, refuse_contrast_ci=(contrast - width, contrast + width),
        refuse_harm_realised=around(pair), refuse_harm_interaction=pair, refuse_harm_z=z, refuse_harm_matched_z=matched,
        by_head=[], unexplained={"1": 0.1},
    )  # fmt: skip


def found(rows: list[Origin]) -> dict[str, str | None]:
    return {m.event: m.checkpoint for m in milestones(rows)}


def test_each_event_is_dated_by_itself() -> None:
    rows = [
        row(0, 0.0, 0.03, 0.0, -0.3, -0.2),
        row(1, 0.03, 0.9, -0.03, -1.0, -1.0),  # a fall whose interval excludes zero, but not a tenth of the last's
        row(2, 0.4, 1.5, -0.05, -3.0, -1.5),  # negative against one null alone
        row(3, 0.5, 1.6, -0.5, -3.5, -2.4),
    ]
    assert found(rows) == {
        "accuracy falls under harm": "c2",
        "refuse-and-redirect appears": "c1",
        "attention to the correct option is lost under harm": "c2",
        "the pair pushes the options away on prompts": "c3",
        "the pair is negative in the weights": "c3",
    }


def test_what_the_last_does_not_show_has_no_beginning() -> None:
    rows = [row(0, 0.5, 1.0, -0.5, -4.0, -4.0), row(1, 0.01, 0.01, -0.01, -1.0, -4.0)]
    assert set(found(rows).values()) == {None}


def test_a_rise_is_no_fall() -> None:
    rows = [row(0, 0.5, 1.0, 0.5, -4.0, -4.0), row(1, -0.5, 1.0, 0.5, 3.0, 3.0)]
    events = found(rows)
    assert events["accuracy falls under harm"] is None
    assert events["the pair pushes the options away on prompts"] is None
    assert events["refuse-and-redirect appears"] == "c0"


def test_the_rule_prints_its_bound() -> None:
    rules = [m.rule for m in milestones([row(0, 0.4, 1.0, -0.2, -3, -3)])]
    assert "95% interval beyond +0.04, a tenth of the last checkpoint's +0.4" in rules
    assert "z at most -2 against random_pairs and matched, mean over heads" in rules
