"""Mean weighted pair terms sum to the model's own weighted scores, in float64, over structurally different families."""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.interactions import mean_terms
from qklens.analyses.lens import head_lens
from qklens.analyses.weighting import WEIGHTING_KINDS, Weighting
from qklens.analyses.written import write_prompts
from qklens.data.render import Prompt
from qklens.models.families import load_family
from qklens.models.subject import wrap_model
from sparse_source import sparse_source
from tiny_families import LAYERS, tiny_model
from transformers_oracle import double_norms, oracle

TOKENS = (list(range(11, 25)), list(range(30, 41)))
SPANS = {"correct": (2, 3, 4), "incorrect": (7, 8)}
CASES = (
    "llama gqa",
    "llama biases",
    "qwen3",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "gemma2 low cap",
    "mistral window",
    "gpt_oss",
)


def prompt(tokens: list[int]) -> Prompt:
    """In a window of 5 the first option of these prompts is not seen from the answer."""
    spans = {**SPANS, "answer": (len(tokens) - 1,)}
    return Prompt("", tuple(tokens), spans, 0, (), (0, 0), "A")


def logsumexp_gradient(scores: torch.Tensor, positions: tuple[int, ...]) -> torch.Tensor:
    """By autograd; zero where none of the span is seen."""
    leaf = scores.clone().requires_grad_()
    chosen = leaf[list(positions)]
    if not bool(chosen.isfinite().any()):
        return torch.zeros_like(scores)
    chosen.logsumexp(dim=0).backward()
    return leaf.grad


@pytest.mark.parametrize("case", CASES)
def test_weighted_totals_are_the_models_own_in_float64(case, word_tokenizer, monkeypatch):
    """Weights come from the scores after a cap, terms are of u before it; the oracle is plain transformers."""
    model = tiny_model(case, len(word_tokenizer), torch.float64)
    double_norms(monkeypatch, model)
    own = [oracle(model, tokens, monkeypatch) for tokens in TOKENS]
    subject = wrap_model(model, word_tokenizer, load_family(model.config.model_type))
    prompts = [prompt(tokens) for tokens in TOKENS]
    source = sparse_source(subject.d_model, 50, tuple(range(LAYERS)), threshold=1.0)
    worst = largest = 0.0
    unseen = 0
    for layer in range(LAYERS):
        maps = head_lens(subject, source, layer, 0).maps
        written = write_prompts(subject, source, maps, [{layer: o.streams[layer]} for o in own])
        for head in range(subject.n_heads):
            lens = head_lens(subject, source, layer, head)
            wanted = dict.fromkeys(WEIGHTING_KINDS, 0.0)
            for o in own:
                keys, query = o.keys[layer][maps.kv_head(head)], o.queries[layer][head, -1]
                u, pattern = o.scales[layer] * keys @ query, o.patterns[layer][head, -1].double()
                scores = u if maps.cap is None else maps.cap * torch.tanh(u / maps.cap)
                scores = scores.masked_fill(pattern == 0, float("-inf"))
                correct, incorrect = (logsumexp_gradient(scores, SPANS[name]) for name in ("correct", "incorrect"))
                unseen += not bool(correct.any())
                sink = [] if maps.sinks is None else [maps.sinks[head][None]]
                exact = torch.cat([scores, *sink]).softmax(dim=0)[: len(scores)]
                assert torch.allclose(exact, pattern, atol=1e-6)
                # A contrast with an option that the head does not see would keep every constant: there is none.
                contrast = (correct - incorrect) * (correct.any() & incorrect.any())
                # Nor has the log of no attention a gradient.
                share = (correct - exact) * correct.any()
                weights = {"realised": correct, "contrastive": contrast, "share": share}
                for kind, w in weights.items():
                    wanted[kind] += float(w @ u) / len(own)
                largest = max(largest, float(u.abs().max()))
            for kind in WEIGHTING_KINDS:
                total = mean_terms(lens, prompts, written, Weighting(kind)).total
                worst = max(worst, abs(total - wanted[kind]))
    assert worst <= 1e-10 * largest
    assert (unseen > 0) == (case in ("mistral window", "gpt_oss"))
