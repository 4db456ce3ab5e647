"""Taking a source out, with norms held, moves the model's own scores by exactly what its pair terms say.

The source is taken out of what one head's W_Q or W_K reads, in the running model, and the scores that the model then
computes are compared with those before. Every error is |measured − predicted| relative to the largest |score| of the
same head and prompt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from qklens.analyses.interactions import mean_terms
from qklens.analyses.lens import ERROR, HeadLens, head_lens
from qklens.analyses.weighting import CONTRASTIVE, REALISED
from qklens.analyses.written import WrittenPrompt, write_prompts
from qklens.data.render import LetterForm, Prompt, render
from qklens.dictionaries.crosscoder import load_crosscoder
from qklens.dictionaries.source import FeatureSource
from qklens.interventions.direction import feature_direction
from qklens.interventions.steer import Steer
from qklens.models.batch import left_padded
from qklens.models.edits import Side, VectorEdit
from qklens.models.loading import load_subject
from qklens.models.subject import Subject
from qklens.models.trace import trace
from qklens.studies.resources import model_folder, organism_folder
from sparse_source import sparse_source

FEATURES_A_SIDE = 2


@dataclass
class Setting:
    """A model, a source that writes some of its layers, and prompts."""

    subject: Subject
    source: FeatureSource
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    prompts: list[Prompt]


@dataclass
class Change:
    """Predicted and measured change of a head's scores on one prompt, one a key token, and its largest |score|."""

    what: str
    predicted: Tensor
    measured: Tensor
    largest: float


def organism(items) -> Setting:
    subject = load_subject(str(model_folder("organism")))
    prompts = [
        render(subject.tokenizer, item, condition, order, LetterForm("", ""))
        for item, condition, order in zip(
            items[:3], ("harm", "none", "benign"), ("correct_first", "incorrect_first", "correct_first"), strict=True
        )
    ]
    return Setting(subject, load_crosscoder(organism_folder() / "dictionary"), (1, 2, 3), (0, 3, 6), prompts)


def smollm2(items) -> Setting:
    if "QKLENS_SMOLLM2" not in os.environ:
        pytest.skip("needs SmolLM2-135M-Instruct; set QKLENS_SMOLLM2 to it")
    subject = load_subject(os.environ["QKLENS_SMOLLM2"])
    layers = (8, 20)
    source = sparse_source(subject.d_model, 4000, layers, threshold=2.5, size=2.0)
    prompts = [render(subject.tokenizer, items[0], "harm", "correct_first", LetterForm("", ""))]
    return Setting(subject, source, layers, (2, 7), prompts)


@pytest.fixture(scope="module", params=[organism, smollm2])
def setting(request, items) -> Setting:
    return request.param(items)


class Measure:
    """One prompt in one head: its pair terms, and the model's own scores under edits of that head."""

    def __init__(self, setting: Setting, layer: int, head: int, prompt: Prompt) -> None:
        self.subject, self.source, self.layer, self.head, self.prompt = (
            setting.subject, setting.source, layer, head, prompt,
        )  # fmt: skip
        self.batch = left_padded([prompt.tokens], self.subject.pad_id, self.subject.device)
        also = self.source.reads(layer)
        clean = trace(self.subject, self.batch, [layer], also=also)
        self.lens: HeadLens = head_lens(self.subject, self.source, layer, head)
        streams = {where: stream[0] for where, stream in clean.streams.items()}
        self.written: WrittenPrompt
        (self.written,) = write_prompts(self.subject, self.source, self.lens.maps, [streams])
        self.clean = self.row(clean)
        self.seen: dict[tuple, Tensor] = {}
        self.largest = float(self.clean.abs().max())

    def row(self, found) -> Tensor:
        last = torch.tensor([[self.batch.width - 1]])
        return found.attention[self.layer].score(torch.tensor([self.head]), last)[0, 0, 0].double()

    def after(self, edits) -> Tensor:
        return self.row(trace(self.subject, self.batch, [self.layer], edits=edits))

    def steer(self, feature: int, side: Side, span: str, norm: str = "frozen") -> list:
        direction = feature_direction(self.source, feature, {})
        steer = Steer(
            direction, 0.0, mode="ablate", side=side, heads=((self.layer, self.head),), tokens=(span,), norm=norm
        )
        return steer.edits(self.subject, [self.prompt], self.batch, [0])

    def without(self, feature: int, side: Side, span: str, norm: str = "frozen") -> Tensor:
        """The model's scores without a feature."""
        what = (feature, side, span, norm)
        if what not in self.seen:
            self.seen[what] = self.after(self.steer(*what))
        return self.seen[what]

    def take_out(self, part: Callable[[Tensor, Callable[[int], Tensor]], Tensor], side: Side, positions) -> VectorEdit:
        mask = torch.zeros(self.batch.input_ids.shape, dtype=torch.bool)
        mask[0, list(positions)] = True
        head = self.head if side == "query" else self.lens.maps.kv_head(self.head)
        reads = self.source.reads(self.layer)
        return VectorEdit(self.layer, side, mask, lambda x, at: x - part(x, at), (head,), True, reads)

    def error_edit(self, side: Side, positions) -> VectorEdit:
        return self.take_out(lambda _, at: self.source.error(self.layer, at), side, positions)

    def bias_edit(self, side: Side, positions) -> VectorEdit:
        return self.take_out(lambda x, _: self.source.bias(self.layer).to(x).expand_as(x), side, positions)

    def table(self) -> tuple[Tensor, Tensor]:
        """Pair terms `query source, key source, token` as the sums over key and over query sources."""
        terms = self.lens.terms_by_token(self.written, len(self.prompt.tokens) - 1)
        n, t = len(self.lens.names), len(self.prompt.tokens)
        value = terms.value.double()
        rows = torch.zeros(n, t, dtype=torch.float64)
        rows[terms.query] = torch.zeros(len(terms.query), t, dtype=torch.float64).index_add(1, terms.position, value)
        columns = torch.zeros(n, t, dtype=torch.float64)
        columns.index_put_((terms.key, terms.position), value.sum(dim=0), accumulate=True)
        return rows, columns

    def strongest(self, side: Side, span: str) -> list[int]:
        """Features whose removal is predicted to matter most, and the feature that matters least of the active."""
        rows, columns = self.table()
        if side == "query":
            size = rows[:-2].abs().amax(dim=1)
        else:
            size = columns[:-2][:, list(self.prompt.span(span))].abs().amax(dim=1)
        there = size.nonzero()[:, 0]
        order = there[size[there].argsort(descending=True)].tolist()
        return [*order[:FEATURES_A_SIDE], *order[-1:]] if len(order) > FEATURES_A_SIDE else order


