"""Pair terms with known answers, and properties that any decomposition must have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pair_terms import pair_terms
from qklens.analyses.factorial import TERMS, factorial_terms, removal, shapley_values, term_rows
from qklens.analyses.interactions import mean_terms
from qklens.analyses.lens import HeadLens, head_lens
from qklens.analyses.readings import SPANS, read_attention, read_patterns, read_streams
from qklens.analyses.weighting import CONTRASTIVE, REALISED, Weighting, within_span
from qklens.analyses.written import WrittenPrompt, write_prompts
from qklens.data.render import LetterForm, render
from qklens.dictionaries.directions import Directions
from qklens.errors import QklensError
from qklens.interventions.engine import Workset
from qklens.models.scores import score_maps

FORM = LetterForm("", "")


def written_by(lens: HeadLens, streams: list[dict[int, torch.Tensor]]) -> list[WrittenPrompt]:
    return write_prompts(lens.subject, lens.source, lens.maps, streams)


@pytest.fixture(scope="module")
def lab(tiny_llama, items, word_tokenizer):
    """A tiny random model with harm and benign prompts, their streams, and a random source."""
    subject = tiny_llama()
    prompts = {
        c: [render(word_tokenizer, i, c, o, FORM) for i in items[:4] for o in ("correct_first", "incorrect_first")]
        for c in ("none", "harm", "benign")
    }
    works = {c: Workset(subject, p) for c, p in prompts.items()}
    streams = {c: read_streams(w, range(3)) for c, w in works.items()}
    generator = torch.Generator().manual_seed(0)
    source = Directions(
        ("a", "b", "c", "d"),
        {m: torch.randn(4, 32, generator=generator) for m in range(3)},
        {m: torch.randn(32, generator=generator) for m in range(3)},
    )
    return subject, source, prompts, works, streams


def test_a_planted_pair_has_its_closed_form(tiny_llama):
    """Two sources, identity-like weights: every pair term is known in advance."""
    subject = tiny_llama(num_key_value_heads=4, num_hidden_layers=1)
    attention = subject.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        # Head 0 reads "refuse" (axis 0) into its query and "harm" (axis 1), with a minus, into its key. The two
        # coordinates at index 3 and 7 turn slowest, so that position hardly matters.
        attention.q_proj.weight[3, 0] = 2.0
        attention.k_proj.weight[3, 1] = -5.0
    unit = torch.eye(32)
    source = Directions(("refuse", "harm"), {0: unit[:2]}, {0: torch.zeros(32)})
    stream = torch.zeros(6, 32)
    stream[2, 1] = 3.0
    stream[5, 0] = 1.5
    stream[:, 9] = 1.0
    maps = score_maps(subject, 0)
    (written,) = write_prompts(subject, source, maps, [{0: stream}])
    lens = head_lens(subject, source, 0, 0)
    found = lens.terms_by_token(written, 5)
    sigma_q, sigma_k = maps.norm.scale(stream[5]), maps.norm.scale(stream[2])
    angle = 3 * 10000.0 ** (-6 / 8)
    expected = maps.scale * (2.0 * 1.5 / sigma_q) * (-5.0 * 3.0 / sigma_k) * np.cos(angle)
    there = (found.key == 1) & (found.position == 2)
    assert float(found.value[found.query == 0][:, there]) == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) < -1.0
    assert found.value[:, ~there].abs().max() < 1e-6
    assert found.value[found.query != 0].abs().max() < 1e-6


@pytest.mark.parametrize("weighting", ["realised", "contrastive", "share"])
@pytest.mark.parametrize("condition", ["none", "harm"])
def test_mean_terms_sum_to_the_mean_weighted_score(lab, weighting, condition):
    subject, source, prompts, _, streams = lab
    lens = head_lens(subject, source, 1, 2)
    written = written_by(lens, streams[condition])
    how = Weighting(weighting)
    means = mean_terms(lens, prompts[condition], written, how)
    total = 0.0
    for prompt, parts in zip(prompts[condition], written, strict=True):
        scores = lens.scores(parts, prompt.spans["answer"][0])
        weights = how.weigh(lens, prompt, parts).weights
        total += float((weights * scores.nan_to_num(neginf=0.0)).sum()) / len(written)
    assert means.total == pytest.approx(total, abs=1e-4)
    assert sum(means.shares().values()) == pytest.approx(means.total, abs=1e-6)
    assert 0 <= means.error_share() <= 1


@pytest.mark.parametrize("weighting", ["realised", "contrastive"])
def test_tokens_weighed_as_without_pressure(lab, weighting):
    """The pressed scores at the options' tokens, each as much as the head looks there without pressure."""
    subject, source, prompts, _, streams = lab
    lens, how = head_lens(subject, source, 1, 2), Weighting(weighting)
    written = {c: written_by(lens, streams[c]) for c in ("none", "harm")}
    means = mean_terms(lens, prompts["harm"], written["harm"], how, (prompts["none"], written["none"]))
    total = 0.0
    for pressed, parts, calm, before in zip(
        prompts["harm"], written["harm"], prompts["none"], written["none"], strict=True
    ):
        scores = lens.scores(parts, pressed.spans["answer"][0])
        weights = how.weigh(lens, calm, before).weights
        for name in how.spans():
            here, there = list(pressed.span(name)), list(calm.span(name))
            total += float(weights[there] @ scores[here]) / len(written["harm"])
    assert means.total == pytest.approx(total, abs=1e-4)
    own = mean_terms(lens, prompts["harm"], written["harm"], how).total
    assert abs(own - total) > 1e-3
    assert how.fits(prompts["none"][0], prompts["harm"][0])
    asked = prompts["harm"][0]
    more = {n: (*at, at[-1] + 1) for n, at in asked.spans.items() if n in ("correct", "correct.boundary")}
    longer = replace(asked, spans=asked.spans | more)
    assert not how.fits(prompts["none"][0], longer)
    assert not Weighting("share").fits(prompts["none"][0], prompts["harm"][0])
    same = mean_terms(lens, prompts["none"], written["none"], how, (prompts["none"], written["none"])).total
    assert same == pytest.approx(mean_terms(lens, prompts["none"], written["none"], how).total, abs=1e-6)


