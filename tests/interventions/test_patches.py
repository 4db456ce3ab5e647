"""Heads ablated in three ways, and heads held at their own patterns, each against what the model then computes."""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.readings import read_attention, read_patterns
from qklens.data.render import LetterForm, render
from qklens.errors import QklensError
from qklens.interventions import engine
from qklens.interventions.direction import Direction
from qklens.interventions.engine import Workset
from qklens.interventions.patch import HeadAblation, frozen_patterns, other_items
from qklens.interventions.steer import Steer
from qklens.models.attention import AttentionRead
from qklens.models.copies import Reads

HEADS = [(0, 2), (2, 1)]
EVERY = [(layer, head) for layer in range(3) for head in range(4)]


@pytest.fixture(scope="module")
def work(tiny_llama, word_tokenizer, items) -> Workset:
    prompts = [
        render(word_tokenizer, item, "harm", order, LetterForm("", ""))
        for item in items[:5]
        for order in ("correct_first", "incorrect_first")
    ]
    return Workset(tiny_llama(), prompts)


def outputs_under(work: Workset, *interventions) -> torch.Tensor:
    return read_attention(work, interventions).outputs


def test_zero_and_mean_stand_in_at_the_answer(work):
    clean = outputs_under(work)
    zero = outputs_under(work, HeadAblation.zero(HEADS, work.subject.d_head))
    mean = outputs_under(work, HeadAblation.mean(clean, HEADS))
    for layer, head in HEADS:
        assert not zero[:, layer, head].any()
        wanted = clean[:, layer, head].mean(dim=0)
        assert torch.equal(mean[:, layer, head], wanted.expand(len(work), -1))


def test_resampling_gives_each_prompt_another_item_s_output_of_the_same_order(work, monkeypatch):
    monkeypatch.setattr(engine, "TOKENS_PER_BATCH", 150)
    several = Workset(work.subject, work.prompts)
    assert len(several.chunks) > 1
    clean = outputs_under(work)
    ablation = HeadAblation.resample(clean, HEADS, seed=4)
    after = outputs_under(several, ablation)
    donors = other_items(5, 4)
    for i in range(len(work)):
        donor = 2 * int(donors[i // 2]) + i % 2
        assert donor // 2 != i // 2
        for layer, head in HEADS:
            torch.testing.assert_close(after[i, layer, head], clean[donor, layer, head], rtol=0, atol=1e-5)
    assert torch.allclose(several.margins([ablation]), work.margins([ablation]), atol=1e-4)
    assert ablation.describe()["kind"] == "resample"


@pytest.mark.parametrize("n", [2, 3, 7, 64])
def test_every_item_gives_once_and_none_to_itself(n):
    draws = {tuple(other_items(n, seed).tolist()) for seed in range(20)}
    for draw in draws:
        assert sorted(draw) == list(range(n))
        assert all(i != donor for i, donor in enumerate(draw))
    assert len(draws) == 1 if n == 2 else len(draws) > 1
    assert torch.equal(other_items(n, 3), other_items(n, 3))


def test_ablations_that_do_not_fit_are_refused(work):
    with pytest.raises(QklensError, match="needs another item to take from: 1 given, expected at least 2"):
        HeadAblation.resample(torch.zeros(2, 3, 4, 8), HEADS, 0)
    for outputs in (torch.zeros(6), torch.zeros(3, 8)):
        with pytest.raises(QklensError, match=r"ablation of L0H2 has outputs of shape .*; expected 8 numbers"):
            work.margins([HeadAblation({(0, 2): outputs})])
    with pytest.raises(QklensError, match="head 9 does not exist"):
        work.margins([HeadAblation.zero([(0, 9)], 8)])


def rows_under(work: Workset, *interventions) -> dict[int, torch.Tensor]:
    kept: dict[int, torch.Tensor] = {}

    def keep(read: AttentionRead) -> None:
        kept[read.layer] = read.pattern[:, :, -1].clone()

    work.logits(interventions, reads=lambda index, batch: Reads({}, dict.fromkeys(range(3), keep)))
    return kept


@pytest.mark.parametrize("from_layer", [0, 2])
def test_frozen_heads_keep_their_rows_while_the_steered_ones_move(work, from_layer):
    steered = [(0, 1), (1, 3)]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    direction = Direction("d", dict.fromkeys(range(3), vector), dict.fromkeys(range(3), 3.0), lambda m, s: s(m)[..., 0])
    steer = Steer(direction, 2.0, side="query", heads=tuple(steered), tokens=("answer",))
    patch = frozen_patterns(read_patterns(work, EVERY), steered, from_layer)
    clean, free, frozen = rows_under(work), rows_under(work, steer), rows_under(work, steer, patch)
    for layer, head in EVERY:
        if (layer, head) in steered:
            assert (frozen[layer][:, head] - clean[layer][:, head]).abs().max() > 1e-3
        elif layer >= from_layer:
            assert torch.equal(frozen[layer][:, head], clean[layer][:, head])
        else:
            assert torch.equal(frozen[layer][:, head], free[layer][:, head])
    assert not torch.equal(free[2], clean[2]), "left free, later heads answer"
    assert not torch.equal(work.margins([steer]), work.margins([steer, patch]))
    plain = Workset(work.subject, work.prompts, reuse=False)
    assert torch.allclose(work.margins([steer, patch]), plain.margins([steer, patch]), atol=1e-4)


def test_a_freeze_without_heads_is_refused(work):
    rows = read_patterns(work, EVERY)
    with pytest.raises(
        QklensError, match="no head is left to freeze: of 12 heads all from layer 2 on are named as free"
    ):
        frozen_patterns(rows, [(2, head) for head in range(4)], 2)
    some = frozen_patterns({(1, 0): rows[1, 0][:3]}, [])
    with pytest.raises(QklensError, match=r"row of L1H0 for prompt \d has \d+ entries, its prompt has"):
        Workset(work.subject, work.prompts[3:4] * 4).margins([some])
