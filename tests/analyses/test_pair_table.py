"""The table of mean pair terms against one summed by explicit loops, and against blocks of every size."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qklens.analyses.decompose import decompose
from qklens.analyses.interactions import PairTerms, mean_terms, refuse_silence
from qklens.analyses.lens import HeadLens, Sources, head_lens
from qklens.analyses.weighting import CONTRASTIVE, REALISED, SHARE, Weighting
from qklens.analyses.written import WrittenPrompt, write_prompts
from qklens.data.render import LetterForm, Prompt, render
from qklens.errors import QklensError
from qklens.models.batch import left_padded
from qklens.models.trace import trace
from sparse_source import SparseSource, sparse_source

LAYER, HEAD, N_FEATURES = 1, 3, 120


@pytest.fixture(scope="module")
def lens(tiny_llama) -> HeadLens:
    """A head of a float64 model with biases, seen through a sparse source."""
    subject = tiny_llama(dtype=torch.float64, attention_bias=True)
    for layer in subject.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.bias, generator=torch.Generator().manual_seed(1))
    return head_lens(subject, sparse_source(subject.d_model, N_FEATURES, (LAYER,)), LAYER, HEAD)


@pytest.fixture(scope="module")
def prompts(word_tokenizer, items) -> list[Prompt]:
    return [render(word_tokenizer, item, "harm", "correct_first", LetterForm("", "")) for item in items[:3]]


@pytest.fixture(scope="module")
def traces(lens, prompts):
    return [trace(lens.subject, left_padded([p.tokens], lens.subject.pad_id, lens.subject.device), [LAYER])
            for p in prompts]  # fmt: skip


@pytest.fixture(scope="module")
def written(lens, traces) -> list[WrittenPrompt]:
    return write_prompts(lens.subject, lens.source, lens.maps, [{LAYER: t.streams[LAYER][0]} for t in traces])


def dense(terms: PairTerms) -> torch.Tensor:
    """The whole table, from the products alone."""
    n = len(terms.names)
    table = torch.zeros(n, n, dtype=torch.float64)
    for query, key, weight in zip(terms.query, terms.key, terms.weights, strict=True):
        for i, source in enumerate(query.index.tolist()):
            for j, other in enumerate(key.index.tolist()):
                table[source, other] += (
                    weight * terms.scale * float(query.vectors[i].double() @ key.vectors[j].double())
                )
    return table


def drawn_terms(n_features: int, sides: tuple[int, int], prompts: int, seed: int = 0, whole: bool = False) -> PairTerms:
    """Pair terms with random sources there on each side; whole numbers give many ties."""
    generator = torch.Generator().manual_seed(seed)

    def side(there: int) -> Sources:
        features = torch.randperm(n_features, generator=generator)[:there].sort().values
        index = torch.cat([features, torch.tensor([n_features, n_features + 1])])
        vectors = torch.randn(len(index), 4, generator=generator)
        return Sources(index, vectors.round() if whole else vectors)

    names = (*(f"f{i}" for i in range(n_features)), "bias", "error")
    queries, keys = (tuple(side(n) for _ in range(prompts)) for n in sides)
    weights = tuple(1.0 / prompts if i % 3 else -1.0 / prompts for i in range(prompts))
    return PairTerms(names, 0.5, queries, keys, weights, (0.0,) * prompts)


def test_the_sparse_source_exercises_every_kind_of_activity(written, prompts):
    """Negative activations, features at the query and not at the key, and the other way round, and never active."""
    for prompt, parts in zip(prompts, written, strict=True):
        assert bool((parts.active.value < 0).any())
        assert bool((parts.active.value > 0).any())
        query = set(parts.active.features_at(prompt.span("answer")).tolist())
        key = set(parts.active.features_at(prompt.span("correct")).tolist())
        assert query - key
        assert key - query
        everywhere = parts.active.features_at(range(len(prompt.tokens))).tolist()
        assert not set(everywhere) & set(range(0, N_FEATURES, 7))
        assert len(everywhere) < 0.2 * N_FEATURES * len(prompt.tokens)


@pytest.mark.parametrize("weighting", [REALISED, CONTRASTIVE, SHARE], ids=lambda w: w.kind)
def test_the_table_is_the_weighted_sum_of_every_tokens_decomposition(lens, prompts, written, traces, weighting):
    """`decompose` goes by another way: from the traced pass, densely, one key token at a time."""
    wanted = torch.zeros(len(lens.names), len(lens.names), dtype=torch.float64)
    for prompt, parts, traced in zip(prompts, written, traces, strict=True):
        weights = weighting.weigh(lens, prompt, parts).weights
        for token in weights.nonzero()[:, 0].tolist():
            found = decompose(traced, LAYER, HEAD, -1, token, lens.source)
            rows = torch.tensor([lens.names.index(name) for name in found.query_names])
            columns = torch.tensor([lens.names.index(name) for name in found.key_names])
            wanted[rows[:, None], columns] += weights[token] * found.terms[0] / len(prompts)
    terms = mean_terms(lens, prompts, written, weighting)
    assert float((dense(terms) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
    assert terms.total == pytest.approx(float(wanted.sum()), abs=1e-11)
    for query, key in ((3, 8), (N_FEATURES, 1), (N_FEATURES + 1, N_FEATURES), (7, 7)):
        assert terms.between(query, key) == pytest.approx(float(wanted[query, key]), abs=1e-13)
        one_by_one = [mean_terms(lens, [p], [w], weighting).between(query, key)
                      for p, w in zip(prompts, written, strict=True)]  # fmt: skip
        assert terms.by_prompt([(query, key)])[:, 0].tolist() == pytest.approx(one_by_one, abs=1e-13)


@pytest.mark.parametrize("entries", [1, 7, 44, 97, 400, 10**6])
def test_blocks_of_any_size_are_the_same_table(entries):
    terms = drawn_terms(60, (20, 31), 4)
    table, found = dense(terms), torch.zeros(62, 62, dtype=torch.float64)
    seen = 0
    for block in terms.blocks(entries):
        assert block.value.numel() <= max(entries, len(block.key))
        found[block.query[:, None], block.key] += block.value
        seen += len(block.query)
    torch.testing.assert_close(found, table, atol=1e-6, rtol=0)
    assert seen == len(torch.cat([q.index for q in terms.query]).unique())


def by_hand(terms: PairTerms, k: int) -> list[tuple[str, str, float]]:
    table = torch.zeros(len(terms.names), len(terms.names), dtype=torch.float64)
    for block in terms.blocks(10**9):
        table[block.query[:, None], block.key] = block.value
    entries = [(value, i, j) for i, row in enumerate(table.tolist()) for j, value in enumerate(row)]
    low = sorted(e for e in entries if e[0] < 0)[:k]
    high = sorted((-v, i, j) for v, i, j in entries if v > 0)[:k]
    return [(terms.names[i], terms.names[j], v) for v, i, j in (*low, *((-v, i, j) for v, i, j in high))]


@pytest.mark.parametrize("whole", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("k", [0, 1, 5, 10_000])
@pytest.mark.parametrize("entries", [1, 50, 10**6])
def test_top_is_exact_from_both_ends_for_any_block_size(monkeypatch, entries, k, whole):
    """Ties go to the earlier source, query side first."""
    every = [drawn_terms(40, (15, 18), 4, seed=seed, whole=whole) for seed in range(6)]
    wanted = [by_hand(terms, k) for terms in every]
    monkeypatch.setattr(PairTerms, "blocks", partialmethod(PairTerms.blocks, entries=entries))
    for terms, right in zip(every, wanted, strict=True):
        found = terms.top(k)
        assert [pair[:2] for pair in found] == [pair[:2] for pair in right]
        assert [v for *_, v in found] == pytest.approx([v for *_, v in right], abs=1e-6)


def test_minus_is_the_difference_of_tables():
    one, other = drawn_terms(30, (9, 12), 3, seed=3), drawn_terms(30, (14, 7), 2, seed=4)
    gone = one.minus(other)
    wanted = dense(one) - dense(other)
    torch.testing.assert_close(dense(gone), wanted)
    assert gone.total == pytest.approx(one.total - other.total, abs=1e-5)
    assert gone.between(2, 31) == pytest.approx(one.between(2, 31) - other.between(2, 31), abs=1e-6)
    assert one.minus(one).top(5) == []
    assert len(gone.by_prompt([(0, 0)])) == 5


def test_sums_over_a_side_and_by_kind_are_those_of_the_table():
    terms = drawn_terms(30, (11, 13), 4, seed=5)
    table = dense(terms)

    def close(found, wanted) -> None:
        torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), wanted, atol=1e-5, rtol=0)

    close(terms.marginal("query"), table.sum(dim=1))
    close(terms.marginal("key"), table.sum(dim=0))
    close(terms.total, table.sum())
    for source in (0, 5, 30, 31):
        close(terms.against("query", source), table[:, source])
        close(terms.against("key", source), table[source])
    groups = {"feature": slice(0, 30), "bias": slice(30, 31), "error": slice(31, 32)}
    for a, rows in groups.items():
        for b, columns in groups.items():
            close(terms.shares()[f"{a} x {b}"], table[rows, columns].sum())
            close(terms.absolute_shares()[f"{a} x {b}"], table[rows, columns].abs().sum() / table.abs().sum())
    assert sum(terms.absolute_shares().values()) == pytest.approx(1)
    with_error = table.abs()[31].sum() + table.abs()[:, 31].sum() - table.abs()[31, 31]
    assert terms.error_share() == pytest.approx(float(with_error / table.abs().sum()), abs=1e-6)


class Largest(TorchDispatchMode):
    """Records the most entries of any tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.entries = max(self.entries, leaf.numel())
        return out