def test_scores_from_sources_give_the_models_own_pattern(lab):
    subject, source, prompts, works, streams = lab
    rows = read_patterns(works["harm"], [(1, 2)])[1, 2]
    lens = head_lens(subject, source, 1, 2)
    for prompt, stream, row in zip(prompts["harm"], streams["harm"], rows, strict=True):
        scores = lens.scores(written_by(lens, [stream])[0], prompt.spans["answer"][0])
        assert torch.allclose(scores.softmax(0), row, atol=1e-5)


def test_top_ranks_by_signed_value_from_both_ends(lab):
    subject, source, prompts, _, streams = lab
    lens = head_lens(subject, source, 2, 0)
    means = mean_terms(lens, prompts["harm"], written_by(lens, streams["harm"]), REALISED)
    pairs = means.top(4)
    values = [v for *_, v in pairs]
    every = torch.cat([block.value.flatten() for block in means.blocks()]).tolist()
    assert len(every) == 36
    assert values[:4] == sorted(every)[:4]
    assert values[4:] == sorted(every, reverse=True)[:4]
    query, key = means.names.index(pairs[0][0]), means.names.index(pairs[0][1])
    assert means.between(query, key) == pytest.approx(pairs[0][2])


def test_swapping_the_options_negates_the_contrast(lab):
    subject, source, prompts, _, streams = lab
    lens = head_lens(subject, source, 1, 1)
    prompt, parts = prompts["none"][0], written_by(lens, streams["none"][:1])[0]
    swapped = {**prompt.spans, "correct": prompt.spans["incorrect"], "incorrect": prompt.spans["correct"]}
    other = type(prompt)(**{**prompt.__dict__, "spans": swapped})
    one, mirrored = (CONTRASTIVE.weigh(lens, p, parts) for p in (prompt, other))
    assert torch.allclose(mirrored.weights, -one.weights)
    assert mirrored.logsumexp == pytest.approx(-one.logsumexp)


