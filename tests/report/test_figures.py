"""The figures: one per stage that has rows, well-formed, inert, and the same twice."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_results import STAGES

from qklens.report.figures import FIGURES, draw, write_figures
from qklens.report.figures.heads import SPANS, _shares, heads
from qklens.report.figures.interactions import ranked
from qklens.report.figures.partners import both_ends, partners
from qklens.report.figures.render import _prune
from qklens.report.figures.style import spread
from qklens.report.figures.verdict import threshold_value
from qklens.report.figures.zscores import pooled
from qklens.studies.results import Results

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_there_is_a_figure_for_every_stage_in_the_study_s_order() -> None:
    assert list(FIGURES) == [*STAGES, "verdict"]


def test_every_stage_with_rows_is_drawn(outcomes: dict[str, Results], drawings: dict[str, dict[str, str]]) -> None:
    for name, drawn in drawings.items():
        assert list(drawn) == [stage for stage in FIGURES if stage not in outcomes[name].skipped], name
    assert list(drawings["task_not_solved"]) == ["behaviour", "verdict"]


def test_figures_hold_shapes_and_text_and_nothing_that_acts(drawings: dict[str, dict[str, str]]) -> None:
    allowed = {"svg", "g", "path", "rect", "line", "text", "tspan", "defs", "clipPath", "linearGradient", "stop"}
    for name, figures in drawings.items():
        for stage, svg in figures.items():
            root = ET.fromstring(svg)
            assert root.tag == f"{SVG}svg"
            assert {element.tag.removeprefix(SVG) for element in root.iter()} <= allowed, (name, stage)
            for element in root.iter():
                for key, value in element.attrib.items():
                    assert not key.lower().startswith("on")
                    assert not key.endswith("href"), (name, stage, key)
                    assert "url(" not in value or value.startswith("url(#"), (name, stage, value)
            assert "http" not in svg.replace("http://www.w3.org/2000/svg", ""), (name, stage)


def test_hostile_text_is_drawn_as_text(drawings: dict[str, dict[str, str]]) -> None:
    seen = 0
    for stage, svg in drawings["hostile"].items():
        for markup in ("<script", "<img", "\x00", "\u202e"):
            assert markup not in svg, (stage, markup)
        seen += svg.count("&lt;scr")
    assert seen > 20, "the hostile labels never reached a figure, so this test saw nothing"


def test_no_figure_grows_wider_than_the_page_because_of_its_labels(drawings: dict[str, dict[str, str]]) -> None:
    for name, figures in drawings.items():
        for stage, svg in figures.items():
            width = float(ET.fromstring(svg).get("width", "nan"))
            assert width <= 780, (name, stage, width)


def test_ids_are_unique_across_the_figures_of_one_page(drawings: dict[str, dict[str, str]]) -> None:
    page = "".join(drawings["large"].values())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_the_same_results_give_the_same_bytes(
    outcomes: dict[str, Results], drawings: dict[str, dict[str, str]]
) -> None:
    assert draw(outcomes["directions"]) == drawings["directions"]


def test_figures_print_the_results_numbers(drawings: dict[str, dict[str, str]]) -> None:
    figures = drawings["full"]
    assert {"100%", "48.1%", "96.9%"} <= set(texts(figures["behaviour"]))
    assert {"0.98", "0.91", "0.97", "1.31", "0.42"} <= set(texts(figures["belief"]))
    assert {"3.95", "\u22120.15"} <= set(texts(figures["heads"]))
    assert "What decided: attention harm key" in texts(figures["verdict"])


def test_no_axis_of_the_heads_figure_repeats_a_tick(make: Callable[..., Results], outcomes: dict[str, Results]) -> None:
    details = outcomes["full"].heads_details
    assert details is not None
    two = make(heads_details={**details.model_dump(), "discovery_curve": [0.75, 1.02]})
    drawing = heads(two)
    assert drawing is not None
    found: list[list[int]] = []

    def look(value: object) -> None:
        if isinstance(value, dict):
            if value.get("title") == "first k ranked heads":
                found.append(value["axis"]["values"])
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(drawing.to_dict(validate=False))
    assert found == [[1, 2]]


def test_heads_are_drawn_with_the_template_and_all_their_attention(outcomes: dict[str, Results]) -> None:
    row = outcomes["full"].heads[0]
    values = row.model_copy(
        update={
            "attention": {"harm": {"correct": 0.1, "incorrect": 0.05, "intent": 0.1, "question": 0.15, "other": 0.6}},
            "attention_by_place": {
                "harm": {"template_before": 0.4, "instruction": 0.05, "template_after": 0.1, "between": 0.05}
            },
        }
    )
    shares = _shares(values, "harm")
    assert list(shares) == list(SPANS)
    assert shares["template before"] == 0.4
    assert shares["template after"] == 0.1
    assert sum(shares.values()) == pytest.approx(1.0)


def test_partners_left_out_of_the_figure_are_counted(
    make: Callable[..., Results], outcomes: dict[str, Results]
) -> None:
    few = [row.model_dump() for row in outcomes["full"].partners]
    many = few + [{**few[0], "feature": f"more {i}", "value": 0.001 * i} for i in range(5)]

    def said(rows: list[dict[str, object]]) -> str:
        drawing = partners(make(partners=rows))
        assert drawing is not None
        return str(drawing.to_dict(validate=False)["title"])

    assert "in the table only" not in said(few[:30])
    assert f"The 30 at both ends; {len(many) - 30} between them are in the table only" in said(many)


def test_written_files_are_the_drawings_and_nothing_else(
    outcomes: dict[str, Results], drawings: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    paths = write_figures(outcomes["task_not_solved"], tmp_path / "figures")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["behaviour.svg", "verdict.svg"]
    assert {stage: path.read_text(encoding="utf-8") for stage, path in paths.items()} == drawings["task_not_solved"]


def test_every_specification_is_valid_vega_lite(outcomes: dict[str, Results]) -> None:
    """`draw` skips altair's validation for speed; here every figure goes through it."""
    for stage, figure in FIGURES.items():
        drawing = figure(outcomes["full"])
        assert drawing is not None, stage
        drawing.to_dict(validate=True)


