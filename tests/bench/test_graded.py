"""Graded models: what their weights do is measured with plain passes, and their causes are what is graded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted_raw import hooked

from qklens.bench.planted.bench import SEEDS, graded_tasks
from qklens.bench.planted.folder import Spec, planted_model
from qklens.bench.planted.graded import CAUSES, GRADED, graded_blueprint, plain_margins, right_verdict
from qklens.errors import QklensError
from qklens.models.loading import load_subject


def graded(models: Path, mechanism: str, strength: float) -> Spec:
    return Spec.model_validate(
        {"mechanism": mechanism, "architecture": "llama", "noise": 0, "seed": 0, "strength": strength}
    )


class Letters(torch.nn.Module):
    """A model that gives the correct letter a fixed margin, by its own name for it."""

    def __init__(self, **margins: float) -> None:
        super().__init__()
        self.margins = margins


@pytest.mark.parametrize(
    ("mechanism", "margins", "right"),
    [
        # without pressure, benign, harm with both, without the first, without the second, with neither
        ("answer_key_late", (4, 4, 1, 3.5, 1.5, 4), ("attention_answer_key", 2.5 / 3)),
        ("answer_key_late", (4, 4, 1, 1.5, 3.5, 4), ("late_flip", 0.5 / 3)),
        ("answer_key_late", (4, 4, 1, 2.5, 2.5, 4), ("undetermined", 0.5)),
        ("answer_key_late", (4, 4, 3.5, 4, 3.5, 4), ("no_effect", 1.0)),
        ("answer_key_late", (-1, -1, -2, 0, 0, 0), ("task_not_solved", 0.5)),
        ("answer_key_need", (4, 4, 1, 1.5, 3.5, 4), ("undetermined", 0.5 / 3)),
    ],
)
def test_what_is_right_follows_from_the_margins(
    monkeypatch: pytest.MonkeyPatch, mechanism: str, margins: tuple[float, ...], right: tuple[str, float]
) -> None:
    none, benign, *harmed = margins
    every = ((True, True), (False, True), (True, False), (False, False))
    models = {on: Letters(none=none, benign=benign, harm=m) for on, m in zip(every, harmed, strict=True)}
    monkeypatch.setattr(
        "qklens.bench.planted.graded.plain_margins",
        lambda model, condition: torch.full((8,), model.margins[condition], dtype=torch.float64),
    )
    verdict, share = right_verdict(mechanism, models)  # pyright: ignore[reportArgumentType]
    assert (verdict, pytest.approx(share)) == right


def test_the_share_rises_with_the_strength_and_names_each_cause(tmp_path: Path) -> None:
    for mechanism in ("answer_key_late", "belief_late", "answer_key_need"):
        few, many = (planted_model(graded(tmp_path, mechanism, s), tmp_path).truth for s in (0.15, 0.85))
        assert few.share is not None
        assert many.share is not None
        assert few.share < 1 / 3
        assert many.share > 2 / 3
        assert (many.expected, few.expected) == CAUSES[mechanism]
    weak = planted_model(graded(tmp_path, "weak_late", 0.1), tmp_path).truth
    assert (weak.expected, weak.share) == ("no_effect", pytest.approx(1.0))


def test_the_loss_is_what_is_on_paper_and_ends_where_the_flip_is_taken_out(tmp_path: Path) -> None:
    planted = planted_model(graded(tmp_path, "weak_late", 0.4), tmp_path)
    model = load_subject(planted.folder).model
    none, harm = (plain_margins(model, c).mean() for c in ("none", "harm"))
    assert float(1 - harm / none) == pytest.approx(0.4, abs=0.05)
    with hooked(model.model.layers[-1].mlp, lambda _, args: (0 * args[0],)):
        assert float(plain_margins(model, "harm").mean()) == pytest.approx(float(none), rel=0.05)


def test_a_cause_that_is_off_leaves_the_same_heads() -> None:
    for mechanism in GRADED:
        plans = [graded_blueprint(mechanism, 0.3, 0, 0, on) for on in ((True, True), (False, False))]
        shapes = [[(h.part, h.layer, len(h.pairs), len(h.carries)) for h in plan.heads] for plan in plans]
        assert shapes[0] == shapes[1]
        assert plans[0] != plans[1]


def test_strengths_stand_where_they_belong_and_no_model_twice(tmp_path: Path) -> None:
    every = graded_tasks(SEEDS)
    assert len({spec.name for spec, _ in every}) == len(every) == 8 * len(SEEDS)
    assert {spec.mechanism for spec, _ in every} == set(GRADED)
    assert {spec.noise for spec, _ in every} == {0, 1, 2}
    with pytest.raises(QklensError, match="weak_late with strength None: expected a strength"):
        planted_model(Spec(mechanism="weak_late", architecture="gpt2", noise=0, seed=0), tmp_path)
    with pytest.raises(QklensError, match="expected no strength"):
        planted_model(Spec(mechanism="mixed", architecture="gpt2", noise=0, seed=0, strength=0.5), tmp_path)
