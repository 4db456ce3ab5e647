"""What stands in for the error is what it says, token by token."""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.attended import places
from qklens.analyses.replaced_error import aligned, place_means, replaced
from qklens.data.items import Dataset
from qklens.data.render import LetterForm
from qklens.interventions.patch import other_items
from qklens.studies.lab import Lab
from sparse_source import sparse_source


@pytest.fixture(scope="module")
def lab(tiny_llama, items) -> Lab:
    lab = Lab(tiny_llama(), Dataset("few", items[:8], "0"), LetterForm("", ""), 0)
    lab.source = sparse_source(lab.subject.d_model, 64, (1, 2))
    return lab


def made(lab: Lab, kind, seed: int = 5):
    prompts, written = lab.prompts("harm", "report"), lab.written("harm", "report", 1)
    means = place_means(lab.prompts("harm", "discovery"), lab.written("harm", "discovery", 1))
    return prompts, written, means, replaced(kind, prompts, written, means, seed)


def test_zero_leaves_the_reconstruction(lab: Lab) -> None:
    _, written, _, deltas = made(lab, "zero")
    for parts, delta in zip(written, deltas, strict=True):
        rebuilt = parts.active.dense() @ lab.source.directions(1) + parts.bias
        assert torch.allclose(parts.residual + delta, rebuilt, atol=1e-4)


def test_mean_is_of_the_other_half_at_the_same_place(lab: Lab) -> None:
    prompts, written, means, deltas = made(lab, "mean")
    donors = list(zip(lab.prompts("harm", "discovery"), lab.written("harm", "discovery", 1), strict=True))
    for place, spans in (("question", ("question",)), ("answer", ("answer",))):
        rows = torch.cat([w.error[[j for s in spans for j in p.span(s)]] for p, w in donors])
        assert torch.allclose(means[place], rows.mean(dim=0), atol=1e-5)
        j = prompts[0].span(place)[0]
        assert torch.allclose(written[0].error[j] + deltas[0][j], means[place], atol=1e-5)


def test_random_is_as_long_as_the_error_and_points_elsewhere(lab: Lab) -> None:
    _, written, _, deltas = made(lab, "random")
    errors, drawn = torch.cat([w.error for w in written]), torch.cat(deltas)
    assert torch.allclose(drawn.norm(dim=-1), errors.norm(dim=-1), rtol=1e-4)
    assert torch.nn.functional.cosine_similarity(drawn, errors).abs().mean() < 0.3
    assert not torch.equal(deltas[0], made(lab, "random", seed=6)[3][0])


def test_another_item_s_error_comes_from_the_same_place_and_order(lab: Lab) -> None:
    prompts, written, _, deltas = made(lab, "other_item")
    donors = other_items(len(prompts) // 2, 5)
    for row, prompt in enumerate(prompts):
        other = 2 * int(donors[row // 2]) + row % 2
        assert other != row
        there = places(prompts[other])
        for j, (source, place) in enumerate(zip(aligned(prompts[other], prompt), places(prompt), strict=True)):
            assert there[source] == place
            assert torch.allclose(written[row].error[j] + deltas[row][j], written[other].error[source], atol=1e-5)


def test_alignment_keeps_ends_and_order(lab: Lab) -> None:
    prompts = lab.prompts("harm", "report")
    for donor in prompts[:4]:
        for receiver in prompts[:4]:
            at = aligned(donor, receiver)
            for name in ("intent", "question", "option_A", "option_B", "template_after"):
                mine, theirs = receiver.span(name), donor.span(name)
                assert [at[mine[0]], at[mine[-1]]] == [theirs[0] if len(mine) > 1 else theirs[-1], theirs[-1]]
                assert sorted(at[j] for j in mine) == [at[j] for j in mine]
    assert aligned(prompts[0], prompts[0]) == list(range(len(prompts[0].tokens)))
