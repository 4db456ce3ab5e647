"""Partners of a direction: every family against virtual_interaction, and exact lists whatever the blocks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qklens.analyses import partners as partners_module
from qklens.analyses.partners import Partners, rank_partners
from qklens.dictionaries.unit import UnitDirections, unit_directions
from qklens.errors import QklensError
from qklens.models.families import load_family
from qklens.models.scores import offset_rotation, score_maps, virtual_interaction, virtual_reader
from qklens.models.subject import wrap_model
from tiny_families import CASES, tiny_model

FAMILIES = ["llama gqa", "llama mqa", "qwen3", "phi3", "gpt_neox", "gpt2", "olmo2", "llama rotary scaling yarn"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Rows of four ones with signs, length 2, and readers of small whole numbers, meet without any rounding."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(shape, generator=draw).topk(4, dim=-1).indices
    signs = torch.randint(0, 2, chosen.shape, generator=draw) * 2.0 - 1
    return torch.zeros(shape).scatter(-1, chosen, signs)


def dense(units: UnitDirections, values: Tensor, k: int, largest: bool) -> tuple[list[list[int]], list[list[float]]]:
    """Per column, by a plain stable sort of the features that write: the oracle of the top lists."""
    living = [i for i in range(len(units)) if units.present[i]]
    indices, sorted_values = [], []
    for column in values.T.tolist():
        order = sorted(living, key=lambda i: (-column[i] if largest else column[i], i))[:k]
        indices.append(order)
        sorted_values.append([column[i] for i in order])
    return indices, sorted_values


def lists(found: Partners) -> list[list[list[int]]]:
    return [[[i for i in row if i >= 0] for row in end.index.tolist()] for end in (found.lowest, found.highest)]


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("case", FAMILIES)
def test_every_feature_is_ranked_as_virtual_interaction_has_it(case, side, word_tokenizer):
    """From both ends, at all heads of two layers together, with a mean rotation that is no rotation."""
    assert case in CASES
    model = tiny_model(case, len(word_tokenizer), torch.float64)
    subject = wrap_model(model, word_tokenizer, load_family(model.config.model_type))
    held = normal(subject.d_model, seed=5)
    readers, expected, blocks, k = [], [], [], 7
    for layer in (1, 2):
        maps, turn = score_maps(subject, layer), offset_rotation(subject, layer, torch.tensor([2, 5, 11]))
        directions = 3 * normal(40, subject.d_model, seed=layer)
        blocks.append(unit_directions(directions, centred=subject.family.norm.centred))
        readers.append(torch.stack([virtual_reader(maps, h, turn, held, side) for h in range(subject.n_heads)]))
        for head in range(subject.n_heads):
            pair = (held[None], directions) if side == "query" else (directions, held[None])
            expected.append(virtual_interaction(maps, head, turn, *pair))
    expected.append(torch.stack(expected).mean(dim=0))
    values = torch.stack(expected, dim=1)
    found = rank_partners([blocks], readers, k)
    scale = float(values.abs().max())
    assert scale > 1e-3
    for end, largest in ((found.lowest, False), (found.highest, True)):
        indices, sorted_values = dense(blocks[0], values, k, largest)
        assert end.index.tolist() == indices
        assert (end.value - torch.tensor(sorted_values, dtype=torch.float64)).abs().max() < 1e-10 * scale
    assert found.count.tolist() == [40] * len(expected)
    torch.testing.assert_close(found.mean, values.mean(dim=0), rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(found.sd, values.std(dim=0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", FAMILIES)
def test_transposed_rotations_move_to_the_other_side(case, word_tokenizer):
    model = tiny_model(case, len(word_tokenizer), torch.float64)
    subject = wrap_model(model, word_tokenizer, load_family(model.config.model_type))
    turn = offset_rotation(subject, 1, torch.tensor([1, 4, 9]))
    left, right = normal(20, subject.d_head, seed=1), normal(20, subject.d_head, seed=2)
    before, after = (turn(left) * right).sum(dim=1), (left * turn.transposed()(right)).sum(dim=1)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


@pytest.fixture
def _small_tiles(monkeypatch):
    """Many tiles and stretches in few features, so that all their borders are met."""
    monkeypatch.setattr(partners_module, "_TILE", 64)
    monkeypatch.setattr(partners_module, "_STRETCH", 192)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("n", [1, 5, 63, 64, 65, 192, 193, 1000])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_lists_are_exact_with_ties_and_rows_that_do_not_write(n, k):
    """Two groups of heads; a third of the rows are zero in the first, the tail of them in the second."""
    readers = [whole(3, 16, seed=1), 2 * whole(2, 16, seed=2)]
    rows = [whole(n, 16, seed=3), whole(n, 16, seed=4)]
    rows[0][::3] = 0
    rows[1][n // 2 :] = 0
    block = [unit_directions(r) for r in rows]
    found = rank_partners([block], readers, k)
    groups = [(r / 2) @ reader.T for r, reader in zip(rows, readers, strict=True)]
    either = UnitDirections(block[0].rows, block[0].present | block[1].present)
    mean = torch.cat(groups, dim=1).double().mean(dim=1, keepdim=True)
    for end, largest in ((found.lowest, False), (found.highest, True)):
        heads = [dense(units, values, k, largest) for units, values in zip(block, groups, strict=True)]
        indices, values = [row for h in heads for row in h[0]], [row for h in heads for row in h[1]]
        assert [[i for i in row if i >= 0] for row in end.index.tolist()[:-1]] == indices
        assert [[v for v in row if v == v] for row in end.value.tolist()[:-1]] == values
        expected = dense(either, mean, k, largest)[1][0]
        assert end.value[-1][: len(expected)].tolist() == pytest.approx(expected, abs=1e-6)
    counts = [int(units.present.sum()) for units in (block[0],) * 3 + (block[1],) * 2 + (either,)]
    assert found.count.tolist() == counts
    for column, values in enumerate([*groups[0].T, *groups[1].T]):
        living = values[block[0 if column < 3 else 1].present].double()
        assert float(found.mean[column]) == pytest.approx(float(living.mean()), nan_ok=True)
        spread = float(living.std()) if len(living) > 1 else float("nan")
        assert float(found.sd[column]) == pytest.approx(spread, rel=1e-6, abs=1e-6, nan_ok=True)


@st.composite
def splits(draw: st.DrawFn) -> list[int]:
    return draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))


@given(sizes=splits(), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=40)
def test_any_split_into_blocks_gives_the_same_answer(sizes, seed):
    # Four heads, so that their mean is exact too.
    rows, readers = unit_directions(whole(sum(sizes), 12, seed=seed)), whole(4, 12, seed=seed + 1)
    whole_answer = rank_partners([[rows]], [readers], 20)
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    blocks = [[rows.part(b, b + s)] for b, s in zip(begins, sizes, strict=True)]
    split_answer = rank_partners(blocks, [readers], 20)
    assert lists(split_answer) == lists(whole_answer)
    assert torch.equal(split_answer.lowest.value.nan_to_num(9), whole_answer.lowest.value.nan_to_num(9))
    # sd² is a difference of sums, whose rounding is that of mean² + sd².
    size = whole_answer.mean.square() + whole_answer.sd.square()
    off = (split_answer.sd.square() - whole_answer.sd.square()).abs()
    assert bool((off <= 1e-6 * size).logical_or(size.isnan() & split_answer.sd.isnan()).all())


@given(seed=st.integers(0, 50))
@settings(deadline=None, max_examples=20)
def test_a_permutation_of_features_permutes_indices_and_one_of_heads_columns(seed):
    rows, readers = normal(300, 12, seed=seed), normal(5, 12, seed=seed + 1)
    draw = torch.Generator().manual_seed(seed)
    features, heads = torch.randperm(300, generator=draw), torch.randperm(5, generator=draw)
    plain = rank_partners([[unit_directions(rows)]], [readers], 10)
    mixed = rank_partners([[unit_directions(rows[features])]], [readers[heads]], 10)
    columns = torch.cat([heads, torch.tensor([5])])
    assert torch.equal(features[mixed.highest.index], plain.highest.index[columns])
    assert torch.equal(features[mixed.lowest.index], plain.lowest.index[columns])
    torch.testing.assert_close(mixed.mean, plain.mean[columns])


def test_a_planted_partner_leads_its_end():
    readers = normal(4, 32, seed=1)
    rows = normal(5000, 32, seed=2)
    rows[4321], rows[17] = 7 * readers[2], -0.1 * readers[3]
    found = rank_partners([[unit_directions(rows)]], [readers], 5)
    assert int(found.highest.index[2, 0]) == 4321
    assert float(found.highest.value[2, 0]) == pytest.approx(float(readers[2].norm()))
    assert int(found.lowest.index[3, 0]) == 17
    assert float(found.lowest.value[3, 0]) == pytest.approx(-float(readers[3].norm()))


def test_equal_directions_are_listed_by_index_also_across_blocks():
    rows = unit_directions(torch.ones(400, 4))
    found = rank_partners([[rows.part(0, 30)], [rows.part(30, 400)]], [torch.ones(1, 4)], 40)
    assert found.lowest.index.tolist() == found.highest.index.tolist() == [list(range(40))] * 2


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("rising", [True, False])
def test_lists_are_exact_where_every_value_beats_the_last(rising):
    """In twos that are equal, so that everything is a candidate at one end and nothing at the other."""
    steps = torch.linspace(-1, 1, 1000, dtype=torch.float64).repeat_interleave(2)
    rows = torch.stack([steps, (1 - steps**2).sqrt()], dim=1)
    order = torch.arange(2000) if rising else torch.arange(2000).flip(0)
    units = UnitDirections(rows[order], torch.ones(2000, dtype=torch.bool))
    readers = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    found = rank_partners([[units]], [readers], 5)
    values = units.rows @ readers.T
    for end, largest in ((found.lowest, False), (found.highest, True)):
        assert end.index.tolist() == dense(units, values, 5, largest)[0] * 2


def test_past_the_last_feature_there_is_nothing():
    found = rank_partners([[unit_directions(torch.eye(3))]], [torch.tensor([[1.0, -2.0, 0.5]])], 50)
    assert found.highest.index.tolist() == [[0, 2, 1]] * 2
    rows = torch.eye(3)
    rows[1] = 0
    found = rank_partners([[unit_directions(rows)]], [torch.tensor([[1.0, -2.0, -0.5]])], 50)
    assert found.lowest.index.tolist() == [[2, 0, -1]] * 2
    assert found.lowest.value.isnan().tolist() == [[False, False, True]] * 2


def bad_calls() -> list[tuple[str, Sequence, Sequence[Tensor], int]]:
    units, readers = unit_directions(torch.eye(3)), torch.ones(2, 3)
    return [
        ("k is 0", [[units]], [readers], 0),
        ("0 readers", [[units]], [readers[:0]], 5),
        ("reader holds NaN", [[units]], [readers * torch.nan], 5),
        ("no feature", [], [readers], 5),
        ("expected equally many", [[units, units]], [readers], 5),
        ("expected equally many", [[units, units.part(0, 2)]], [readers, readers], 5),
        ("in \\[4\\] dimensions", [[units]], [torch.ones(2, 4)], 5),
    ]


@pytest.mark.parametrize(("line", "blocks", "readers", "k"), bad_calls(), ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_be_ranked_is_refused(line, blocks, readers, k):
    with pytest.raises(QklensError, match=line):
        rank_partners(blocks, readers, k)


def test_directions_that_are_no_numbers_are_refused_with_their_row():
    rows = torch.eye(4)
    rows[2, 1] = torch.nan
    with pytest.raises(QklensError, match="directions: row 12 holds NaN"):
        unit_directions(rows, first=10)


def test_unit_directions_are_scaled_and_short_ones_are_no_writers():
    units = unit_directions(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-13], [0.0, -1e-6]]).half().float())
    torch.testing.assert_close(units.rows[0], torch.tensor([0.6, 0.8]))
    assert units.present.tolist() == [True, False, False, True]
    assert not units.rows[1:3].any()
