"""What a weighting weighs with is the gradient of what it reports: logsumexps of spans, and log attention."""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.lens import HeadLens
from qklens.analyses.weighting import CONTRASTIVE, REALISED, SHARE, Weighting
from qklens.analyses.written import WrittenPrompt
from qklens.data.render import PARTS, Prompt

N = 14
SPANS = {"correct": (3, 4, 5), "incorrect": (7, 8, 9), "answer": (N - 1,), "intent": (0, 1)}


class GivenScores(HeadLens):
    """A lens on scores that are given, on a head that has a sink or none."""

    def __init__(self, values: torch.Tensor, sink: float | None) -> None:
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "sink", sink)

    def scores(self, written: WrittenPrompt, position: int) -> torch.Tensor:
        return self.values

    def pattern(self, scores: torch.Tensor) -> torch.Tensor:
        extra = [] if self.sink is None else [torch.tensor([self.sink], dtype=scores.dtype)]
        return torch.cat([scores, *extra]).softmax(dim=0)[: len(scores)]


PARTS_OF = {
    f"{name}.{part}": (at,) for name in ("correct", "incorrect") for part, at in zip(PARTS, SPANS[name], strict=True)
}
PROMPT = Prompt("", tuple(range(N)), {**SPANS, **PARTS_OF}, 0, tuple(range(N)), (0, 1), "A")
WRITTEN = object.__new__(WrittenPrompt)  # not read: the scores are given


@pytest.mark.parametrize("sink", [None, 0.7])
@pytest.mark.parametrize(
    "weighting",
    [REALISED, CONTRASTIVE, SHARE, Weighting("share", "intent"), Weighting("contrastive", parts=("letter", "content"))],
    ids=lambda w: f"{w.kind} {w.span} {len(w.parts)}",
)
def test_weights_are_the_gradient_of_the_logsumexp(weighting, sink):
    scores = 2 * torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = weighting.weigh(GivenScores(scores, sink), PROMPT, WRITTEN)
    step, slope = 1e-5, []
    for j in range(N):
        up, down = (scores.clone().index_add_(0, torch.tensor([j]), scores.new_tensor([s])) for s in (step, -step))
        ends = [weighting.weigh(GivenScores(s, sink), PROMPT, WRITTEN).logsumexp for s in (up, down)]
        slope.append((ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(found.weights, torch.tensor(slope, dtype=torch.float64), rtol=0, atol=1e-9)


def test_log_ratio_and_log_attention_are_the_patterns_own():
    scores = 3 * torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for sink in (None, 1.5):
        lens = GivenScores(scores, sink)
        pattern = lens.pattern(scores)
        correct, incorrect = (float(pattern[list(SPANS[name])].sum().log()) for name in ("correct", "incorrect"))
        assert CONTRASTIVE.weigh(lens, PROMPT, WRITTEN).logsumexp == pytest.approx(correct - incorrect, abs=1e-12)
        assert SHARE.weigh(lens, PROMPT, WRITTEN).logsumexp == pytest.approx(correct, abs=1e-12)


def test_log_attention_of_next_to_nothing_is_still_a_number():
    scores = torch.zeros(N)
    scores[list(SPANS["correct"])] = -200.0
    found = SHARE.weigh(GivenScores(scores, None), PROMPT, WRITTEN).logsumexp
    assert found == pytest.approx(-200 + torch.log(torch.tensor(3 / (N - 3))).item(), abs=1e-3)


@pytest.mark.parametrize("weighting", [REALISED, CONTRASTIVE, SHARE], ids=lambda w: w.kind)
def test_a_hidden_span_has_neither_weights_nor_a_logsumexp(weighting):
    scores = torch.zeros(N)
    scores[list(SPANS["correct"])] = float("-inf")
    found = weighting.weigh(GivenScores(scores, None), PROMPT, WRITTEN)
    assert found.logsumexp is None
    assert not found.weights.any()
