"""Many interventions in one pass give what each gives alone, on every side and by every kind of patch."""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.readings import read_patterns
from qklens.data.render import LetterForm, render
from qklens.dictionaries.directions import Directions
from qklens.errors import QklensError
from qklens.interventions import engine
from qklens.interventions.direction import feature_direction
from qklens.interventions.engine import Workset
from qklens.interventions.patch import HeadAblation, PatternPatch, ScoreShift
from qklens.interventions.steer import Steer
from qklens.models.families import load_family
from qklens.models.subject import wrap_model
from tiny_families import tiny_model

FORM = LetterForm("", "")
STEERS = (
    {"layers": (1,), "tokens": ("answer",)},
    {"layers": (0,), "tokens": ("question",)},
    {"side": "query", "heads": ((1, 0), (2, 3)), "tokens": ("answer",)},
    {"side": "query", "heads": ((1, 0),), "tokens": ("answer",), "norm": "frozen"},
    {"side": "key", "heads": ((1, 0),), "tokens": ("correct",)},
    {"side": "key", "heads": ((1, 0),), "tokens": ("correct", "incorrect"), "key_scope": "head"},
    {"side": "value", "layers": (2,), "tokens": ("incorrect",)},
    {"mode": "ablate", "layers": (1,), "tokens": ("question",)},
)


@pytest.fixture(scope="module")
def prompts(word_tokenizer, items):
    return [render(word_tokenizer, i, c, "correct_first", FORM) for i in items[:3] for c in ("harm", "none")]


@pytest.fixture(scope="module", params=["llama gqa", "qwen3", "gpt2", "gemma2 low cap", "gpt_oss"])
def alone(request, word_tokenizer, prompts):
    """A model, interventions, the margins under each by itself on the plain path, and the clean ones."""
    model = tiny_model(request.param, len(word_tokenizer), torch.float32)
    subject = wrap_model(model, word_tokenizer, load_family(model.config.model_type))
    plain = Workset(subject, prompts, reuse=False)
    some = interventions(subject, plain)
    return subject, some, torch.stack([plain.margins([one]) for one in some]), plain.margins()


def interventions(subject, work: Workset) -> list:
    vector = torch.randn(subject.d_model, generator=torch.Generator().manual_seed(0))
    layers = range(subject.n_layers)
    source = Directions(("d",), dict.fromkeys(layers, vector[None]), dict.fromkeys(layers, torch.zeros_like(vector)))
    direction = feature_direction(source, 0, dict.fromkeys(layers, 2.0))
    rows = read_patterns(work, [(1, 0), (2, 1)])
    flat = {head: [torch.full_like(row, 1 / len(row)) for row in values] for head, values in rows.items()}
    shift = {(1, 2): [torch.linspace(-1, 1, len(row)) for row in rows[1, 0]]}
    return [
        *(Steer(direction, 1.5, **options) for options in STEERS),
        PatternPatch({(1, 0): flat[1, 0]}),
        PatternPatch(flat),
        HeadAblation({(2, 1): torch.zeros(subject.d_head)}),
        ScoreShift(shift),
        Steer(direction, 0.0, layers=(1,), tokens=("answer",)),
    ]


@pytest.mark.parametrize(("reuse", "columns"), [(True, 13), (True, 256), (False, 256)])
def test_each_is_as_if_it_ran_alone(alone, prompts, reuse, columns, monkeypatch):
    subject, some, expected, clean = alone
    monkeypatch.setattr(engine, "COPIED_COLUMNS", columns)
    monkeypatch.setattr(engine, "TOKENS_PER_BATCH", 150)  # several batches of prompts
    work = Workset(subject, prompts, reuse=reuse)
    assert len(work.chunks) > 1
    before = work.margins()
    assert ((expected - clean).abs().amax(dim=1)[:-1] > 1e-4).all()
    assert torch.allclose(work.margins_each(some), expected, atol=2e-5)
    assert torch.equal(work.margins(), before)


def test_answer_edits_run_one_token_a_row(tiny_llama, prompts):
    work = Workset(tiny_llama(), prompts)
    work.margins()
    before = work.ran.columns
    ablations = [HeadAblation({(layer, 0): torch.zeros(8)}) for layer in range(3)]
    work.margins_each(ablations)
    assert work.ran.columns - before == 3 * len(prompts)


def test_one_that_changes_nothing_is_named(tiny_llama, prompts):
    work = Workset(tiny_llama(), prompts)
    rows = read_patterns(work, [(2, 1)])
    idle = ScoreShift({(1, 0): [torch.zeros_like(row) for row in rows[2, 1]]})
    real = PatternPatch({(2, 1): [torch.full_like(row, 1 / len(row)) for row in rows[2, 1]]})
    with pytest.raises(QklensError, match=r"'heads': \[\[1, 0\]\].*changed no value in any of 6 prompts"):
        work.margins_each([real, idle])
