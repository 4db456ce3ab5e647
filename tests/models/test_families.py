"""Every family and head layout against plain transformers: logits, sites, scores, completeness, edits."""

from __future__ import annotations

import pytest
import torch

from pair_terms import pair_terms
from qklens.analyses.lens import head_lens
from qklens.analyses.written import write_prompts
from qklens.dictionaries.directions import Directions
from qklens.models.attention import AttentionRead
from qklens.models.batch import left_padded
from qklens.models.copies import Reads
from qklens.models.edits import VectorEdit
from qklens.models.families import FAMILIES, load_family
from qklens.models.kept import Beginning
from qklens.models.passes import run_pass
from qklens.models.scores import rotation, score_maps
from qklens.models.selfcheck import self_check
from qklens.models.subject import Subject, wrap_model
from tiny_families import CASES, LAYERS, tiny_model
from transformers_oracle import double_norms, oracle

TOKENS = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]


def subject_for(model: nn.Module, tokenizer) -> Subject:
    return wrap_model(model, tokenizer, load_family(model.config.model_type))


def read_all(subject: Subject, edits=()) -> tuple[torch.Tensor, dict[int, torch.Tensor], dict[int, AttentionRead]]:
    streams: dict[int, torch.Tensor] = {}
    attention: dict[int, AttentionRead] = {}
    reads = Reads(
        {m: (lambda x, m=m: streams.__setitem__(m, x[0])) for m in range(LAYERS + 1)},
        {m: (lambda a, m=m: attention.__setitem__(m, a)) for m in range(LAYERS)},
    )
    batch = left_padded([TOKENS], 0, subject.device)
    return run_pass(subject, batch, edits, reads).logits[0], streams, attention


def test_every_family_has_a_case():
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_sites_equal_plain_transformers(case, dtype, word_tokenizer, monkeypatch):
    model = tiny_model(case, len(word_tokenizer), dtype)
    expected = oracle(model, TOKENS, monkeypatch)
    subject = subject_for(model, word_tokenizer)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    logits, streams, attention = read_all(subject)

    def close(got: torch.Tensor, want: torch.Tensor) -> None:
        assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))

    close(logits, expected.logits[-1])
    assert set(streams) == set(range(LAYERS + 1))
    for layer in range(LAYERS):
        read = attention[layer]
        close(streams[layer], expected.streams[layer])
        close(read.query[0], expected.queries[layer])
        close(read.key[0], expected.keys[layer])
        close(read.pattern[0], expected.patterns[layer])
        assert read.scale == expected.scales[layer]


@pytest.mark.parametrize("case", CASES)
def test_terms_sum_to_the_models_scores_in_float64(case, word_tokenizer, monkeypatch):
    """Completeness with a random dictionary on every head, from two positions to every key."""
    model = tiny_model(case, len(word_tokenizer), torch.float64)
    double_norms(monkeypatch, model)
    expected = oracle(model, TOKENS, monkeypatch)
    subject = subject_for(model, word_tokenizer)
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d = subject.d_model
    source = Directions(
        tuple(f"d{i}" for i in range(5)), {m: draw(5, d) for m in range(LAYERS)}, {m: draw(d) for m in range(LAYERS)}
    )
    worst = largest = 0.0
    for layer in range(LAYERS):
        maps = score_maps(subject, layer)
        (written,) = write_prompts(subject, source, maps, [{layer: expected.streams[layer]}])
        for head in range(subject.n_heads):
            lens = head_lens(subject, source, layer, head)
            for position in (4, len(TOKENS) - 1):
                keys, query = expected.keys[layer][maps.kv_head(head)], expected.queries[layer][head, position]
                own = expected.scales[layer] * keys @ query
                total = lens.terms_by_token(written, position).scores(len(TOKENS))
                worst = max(worst, float((total - own).abs().max()))
                largest = max(largest, float(own.abs().max()))
                pattern = lens.pattern(lens.scores(written, position))
                assert torch.allclose(pattern, expected.patterns[layer][head, position], atol=2e-6)
                weights = torch.zeros(len(TOKENS), dtype=torch.float64)
                weights[2], weights[position] = 0.7, -1.3
                together = float(pair_terms(lens, written, position, weights).sum())
                assert together == pytest.approx(float(weights @ own), abs=1e-9 * largest)
    assert largest > 0.1
    assert worst <= 1e-10 * largest


