"""Vectors added to what some heads read: the same as steering where both can say it, and each prompt its own."""

from __future__ import annotations

import pytest
import torch

from qklens.data.render import CONDITIONS, LetterForm, render
from qklens.errors import QklensError
from qklens.interventions.direction import Direction
from qklens.interventions.engine import Workset
from qklens.interventions.shift import StreamShift
from qklens.interventions.steer import Steer

HEADS = ((1, 0), (1, 3), (2, 1))
LAYERS = (1, 2)


@pytest.fixture(scope="module")
def work(tiny_llama, items):
    subject = tiny_llama(dtype=torch.float64)
    chosen = [
        render(subject.tokenizer, item, condition, order, LetterForm("", ""))
        for item in items[:3]
        for condition in CONDITIONS
        for order in ("correct_first", "incorrect_first")
    ]
    return Workset(subject, chosen)


def drawn(work, seed: int = 0) -> dict[int, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        m: [torch.randn(len(p.tokens), work.subject.d_model, generator=generator) for p in work.prompts] for m in LAYERS
    }


def along(vector: torch.Tensor) -> Direction:
    return Direction("v", dict.fromkeys(LAYERS, vector), {}, lambda layer, stream: stream(layer) @ vector)


@pytest.mark.parametrize("side", ["query", "key"])
def test_one_vector_for_all_is_steering(work, side: str) -> None:
    vector = torch.randn(work.subject.d_model, generator=torch.Generator().manual_seed(1))
    tokens = ("answer",) if side == "query" else ("correct", "incorrect")
    scope = "group" if side == "query" else "head"
    steer = Steer(along(vector), 2.0, unit="raw", side=side, heads=HEADS, tokens=tokens, key_scope=scope)
    nothing = {m: [torch.zeros(len(p.tokens), work.subject.d_model) for p in work.prompts] for m in LAYERS}
    everywhere = {m: [2 * vector.expand(len(p.tokens), -1) for p in work.prompts] for m in LAYERS}
    plus = StreamShift("v", nothing, HEADS, side, tokens, dict.fromkeys(LAYERS, 2 * vector))
    given = StreamShift("v", everywhere, HEADS, side, tokens)
    swept = work.sweep([steer, plus, given], HEADS)
    assert torch.allclose(swept.margins[0], swept.margins[1], atol=1e-6)
    assert torch.allclose(swept.margins[0], swept.margins[2], atol=1e-6)
    assert torch.allclose(swept.attention[0], swept.attention[1], atol=1e-6)
    assert (swept.margins[0] - work.margins()).abs().max() > 1e-3


@pytest.mark.parametrize("tokens", [("all",), ("answer",), ("incorrect", "correct")])
@pytest.mark.parametrize("side", ["query", "key"])
def test_each_prompt_gets_its_own(work, side: str, tokens: tuple[str, ...]) -> None:
    """Alone in a workset of its own, run whole, a prompt gives what it gives in the batch that shares work."""
    shifts = drawn(work)
    together = work.margins([StreamShift("s", shifts, HEADS, side, tokens)])
    for i in (0, 3, 17):
        alone = Workset(work.subject, [work.prompts[i]], reuse=False)
        mine = {m: [rows[i]] for m, rows in shifts.items()}
        assert torch.allclose(alone.margins([StreamShift("s", mine, HEADS, side, tokens)])[0], together[i], atol=1e-6)


def test_the_clean_run_is_the_same_afterwards(work) -> None:
    before = work.margins()
    work.margins([StreamShift("s", drawn(work), HEADS, "key")])
    assert torch.equal(work.margins(), before)


def test_what_does_not_fit_is_refused(work) -> None:
    shifts = drawn(work)
    short = {m: [row[:-1] for row in rows] for m, rows in shifts.items()}
    with pytest.raises(QklensError, match=r"shift 's' of layer 1 has shape .* for prompt \d+, expected"):
        work.margins([StreamShift("s", short, HEADS, "key")])
    with pytest.raises(QklensError, match=r"has no vectors for layer 2; it has \[1\]"):
        work.margins([StreamShift("s", {1: shifts[1]}, HEADS, "query")])