def test_weights_are_softmax_within_spans(lab):
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weights = within_span(scores, (1, 3))
    assert torch.allclose(weights[[1, 3]], torch.tensor([2.0, 4.0]).softmax(0))
    assert bool((weights[[0, 2]] == 0).all())
    with pytest.raises(QklensError, match="without tokens"):
        within_span(scores, ())


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 20.0), st.permutations(range(4)))
def test_rescaling_and_permuting_features_changes_nothing_realised(lab, scale, order):
    """A decoder times s has its activation divided by s; permuting features permutes rows and columns."""
    subject, source, prompts, _, streams = lab
    vectors = {m: v[list(order)] * scale for m, v in source.vectors.items()}
    other = Directions(tuple(source.labels[i] for i in order), vectors, source.means)
    stream, position = streams["harm"][0], prompts["harm"][0].spans["answer"][0]
    weights = torch.zeros(len(prompts["harm"][0].tokens))
    weights[5] = 1.0
    first = head_lens(subject, source, 1, 3)
    second = head_lens(subject, other, 1, 3)
    a = pair_terms(first, written_by(first, [stream])[0], position, weights)
    b = pair_terms(second, written_by(second, [stream])[0], position, weights)
    index = [*order, 4, 5]
    assert torch.allclose(a[index][:, index], b, atol=1e-3 * float(a.abs().max()))


def test_attention_reading_sums_to_one_and_matches_patterns(lab):
    _, _, prompts, works, _ = lab
    reading = read_attention(works["harm"])
    assert torch.allclose(reading.mass.sum(-1), torch.ones(reading.mass.shape[:-1]), atol=1e-5)
    row = read_patterns(works["harm"], [(2, 3)])[2, 3][1]
    correct = row[list(prompts["harm"][1].span("correct"))].sum()
    assert reading.mass[1, 2, 3, SPANS.index("correct")] == pytest.approx(float(correct), abs=1e-6)


def test_letter_attribution_of_all_heads_is_the_attention_part_of_the_margin(lab):
    """With zero MLPs the margin is embedding + heads, linearly through the frozen final norm."""
    subject, _, _, _, _ = lab
    saved = [layer.mlp.down_proj.weight.clone() for layer in subject.layers]
    try:
        with torch.no_grad():
            for layer in subject.layers:
                layer.mlp.down_proj.weight.zero_()
        work = Workset(subject, lab[2]["harm"])
        reading = read_attention(work)
        embedding = torch.stack([subject.model.model.embed_tokens.weight[p.tokens[-1]] for p in work.prompts])
        final = read_final(work)
        norm = subject.model.model.norm
        sigma = (final.pow(2).mean(-1) + norm.variance_epsilon).sqrt()
        ids = torch.tensor([p.letter_ids for p in work.prompts])
        toward = subject.model.lm_head.weight[ids[:, 0]] - subject.model.lm_head.weight[ids[:, 1]]
        rest = (embedding * norm.weight / sigma[:, None] * toward).sum(-1)
        assert torch.allclose(reading.letter_logit.sum((1, 2)) + rest, reading.margins, atol=1e-4)
    finally:
        with torch.no_grad():
            for layer, weight in zip(subject.layers, saved, strict=True):
                layer.mlp.down_proj.weight.copy_(weight)


def read_final(work: Workset) -> torch.Tensor:
    from qklens.models.copies import Reads

    rows = torch.zeros(len(work), work.subject.d_model)

    def reads(index, batch):
        return Reads({work.subject.n_layers: lambda x: rows.__setitem__(torch.tensor(index), x[:, -1])}, {})

    work.logits(reads=reads)
    return rows


