"""Attention by place and by token, on patterns written by hand."""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.attended import PLACES, attended_tokens, place_mass, places
from qklens.data.render import Prompt


def prompt(tokens: tuple[int, ...], spans: dict[str, tuple[int, ...]]) -> Prompt:
    return Prompt("", tokens, spans, 0, (), (0, 0), "A")


# user-tag, intent, question, line break, option A, option B, instruction, assistant-tag
HARM = prompt(
    (1, 7, 8, 5, 9, 9, 6, 2),
    {
        "template_before": (0,),
        "intent": (1,),
        "question": (2,),
        "option_A": (4,),
        "option_B": (5,),
        "correct": (5,),
        "incorrect": (4,),
        "instruction": (6,),
        "answer": (7,),
        "template_after": (7,),
    },
)
ROW = torch.tensor([0.4, 0.1, 0.05, 0.02, 0.2, 0.13, 0.03, 0.07])


def test_every_token_has_exactly_one_place():
    assert places(HARM) == [
        "template_before", "intent", "question", "between", "option_A", "option_B", "instruction", "template_after",
    ]  # fmt: skip


def test_places_share_out_the_whole_attention():
    other = prompt((1, 8, 2), {"template_before": (0,), "question": (1,), "template_after": (2,)})
    mass = place_mass([HARM, other], [ROW, torch.tensor([0.2, 0.5, 0.3])])
    assert tuple(mass) == PLACES
    assert sum(mass.values()) == pytest.approx(1.0)
    assert mass["template_before"] == pytest.approx(0.3)
    assert mass["option_B"] == pytest.approx(0.065)


def test_a_token_is_named_with_its_place_and_averaged_over_all_prompts():
    """The two options hold the same word: they are told apart; a prompt without the token counts as none."""
    bare = prompt((1, 8, 9, 2), {"template_before": (0,), "question": (1,), "option_A": (2,), "template_after": (3,)})
    clean = torch.tensor([0.1, 0.1, 0.7, 0.1])
    found = attended_tokens({"none": [bare], "harm": [HARM, bare]}, {"none": [clean], "harm": [ROW, clean]}, 2)
    assert [(a.token, a.place) for a in found] == [(9, "option_A"), (1, "template_before")]
    assert found[0].attention == pytest.approx({"none": 0.7, "harm": 0.45})
    assert found[1].attention == pytest.approx({"none": 0.1, "harm": 0.25})
    every = attended_tokens({"harm": [HARM]}, {"harm": [ROW]}, 99)
    assert sum(a.attention["harm"] for a in every) == pytest.approx(1.0)
    assert {(9, "option_A"), (9, "option_B")} <= {(a.token, a.place) for a in every}