@pytest.mark.parametrize("case", CASES)
def test_the_self_check_passes_and_padding_changes_nothing(case, word_tokenizer):
    subject = subject_for(tiny_model(case, len(word_tokenizer), torch.float32), word_tokenizer)
    check = self_check(subject)
    assert max(row.score_error for row in check.layers) <= 1e-5
    assert max(row.pattern_error for row in check.layers) <= 1e-5
    assert check.padding_error <= 1e-5


@pytest.mark.parametrize("norm", ["recomputed", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_a_query_edit_reaches_its_head_alone_and_has_its_closed_form(case, norm, word_tokenizer, monkeypatch):
    model = tiny_model(case, len(word_tokenizer), torch.float64)
    double_norms(monkeypatch, model)
    subject = subject_for(model, word_tokenizer)
    layer, head, shift = 1, 2, torch.linspace(-1, 1, subject.d_model, dtype=torch.float64)
    mask = torch.zeros(1, len(TOKENS), dtype=torch.bool)
    mask[0, -1] = True
    edit = VectorEdit(layer, "query", mask, lambda rows, _: rows + shift, (head,), norm == "frozen")
    clean_logits, clean_streams, clean = read_all(subject)
    logits, _, edited = read_all(subject, [edit])
    again, _, _ = read_all(subject)
    assert torch.equal(again, clean_logits)
    assert not torch.equal(logits, clean_logits)
    for m in range(layer + 1):
        assert torch.equal(edited[m].key, clean[m].key)
    others = [h for h in range(subject.n_heads) if h != head]
    pooled = subject.family.qk_norm is not None and subject.family.qk_norm.over == "all"
    if pooled and norm == "frozen":
        assert torch.allclose(edited[layer].query[0, others], clean[layer].query[0, others], atol=1e-12)
    elif not pooled:  # a norm over all heads' queries lets them see each other
        assert torch.equal(edited[layer].query[0, others], clean[layer].query[0, others])
    maps, x = score_maps(subject, layer), clean_streams[layer][-1:]
    turn = rotation(subject, layer, torch.tensor([len(TOKENS) - 1]))
    if norm == "frozen":
        expected = turn(maps.whole_query(x + shift, head, maps.scales(x)))
        assert torch.allclose(edited[layer].query[0, head, -1:], expected, atol=1e-9)
    elif not pooled:
        assert torch.allclose(edited[layer].query[0, head, -1:], turn(maps.whole_query(x + shift, head)), atol=1e-9)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("case", CASES)
def test_a_key_or_value_edit_reaches_its_head_and_leaves_the_other_sides(case, side, word_tokenizer):
    subject = subject_for(tiny_model(case, len(word_tokenizer), torch.float64), word_tokenizer)
    mask = torch.zeros(1, len(TOKENS), dtype=torch.bool)
    mask[0, 8] = True
    clean_logits, _, clean = read_all(subject)
    logits, _, edited = read_all(subject, [VectorEdit(1, side, mask, lambda rows, _: 1.5 * rows + 0.3, (0,))])
    assert not torch.equal(logits, clean_logits)
    assert torch.equal(edited[1].query, clean[1].query)
    assert torch.equal(edited[1].key, clean[1].key) == (side == "value")
    if side == "value":
        assert torch.equal(edited[1].pattern, clean[1].pattern)
        assert not torch.equal(edited[1].output, clean[1].output)


@pytest.mark.parametrize("case", CASES)
def test_a_prefix_gives_the_same_logits_as_the_whole_prompt(case, word_tokenizer):
    subject = subject_for(tiny_model(case, len(word_tokenizer), torch.float32), word_tokenizer)
    batch = left_padded([TOKENS, TOKENS[3:]], 0, subject.device)
    prefix = run_pass(subject, batch, keep=True).own
    mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    mask[:, -1] = True
    edit = VectorEdit(2, "query", mask, lambda rows, _: 2 * rows + 0.5, (1,))
    whole = run_pass(subject, batch, [edit]).logits
    short = run_pass(subject, batch, [edit], beginning=Beginning(prefix, batch.width - 1)).logits
    assert float((whole - short).abs().max()) <= 1e-5 * max(1.0, float(whole.abs().max()))