def test_factorial_terms_rebuild_the_pressed_scores(lab):
    """ordinary + all terms + a constant is the model's own score at every shared token; ordinary is the benign one."""
    subject, source, prompts, _, streams = lab
    lens = head_lens(subject, source, 1, 2)
    for i in range(4):
        harm, benign = prompts["harm"][i], prompts["benign"][i]
        pressed, calm = streams["harm"][i][1], streams["benign"][i][1]
        terms, ordinary, _ = factorial_terms(subject, (1, 2), harm, benign, pressed, calm)
        assert set(terms) == set(TERMS)
        own = lens.scores(written_by(lens, [streams["harm"][i]])[0], harm.spans["answer"][0])
        shared = range(harm.spans["question"][0], len(harm.tokens))
        assert torch.allclose(ordinary[shared], benign_scores(subject, harm, benign, calm)[shared], atol=1e-4)
        left = (own - sum(terms[t] for t in TERMS) - ordinary)[shared]
        assert torch.allclose(left, left[0].expand_as(left), atol=1e-4), "a constant, which softmax does not see"
        options = list(harm.span("correct"))
        assert bool((terms["elsewhere"][options] == 0).all())
        assert terms["harm_key"][options].abs().max() > 1e-3
        intent = list(harm.span("intent"))
        assert terms["intent_key"][intent].unique().numel() == 1
        assert bool((terms["harm_key"][intent] == 0).all())


def test_an_unchanged_prompt_has_no_terms(lab):
    subject, _, prompts, _, streams = lab
    benign, calm = prompts["benign"][0], streams["benign"][0][1]
    terms, _, _ = factorial_terms(subject, (1, 2), benign, benign, calm, calm)
    assert all(values.abs().max() < 1e-5 for values in terms.values())


def benign_scores(subject, harm, benign, calm) -> torch.Tensor:
    """The benign query against the benign keys, turned to the harm prompt's positions."""
    from qklens.models.scores import rotation

    maps = score_maps(subject, 1)
    x = calm[benign.spans["answer"][0]]
    turn = rotation(subject, 1, torch.arange(len(harm.tokens)))
    query = turn.at(harm.spans["answer"][0])(maps.whole_query(x, 2))
    keys = torch.zeros(len(harm.tokens), subject.d_head)
    here, there = harm.spans["question"][0], benign.spans["question"][0]
    rows = calm[there:]
    keys[here:] = maps.whole_key(rows, 2)
    return maps.scale * turn(keys) @ query


def test_taking_terms_out_moves_the_margin_and_all_heads_rows_align(lab):
    subject, _, prompts, works, streams = lab
    heads = [(1, 2), (2, 0)]
    rows = term_rows(subject, heads, prompts["harm"], prompts["benign"], streams["harm"], streams["benign"])
    both, one, other = (
        removal(rows, terms) for terms in (("answer_key", "elsewhere"), ("answer_key",), ("elsewhere",))
    )
    for head in heads:
        for i, prompt in enumerate(prompts["harm"]):
            assert len(both.shifts[head][i]) == len(prompt.tokens)
            assert torch.allclose(both.shifts[head][i], one.shifts[head][i] + other.shifts[head][i], atol=1e-5)
    assert (works["harm"].margins() - works["harm"].margins([one])).abs().max() > 1e-5


def test_shapley_values_split_the_whole_and_respect_symmetry():
    """An AND of two terms is split evenly; a term that never matters gets nothing; a lone cause gets its own."""

    def value(terms: frozenset) -> float:
        return 0.6 * ({"answer_key", "elsewhere"} <= terms) + 0.3 * ("harm_key" in terms)

    shares = shapley_values(value)
    assert shares == pytest.approx(
        {"answer_key": 0.3, "elsewhere": 0.3, "harm_key": 0.3, "key_only": 0.0, "intent_key": 0.0}
    )
