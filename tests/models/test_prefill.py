"""The tree of shared beginnings: every token once, every prompt's last token its own."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qklens.models.copies import Copies
from qklens.models.prefill import shared_levels

SEQUENCES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=24), min_size=1, max_size=8)


@given(SEQUENCES, st.integers(1, 6))
def test_the_nodes_on_a_prompts_way_are_the_prompt(sequences, least):
    levels = shared_levels(sequences, least)
    ends = {}
    for depth, level in enumerate(levels):
        for place, node in enumerate(level):
            tokens = {tuple(sequences[row][node.begin : node.end]) for row in node.rows}
            assert len(tokens) == 1
            assert node.end > node.begin
            if node.children:
                assert len(node.rows) > 1
                assert node.end - node.begin >= least
                assert sorted(r for child in node.children for r in child.rows) == sorted(node.rows)
                assert all(child.parent == place and child.begin == node.end for child in node.children)
            else:
                assert len(node.rows) == 1
                ends[node.rows[0]] = (depth, node)
    assert sorted(ends) == list(range(len(sequences)))
    assert all(node.end == len(sequences[row]) for row, (_, node) in ends.items())


@given(SEQUENCES)
def test_sharing_never_runs_more_tokens(sequences):
    run = sum(node.end - node.begin for level in shared_levels(sequences) for node in level)
    assert run <= sum(map(len, sequences))


def test_what_one_item_shares_is_run_once():
    template, question = [1] * 10, [2] * 9
    prompts = [[*template, *question, 3, 4], [*template, *question, 4, 3], [*template, *[5] * 9, 3, 4]]
    runs = [[(n.rows, n.begin, n.end) for n in level] for level in shared_levels(prompts)]
    assert runs == [[((0, 1, 2), 0, 10)], [((0, 1), 10, 19), ((2,), 10, 21)], [((0,), 19, 21), ((1,), 19, 21)]]


def test_a_copys_block_is_the_prefix_and_its_own_columns():
    copies = Copies(3, 4, 2)
    whole = torch.rand(2, 5, 6, 10)
    for copy in range(3):
        block = copies.take(whole, copy)
        rows, own = slice(2 * copy, 2 * copy + 2), slice(4 + 2 * copy, 6 + 2 * copy)
        assert torch.equal(block, torch.cat([whole[:, :, rows, :4], whole[:, :, rows, own]], dim=-1))
        assert torch.equal(copies.answer_rows(whole)[:, :, copy], block[:, :, -1])
        keys = torch.rand(2, 5, 10, 3)
        assert torch.equal(copies.take_keys(keys, copy), torch.cat([keys[:, :, :4], keys[:, :, own]], dim=2))
        other = whole.clone()
        copies.put(other, copy, block + 1)
        assert torch.equal(copies.take(other, copy), block + 1)
        assert (other != whole).sum() == block.numel()
