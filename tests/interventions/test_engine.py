"""Steering and patching: closed forms on one layer, reuse equals the plain path, and nothing silent."""

from __future__ import annotations

import pytest
import torch

from qklens.data.render import LetterForm, render
from qklens.dictionaries.directions import Directions
from qklens.errors import QklensError
from qklens.interventions import engine
from qklens.interventions.direction import Direction, at_equal_norm, feature_direction, random_direction
from qklens.interventions.engine import Workset
from qklens.interventions.patch import HeadAblation, PatternPatch, ScoreShift, align_rows
from qklens.interventions.steer import Steer
from qklens.models.attention import AttentionRead
from qklens.models.copies import Reads
from qklens.models.scores import rotation, score_maps

FORM = LetterForm("", "")


@pytest.fixture(scope="module")
def prompts(word_tokenizer, items):
    return [
        render(word_tokenizer, item, condition, order, FORM)
        for item in items[:3]
        for condition in ("harm", "none")
        for order in ("correct_first", "incorrect_first")
    ]


@pytest.fixture(scope="module")
def harm(word_tokenizer, items):
    return [render(word_tokenizer, item, "harm", "correct_first", FORM) for item in items[:4]]


def direction(subject, seed: int = 0) -> Direction:
    vector = torch.randn(subject.d_model, generator=torch.Generator().manual_seed(seed))
    layers = range(subject.n_layers)
    source = Directions(("d",), dict.fromkeys(layers, vector[None]), {m: torch.zeros(subject.d_model) for m in layers})
    return feature_direction(source, 0, dict.fromkeys(layers, 2.0))


def attention_of(work: Workset, layer: int, interventions=()) -> AttentionRead:
    kept: list[AttentionRead] = []
    work.logits(interventions, reads=lambda index, batch: Reads({}, {layer: kept.append}))
    assert len(kept) == 1
    return kept[0]


EDITS = {
    "residual, answer": {"layers": (1,), "tokens": ("answer",)},
    "residual, all tokens": {"layers": (1, 2)},
    "query of two heads": {"side": "query", "heads": ((1, 0), (2, 3)), "tokens": ("answer",)},
    "query frozen": {"side": "query", "heads": ((1, 0),), "tokens": ("answer",), "norm": "frozen"},
    "shared key": {"side": "key", "heads": ((1, 0),), "tokens": ("correct",)},
    "own key": {"side": "key", "heads": ((1, 0),), "tokens": ("correct", "incorrect"), "key_scope": "head"},
    "value": {"side": "value", "layers": (2,), "tokens": ("incorrect",)},
    "ablate": {"mode": "ablate", "layers": (1,), "tokens": ("question",)},
    "clamp": {"mode": "clamp", "layers": (0,), "tokens": ("correct",)},
    "scale": {"mode": "scale", "side": "query", "layers": (2,), "tokens": ("answer",)},
    "in residual norms": {"unit": "resid_norm", "layers": (1,), "tokens": ("answer",)},
}


@pytest.mark.parametrize("name", EDITS)
def test_reuse_equals_the_plain_path(tiny_llama, prompts, name):
    subject = tiny_llama()
    steer = Steer(direction(subject), 1.5, **EDITS[name])
    fast, plain = Workset(subject, prompts), Workset(subject, prompts, reuse=False)
    clean = plain.logits()
    expected = plain.logits([steer])
    assert (expected - clean).abs().max() > 1e-4
    for _ in range(2):  # the second time from the kept prefix
        assert torch.allclose(fast.logits([steer]), expected, atol=1e-5)
    assert torch.allclose(fast.logits(), clean, atol=1e-5)


def test_an_edit_at_the_answer_runs_one_token_a_prompt(tiny_llama, prompts):
    subject = tiny_llama()
    work = Workset(subject, prompts)
    work.logits()
    before = work.ran.columns
    work.logits([Steer(direction(subject), 1.0, side="query", layers=(1,), tokens=("answer",))])
    assert work.ran.columns - before == len(prompts)


def test_layers_below_the_first_edit_are_not_run(tiny_llama, prompts):
    subject = tiny_llama()
    work = Workset(subject, prompts)
    work.logits()
    before = work.ran.column_layers
    steers = [Steer(direction(subject), s, side="query", layers=(2,), tokens=("answer",)) for s in (1.0, 2.0)]
    work.margins_each(steers)
    assert work.ran.column_layers - before == 2 * len(prompts)  # the last of three layers