def test_unknown_numbers_leave_gaps(outcomes: dict[str, Results]) -> None:
    nan = float("nan")

    def blank(value: object) -> object:
        if isinstance(value, dict):
            return {key: blank(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [blank(inner) for inner in value]
        return nan if isinstance(value, float) else value

    values = blank(outcomes["full"].model_dump(by_alias=True))
    for svg in draw(Results.model_validate(values)).values():
        assert "NaN" not in svg
        ET.fromstring(svg)


def test_an_element_that_could_act_is_refused() -> None:
    root = ET.fromstring(f'<svg xmlns="{SVG[1:-1]}"><g><script>1</script></g></svg>')
    with pytest.raises(ValueError, match="script"):
        _prune(root)


def test_ranking_takes_both_ends_by_value_and_no_pair_twice(outcomes: dict[str, Results]) -> None:
    rows = ranked(outcomes["full"].interactions, "contrastive", 3)
    values = [row.value for row in rows]
    under = [r.value for r in outcomes["full"].interactions if r.kind == "contrastive" and r.condition == "harm"]
    assert values == sorted(under)[:3] + sorted(under)[-3:]
    few = ranked(outcomes["full"].interactions, "contrastive", 10_000)
    assert len(few) == len(under)


def test_partners_are_shown_from_both_ends(outcomes: dict[str, Results]) -> None:
    partners = outcomes["full"].partners
    assert [p.value for p in both_ends(partners, 2)] == [sorted(p.value for p in partners)[i] for i in (0, 1, -2, -1)]
    assert len(both_ends(partners[:3], 2)) == 3


def test_pooled_null_keeps_its_mass(outcomes: dict[str, Results]) -> None:
    histograms = outcomes["full"].null_histograms
    total = sum(bin_["share"] for bin_ in pooled(histograms, (-100.0, 100.0)))
    assert total == pytest.approx(1.0)
    assert pooled([h.model_copy(update={"sd": 0.0}) for h in histograms], (-4.0, 4.0)) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [(">= 0.5", 0.5), ("<= -2", -2.0), ("< \u22122", -2.0), (">= 80%", 0.8), ("between 0 and 1", None)],
)
def test_thresholds_are_read_only_when_they_have_one_number(text: str, value: float | None) -> None:
    assert threshold_value(text) == value


def test_labels_move_apart_and_keep_their_order() -> None:
    placed = spread([0.5, 0.52, 0.1, 0.99], 0.1, 0.0, 1.0)
    assert sorted(range(4), key=placed.__getitem__) == [2, 0, 1, 3]
    ordered = sorted(placed)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert min(placed) >= 0.0
    assert max(placed) <= 1.0 + 1e-9


def test_a_stage_without_rows_has_no_figure(make: Callable[..., Results]) -> None:
    results = make(
        transfer=[],
        partners=[],
        zscores=[],
        error_terms=[],
        error_effects=[],
        steering=[],
        origin=[],
        interactions=[],
        interaction_shares=[],
        cards=[],
    )
    drawn = set(draw(results))
    assert drawn == {"behaviour", "belief", "heads", "verdict"}
