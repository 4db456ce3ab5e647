"""Checkpoints read by one source, and what a pair adds to a span's score, against the scores themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qklens.data.items import Dataset
from qklens.data.render import LetterForm
from qklens.errors import QklensError
from qklens.studies.harm_pressure import origin
from qklens.studies.harm_pressure.span_terms import span_terms
from qklens.studies.lab import Lab
from qklens.studies.results_around import Origin
from sparse_source import sparse_source

HEADS = [(1, 0), (2, 3)]
ROLES: dict[Any, str] = {"refuse_redirect": "f1", "harm_detection": "f2"}


@pytest.fixture(scope="module")
def lab(tiny_llama, items) -> Lab:
    lab = Lab(tiny_llama(), Dataset("few", items[:8], "0"), LetterForm("", ""), 0)
    lab.source = sparse_source(lab.subject.d_model, 64, (1, 2))
    return lab


@pytest.mark.parametrize("spans", [("correct", "incorrect"), ("intent",)])
def test_terms_on_a_span_sum_to_its_mean_score(lab: Lab, spans: tuple[str, ...]) -> None:
    for head in HEADS:
        terms = span_terms(lab, head, "harm", "report", spans)
        scores = []
        for prompt, parts in zip(lab.prompts("harm", "report"), lab.written("harm", "report", head[0]), strict=True):
            at = [p for name in spans for p in prompt.span(name)]
            scores.append(lab.lens(*head).scores(parts, prompt.spans["answer"][0])[at].mean())
        assert terms.total == pytest.approx(float(torch.stack(scores).mean()), rel=1e-4, abs=1e-5)


def test_every_checkpoint_is_read_with_its_own_weights(lab: Lab, tiny_llama) -> None:
    other = tiny_llama(seed=1)
    found = origin.run(lab, HEADS, ROLES, [("first", lambda: other), ("last", lambda: lab.subject)]).results
    rows = [Origin.model_validate(row) for row in found["origin"]]
    assert [row.checkpoint for row in rows] == ["first", "last"]
    assert len(found["milestones"]) == 5
    mine = Lab(other, lab.dataset, lab.form, lab.seed)
    mine.source = lab.source
    for row, one in zip(rows, (mine, lab), strict=True):
        margins = {c: one.attention(c, "report").margins for c in ("none", "harm")}
        assert row.margin["harm"] == pytest.approx(float(margins["harm"].mean()), abs=1e-6)
        drop = float(((margins["none"] > 0).float() - (margins["harm"] > 0).float()).mean())
        assert row.accuracy_drop[0] == pytest.approx(drop, abs=1e-6)
        pair = [span_terms(one, h, "harm", "report", origin.OPTIONS).between(1, 2) for h in HEADS]
        assert row.refuse_harm_realised[0] == pytest.approx(sum(pair) / 2, abs=1e-7)
        assert set(row.unexplained) == {"1", "2"}
    assert rows[0].refuse_harm_interaction != rows[1].refuse_harm_interaction


def test_a_checkpoint_of_another_shape_is_refused(lab: Lab, tiny_llama) -> None:
    wide = tiny_llama(hidden_size=48)
    with pytest.raises(QklensError, match="checkpoint wide: has 3 layers, 4 heads and width 48, the model has 3, 4"):
        origin.check(lab, [("wide", lambda: wide)])
