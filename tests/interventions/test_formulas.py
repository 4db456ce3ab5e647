"""Each steering mode and unit by its formula, and results in the order of the prompts, whatever their lengths."""

from __future__ import annotations

import pytest
import torch

from qklens.data.render import LetterForm, render
from qklens.interventions.direction import Direction
from qklens.interventions.engine import Workset
from qklens.interventions.patch import align_rows
from qklens.interventions.steer import Steer
from qklens.models.batch import left_padded

FORM = LetterForm("", "")
S, TYPICAL = -2.5, 3.0


@pytest.fixture(scope="module")
def vector() -> torch.Tensor:
    return 2 * torch.randn(32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("mode", "unit", "formula"),
    [
        ("add", "raw", lambda x, a, d: x + S * d),
        ("add", "activation_max", lambda x, a, d: x + S * TYPICAL * d),
        ("add", "resid_norm", lambda x, a, d: x + S * x.norm(dim=1, keepdim=True) / d.norm() * d),
        ("scale", "raw", lambda x, a, d: x + (S - 1) * a * d),
        ("clamp", "raw", lambda x, a, d: x + (S - a) * d),
        ("clamp", "activation_max", lambda x, a, d: x + (S * TYPICAL - a) * d),
        ("ablate", "raw", lambda x, a, d: x - a * d),
    ],
)
def test_a_mode_does_what_its_formula_says(tiny_llama, word_tokenizer, items, vector, rows, mode, unit, formula):
    subject = tiny_llama()
    prompt = render(word_tokenizer, items[0], "harm", "correct_first", FORM)
    batch = left_padded([prompt.tokens], subject.pad_id, subject.device)
    direction = Direction("d", {1: vector}, {1: TYPICAL}, lambda layer, stream: stream(layer)[..., 7])
    steer = Steer(direction, S, mode=mode, unit=unit, layers=(1,))
    (edit,) = steer.edits(subject, [prompt], batch, [0])
    wanted = formula(rows, rows[:, 7:8], vector)
    torch.testing.assert_close(edit.change(rows, lambda _: rows), wanted)
    assert not torch.allclose(wanted, rows, atol=0.1)


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_group_edit_goes_to_the_group_of_the_named_heads(tiny_llama, word_tokenizer, items, vector, side):
    subject = tiny_llama()
    prompt = render(word_tokenizer, items[0], "harm", "correct_first", FORM)
    batch = left_padded([prompt.tokens], subject.pad_id, subject.device)
    direction = Direction("d", {1: vector}, {1: TYPICAL}, lambda layer, stream: stream(layer)[..., 7])
    for heads, groups in {(0,): (0,), (1,): (0,), (2,): (1,), (0, 3): (0, 1), (2, 3): (1,)}.items():
        steer = Steer(direction, S, side=side, heads=tuple((1, head) for head in heads))
        (edit,) = steer.edits(subject, [prompt], batch, [0])
        assert edit.heads == groups


def test_results_stand_in_the_order_of_the_prompts(tiny_llama, word_tokenizer, items):
    """Batches are made by length, so prompts of falling lengths are run in another order."""
    subject = tiny_llama()
    prompts = [
        render(word_tokenizer, item, condition, "correct_first", FORM)
        for item in items[:4]
        for condition in ("harm", "none")
    ]
    prompts.sort(key=lambda prompt: -len(prompt.tokens))
    assert len(prompts[0].tokens) > len(prompts[-1].tokens)
    together = Workset(subject, prompts).margins()
    alone = torch.cat([Workset(subject, [prompt]).margins() for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, together.flip(0), atol=1e-2)


def test_weight_on_an_intent_that_the_receiver_lacks_stays_before_the_question(word_tokenizer, items):
    """None of it may reach the question or an option: that would restore an answer that the pattern did not look at."""
    none, harm = (render(word_tokenizer, items[0], c, "correct_first", FORM) for c in ("none", "harm"))
    row = torch.zeros(len(harm.tokens))
    row[list(harm.span("intent"))] = 1.0
    moved = align_rows(harm, none, row)
    before = none.span("question")[0]
    assert float(moved[:before].sum()) == pytest.approx(len(harm.span("intent")))
    assert not moved[before:].any()
