"""Attention on the options before the answer, carried over from another condition: what a pass then uses."""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.before_answer import option_blocks
from qklens.analyses.mediation import OPTIONS
from qklens.data.render import ORDERS, LetterForm, render
from qklens.interventions.blocks import Block, BlockPatch
from qklens.interventions.engine import Workset
from qklens.models.attention import AttentionRead
from qklens.models.copies import Reads
from qklens.models.subject import Subject


@pytest.fixture(scope="module")
def works(tiny_llama, items, word_tokenizer) -> dict[str, Workset]:
    subject = tiny_llama()
    return {
        c: Workset(subject, [render(word_tokenizer, i, c, o, LetterForm("", "")) for i in items[:4] for o in ORDERS])
        for c in ("none", "harm")
    }


def patterns(work: Workset, *interventions: BlockPatch) -> list[torch.Tensor]:
    """Every prompt's whole patterns, `layer head q_pos k_pos` over its own tokens."""
    n_layers = work.subject.n_layers
    found: list[dict[int, torch.Tensor]] = [{} for _ in work.prompts]

    def reads(index, batch) -> Reads:
        def attention(read: AttentionRead) -> None:
            for row, i in enumerate(index):
                found[i][read.layer] = read.pattern[row, :, batch.padding(row) :, batch.padding(row) :].clone()

        return Reads({}, dict.fromkeys(range(n_layers), attention))

    work.logits(list(interventions), reads=reads)
    return [torch.stack([one[layer] for layer in range(n_layers)]) for one in found]


def test_the_block_is_the_donor_s_and_each_row_keeps_its_sum_and_the_rest_its_proportions(works) -> None:
    harm, none = works["harm"], works["none"]
    blocks = option_blocks(none, harm.prompts)
    clean, donors, mixed = patterns(harm), patterns(none), patterns(harm, BlockPatch(blocks))
    for i, (prompt, donor) in enumerate(zip(harm.prompts, none.prompts, strict=True)):
        options = sorted(p for name in OPTIONS for p in prompt.span(name))
        answer, block = prompt.spans["answer"][0], blocks[i]
        assert list(block.keys) == options
        assert list(block.queries) == list(range(min(options), answer)), "from the first option on, all shared"
        shift = len(donor.tokens) - len(prompt.tokens)
        queries, keys = list(block.queries), list(block.keys)
        its = donors[i][:, :, [q + shift for q in queries]][..., [k + shift for k in keys]]
        assert torch.equal(block.values, its)
        there = mixed[i][:, :, queries]
        assert torch.allclose(there[..., keys], its, atol=1e-7)
        assert torch.allclose(there.sum(dim=-1), torch.ones(there.shape[:-1]), atol=1e-5)
        others = [k for k in range(len(prompt.tokens)) if k not in keys]
        was, now = clean[i][0][:, queries][..., others], mixed[i][0][:, queries][..., others]
        assert torch.allclose(now / now.sum(dim=-1, keepdim=True), was / was.sum(dim=-1, keepdim=True), atol=1e-6)
        rest = [q for q in range(len(prompt.tokens)) if q not in queries]
        assert torch.equal(mixed[i][0][:, rest], clean[i][0][:, rest]), "in the first layer no other row has changed"
        assert not torch.allclose(mixed[i][-1][:, -1], clean[i][-1][:, -1], atol=1e-6), "later ones see the change"


def test_beginnings_that_prompts_share_are_run_once_with_the_same_margins(works) -> None:
    harm = works["harm"]
    patch = BlockPatch(option_blocks(works["none"], harm.prompts))
    whole = Workset(harm.subject, harm.prompts, reuse=False)
    assert torch.allclose(harm.margins_each([patch])[0], whole.margins([patch]), atol=1e-5)
    assert (harm.margins_each([patch])[0] - harm.margins()).abs().max() > 1e-4


def test_a_prompt_s_own_block_changes_nothing_and_one_without_queries_is_none(works) -> None:
    harm = works["harm"]
    own = BlockPatch(option_blocks(harm, harm.prompts))
    assert torch.allclose(harm.margins_each([own], idle_ok=True)[0], harm.margins(), atol=1e-5)
    subject: Subject = harm.subject
    nothing = BlockPatch([Block([], [1], torch.zeros(subject.n_layers, subject.n_heads, 0, 1)) for _ in harm.prompts])
    assert torch.equal(harm.margins_each([nothing], idle_ok=True)[0], harm.margins())