def test_a_large_set_keeps_nothing_between_sweeps_and_gives_the_same(tiny_llama, prompts, monkeypatch):
    subject = tiny_llama()
    steers = [Steer(direction(subject), s, side="query", layers=(2,), tokens=("answer",)) for s in (1.0, 2.0)]
    kept = Workset(subject, prompts).margins_each(steers)
    monkeypatch.setattr(engine, "CACHE_BYTES", 0)
    work = Workset(subject, prompts)
    assert torch.equal(work.margins_each(steers), kept)
    assert all(chunk.clean is None for chunk in work.chunks)


def test_the_prefix_is_clean_whatever_was_asked_first(tiny_llama, prompts):
    """A hook at position −1 that is left on while a cache fills edits the prefix, silently."""
    subject = tiny_llama()
    steer = Steer(direction(subject), 3.0, layers=(0,), tokens=("answer",))
    work, fresh = Workset(subject, prompts), Workset(subject, prompts)
    work.margins_each([steer])
    for used, clean in zip(work.chunks, fresh.chunks, strict=True):
        wanted = fresh._run_clean(clean).prefix.pairs
        assert used.clean is not None
        for pair, expected in zip(used.clean.prefix.pairs, wanted, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(pair, expected, strict=True))


def test_strength_zero_is_clean_bit_for_bit(tiny_llama, prompts):
    subject = tiny_llama()
    clean = Workset(subject, prompts).logits()
    for mode, strength in (("add", 0.0), ("scale", 1.0)):
        steer = Steer(direction(subject), strength, mode=mode, layers=(1,))
        assert torch.equal(Workset(subject, prompts).logits([steer]), clean)
        work = Workset(subject, prompts)
        swept = work.sweep([steer, Steer(direction(subject), 1.0, layers=(1,))], [(1, 0)])
        assert torch.equal(swept.margins[0], work.margins())
        assert not torch.equal(swept.margins[1], work.margins())


def test_query_add_has_its_closed_form(tiny_llama, harm):
    """q' = R W_Q n(x + s a d), with n recomputed, and untouched everywhere else."""
    subject = tiny_llama()
    d = direction(subject)
    work = Workset(subject, harm[:1])
    streams: list[torch.Tensor] = []
    work.logits(reads=lambda index, batch: Reads({1: streams.append}, {}))
    x = streams[0][0, -1] + 0.7 * 2.0 * d.vectors[1]
    normed = subject.layers[1].input_layernorm(x)
    weight = subject.layers[1].self_attn.q_proj.weight.view(4, 8, 32)[2]
    expected = rotation(subject, 1, torch.tensor(len(harm[0].tokens) - 1))(weight @ normed)
    steer = Steer(d, 0.7, side="query", heads=((1, 2),), tokens=("answer",))
    assert torch.allclose(attention_of(work, 1, [steer]).query[0, 2, -1], expected, atol=1e-5)


def test_group_and_own_key_scope_differ_exactly_in_the_other_heads(tiny_llama, harm):
    subject = tiny_llama()
    work = Workset(subject, harm[:1])
    options = {"side": "key", "heads": ((1, 0),), "tokens": ("correct",)}
    clean = attention_of(work, 1).pattern[0, :, -1]
    group = attention_of(work, 1, [Steer(direction(subject), 1.0, **options)]).pattern[0, :, -1]
    own = attention_of(work, 1, [Steer(direction(subject), 1.0, key_scope="head", **options)]).pattern[0, :, -1]
    assert torch.allclose(own[0], group[0], atol=1e-6)
    assert not torch.allclose(own[0], clean[0], atol=1e-3)
    assert torch.allclose(own[1:], clean[1:], atol=1e-6)
    assert not torch.allclose(group[1], clean[1], atol=1e-3)  # heads 0 and 1 share a key head
    assert torch.equal(group[2:], clean[2:])


def test_ablating_removes_the_direction(tiny_llama, harm):
    subject = tiny_llama()
    d = direction(subject)
    work = Workset(subject, harm[:1])
    streams: list[torch.Tensor] = []
    work.logits([Steer(d, 0.0, mode="ablate", layers=(1,))], reads=lambda index, batch: Reads({1: streams.append}, {}))
    assert (streams[0][0] @ d.vectors[1]).abs().max() < 1e-4


