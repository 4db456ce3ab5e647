"""The stage that places the named pairs among random ones: what a null cannot place is said, and stops nothing."""

from __future__ import annotations

import pytest
import torch

from qklens.data.items import Dataset
from qklens.data.render import LetterForm
from qklens.studies.harm_pressure import zscores
from qklens.studies.lab import Lab
from sparse_source import sparse_source

ROLES = {"need_answer": "f1", "correct_answer": "f2", "harm_detection": "f3", "refuse_redirect": "f4"}


@pytest.fixture
def lab(tiny_llama, items) -> Lab:
    subject = tiny_llama()
    found = Lab(subject, Dataset("few", tuple(items), "0"), LetterForm("", ""), 0)
    found.source = sparse_source(subject.d_model, 60, (1, 2), threshold=1.0)
    return found


def blinded(lab: Lab, layer: int, head: int) -> None:
    """Take a head's query away, so that every pair interacts alike there: not at all."""
    weight = lab.subject.layers[layer].self_attn.q_proj.weight
    width = lab.subject.d_head
    with torch.no_grad():
        weight[head * width : (head + 1) * width] = 0


def test_a_head_where_no_null_has_spread_is_said_and_the_other_keeps_its_tests(lab):
    alone = zscores.run(lab, [(2, 3)], ROLES).results
    blinded(lab, 1, 0)
    both = zscores.run(lab, [(1, 0), (2, 3)], ROLES).results  # streams are those read before
    assert alone["zscores"]
    assert both["zscores"] == alone["zscores"]
    assert both["null_histograms"] == alone["null_histograms"]
    assert alone["untested"] == []
    assert both["untested"]
    assert all("layer 1 head 0 has no spread" in why for why in both["untested"])