def measures(setting: Setting) -> Iterator[Measure]:
    for layer in setting.layers:
        for head in setting.heads:
            for prompt in setting.prompts:
                yield Measure(setting, layer, head, prompt)


@pytest.fixture(scope="module")
def every(setting) -> list[Measure]:
    return list(measures(setting))


def changes(every: list[Measure], norm: str = "frozen", limit: int | None = None) -> list[Change]:
    """Every removal on either side: single features, the whole error and, with norms held, the source's bias."""
    found = []
    for m in every[:limit]:
        rows, columns = m.table()
        answer, error = m.prompt.spans["answer"], m.lens.names.index(ERROR)
        here = torch.zeros(len(m.prompt.tokens), dtype=torch.float64)
        here[list(m.prompt.span("correct"))] = 1.0
        for feature in m.strongest("query", "answer"):
            moved = m.without(feature, "query", "answer", norm) - m.clean
            found.append(Change("query feature", -rows[feature], moved, m.largest))
        for feature in m.strongest("key", "correct"):
            moved = m.without(feature, "key", "correct", norm) - m.clean
            found.append(Change("key feature", -columns[feature] * here, moved, m.largest))
        if norm == "recomputed":
            continue
        for source, edit in ((error, m.error_edit), (error - 1, m.bias_edit)):
            for side, table, where in (
                ("query", rows, answer),
                ("key", columns * here, m.prompt.span("correct")),
            ):
                after = m.after([edit(side, where)])
                found.append(Change(f"{side} {m.lens.names[source]}", -table[source], after - m.clean, m.largest))
    return found


@pytest.fixture(scope="module")
def frozen(every) -> list[Change]:
    return changes(every)


def worst(found: list[Change]) -> float:
    return max(float((c.measured - c.predicted).abs().max()) / c.largest for c in found)


def correlation(found: list[Change]) -> float:
    """Over removals and key tokens that the removal can reach."""
    predicted, measured = (torch.cat([getattr(c, name) for c in found]) for name in ("predicted", "measured"))
    reached = predicted != 0
    return float(np.corrcoef(predicted[reached], measured[reached])[0, 1])


def test_with_norms_held_the_predicted_change_is_the_measured_one(frozen):
    kinds = {c.what for c in frozen}
    assert kinds == {f"{side} {source}" for side in ("query", "key") for source in ("feature", "bias", "error")}
    for kind in sorted(kinds):
        these = [c for c in frozen if c.what == kind]
        assert worst(these) <= 1e-5
        assert correlation(these) > 0.9995
        assert max(float(c.measured.abs().max()) / c.largest for c in these) > 0.01


def test_with_norms_recomputed_the_prediction_is_worse(every, frozen):
    moved = changes(every, "recomputed", limit=2)
    assert worst(moved) > 100 * worst([c for c in frozen if "feature" in c.what])
    assert worst(moved) > 1e-3


def test_a_pair_term_is_the_second_difference_of_the_models_scores(every):
    """Score with neither removed, less with either, plus with both: what is left is the pair's own term."""
    for m in every[:6]:
        query, key = m.strongest("query", "answer")[0], m.strongest("key", "correct")[0]
        both = m.after([*m.steer(query, "query", "answer"), *m.steer(key, "key", "correct")])
        measured = m.clean - m.without(query, "query", "answer") - m.without(key, "key", "correct") + both
        terms = m.lens.terms_by_token(m.written, len(m.prompt.tokens) - 1)
        predicted = torch.zeros_like(measured)
        columns = (terms.key == key) & torch.isin(terms.position, torch.tensor(m.prompt.span("correct")))
        predicted[terms.position[columns]] = terms.value[terms.query == query][0, columns].double()
        assert float((measured - predicted).abs().max()) <= 1e-5 * m.largest
        assert float(predicted.abs().max()) > 0


@pytest.mark.parametrize("weighting", [REALISED, CONTRASTIVE], ids=lambda w: w.kind)
def test_the_same_holds_of_weighted_terms(every, weighting):
    """Weights held, taking a query feature out of Σ_j w_j u(p, j) takes off its marginal."""
    for m in every[:6]:
        terms = mean_terms(m.lens, [m.prompt], [m.written], weighting)
        weights = weighting.weigh(m.lens, m.prompt, m.written).weights.double()
        marginal = terms.marginal("query")
        for feature in m.strongest("query", "answer"):
            measured = float(weights @ (m.without(feature, "query", "answer") - m.clean))
            assert measured == pytest.approx(-float(marginal[feature]), abs=2e-5 * m.largest)
