"""`qklens heads`, `qk` and `partners` as a user runs them: JSON alone on stdout, tables that no name can break."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qklens.cli import show, show_pairs, show_tables
from qklens.studies.tables import pair_table, partner_table
from qklens.studies.tables.head_table import HeadTable
from qklens.studies.tables.pair_table import PairTable
from qklens.studies.tables.partner_table import PartnerTable
from terminal import HOSTILE, lines_of, parsed

QK = ("qk", "--dictionary", "directions", "--heads", "L1H0", "--draws", 30, "--top", 2, "--reading", "none,harm-none")
PARTNERS = ("partners", "--dictionary", "directions", "--feature", "harm_detection", "--heads", "1.0,L1H1", "--top", 2)
PROSE = f"Which gas do plants take in? {HOSTILE} Plants take in the gas. Which animal is the largest?\n\n" * 6


@pytest.fixture
def asked(healthy_model: Path, data: Path) -> tuple[object, ...]:
    return ("--model", healthy_model, "--data", data)


@pytest.mark.parametrize(
    ("command", "table", "says"),
    [
        (("heads", "--folds", 2), HeadTable, "heads ...\n"),
        (QK, PairTable, "pairs ...\n"),
        (PARTNERS, PartnerTable, ""),
    ],
)
def test_json_is_all_there_is_on_stdout(
    qklens: Callable[..., Any], asked: tuple[object, ...], command: tuple[object, ...], table: Any, says: str
) -> None:
    ended = qklens(*command, *asked, "--json")
    assert (ended.status, ended.err) == (0, says)
    assert table.model_validate_json(ended.out).model_dump(mode="json") == parsed(ended.out)


@pytest.mark.parametrize(
    ("command", "table"), [(("heads", "--folds", 2), HeadTable), (QK, PairTable), (PARTNERS, PartnerTable)]
)
def test_a_number_that_is_not_defined_is_null(
    qklens: Callable[..., Any],
    asked: tuple[object, ...],
    capfd: pytest.CaptureFixture[str],
    command: tuple[object, ...],
    table: Any,
) -> None:
    whole = table.model_validate(parsed(qklens(*command, *asked, "--json").out)).model_dump(mode="json")
    capfd.readouterr()
    for strange in (math.nan, math.inf, -math.inf):
        show.as_json(with_floats(whole, strange))
        assert parsed(capfd.readouterr().out) == with_floats(whole, None)


def with_floats(value: Any, new: float | None) -> Any:
    """Every number that is not whole replaced."""
    if isinstance(value, dict):
        return {key: with_floats(inner, new) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_floats(inner, new) for inner in value]
    return new if isinstance(value, float) else value


def test_the_table_of_heads(qklens: Callable[..., Any], asked: tuple[object, ...]) -> None:
    """Four heads, of which --top shows three; the signs are the columns' own."""
    table = HeadTable.model_validate_json(qklens("heads", "--folds", 2, *asked, "--json").out)
    lines = lines_of(qklens("heads", "--folds", 2, "--top", 3, *asked).out)
    assert lines[0].startswith("model: 4 heads, 6 items; margins none ")
    header = lines[2].split()
    assert " ".join(header) == "head attends letter content boundary harm QK-score copies ablated patched folds"
    for line, found in zip(lines[3:6], table.heads, strict=False):
        cells = dict(zip(header, line.split(), strict=True))
        assert cells["head"] == f"L{found.layer}H{found.head}"
        assert float(cells["attends"]) == pytest.approx(found.attention_difference["none"], abs=0.0051)
        assert float(cells["harm"]) == pytest.approx(found.attention_difference["harm"], abs=0.0051)
        assert float(cells["QK-score"]) == pytest.approx(found.score_difference["all"], abs=0.0051)
        assert float(cells["ablated"]) == pytest.approx(-found.ablation_drop, abs=0.0051)
        assert float(cells["patched"]) == pytest.approx(found.patch_gain, abs=0.0051)
        assert cells["folds"] == f"{found.chosen_in}/2"
    assert lines[6] == ""
    assert "on items left out: " in lines[-1]
    change = table.held_out_effect if table.ranked_by == "patch_gain" else -table.held_out_effect
    assert f"changes the margin by {change:+.2f}" in lines[-1]
    if table.held_out_share is None:
        assert "neither is the margin clearly above zero" in lines[-1]


