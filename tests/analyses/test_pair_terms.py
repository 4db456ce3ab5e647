"""Signs and parts of pair terms that a model without biases, or a sum over all terms, would not show."""

from __future__ import annotations

import pytest
import torch

from pair_terms import pair_terms
from qklens.analyses.interactions import PairTerms
from qklens.analyses.lens import Sources, head_lens
from qklens.analyses.weighting import SHARE, within_span
from qklens.analyses.written import write_prompts
from qklens.data.render import LetterForm, render
from qklens.dictionaries.directions import Directions
from qklens.interventions.engine import letter_margins
from qklens.models.scores import score_maps

FORM = LetterForm("", "")


@pytest.fixture(scope="module")
def biased(tiny_llama, items, word_tokenizer):
    """A lens on a model whose projections have biases, and one written prompt."""
    subject = tiny_llama(attention_bias=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in subject.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.bias.copy_(torch.randn(projection.bias.shape, generator=generator))
    prompt = render(word_tokenizer, items[0], "harm", "correct_first", FORM)
    source = Directions(
        ("a", "b"), {1: torch.randn(2, 32, generator=generator)}, {1: torch.randn(32, generator=generator)}
    )
    stream = torch.randn(len(prompt.tokens), 32, generator=generator)
    (written,) = write_prompts(subject, source, score_maps(subject, 1), [{1: stream}])
    return head_lens(subject, source, 1, 2), prompt, written


def test_terms_hold_the_projections_biases(biased):
    lens, prompt, written = biased
    position = prompt.spans["answer"][0]
    scores = lens.scores(written, position)
    weights = within_span(scores, prompt.span("correct")) - within_span(scores, prompt.span("incorrect"))
    total = float(pair_terms(lens, written, position, weights).sum())
    assert total == pytest.approx(float((weights * scores).sum()), abs=1e-4 * float(scores.abs().max()))
    alone = within_span(scores, prompt.span("correct"))
    total = float(pair_terms(lens, written, position, alone).sum())
    assert total == pytest.approx(float((alone * scores).sum()), abs=1e-4 * float(scores.abs().max()))
    by_token = lens.terms_by_token(written, position).scores(len(prompt.tokens))
    torch.testing.assert_close(by_token, scores, rtol=1e-4, atol=1e-4)


def test_share_is_the_correct_span_less_the_whole_pattern(biased):
    lens, prompt, written = biased
    scores = lens.scores(written, prompt.spans["answer"][0])
    correct = list(prompt.span("correct"))
    wanted = -scores.softmax(dim=0)
    wanted[correct] += scores[correct].softmax(dim=0)
    found = SHARE.weigh(lens, prompt, written).weights
    torch.testing.assert_close(found, wanted)
    assert float(found[correct].sum()) > 0


def test_an_error_on_either_side_counts_as_error():
    table = torch.tensor([[1.0, 0, 3], [0, 10, 0], [-2, 0, -4]])
    index = torch.arange(3)
    sides = (Sources(index, torch.eye(3)),), (Sources(index, table.T),)
    terms = PairTerms(("a", "bias", "error"), 1.0, *sides, (1.0,), (0.0,))
    assert terms.error_share() == pytest.approx((2 + 3 + 4) / 20)
    assert terms.shares()["error x feature"] == -2.0
    assert terms.shares()["feature x error"] == 3.0
    assert sum(terms.shares().values()) == terms.total == 8.0
    assert terms.marginal("query").tolist() == [4.0, 10.0, -6.0]
    assert terms.marginal("key").tolist() == [-1.0, 10.0, -1.0]
    assert terms.against("key", 2).tolist() == [-2.0, 0.0, -4.0]
    assert terms.top(2) == [
        ("error", "error", -4.0), ("error", "a", -2.0), ("bias", "bias", 10.0), ("a", "error", 3.0)
    ]  # fmt: skip


def test_a_margin_is_the_correct_letter_less_the_incorrect_one(items, word_tokenizer):
    prompts = [render(word_tokenizer, items[0], "none", order, FORM) for order in ("correct_first", "incorrect_first")]
    a, b = word_tokenizer.convert_tokens_to_ids(["A", "B"])
    logits = torch.zeros(2, len(word_tokenizer))
    logits[:, a], logits[:, b] = 3.0, 1.0
    assert letter_margins(logits, prompts).tolist() == [2.0, -2.0]