def test_no_tensor_is_larger_than_a_block_with_thousands_of_features_active(monkeypatch):
    terms = drawn_terms(6000, (3000, 3000), 2, seed=6)
    limit = 300_000
    with Largest() as whole:
        for _ in terms.blocks(10**9):
            pass
    assert whole.entries > 3000 * 3000, "the whole table would be seen"
    monkeypatch.setattr(PairTerms, "blocks", partialmethod(PairTerms.blocks, entries=limit))
    with Largest() as seen:
        found = terms.top(20)
        terms.absolute_shares()
        for side in ("query", "key"):
            terms.marginal(side)
            terms.against(side, 17)
        terms.minus(terms)
        terms.by_prompt([(0, 1)])
        assert terms.total == pytest.approx(sum(terms.shares().values()))
    assert len(found) == 40
    assert seen.entries <= limit


def test_a_side_without_any_active_feature_is_refused(lens, prompts, written):
    deaf = SparseSource(**{**lens.source.__dict__, "threshold": 1e9})
    silent = HeadLens(**{**lens.__dict__, "source": deaf})
    streams = [{LAYER: w.residual} for w in written]
    nothing = write_prompts(lens.subject, deaf, lens.maps, streams)
    for weighting in (REALISED, CONTRASTIVE, Weighting("share", "intent")):
        good, bad = (mean_terms(lens, prompts, w, weighting) for w in (written, nothing))
        refuse_silence(good, lens, weighting)
        one_side = PairTerms(good.names, good.scale, good.query, bad.key, good.weights, good.logsumexp)
        other_side = PairTerms(good.names, good.scale, bad.query, good.key, good.weights, good.logsumexp)
        with pytest.raises(QklensError, match=r"span .*key side"):
            refuse_silence(one_side, silent, weighting)
        with pytest.raises(QklensError, match=r"answer position .*query side"):
            refuse_silence(other_side, silent, weighting)
        assert sum(good.absolute_shares().values()) == pytest.approx(1)
        one_speaks = mean_terms(lens, prompts[:2], [nothing[0], written[1]], weighting)
        refuse_silence(one_speaks, lens, weighting)
