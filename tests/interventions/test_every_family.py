"""On every family: shared beginnings, skipped layers and copies side by side give what whole prompts give.

To 1e-5 of the largest number, 85 roundings of float32; some families' logits reach 11.
"""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.readings import read_patterns
from qklens.data.render import ORDERS, LetterForm, render
from qklens.dictionaries.directions import Directions
from qklens.interventions import engine
from qklens.interventions.direction import Direction, feature_direction
from qklens.interventions.engine import Workset
from qklens.interventions.patch import HeadAblation, PatternPatch, ScoreShift
from qklens.interventions.steer import Steer
from qklens.models.batch import left_padded
from qklens.models.copies import Reads
from qklens.models.families import load_family
from qklens.models.passes import run_pass
from qklens.models.prefill import prefill
from qklens.models.subject import Subject, wrap_model
from tiny_families import CASES, tiny_model

FORM = LetterForm("", "")
SHARED = [5, 6, 7, 8, 9, 10, 11, 12, 13]
SEQUENCES = [
    [*SHARED, 21, 22, 23],
    [*SHARED, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41],
    [*SHARED, 31, 32, 33, 34, 35, 36, 37, 38, 39, 50, 51, 52, 53],
    [61, 62],
    [*SHARED, 31, 32, 33, 34, 35, 36, 37, 38, 39, 50, 51, 52, 54],
    [*SHARED, 21, 22, 23],  # the same prompt twice
]


@pytest.fixture(scope="module", params=list(CASES))
def subject(request, word_tokenizer) -> Subject:
    model = tiny_model(request.param, len(word_tokenizer), torch.float32)
    return wrap_model(model, word_tokenizer, load_family(model.config.model_type))


@pytest.fixture(scope="module")
def prompts(word_tokenizer, items):
    return [render(word_tokenizer, item, "harm", order, FORM) for item in items[:2] for order in ORDERS]


def any_direction(subject: Subject) -> Direction:
    vector = torch.randn(subject.d_model, generator=torch.Generator().manual_seed(0))
    layers = range(subject.n_layers)
    source = Directions(("d",), dict.fromkeys(layers, vector[None]), dict.fromkeys(layers, torch.zeros_like(vector)))
    return feature_direction(source, 0, dict.fromkeys(layers, 2.0))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max())))


@torch.no_grad()
def test_shared_beginnings_leave_what_one_pass_leaves(subject):
    batch = left_padded(SEQUENCES, 0, subject.device)
    streams: dict[int, torch.Tensor] = {}
    reads = Reads({m: (lambda x, m=m: streams.__setitem__(m, x[:, -1])) for m in range(subject.n_layers)}, {})
    whole = run_pass(subject, batch, reads=reads, keep=True)
    shared = prefill(subject, batch)
    assert shared.tokens_run < batch.input_ids.numel()
    assert same(shared.logits, whole.logits)
    real = batch.attention_mask.bool()
    for layer, ((k, v), (k2, v2)) in enumerate(zip(whole.own.pairs, shared.prefix.pairs, strict=True)):
        for one, other in ((k, k2), (v, v2)):
            assert same(one.transpose(1, 2)[real], other.transpose(1, 2)[real])
        assert same(streams[layer], shared.answer[layer])


def test_the_fast_path_gives_the_logits_of_the_plain_one(subject, prompts, monkeypatch):
    monkeypatch.setattr(engine, "COPIED_COLUMNS", 40)  # several passes, and several copies in one
    direction, top = any_direction(subject), subject.n_layers - 1
    plain, fast = Workset(subject, prompts, reuse=False), Workset(subject, prompts)
    rows = read_patterns(plain, [(1, 0), (top, 1)])
    flat = {head: [torch.full_like(row, 1 / len(row)) for row in values] for head, values in rows.items()}
    query = Steer(direction, 1.5, side="query", heads=((top, 0),), tokens=("answer",))
    points = [
        Steer(direction, 1.5, layers=(1,), tokens=("answer",)),
        Steer(direction, 1.5, layers=(top,)),
        query,
        Steer(direction, -1.0, side="query", heads=((1, 0), (2, 3)), tokens=("answer",)),
        Steer(direction, 1.5, side="query", heads=((1, 0),), tokens=("answer",), norm="frozen"),
        Steer(direction, 1.5, side="key", heads=((2, 0),), tokens=("correct",)),
        Steer(direction, 1.5, side="key", heads=((1, 0),), tokens=("correct", "incorrect"), key_scope="head"),
        Steer(direction, 1.5, side="value", layers=(top,), tokens=("incorrect",)),
        Steer(direction, 1.5, mode="ablate", layers=(1,), tokens=("question",)),
        PatternPatch(flat),
        HeadAblation({(2, 1): torch.zeros(subject.d_head)}),
        ScoreShift({(1, 2): [torch.linspace(-1, 1, len(row)) for row in rows[1, 0]]}),
        [query, HeadAblation({(1, 1): torch.zeros(subject.d_head)})],
    ]
    several = [point if isinstance(point, list) else [point] for point in points]
    expected = [plain.logits(point) for point in several]
    for point, logits in zip(several, expected, strict=True):
        assert same(fast.logits(point), logits)
    heads = [(0, 0), (top, 1)]
    for work in (fast, plain):
        swept = work.sweep(points, heads)
        margins = torch.stack([engine.letter_margins(logits, prompts) for logits in expected])
        assert same(swept.margins, margins)
        assert torch.allclose(swept.attention, plain.sweep(points, heads).attention, atol=1e-5)
        clean, now = plain.logits().double().log_softmax(-1), torch.stack(expected).double().log_softmax(-1)
        divergence = (clean.exp() * (clean - now)).sum(-1)
        assert torch.allclose(work.divergence(points).double(), divergence, atol=1e-5)
    assert fast.ran.column_layers < plain.ran.column_layers / 3
