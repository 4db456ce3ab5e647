"""Sweeps of steering on the shipped organism: rows are the engine's, clean at 0, beside fair controls."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from qklens.analyses.statistics import bootstrap_mean, wilson
from qklens.errors import NothingChangedError, QklensError
from qklens.interventions.direction import random_direction
from qklens.interventions.engine import Workset
from qklens.interventions.steer import Steer
from qklens.studies.config import LabConfig
from qklens.studies.lab import Lab
from qklens.studies.neutral import neutral_prompts, on_neutral
from qklens.studies.opening import ready_lab
from qklens.studies.roles import role_direction
from qklens.studies.steer_spec import SteerSpec
from qklens.studies.tables.steer_plan import SteerPlan
from qklens.studies.tables.steer_rows import SteerTable
from qklens.studies.tables.steer_table import steer_table

FEATURE, HEADS = "L2/271", ((2, 4), (2, 6))
SPEC = SteerSpec.parse(
    {
        "direction": FEATURE,
        "strengths": [-4, 0, 1],
        "heads": [["L2H4", "L2H6"], ["L2H4", "L3H0"]],
        "layers": [2, "2-3"],
        "conditions": ["harm", "none"],
        "draws": 3,
    }
)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return ready_lab(LabConfig(items=8))


@pytest.fixture(scope="module")
def table(lab: Lab) -> SteerTable:
    return steer_table(lab, SPEC)


@pytest.fixture(scope="module")
def direction(lab: Lab):
    return role_direction(lab, lab.source.labels.index(FEATURE), "refuse_redirect")


def test_rows_are_every_combination(table: SteerTable) -> None:
    """Heads of a subset that lie in a range; the same place is run once."""
    places = [[(2, 4), (2, 6)], [(2, 4)], [(2, 4), (3, 0)]]
    asked = [(c, heads, s) for c in ("harm", "none") for heads in places for s in SPEC.strengths]
    assert [(r.condition, r.heads, r.strength) for r in table.rows] == asked
    assert [r.layers for r in table.rows[::3]] == [[2], [2], [2, 3]] * 2
    assert (table.feature, table.heads) == (FEATURE, None)
    assert table.spec == SPEC


def test_a_row_is_what_the_engine_gives(lab: Lab, table: SteerTable, direction) -> None:
    neutral = Workset(lab.subject, neutral_prompts(lab.subject)[0])
    for row in table.rows:
        work = lab.work(row.condition, "report")
        steer = Steer(direction, row.strength, side="query", heads=tuple(row.heads or ()), tokens=("answer",))
        margins = work.margins([steer]).double()
        assert row.accuracy == float((margins > 0).double().mean())
        assert row.ci == wilson(int((margins > 0).sum()), len(margins))
        assert row.margin == pytest.approx(float(margins.mean()), abs=1e-5)
        by_item = margins.numpy().reshape(-1, 2).mean(axis=1)
        assert np.allclose(row.margin_ci, bootstrap_mean(by_item, lab.seed), atol=1e-5)
        attention = work.sweep([steer], row.heads or ()).attention
        assert row.attention_difference == pytest.approx(float(attention.mean()), abs=1e-6)
        kl = neutral.divergence([steer])
        assert row.kl == pytest.approx(float(kl.double().mean()), rel=1e-3, abs=1e-9)


def test_controls_are_the_same_edit_elsewhere(lab: Lab, table: SteerTable, direction) -> None:
    row = table.rows[0]
    assert row.controls is not None
    options = {"side": "query", "heads": HEADS, "tokens": ("answer",)}
    benign = lab.work("benign", "report").margins([Steer(direction, -4.0, **options)])
    assert row.controls.benign.margin == pytest.approx(float(benign.mean()), abs=1e-5)
    assert row.controls.benign.kl == row.kl
    draws = torch.stack(
        [
            lab.work("harm", "report").margins([Steer(random_direction(direction, lab.seed + i), -4.0, **options)])
            for i in range(3)
        ]
    )
    means = draws.mean(dim=1)
    assert row.controls.random.draws == 3
    assert row.controls.random.margin == pytest.approx(float(draws.mean()), abs=1e-5)
    assert row.controls.random.margin_range == pytest.approx((float(means.min()), float(means.max())), abs=1e-5)
    assert row.controls.random.accuracy == pytest.approx(float((draws > 0).float().mean()))
    assert table.unrelated not in (None, FEATURE)


def test_controls_have_equal_norm(lab: Lab, direction) -> None:
    plan = SteerPlan(lab, SPEC, {})
    assert plan.controls is not None
    for other in (*plan.controls.random, plan.controls.unrelated):
        assert other.typical == plan.direction.typical
        for layer in direction.layers:
            assert other.vectors[layer].norm() == pytest.approx(float(direction.vectors[layer].norm()), rel=1e-5)
            cosine = torch.cosine_similarity(other.vectors[layer], direction.vectors[layer], dim=0)
            assert abs(float(cosine)) < 0.9


def test_strength_zero_is_clean(table: SteerTable) -> None:
    """Bit for bit, and the controls with it."""
    for row in table.rows:
        if row.strength == 0:
            clean = table.clean[row.condition]
            assert (row.accuracy, row.ci, row.margin, row.margin_ci) == (
                clean.accuracy,
                clean.ci,
                clean.margin,
                clean.margin_ci,
            )
            assert row.kl == 0
            assert row.controls is not None
            assert row.controls.random.margin_range == pytest.approx((clean.margin, clean.margin), abs=0)
            assert row.controls.unrelated.margin == clean.margin
            assert row.controls.benign.margin == table.clean["benign"].margin
            by_head = [clean.attention_difference[f"L{layer}H{head}"] for layer, head in row.heads or ()]
            assert row.attention_difference == pytest.approx(float(np.mean(by_head)), abs=1e-6)


def test_all_points_of_a_condition_go_through_one_sweep(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"sweep": 0, "divergence": 0}

    def counted(name: str):
        real = getattr(Workset, name)

        def call(self, points, *rest, **options):
            calls[name] += 1
            return real(self, points, *rest, **options)

        return call

    for name in calls:
        monkeypatch.setattr(Workset, name, counted(name))
    monkeypatch.setattr(Workset, "margins_each", None)
    table = steer_table(lab, SPEC)
    assert calls == {"sweep": 3, "divergence": 1}
    assert table.cost["harm"].points == 3 * 2 * 5
    assert table.cost["benign"].points == 3 * 2
    assert 0 < table.cost["harm"].tokens_x_layers < table.cost["harm"].whole_prompts / 5


def test_the_echoed_spec_gives_the_same_rows_and_strict_json(lab: Lab, table: SteerTable) -> None:
    text = json.dumps(table.model_dump(mode="json"), allow_nan=False)
    again = steer_table(lab, SteerSpec.parse(json.loads(text)["spec"]))
    assert again.spec == table.spec
    for old, new in zip(table.rows, again.rows, strict=True):
        assert (new.heads, new.accuracy, new.ci) == (old.heads, old.accuracy, old.ci)
        assert new.margin == pytest.approx(old.margin, abs=1e-6)
        assert new.controls is not None
        assert old.controls is not None
        assert new.controls.random.margin_range == pytest.approx(old.controls.random.margin_range, abs=1e-6)
    assert SteerTable.model_validate_json(text) == table


def test_a_role_is_found_and_the_heads_are_chosen(lab: Lab) -> None:
    spec = SteerSpec.parse({"sides": ["residual", "key"], "tokens": "answer", "layers": 2, "heads": "all"})
    table = steer_table(lab, spec.model_copy(update={"strengths": (-1.0,), "controls": False}))
    assert table.feature in lab.source.labels
    assert table.heads == list(SteerPlan(lab, spec, {}).chosen)
    assert [(r.side, r.layers, r.heads, r.controls) for r in table.rows] == [
        ("residual", [2], None, None),
        ("key", [2], None, None),
    ]
    assert set(table.clean["harm"].attention_difference) == {f"L{m}H{h}" for m, h in table.heads or ()}
    assert (table.unrelated, set(table.clean)) == (None, {"harm"})
    named = steer_table(lab, spec.model_copy(update={"strengths": (-1.0,)}), {"refuse_redirect": FEATURE})
    assert named.feature == FEATURE


def test_where_a_point_acts_on_neutral_text(lab: Lab, direction) -> None:
    prompts, about = neutral_prompts(lab.subject)
    assert (len(prompts), sum(len(p.tokens) for p in prompts)) == (about.windows, about.tokens)
    assert 30 < about.windows <= 64
    assert 0 < about.unknown < 0.3
    for prompt in prompts:
        assert prompt.spans["answer"] == (len(prompt.tokens) - 1,)
        assert prompt.spans["before"] == tuple(range(len(prompt.tokens) - 1))
    ends = {lab.subject.tokenizer.decode([p.tokens[-1]]) for p in prompts}
    assert len(ends) > 10
    for tokens, where in (
        (("answer",), "answer"),
        (("correct", "incorrect"), "before"),
        (("all",), "all"),
        (("answer", "correct"), "all"),
    ):
        assert on_neutral(Steer(direction, 1.0, layers=(2,), tokens=tokens)).tokens == (where,)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"direction": "refuse"}, "direction 'refuse' is no role (need_answer, "),
        ({"direction": "L2/9999"}, "feature 'L2/9999' is not in dictionary"),
        ({"heads": "L9H0"}, "layer 9 does not exist"),
        ({"heads": "L2H99"}, "head 99 does not exist"),
        ({"heads": "L0H0"}, "does not write resid_pre.0"),
        ({"heads": "L1H0"}, "feature 'L2/271' does not write resid_pre.1 (query side of L1H0)"),
        ({"heads": "L2H4", "layers": 3}, "no head of ['L2H4'] lies in layers [3]"),
        ({"tokens": "corect"}, "span 'corect' is not in this prompt"),
        ({"tokens": "intent", "conditions": ["harm", "none"]}, "under condition 'none'"),
        ({"tokens": 400}, "position 400 is not in a prompt of"),
        (
            {"strengths": [-1, 1e39]},
            "strength 1e+39 (query side of L2H4): what it adds to resid_pre.2 overflows float32",
        ),
        ({"strengths": [1e30]}, "strength 1e+30"),
        ({"strengths": [1e30], "unit": "raw"}, "strength 1e+30"),
        ({"strengths": [1e30], "unit": "resid_norm"}, "strength 1e+30"),
        ({"strengths": [1e30], "mode": "scale"}, "strength 1e+30"),
    ],
)
def test_what_cannot_be_is_refused_before_a_point_is_run(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, given: dict[str, object], says: str
) -> None:
    monkeypatch.setattr(Workset, "sweep", None)
    with pytest.raises(QklensError) as caught:
        steer_table(lab, SteerSpec.parse({"direction": FEATURE, "heads": "L2H4", **given}))
    assert says in str(caught.value)


def test_margins_that_are_not_finite_name_the_strength(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Workset.divergence

    def broken(self, points, **options):
        found = real(self, points, **options)
        found[-1] = math.nan
        return found

    monkeypatch.setattr(Workset, "divergence", broken)
    spec = SteerSpec.parse({"direction": FEATURE, "heads": "L2H4", "strengths": [-1, 2], "controls": False})
    with pytest.raises(QklensError, match=r"strength 2 \(query side of L2H4\): the margins are not finite"):
        steer_table(lab, spec)


def test_a_feature_that_is_never_active_has_no_unit(lab: Lab) -> None:
    silent = next(
        label
        for i, label in enumerate(lab.source.labels)
        if label.startswith("L2/") and max(role_direction(lab, i, "refuse_redirect").typical.values()) == 0
    )
    given = {"direction": silent, "heads": "L2H4", "strengths": 1, "controls": False}
    with pytest.raises(QklensError, match="is never active at layer 2 where its role plays"):
        steer_table(lab, SteerSpec.parse(given))
    assert steer_table(lab, SteerSpec.parse({**given, "unit": "raw"})).rows
    with pytest.raises(NothingChangedError):
        steer_table(lab, SteerSpec.parse({**given, "mode": "ablate", "tokens": "answer"}))
