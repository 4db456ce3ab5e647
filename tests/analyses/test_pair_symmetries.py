"""What must not matter does not: the order of heads and features, the size of decoders, and which option is named."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qklens.analyses.interactions import PairTerms, mean_terms
from qklens.analyses.lens import head_lens
from qklens.analyses.nulls import Population, feature_pairs, null_tests
from qklens.analyses.weighting import CONTRASTIVE, REALISED, SHARE, Weighting
from qklens.analyses.written import WrittenPrompt, write_prompts
from qklens.data.render import PARTS, LetterForm, Prompt, render
from qklens.dictionaries.source import ErrorByDecoding, dense_decode
from qklens.models.batch import left_padded
from qklens.models.scores import offset_rotation, score_maps, virtual_interaction
from qklens.models.subject import Subject, wrap_model
from qklens.models.trace import trace
from sparse_source import SparseSource, sparse_source

LAYER, N_FEATURES, GROUP = 1, 60, 2
WEIGHTINGS = st.sampled_from([REALISED, CONTRASTIVE, SHARE])
few = settings(max_examples=12, deadline=None)


class Lab:
    def __init__(self, subject: Subject, prompts: list[Prompt], source: SparseSource) -> None:
        self.subject, self.prompts, self.source = subject, prompts, source
        self.traces = [trace(subject, left_padded([p.tokens], subject.pad_id, subject.device), [LAYER])
                       for p in prompts]  # fmt: skip

    def written(self, source: SparseSource) -> list[WrittenPrompt]:
        streams = [{LAYER: t.streams[LAYER][0]} for t in self.traces]
        return write_prompts(self.subject, source, score_maps(self.subject, LAYER), streams)

    def terms(self, head: int, weighting: Weighting, source: SparseSource | None = None, prompts=None) -> PairTerms:
        source = source or self.source
        lens = head_lens(self.subject, source, LAYER, head)
        return mean_terms(lens, prompts or self.prompts, self.written(source), weighting)


def table(terms: PairTerms) -> torch.Tensor:
    whole = torch.zeros(len(terms.names), len(terms.names), dtype=torch.float64)
    for block in terms.blocks():
        whole[block.query[:, None], block.key] = block.value
    return whole


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())
    assert float(wanted.abs().max()) > 0


@pytest.fixture(scope="module")
def lab(tiny_llama, word_tokenizer, items) -> Lab:
    subject = tiny_llama(dtype=torch.float64, num_attention_heads=8, num_key_value_heads=4)
    prompts = [render(word_tokenizer, item, "harm", order, LetterForm("", ""))
               for item, order in zip(items[:2], ("correct_first", "incorrect_first"), strict=True)]  # fmt: skip
    return Lab(subject, prompts, sparse_source(subject.d_model, N_FEATURES, (LAYER,), threshold=1.0))


def with_heads_permuted(subject: Subject, groups: list[int], within: list[list[int]]) -> tuple[Subject, list[int]]:
    """The same function with its key heads in another order, and in each group its query heads.

    Returns it with the old head that stands at each new place.
    """
    model = copy.deepcopy(subject.model)
    old = [GROUP * group + member for group, order in zip(groups, within, strict=True) for member in order]
    size = subject.d_head
    for layer in model.model.layers:
        attention = layer.self_attn
        rows = torch.cat([torch.arange(size) + size * head for head in old])
        shared = torch.cat([torch.arange(size) + size * group for group in groups])
        with torch.no_grad():
            attention.q_proj.weight.copy_(attention.q_proj.weight[rows])
            attention.k_proj.weight.copy_(attention.k_proj.weight[shared])
            attention.v_proj.weight.copy_(attention.v_proj.weight[shared])
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows])
    return wrap_model(model, subject.tokenizer, subject.family), old


@few
@given(st.permutations(range(4)), st.lists(st.permutations(range(GROUP)), min_size=4, max_size=4), WEIGHTINGS)
def test_permuting_heads_permutes_results(lab, groups, within, weighting):
    permuted, old = with_heads_permuted(lab.subject, groups, within)
    other = Lab(permuted, lab.prompts, lab.source)
    close(other.traces[0].logits, lab.traces[0].logits)
    for new in (0, 3, 6):
        close(table(other.terms(new, weighting)), table(lab.terms(old[new], weighting)))


@few
@given(st.permutations(range(N_FEATURES)), st.integers(0, 7), WEIGHTINGS)
def test_permuting_features_permutes_results(lab, order, head, weighting):
    s = lab.source
    order = list(order)
    other = replace(s, labels=tuple(s.labels[i] for i in order), encoder=s.encoder[order], decoder=s.decoder[order],
                    sign=s.sign[order])  # fmt: skip
    first, second = lab.terms(head, weighting), lab.terms(head, weighting, Reordered(other, s, order))
    index = [*order, N_FEATURES, N_FEATURES + 1]
    close(table(second), table(first)[index][:, index])
    assert [p[:2] for p in second.top(5)] == [p[:2] for p in first.top(5)]


class Reordered(ErrorByDecoding):
    """A source whose features stand in another order; its activations are the original's, reordered."""

    def __init__(self, source: SparseSource, original: SparseSource, order: list[int]) -> None:
        self.source, self.original, self.order = source, original, order
        self.name, self.labels, self.layers = source.name, source.labels, source.layers
        self.reads, self.directions, self.bias = source.reads, source.directions, source.bias
        self.describe, self.site = source.describe, source.site

    def decode(self, layer, activations):
        return dense_decode(self, layer, activations)

    def encode(self, layer, stream):
        return self.original.encode(layer, stream)[..., self.order]


