"""Direct logits are the derivative of the model's final norm and unembedding, its scale held; cosines are cosines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd.functional import jvp
from transformers import PreTrainedTokenizerFast

from qklens.analyses.direct_logits import direct_logits, nearest_directions
from qklens.models.families import load_family
from qklens.models.subject import wrap_model
from tiny_families import WIDTH, tiny_model


@pytest.mark.parametrize("case", ["llama gqa", "gemma2", "gpt2", "gpt_neox"])
def test_they_are_the_models_own_derivative_where_the_scale_does_not_move(
    case: str, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(case, len(word_tokenizer) + 3, torch.float64)
    subject = wrap_model(model, word_tokenizer, load_family(model.config.model_type))
    norm, head = subject.family.final_norm(model), subject.unembedding
    x, d = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rule = subject.final_norm(torch.float64)
    # A direction at right angles to the (centred) stream leaves σ as it is, to first order.
    seen, centred = rule.centre(x), rule.centre(d)
    d = d - (centred @ seen) / (seen @ seen) * seen
    slope = jvp(lambda v: head(norm(v)), x, d / d.norm())[1][: len(word_tokenizer)]
    slope = slope - slope.mean()
    ends = direct_logits(subject, torch.stack([7 * d, -d, torch.zeros_like(d)]), float(rule.scale(x)), 5)
    tolerance = 1e-10 if case in ("gpt2", "gpt_neox") else 2e-6  # RMSNorm of transformers rounds to float32 inside
    for row, sign in ((0, 1), (1, -1)):
        order = (sign * slope).argsort(descending=True)
        for (index, value), expected in ((ends.highest, order[:5]), (ends.lowest, order.flip(0)[:5])):
            assert index[row].tolist() == expected.tolist()
            torch.testing.assert_close(value[row], sign * slope[expected], rtol=tolerance, atol=tolerance)
    assert not bool(ends.highest[1][2].any())
    assert int(ends.highest[0].max()) < len(word_tokenizer)


def test_a_constant_over_the_vocabulary_promotes_nothing(tiny_llama: Callable[..., object]) -> None:
    subject = tiny_llama(dtype=torch.float64)
    d = torch.randn(1, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = direct_logits(subject, d, 2.0, 4)
    subject.unembedding.weight += torch.randn(32, dtype=torch.float64)
    after = direct_logits(subject, d, 2.0, 4)
    torch.testing.assert_close(before.highest[1], after.highest[1])
    torch.testing.assert_close(2 * direct_logits(subject, d, 4.0, 4).lowest[1], after.lowest[1])


@pytest.mark.parametrize("centred", [False, True])
def test_nearest_features_are_those_of_largest_and_smallest_cosine_but_themselves(centred: bool) -> None:
    every = torch.randn(9000, 8, generator=torch.Generator().manual_seed(0)) + 1
    every[::5] = 0
    every[4001] = 3 * every[1]  # a twin
    every[8999] = -every[1]
    chosen = torch.tensor([1, 7, 8999])
    ends = nearest_directions(every, chosen, 6, centred=centred)
    seen = every - every.mean(dim=1, keepdim=True) if centred else every
    cosine = torch.nn.functional.cosine_similarity(seen[chosen][:, None], seen[None], dim=-1)
    written = every.any(dim=1)
    for row, own in enumerate(chosen.tolist()):
        usable = written.clone()
        usable[own] = False
        for (index, value), sign in ((ends.highest, 1), (ends.lowest, -1)):
            expected = (sign * cosine[row]).masked_fill(~usable, -torch.inf).topk(6).values
            torch.testing.assert_close(sign * value[row], expected, rtol=1e-4, atol=1e-5)
            assert own not in index[row].tolist()
            assert bool(written[index[row]].all())
    assert int(ends.highest[0][0, 0]) == 4001
    assert int(ends.lowest[0][0, 0]) == 8999


def test_few_features_leave_places_empty() -> None:
    every = torch.eye(3)
    index, value = nearest_directions(every, torch.tensor([0]), 5).highest
    assert sorted(index[0].tolist()) in ([-1, -1, 1, 2], [-1, 1, 2], [1, 2])
    assert int(value[0].isnan().sum()) == int((index[0] < 0).sum())
