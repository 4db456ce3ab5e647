"""Every named site and both linear maps, on every family and head layout, against plain transformers."""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.decompose import decompose
from qklens.dictionaries.directions import Directions
from qklens.errors import QklensError
from qklens.models.batch import left_padded
from qklens.models.edits import ScoreEdit, VectorEdit
from qklens.models.families import load_family
from qklens.models.sites import Site, capture
from qklens.models.subject import wrap_model
from qklens.models.trace import trace
from tiny_families import CASES, LAYERS, tiny_model
from transformers_oracle import double_norms, oracle

PROMPTS = [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [21, 22, 23, 24, 25, 26, 27, 28]]


def subject_of(case, tokenizer, dtype=torch.float64):
    model = tiny_model(case, len(tokenizer), dtype)
    return wrap_model(model, tokenizer, load_family(model.config.model_type))


def batch_of(subject):
    return left_padded(PROMPTS, 0, subject.device)


def near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    return float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_every_site_equals_plain_transformers_row_by_row(case, dtype, word_tokenizer, monkeypatch):
    """Each row of a padded batch against the model run on that prompt alone, without qklens."""
    expected = [oracle(tiny_model(case, len(word_tokenizer), dtype), tokens, monkeypatch) for tokens in PROMPTS]
    subject = subject_of(case, word_tokenizer, dtype)
    kinds = ("resid_pre", "resid_post", "q_in", "k_in", "q", "k", "score", "pattern", "head_out")
    got = capture(subject, batch_of(subject), [Site(kind, m) for kind in kinds for m in range(LAYERS)])
    for row, want in enumerate(expected):
        padding = len(PROMPTS[0]) - len(PROMPTS[row])
        assert near(got.logits[row], want.logits[-1], dtype)
        for m in range(LAYERS):
            for kind, tensor in (("resid_pre", want.streams[m]), ("resid_post", want.outputs[m])):
                assert near(got[f"{kind}.{m}"][row, padding:], tensor, dtype), kind
            for kind, tensor in (("q_in", want.normed[m]), ("k_in", want.normed[m])):
                assert near(got[f"{kind}.{m}"][row, padding:], tensor, dtype), kind
            for kind, tensor in (("q", want.queries[m]), ("k", want.keys[m]), ("head_out", want.heads[m])):
                assert near(got[f"{kind}.{m}"][row, :, padding:], tensor, dtype), kind
            assert near(got[f"pattern.{m}"][row, :, padding:, padding:], want.patterns[m], dtype)
            group = subject.n_heads // subject.n_kv_heads
            own = want.scales[m] * want.queries[m] @ want.keys[m].repeat_interleave(group, dim=0).transpose(1, 2)
            score = got[f"score.{m}"][row, :, padding:, padding:]
            seen = score.isfinite()
            assert torch.equal(seen, (want.patterns[m] > 0)), "hidden keys are those without weight"
            assert near(score[seen], own[seen], dtype)


@pytest.mark.parametrize("case", CASES)
def test_maps_and_terms_rebuild_the_models_score_on_every_prompt(case, word_tokenizer, monkeypatch):
    subject = subject_of(case, word_tokenizer)
    double_norms(monkeypatch, subject.model)
    traced = trace(subject, batch_of(subject), range(LAYERS))
    generator = torch.Generator().manual_seed(3)
    d = subject.d_model
    vectors = {m: torch.randn(5, d, generator=generator, dtype=torch.float64) for m in range(LAYERS)}
    biases = {m: torch.randn(d, generator=generator, dtype=torch.float64) for m in range(LAYERS)}
    source = Directions(tuple(f"d{i}" for i in range(5)), vectors, biases)
    q_pos, k_pos = torch.tensor([10, 7]), torch.tensor([8, 5])
    for layer in range(LAYERS):
        for head in range(subject.n_heads):
            u = traced.score(layer, head, q_pos, k_pos)
            query, key = traced.query_map(layer, head, -1), traced.key_map(layer, head, -3)
            x, y = traced.stream(layer, -1), traced.stream(layer, -3)
            whole_q = torch.einsum("bed,bd->be", query.matrix, x) + query.constant
            whole_k = key(y[:, None])[:, 0] + key.constant
            rebuilt = traced.maps(layer).scale * (whole_q * whole_k).sum(dim=-1)
            assert near(rebuilt, u, torch.float64)
            parts = decompose(traced, layer, head, -1, -3, source)
            assert parts.error <= 1e-10
            assert torch.equal(parts.score, u)
            assert parts.terms.shape == (2, len(parts.query_names), len(parts.key_names))
            assert torch.equal(traced.pattern(layer, head, -1), traced.attention[layer].pattern[:, head, -1])