@few
@given(st.lists(st.floats(0.01, 100), min_size=N_FEATURES, max_size=N_FEATURES), st.integers(0, 7), WEIGHTINGS)
def test_scaling_decoders_and_activations_inversely_changes_nothing(lab, sizes, head, weighting):
    scale = torch.tensor(sizes, dtype=torch.float64)
    other = Rescaled(lab.source, scale)
    close(table(lab.terms(head, weighting, other)), table(lab.terms(head, weighting)))
    maps, turn = score_maps(lab.subject, LAYER), offset_rotation(lab.subject, LAYER, torch.tensor([5, 9]))
    old, new = lab.source.directions(LAYER).double(), other.directions(LAYER)
    found, wanted = (virtual_interaction(maps, head, turn, d[:-1], d[1:]) for d in (new, old))
    close(found, wanted)


class Rescaled(ErrorByDecoding):
    """Decoders times s, activations over s."""

    def __init__(self, source: SparseSource, scale: torch.Tensor) -> None:
        self.source, self.scale = source, scale
        self.name, self.labels, self.layers = source.name, source.labels, source.layers
        self.reads, self.bias, self.describe, self.site = source.reads, source.bias, source.describe, source.site

    def decode(self, layer, activations):
        return dense_decode(self, layer, activations)

    def directions(self, layer):
        return self.source.directions(layer).double() * self.scale[:, None]

    def encode(self, layer, stream):
        return self.source.encode(layer, stream) / self.scale


def swapped(prompt: Prompt) -> Prompt:
    """The same prompt with the other option called correct."""
    other = {"correct": "incorrect", "incorrect": "correct"}
    spans = {".".join([other.get(name.split(".")[0], name.split(".")[0]), *name.split(".")[1:]]): positions
             for name, positions in prompt.spans.items()}  # fmt: skip
    return replace(prompt, spans=spans)


@few
@given(st.sets(st.sampled_from(PARTS), min_size=1), st.integers(0, 7))
def test_swapping_the_options_negates_every_contrastive_term(lab, parts, head):
    how = Weighting("contrastive", parts=tuple(parts))
    first = lab.terms(head, how)
    second = lab.terms(head, how, prompts=[swapped(p) for p in lab.prompts])
    close(table(second), -table(first))
    assert second.total == pytest.approx(-first.total)
    assert [p[:2] for p in second.top(3)[:3]] == [p[:2] for p in first.top(3)[3:]]


@few
@given(st.sets(st.sampled_from(PARTS), min_size=1), st.integers(0, 7), st.sampled_from(["realised", "contrastive"]))
def test_only_the_named_parts_of_an_option_have_weight(lab, parts, head, kind):
    how = Weighting(kind, parts=tuple(parts))
    lens = head_lens(lab.subject, lab.source, LAYER, head)
    for prompt, written in zip(lab.prompts, lab.written(lab.source), strict=True):
        weights = how.weigh(lens, prompt, written).weights
        for span, sign in (("correct", 1.0), ("incorrect", -1.0))[: len(how.spans())]:
            named = {p for part in parts for p in prompt.spans[f"{span}.{part}"]}
            assert bool((sign * weights[sorted(named)] > 0).all())
            assert float(weights[sorted(named)].sum()) == pytest.approx(sign)
            weights[sorted(named)] = 0
        assert not weights.any()


def test_virtual_results_do_not_depend_on_the_order_of_features(lab):
    """z against a null that draws no feature, of the same two directions standing elsewhere."""
    maps, turn = score_maps(lab.subject, LAYER), offset_rotation(lab.subject, LAYER, torch.tensor([5, 9]))
    vectors = lab.source.decoder.double()
    everywhere, root = torch.ones(N_FEATURES, dtype=torch.float64), torch.eye(32, dtype=torch.float64)
    order = torch.randperm(N_FEATURES, generator=torch.Generator().manual_seed(1))
    plain, moved = (Population(v, everywhere, everywhere.bool(), root) for v in (vectors, vectors[order]))
    place = order.argsort().tolist()
    for null in ("rotated", "random_dictionary"):
        (one,) = null_tests(null, maps, 2, turn, plain, plain, feature_pairs(plain, plain, [(3, 8)]))
        there = [(place[3], place[8])]
        (other,) = null_tests(null, maps, 2, turn, moved, moved, feature_pairs(moved, moved, there))
        assert (one.z, one.p) == (other.z, other.p)