def test_the_table_of_pairs(qklens: Callable[..., Any], asked: tuple[object, ...]) -> None:
    table = PairTable.model_validate_json(qklens(*QK, *asked, "--json").out)
    lines = lines_of(qklens(*QK, *asked).out)
    assert lines[0] == (
        "model through directions: realised terms over correct (letter, content, boundary), ranked on half of 6 items, "
        "measured on the other half"
    )
    for reading in table.readings:
        begin = next(i for i, line in enumerate(lines) if line.startswith(f"L1H0 {reading.reading}: score "))
        low, high = reading.logsumexp_ci
        assert f"logsumexp {reading.logsumexp:+.3f} [{low:+.3f}, {high:+.3f}]" in lines[begin]
        for side, other, line in (("query", "keys", lines[begin + 1]), ("key", "queries", lines[begin + 2])):
            strongest = sorted(reading.marginals[side], key=lambda m: -abs(m.value))[:3]
            shown = ", ".join(f"{m.source} {m.value:+.2f}" for m in strongest)
            assert line == f"{side} sources, each over all {other}: {shown}"
        listed = ""
        for line, pair in zip(lines[begin + 4 :], reading.pairs, strict=False):
            group = {"all": "all pairs", "features": "of features", "roles": "of roles"}[pair.listed]
            assert line.startswith(group) == (pair.listed != listed)
            listed = pair.listed
            assert line.removeprefix(group).lstrip().startswith(pair.query)
            assert f"{pair.value:+.4f}  [{pair.ci[0]:+.4f}, {pair.ci[1]:+.4f}]" in line
            shown = [cell for t in pair.tests for cell in (f"{t.z:+.1f}", f"{t.q:.3f}")] or ["-"] * 4
            assert line.split()[-4:] == shown


def test_the_table_of_partners(qklens: Callable[..., Any], asked: tuple[object, ...]) -> None:
    lines = lines_of(qklens(*PARTNERS, *asked).out)
    assert lines[0] == (
        "model through directions: 4 features as keys of harm_detection; offsets: answer to correct option, as in the "
        "data"
    )
    assert [line.split(":")[0] for line in lines if " features, mean " in line] == ["L1H0", "L1H1", "mean over 2 heads"]
    one = lines_of(qklens(*PARTNERS[:-3], "L1H0", "--side", "key", "--offset", 3, *asked).out)
    assert "4 features as queries of harm_detection; offsets: 3" in one[0]
    assert [line.split(":")[0] for line in one if " features, mean " in line] == ["L1H0"]


def test_named_heads_on_a_text(qklens: Callable[..., Any], asked: tuple[object, ...]) -> None:
    """Nothing else is measured, in the order asked for."""
    Path("prose.txt").write_text(PROSE, encoding="utf-8", newline="")
    command = ("heads", "--text", "prose.txt", "--heads", "L1H1,0.0", *asked)
    rows = parsed(qklens(*command, "--json").out)
    assert [(row["layer"], row["head"]) for row in rows] == [(1, 1), (0, 0)]
    assert any("\x1b" in e["query_context"][0] + e["query_context"][1] for e in rows[0]["text"]["examples"])
    lines = lines_of(qklens(*command).out)
    assert [line[:4] for line in lines if line.startswith("L")] == ["L1H1", "L0H0"]
    assert sum(line.startswith("  attends on text to: ") for line in lines) == 2


def test_chosen_heads_on_a_text(qklens: Callable[..., Any], asked: tuple[object, ...]) -> None:
    Path("prose.txt").write_text(PROSE, encoding="utf-8", newline="")
    command = ("heads", "--folds", 2, "--text", "prose.txt", *asked)
    table = HeadTable.model_validate(parsed(qklens(*command, "--json").out))
    chosen = {(r.layer, r.head) for r in table.heads if r.chosen_in}
    assert {(row["layer"], row["head"]) for row in table.text} == chosen
    lines = lines_of(qklens(*command).out)
    assert sum("on ordinary text" in line for line in lines) == len(chosen)


def test_the_map_is_an_svg(qklens: Callable[..., Any], asked: tuple[object, ...]) -> None:
    ended = qklens("heads", "--folds", 2, "--figure", "map.svg", *asked)
    assert ended.status == 0
    assert "map: map.svg" in ended.out
    assert Path("map.svg").read_text().startswith("<svg")


def hostile(value: Any) -> Any:
    """Every name of a feature, token, source, dictionary or model replaced."""
    names = {"query", "key", "source", "feature", "dictionary", "name", "top_tokens"}
    if isinstance(value, dict):
        return {
            key: [HOSTILE]
            if key == "top_tokens"
            else HOSTILE
            if key in names and isinstance(inner, str)
            else hostile(inner)
            for key, inner in value.items()
        }
    return [hostile(inner) for inner in value] if isinstance(value, list) else value


def test_no_name_reaches_the_terminal_raw(
    qklens: Callable[..., Any], asked: tuple[object, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """Names come from dictionaries, vocabularies and folders that anyone may have made."""
    pairs = pair_table.PairTable.model_validate(hostile(parsed(qklens(*QK, *asked, "--json").out)))
    partners = partner_table.PartnerTable.model_validate(hostile(parsed(qklens(*PARTNERS, *asked, "--json").out)))
    heads = HeadTable.model_validate(hostile(parsed(qklens("heads", "--folds", 2, *asked, "--json").out)))
    capfd.readouterr()
    for printed in (
        lambda: show_pairs.pairs(pairs),
        lambda: show_tables.partners(partners),
        lambda: show_tables.heads(heads, 3, Path(HOSTILE)),
    ):
        printed()
        out = capfd.readouterr().out
        lines_of(out)
        assert "x\ufffd[2J" in out, "the name itself is shown"
