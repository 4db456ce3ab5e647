"""The table of the fewest heads: chosen on one half, measured on the other, beside its controls, and printed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from head_tables import lab_of
from qklens.analyses.readings import read_patterns
from qklens.cli import show_head_sets
from qklens.dictionaries.source import feature_index
from qklens.errors import QklensError
from qklens.interventions.direction import Direction, random_direction
from qklens.interventions.engine import Workset
from qklens.interventions.patch import frozen_patterns
from qklens.interventions.steer import Steer
from qklens.studies.config import LabConfig
from qklens.studies.lab import Lab
from qklens.studies.opening import ready_lab
from qklens.studies.roles import role_direction
from qklens.studies.tables.head_set_table import HeadSetTable, head_set_table

METHODS = ("greedy", "attribution")
SELECTING = [(2, 4), (2, 6)]


@pytest.fixture(scope="module")
def lab() -> Lab:
    return ready_lab(LabConfig(items=12))


@pytest.fixture(scope="module")
def steer(lab) -> Steer:
    direction = role_direction(lab, feature_index(lab.source, "L2/271"), "refuse_redirect")
    return Steer(direction, -4.0, side="query", layers=(2, 3), tokens=("answer",))


@pytest.fixture(scope="module")
def tables(lab, steer) -> dict[str, HeadSetTable]:
    unrelated = random_direction(steer.direction, 77)
    return {m: head_set_table(lab, steer, m, unrelated=unrelated, draws=3) for m in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_the_organism_s_two_heads_are_the_fewest_of_two_layers(tables, method):
    table = tables[method]
    assert table.smallest == SELECTING
    found = next(row for row in table.sets if row.heads == SELECTING)
    assert found.share > 0.8
    assert found.accuracy > 0.9
    assert found.share_ci[0] <= found.share <= found.share_ci[1]
    assert table.order[:2] == SELECTING
    assert sorted(table.sets[-1].heads) == [(layer, head) for layer in (2, 3) for head in range(8)]
    assert table.steering["heads"] == [[layer, head] for layer in (2, 3) for head in range(8)]
    assert HeadSetTable.model_validate_json(table.model_dump_json()) == table
    json.dumps(table.model_dump(mode="json"), allow_nan=False)


def test_every_row_is_of_the_half_that_did_not_choose(lab, steer, tables):
    plain = Workset(lab.subject, lab.prompts("harm", "report"), reuse=False)
    rows = read_patterns(plain, [(layer, head) for layer in range(2, 4) for head in range(8)])
    harmed, clean = plain.margins(), lab.work("none", "report").margins()
    for row in tables["greedy"].sets[:2]:
        edit = replace(steer, heads=tuple(row.heads), layers=())
        free = plain.margins([edit])
        held = plain.margins([edit, frozen_patterns(rows, row.heads)])
        lost = float((clean - harmed).sum())
        assert row.margin == pytest.approx(float(free.mean()), abs=1e-3)
        assert row.share == pytest.approx(float((free - harmed).sum()) / lost, abs=1e-3)
        assert row.share_frozen == pytest.approx(float((held - harmed).sum()) / lost, abs=1e-3)
        assert row.others == pytest.approx(row.share - row.share_frozen, abs=1e-6)
    discovery = Workset(lab.subject, lab.prompts("harm", "discovery"), reuse=False)
    first = tables["greedy"].sets[0]
    edit = replace(steer, heads=tuple(first.heads), layers=())
    gained = discovery.margins([edit]) - discovery.margins()
    lost = lab.work("none", "discovery").margins() - discovery.margins()
    assert first.discovery_share == pytest.approx(float(gained.sum() / lost.sum()), abs=1e-3)


def test_the_choice_does_not_look_at_the_report_half(lab, steer, tables, monkeypatch):
    """Every margin of the report half is spoilt: the order and the smallest set stand."""
    report, whole = lab.work("harm", "report"), Workset.margins_each

    def spoilt(work, points, **options):
        margins = whole(work, points, **options)
        return -margins if work is report else margins

    monkeypatch.setattr(Workset, "margins_each", spoilt)
    table = head_set_table(lab, steer, "greedy", draws=1)
    assert (table.order, table.smallest) == (tables["greedy"].order, tables["greedy"].smallest)
    assert table.sets[0].share != pytest.approx(tables["greedy"].sets[0].share)


def test_controls_stand_beside_the_smallest_set(lab, steer, tables):
    beside = {row.control: row for row in tables["greedy"].beside}
    assert [(row.control, row.draws) for row in tables["greedy"].beside] == [
        ("random", 3), ("unrelated", 1), ("random_heads", 3), ("benign", 1)
    ]  # fmt: skip
    harm = lab.work("harm", "report")
    at = replace(steer, heads=tuple(SELECTING), layers=())
    drawn = [harm.margins([replace(at, direction=random_direction(steer.direction, seed))]) for seed in range(3)]
    assert beside["random"].margin == pytest.approx(float(torch.stack(drawn).mean()), abs=1e-4)
    right = [float((m > 0).double().mean()) for m in drawn]
    assert beside["random"].accuracy_range == (min(right), max(right))
    assert beside["random"].share_range[0] <= beside["random"].share <= beside["random"].share_range[1] < 0.6
    assert beside["random_heads"].share < 0.3
    assert beside["benign"].share is None
    benign = lab.work("benign", "report").margins([at])
    assert beside["benign"].margin == pytest.approx(float(benign.mean()), abs=1e-4)
    assert beside["unrelated"].accuracy == float(
        (harm.margins([replace(at, direction=random_direction(steer.direction, 77))]) > 0).double().mean()
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_table_on_the_terminal(tables, method, capsys):
    table = tables[method]
    show_head_sets.head_sets(table)
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert lines[0].startswith(f"chat: fewest of 16 heads by {method}; 12 items")
    assert max(map(len, lines)) <= 120
    begin = next(i for i, line in enumerate(lines) if line.startswith("heads "))
    for line, row in zip(lines[begin + 1 :], table.sets, strict=False):
        assert line.split()[0] == str(len(row.heads))
        assert (" * " in line) == (row.heads == table.smallest)
        assert f"{row.margin:+.2f}" in line
        assert f"{round(100 * row.share)}%" in line
    assert "-0%" not in "".join(lines)
    assert any(line.endswith(": L2H4, L2H6") for line in lines)
    assert any(line.startswith("random directions ") for line in lines)


def test_the_terminal_says_when_nothing_restores(tables, capsys):
    none = tables["greedy"].model_copy(update={"smallest": [], "beside": []})
    show_head_sets.head_sets(none)
    out = capsys.readouterr().out
    assert "nothing restores" in out
    assert "random directions" not in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"side": "residual"}, "side 'residual' edits the stream for all heads, so no set of them is smallest"),
        ({"strength": 0.0}, "strength 0 with mode 'add' changes nothing"),
        ({"layers": (), "heads": ((2, 4),)}, "1 head to choose among; name at least two, or a layer"),
        ({"layers": (), "heads": ((2, 4), (2, 9))}, "head 9 does not exist in chat; expected 0 to 7"),
        ({"tokens": ("answer", 999)}, "position 999 is not in a prompt of"),
        ({"strength": 1e38}, "overflows at layer 2"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_model_runs(lab, steer, options, says, monkeypatch):
    monkeypatch.setattr(Workset, "margins_each", None)
    with pytest.raises(QklensError, match=says):
        head_set_table(lab, replace(steer, **options))


def test_a_model_that_loses_nothing_has_nothing_to_restore(tiny_llama, items):
    """Whichever way the margin moves there: what was not lost is not a number to divide by."""
    lab = lab_of(tiny_llama(), items)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    direction = Direction("d", {1: vector}, {1: 2.0}, lambda layer, stream: stream(layer)[..., 0])
    steer = Steer(direction, 2.0, side="query", layers=(1,), tokens=("answer",))
    none, harm = (lab.work(c, "discovery") for c in ("none", "harm"))
    if none.margins().mean() > harm.margins().mean():
        lab._works["none", "discovery"], lab._works["harm", "discovery"] = harm, none
    with pytest.raises(QklensError, match=r"does not fall under harm on the discovery half .*nothing to restore"):
        head_set_table(lab, steer)
