"""Which heads' scores are taken apart, and what the query's change does to either option, on numbers made by hand."""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.factorial import TERMS, TermRows, option_pulls
from qklens.analyses.mediation import first_that_suffice


def test_heads_of_the_earliest_layers_that_restore_enough_of_what_all_do() -> None:
    heads = [(5, 1), (2, 0), (3, 7), (2, 4)]
    restored = {2: 0.5, 3: 0.89, 5: 0.9}
    assert first_that_suffice(heads, restored, 0.98) == [(2, 0), (3, 7), (2, 4)]
    assert first_that_suffice(heads, restored, 0.995) == heads
    assert first_that_suffice(heads, restored, 0.5) == [(2, 0), (2, 4)]


def test_an_option_is_pulled_by_its_tokens_as_the_ordinary_query_attends_to_them() -> None:
    """Of the correct option only the attended token is repelled; of the other option a token nobody looks at."""
    ordinary = torch.tensor([9.0, 0.0, 40.0, 40.0, 0.0])
    rows = {term: {(0, 0): [torch.zeros(5)]} for term in TERMS}
    rows["answer_key"][0, 0][0][1:3] = torch.tensor([50.0, -4.0])
    rows["harm_key"][0, 0][0][2] = -2.0
    rows["elsewhere"][0, 0][0][3:5] = torch.tensor([-1.0, -70.0])
    rows["key_only"][0, 0][0][:] = 3.0
    pulls = option_pulls(TermRows(rows, {(0, 0): [ordinary]}, {}), [[(1, 2), (3, 4)]])
    assert pulls.tolist() == [[[pytest.approx(-6.0), pytest.approx(-1.0)]]]
