"""A source that leaves a known part of what the heads read unexplained: the share that runs through it is recovered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from planted_heads import ANSWER, HEADS, PRESSURE, RIGHT, STILL, WIDTH, planted, prompts
from planted_heads import D_HEAD as WIDE
from qklens.analyses.lens import head_lens
from qklens.analyses.readings import read_streams
from qklens.analyses.replaced_error import REPLACEMENTS
from qklens.analyses.written import write_prompts
from qklens.dictionaries.source import ErrorByDecoding, Stream, dense_decode
from qklens.interventions.engine import Workset
from qklens.models.scores import score_maps
from qklens.models.subject import Subject
from qklens.studies.harm_pressure import error_terms
from qklens.studies.results_around import ErrorEffect, ErrorTerms

SELECTING = [(1, 0), (1, 2)]
ROLES: dict[Any, str] = {"refuse_redirect": f"axis {PRESSURE}", "harm_detection": f"axis {RIGHT}"}


@dataclass(frozen=True, eq=False)
class Axes(ErrorByDecoding):
    """One feature an axis; of the mark on the right option's axis a share ρ is left to the error."""

    left_out: float
    name: str = "axes"
    site: str = "resid_pre"
    layers: tuple[int, ...] = (1,)
    labels: tuple[str, ...] = tuple(f"axis {i}" for i in range(WIDTH))

    def reads(self, layer: int) -> tuple[int, ...]:
        return (layer,)

    def encode(self, layer: int, stream: Stream) -> Tensor:
        return stream(layer)

    def decode(self, layer: int, activations: Tensor) -> Tensor:
        return dense_decode(self, layer, activations)

    def directions(self, layer: int) -> Tensor:
        scale = torch.ones(WIDTH)
        scale[RIGHT] = 1 - self.left_out
        return torch.diag(scale)

    def bias(self, layer: int) -> Tensor:
        return torch.zeros(WIDTH)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


@dataclass(eq=False)
class Bench:
    """What the stage asks of a lab, over hand-made prompts."""

    subject: Subject
    source: Axes
    seed: int = 0
    works: dict[str, Workset] = field(default_factory=dict)

    def prompts(self, condition: str, half: str) -> list:
        return prompts(condition == "harm", 6)

    def work(self, condition: str, half: str) -> Workset:
        return self.works.setdefault(condition, Workset(self.subject, self.prompts(condition, half)))

    def written(self, condition: str, half: str, layer: int) -> list:
        streams = read_streams(self.work(condition, half), [layer])
        return write_prompts(self.subject, self.source, score_maps(self.subject, layer), streams)

    def lens(self, layer: int, head: int):
        return head_lens(self.subject, self.source, layer, head)


def bench(left_out: float, word_tokenizer) -> Bench:
    """Under harm the heads' queries are nothing until they are steered: attention is flat, small effects are linear."""
    subject = planted(word_tokenizer)
    found = Bench(subject, Axes(left_out))
    answer = found.written("harm", "report", 1)[0].residual[-1]
    balance = -0.6 * float(answer[ANSWER] / answer[PRESSURE])
    with torch.no_grad():
        for head in range(HEADS):
            subject.model.model.layers[1].self_attn.q_proj.weight[head * WIDE + STILL, PRESSURE] = balance
    found.works.clear()
    return found


def effects(one: Bench) -> dict[tuple[str | None, str | None], ErrorEffect]:
    rows = error_terms.run(one, SELECTING, ROLES, -0.001).results["error_effects"]
    return {(r["place"], r["error"]): ErrorEffect.model_validate(r) for r in rows}


def key_scale(x: Tensor, mark: float) -> float:
    """What the heads' keys read of a token whose mark on RIGHT is given: mark / rms of the whole token."""
    edited = x.clone()
    edited[RIGHT] = mark
    return mark / float((edited.pow(2).mean() + 1e-6).sqrt())


@pytest.mark.parametrize("left_out", [0.2, 0.6])
def test_the_share_that_runs_through_the_error_is_recovered(word_tokenizer, left_out: float) -> None:
    one = bench(left_out, word_tokenizer)
    found = effects(one)
    assert set(found) == {(None, None)} | {(p, e) for p in ("query", "options", "prompt", "both") for e in REPLACEMENTS}
    prompt, parts = one.prompts("harm", "report")[0], one.written("harm", "report", 1)[0]
    right, wrong = (parts.residual[prompt.span(name)[0]] for name in ("correct", "incorrect"))
    whole = key_scale(right, 1.0)
    zero = 1 - key_scale(right, 1 - left_out) / whole
    # Both options and the first token stand at one place in these prompts, so the mean error is a third of it on each.
    mean = 1 - (key_scale(right, 1 - left_out + left_out / 3) - key_scale(wrong, left_out / 3)) / whole
    for place in ("options", "prompt", "both"):
        for kind, expected in (("zero", zero), ("mean", mean), ("other_item", 0.0)):
            lost = found[place, kind].lost_attention
            assert lost is not None
            assert lost[0] == pytest.approx(expected, abs=0.01), (place, kind)
            assert lost[1] <= lost[0] + 1e-6
            assert lost[0] <= lost[2] + 1e-6
    for kind in ("zero", "mean", "other_item"):  # the answer's own error is nothing
        lost = found["query", kind].lost_attention
        assert lost is not None
        assert lost[0] == pytest.approx(0.0, abs=1e-6)
    assert found[None, None].steering_attention[0] > 0
    assert found["options", "random"].draws == error_terms.N_RANDOM


def test_the_algebra_says_the_same_with_norms_held(word_tokenizer) -> None:
    rows = error_terms.run(bench(0.35, word_tokenizer), SELECTING, ROLES, None).results
    assert rows["error_effects"] == []
    split = [ErrorTerms.model_validate(r) for r in rows["error_terms"] if r["condition"] == "harm"]
    assert len(split) == len(SELECTING)
    for row in split:
        assert row.total < 0
        assert row.through["error"] / row.total == pytest.approx(0.35, abs=1e-5)
        assert sum(row.through.values()) == pytest.approx(row.total)


def test_a_source_without_error_loses_nothing(word_tokenizer) -> None:
    for (place, _), row in effects(bench(0.0, word_tokenizer)).items():
        assert row.margin_change == (0.0, 0.0, 0.0), place
        assert row.lost_attention is not None
        assert np.allclose(row.lost_attention, 0, atol=1e-6)