def test_removing_a_score_term_shifts_exactly_that_score(tiny_llama, harm):
    subject = tiny_llama()
    work = Workset(subject, harm[:2])
    row = [torch.zeros(len(p.tokens)) for p in harm[:2]]
    for values, prompt in zip(row, harm[:2], strict=True):
        values[list(prompt.span("correct"))] = -2.5
    before, after = attention_of(work, 1), attention_of(work, 1, [ScoreShift({(1, 3): row})])
    for i, index in enumerate(work.chunks[0].index):
        prompt = work.prompts[index]
        padding = work.chunks[0].batch.padding(i)
        span = [padding + p for p in prompt.span("correct")]
        old, new = before.pattern[i, 3, -1].log(), after.pattern[i, 3, -1].log()
        rest = [c for c in range(padding, work.chunks[0].batch.width) if c not in span]
        gap = (new - old)[span].mean() - (new - old)[rest].mean()
        assert gap == pytest.approx(-2.5, abs=1e-3)
        assert torch.equal(before.pattern[i, :3], after.pattern[i, :3])


def test_a_pattern_patch_writes_the_rows_and_only_the_answer(tiny_llama, harm):
    subject = tiny_llama()
    work = Workset(subject, harm)
    rows = [torch.zeros(len(p.tokens)).index_fill(0, torch.tensor(p.span("correct")[:1]), 1.0) for p in harm]
    clean, patched = attention_of(work, 2), attention_of(work, 2, [PatternPatch({(2, 1): rows})])
    for i, index in enumerate(work.chunks[0].index):
        padding = work.chunks[0].batch.padding(i)
        assert torch.equal(patched.pattern[i, 1, -1, padding:], rows[index])
        assert torch.equal(patched.pattern[i, 1, :-1], clean.pattern[i, 1, :-1])
        value_at_first = patched.output[i, -1, 1]
        assert not torch.equal(value_at_first, clean.output[i, -1, 1])


def test_ablating_every_head_by_zero_leaves_the_answer_without_attention(tiny_llama, harm):
    subject = tiny_llama()
    work = Workset(subject, harm)
    zero = {(m, h): torch.zeros(subject.d_head) for m in range(3) for h in range(4)}
    outputs = [attention_of(work, m, [HeadAblation(zero)]).output[:, -1] for m in range(3)]
    assert all(bool((o == 0).all()) for o in outputs)


def test_aligned_rows_keep_their_sum_and_their_tokens(word_tokenizer, items):
    for item in items[:5]:
        none = render(word_tokenizer, item, "none", "correct_first", FORM)
        harm = render(word_tokenizer, item, "harm", "correct_first", FORM)
        row = torch.rand(2, len(none.tokens))
        moved = align_rows(none, harm, row)
        assert torch.allclose(moved.sum(-1), row.sum(-1))
        assert bool((moved[:, list(harm.span("intent"))] == 0).all())
        for name in ("question", "correct", "incorrect", "answer"):
            assert torch.allclose(moved[:, list(harm.span(name))], row[:, list(none.span(name))])
        back = align_rows(harm, none, moved)
        assert torch.allclose(back, row)


def test_controls_have_equal_norm(tiny_llama):
    subject = tiny_llama()
    d, other = direction(subject), direction(subject, seed=3)
    for control in (random_direction(d, 0), at_equal_norm(other, d)):
        for layer in d.layers:
            assert control.vectors[layer].norm() == pytest.approx(float(d.vectors[layer].norm()), rel=1e-5)
    assert torch.equal(random_direction(d, 4).vectors[0], random_direction(d, 4).vectors[0])
    assert not torch.equal(random_direction(d, 4).vectors[0], random_direction(d, 5).vectors[0])


def test_bad_requests_are_refused_before_the_model_runs(tiny_llama, prompts):
    subject = tiny_llama()
    d = direction(subject)
    with pytest.raises(QklensError, match="expected a finite number"):
        Steer(d, float("inf"), layers=(1,))
    with pytest.raises(QklensError, match="needs layers or heads"):
        Steer(d, 1.0)
    with pytest.raises(QklensError, match="either heads or layers"):
        Steer(d, 1.0, side="query", layers=(1,), heads=((1, 0),))
    with pytest.raises(QklensError, match="edits the stream for all heads"):
        Steer(d, 1.0, heads=((1, 0),))
    with pytest.raises(QklensError, match="no vector at layer 8"):
        Steer(d, 1.0, layers=(8,))
    with pytest.raises(QklensError, match="key_scope 'head' needs side 'key'"):
        Steer(d, 1.0, side="query", heads=((1, 0),), key_scope="head")
    work = Workset(subject, prompts)
    with pytest.raises(QklensError, match="span 'intent' is not in this prompt; it has"):
        work.logits([Steer(d, 1.0, layers=(1,), tokens=("intent",))])
    with pytest.raises(QklensError, match="head 7 does not exist"):
        work.logits([Steer(d, 1.0, side="query", heads=((1, 7),), tokens=("answer",))])
    with pytest.raises(QklensError, match="no prompts"):
        Workset(subject, [])