def test_only_what_was_asked_for_is_kept_in_the_order_asked(word_tokenizer):
    subject = subject_of("llama gqa", word_tokenizer)
    batch = batch_of(subject)
    whole = capture(subject, batch, ["score.1", "k.1", "pattern.1", "resid_pre.2"])
    sites = [
        Site("score", 1, heads=(3, 0), positions=(-1, 2)),
        Site("k", 1, heads=(1,), positions=(0,)),
        Site("pattern", 1, positions=(-2,)),
        Site("resid_pre", 2, positions=(1, -1)),
    ]
    part = capture(subject, batch, sites)
    padding = [0, len(PROMPTS[0]) - len(PROMPTS[1])]
    for row, pad in enumerate(padding):
        for place, head in enumerate((3, 0)):
            assert torch.allclose(part[sites[0]][row, place, 0], whole["score.1"][row, head, -1], rtol=0, atol=1e-12)
            assert torch.allclose(
                part[sites[0]][row, place, 1], whole["score.1"][row, head, pad + 2], rtol=0, atol=1e-12
            )
        assert torch.equal(part[sites[1]][row, 0, 0], whole["k.1"][row, 1, pad])
        assert torch.equal(part[sites[2]][row, :, 0], whole["pattern.1"][row, :, -2])
        assert torch.equal(part[sites[3]][row], whole["resid_pre.2"][row][[pad + 1, -1]])
    for site in sites:
        value = part[site]
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), "a view would keep the whole"


def test_a_score_site_carries_the_edits_that_acted_on_it(word_tokenizer):
    subject = subject_of("llama gqa", word_tokenizer)
    batch = batch_of(subject)
    clean = capture(subject, batch, ["score.1", "q_in.1", "q.1", "resid_post.0"])
    added = capture(subject, batch, ["score.1"], [ScoreEdit(1, lambda view: 0.5 * torch.ones_like(clean["score.1"]))])
    seen = clean["score.1"].isfinite()
    assert torch.allclose(added["score.1"][seen], clean["score.1"][seen] + 0.5)
    mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    mask[:, -1] = True
    edit = VectorEdit(1, "query", mask, lambda rows, _: rows + 1, (2,))
    steered = capture(subject, batch, ["score.1", "q_in.1", "q.1", "resid_post.0"], [edit])
    assert torch.equal(steered["q_in.1"], clean["q_in.1"])
    assert torch.equal(steered["resid_post.0"], clean["resid_post.0"])
    moved = (steered["score.1"] != clean["score.1"]).any(dim=-1)
    assert bool(moved[:, 2, -1].all())
    assert int(moved.sum()) == 2, "one head at one position of each prompt"


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("skore.1", "score"),
        ("score", "with a layer"),
        ("score.9", "layer 9 does not exist"),
        (Site("k", 1, heads=(2,)), "key head 2 does not exist"),
        (Site("resid_pre", 1, heads=(0,)), "has no heads"),
        (Site("q", 1, positions=(8,)), "position 8 does not exist in a prompt of 8 tokens"),
    ],
)
def test_a_site_that_does_not_exist_is_named(site, message, word_tokenizer):
    subject = subject_of("llama gqa", word_tokenizer)
    with pytest.raises(QklensError, match=message):
        capture(subject, batch_of(subject), [site])


@pytest.mark.parametrize("case", ["llama gqa", "gpt_oss", "gemma2 low cap"])
def test_a_trace_of_some_heads_keeps_those_alone_and_says_the_same(case, word_tokenizer):
    subject = subject_of(case, word_tokenizer)
    whole, some = (trace(subject, batch_of(subject), [1], heads=heads) for heads in (None, (3, 1)))
    assert some.attention[1].query.shape[1] == some.attention[1].key.shape[1] == some.attention[1].pattern.shape[1] == 2
    for head in (1, 3):
        assert torch.allclose(some.score(1, head, -1, -2), whole.score(1, head, -1, -2), rtol=0, atol=1e-12)
        assert torch.equal(some.pattern(1, head, -1), whole.pattern(1, head, -1))
        assert torch.equal(some.query_map(1, head, -1).matrix, whole.query_map(1, head, -1).matrix)
    with pytest.raises(QklensError, match=r"head 0 was not traced; it holds heads \[3, 1\]"):
        some.score(1, 0, -1, -2)


def test_a_trace_names_what_it_does_not_hold(word_tokenizer):
    subject = subject_of("mistral window", word_tokenizer)
    traced = trace(subject, batch_of(subject), [1])
    source = Directions(("a",), {1: torch.ones(1, subject.d_model)}, {1: torch.zeros(subject.d_model)})
    with pytest.raises(QklensError, match="layer 2 was not traced"):
        traced.score(2, 0, -1, 0)
    with pytest.raises(QklensError, match="does not see the key token"):
        decompose(traced, 1, 0, -1, 0, source)
    with pytest.raises(QklensError, match="position 9 does not exist in prompt 1, which has 8 tokens"):
        traced.score(1, 0, [10, 9], 0)
    with pytest.raises(QklensError, match="3 positions for 2 prompts"):
        traced.score(1, 0, [1, 2, 3], 0)
