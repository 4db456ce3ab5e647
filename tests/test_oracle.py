"""The oracle's table fails when it should: shifted scores, another mask, an edit without effect or of another head."""

from __future__ import annotations

import pytest
import torch

from oracle.cases import CASES, HEADS, LAYERS, PROMPTS, Case
from oracle.compare import rows

EXACT = Case("exact", "nothing rounds", {})


@pytest.fixture
def sides() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theirs = {"clean": draw(len(PROMPTS), 6), "edited": draw(LAYERS, HEADS, len(PROMPTS), 6)}
    for row, prompt in enumerate(PROMPTS):
        future = torch.ones(len(prompt), len(prompt), dtype=torch.bool).triu(1)
        theirs[f"scores.{row}"] = draw(LAYERS, HEADS, len(prompt), len(prompt)).masked_fill(future, float("-inf"))
    ours = {name: tensor.clone() for name, tensor in theirs.items() if not name.startswith("scores")}
    for row in range(len(PROMPTS)):
        ours[f"read.{row}"] = ours[f"terms.{row}"] = theirs[f"scores.{row}"] + 1e-14
    return ours, theirs


def failed(sides, case: Case = EXACT) -> list[int]:
    return [number for number, row in enumerate(rows(case, *sides)) if not row.ok]


def test_equal_sides_hold(sides):
    assert failed(sides) == []


@pytest.mark.parametrize("by", [1e-8, float("nan")])
@pytest.mark.parametrize(("name", "row"), [("read.1", 0), ("terms.0", 1), ("clean", 2)])
def test_a_shift_is_off_in_its_own_row(name, row, by, sides):
    ours = {**sides[0], name: sides[0][name] + by}
    assert row in failed((ours, sides[1]))
    single = Case("single", "softmax in float32", {}, single_softmax=True)
    assert (row in failed((ours, sides[1]), single)) == (by != 1e-8)


def test_norms_in_float32_loosen_the_pair_terms_alone(sides):
    norms = Case("norms", "norms in float32", {}, single_norms=True)
    ours = {**sides[0], "read.0": sides[0]["read.0"] + 1e-8, "terms.0": sides[0]["terms.0"] + 1e-8}
    assert failed((ours, sides[1]), norms) == [0]


def test_a_key_that_one_side_hides_is_off(sides):
    hidden = sides[0]["read.0"].clone()
    hidden[2, 1, 5, 0] = float("-inf")
    assert failed(({**sides[0], "read.0": hidden}, sides[1])) == [0]


def test_another_heads_edit_is_off(sides):
    swapped = sides[0]["edited"].clone()
    swapped[1] = swapped[1].roll(1, dims=0)
    assert failed(({**sides[0], "edited": swapped}, sides[1])) == [3, 5]


def test_an_edit_without_effect_is_off_on_both_sides(sides):
    ours, theirs = sides
    still = theirs["clean"].expand(LAYERS, HEADS, -1, -1)
    assert failed(({**ours, "edited": still}, {**theirs, "edited": still})) == [4, 5]


def test_the_families_differ():
    assert len({case.model_type for case in CASES}) == len(CASES) == 4