def test_an_intervention_that_changes_nothing_is_an_error(tiny_llama, harm):
    subject = tiny_llama()
    d = direction(subject)
    silent = Direction("silent", d.vectors, d.typical, lambda layer, stream: torch.zeros(len(stream(layer))))
    with pytest.raises(QklensError, match="changed no value in any of 4 prompts"):
        Workset(subject, harm).logits([Steer(silent, 1.0, mode="ablate", layers=(1,), tokens=("answer",))])


def test_predicted_score_change_equals_the_measured_one_with_frozen_norms(tiny_llama, harm):
    """Removing s a d from the query moves each score by exactly c ⟨R W_Q γ d s a / σ, k_j⟩."""
    subject = tiny_llama()
    d = direction(subject)
    work = Workset(subject, harm[:1])
    streams: list[torch.Tensor] = []
    work.logits(reads=lambda index, batch: Reads({1: streams.append}, {}))
    clean = attention_of(work, 1)
    steer = Steer(d, -1.5, side="query", heads=((1, 2),), tokens=("answer",), norm="frozen")
    edited = attention_of(work, 1, [steer])
    keys = clean.key[0, 1]
    measured = clean.scale * (edited.query[0, 2, -1] - clean.query[0, 2, -1]) @ keys.T
    maps = score_maps(subject, 1)
    answer = len(harm[0].tokens) - 1
    change = maps.query(-1.5 * 2.0 * d.vectors[1], 2) / maps.norm.scale(streams[0][0, -1])
    predicted = maps.scale * rotation(subject, 1, torch.tensor(answer))(change) @ keys.T
    assert torch.allclose(measured, predicted, atol=1e-5)
    assert torch.corrcoef(torch.stack([measured, predicted]))[0, 1] > 0.99999


def test_two_edits_of_one_heads_own_key_are_refused(tiny_llama, harm):
    subject = tiny_llama()
    work = Workset(subject, harm)

    def key(strength: float, head: int, scope: str) -> Steer:
        options = {"side": "key", "heads": ((1, head),), "tokens": ("correct",), "key_scope": scope}
        return Steer(direction(subject), strength, **options)

    for first, second in (("head", "head"), ("head", "group"), ("group", "head")):
        with pytest.raises(QklensError, match="act on the same head and token"):
            work.margins([key(1.0, 0, first), key(2.0, 0, second)])
    both = work.margins([key(1.0, 0, "head"), key(2.0, 1, "head")])  # two heads of a group, each with its own
    assert not torch.equal(both, work.margins([key(1.0, 0, "head")]))


def test_what_a_model_cannot_take_is_refused_before_it_runs(tiny_llama, harm):
    subject = tiny_llama()
    for bad in (
        Steer(direction(subject), 1.0, layers=(1,), tokens=("nowhere",)),
        Steer(direction(subject), 1e38, layers=(1,)),
    ):
        work = Workset(subject, harm)
        with pytest.raises(QklensError):
            work.logits([bad])
        assert work.ran.columns == 0


def test_points_of_one_layer_share_the_stream_below_it(tiny_llama, prompts, monkeypatch):
    """Passes of a few points each: layers below the first edit are run once for all of them."""
    monkeypatch.setattr(engine, "COPIED_COLUMNS", 1)
    subject = tiny_llama()
    work = Workset(subject, prompts)
    work.margins()
    before = work.ran.column_layers
    points = [Steer(direction(subject), s, side="key", layers=(2,), tokens=("correct",)) for s in (1.0, 2.0, 3.0, 4.0)]
    shared = work.margins_each(points)
    own = (work.ran.column_layers - before) / (3 + 4)  # all three layers once, then the last one for each point
    assert own == sum((c.batch.width - _first(c)) * len(c.index) for c in work.chunks)
    assert torch.allclose(shared, Workset(subject, prompts, reuse=False).margins_each(points), atol=1e-5)


def _first(chunk) -> int:
    return min(chunk.batch.padding(row) + p.span("correct")[0] for row, p in enumerate(chunk.prompts))
