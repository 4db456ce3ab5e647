"""Heads chosen whatever items are left out: folds, the pooled share, and no look at the items of one's own fold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from head_tables import FOLDS, lab_of, table_of
from qklens.analyses.statistics import wilson
from qklens.data.render import CONDITIONS
from qklens.errors import QklensError
from qklens.interventions.engine import Workset
from qklens.interventions.patch import HeadAblation
from qklens.interventions.points import several
from qklens.studies import choices
from qklens.studies.choices import choose_heads, default_heads
from qklens.studies.config import LabConfig
from qklens.studies.lab import Lab, fold_items
from qklens.studies.opening import open_lab
from qklens.studies.tables.head_table import HeadTable


@pytest.fixture(scope="module")
def lab(tiny_llama, items) -> Lab:
    return lab_of(tiny_llama(seed=1), items)


@pytest.fixture(scope="module")
def table(lab) -> HeadTable:
    return table_of(lab)


@pytest.fixture(scope="module")
def organism() -> Lab:
    return open_lab(LabConfig(items=8))


@pytest.fixture(scope="module")
def organism_table(organism) -> HeadTable:
    return table_of(organism)


def test_the_organism_is_ranked_by_patching_and_a_random_model_by_ablation(table, organism_table):
    assert table.ranked_by == "ablation_drop"
    assert {r.restores_when_patched for r in table.heads} == {None}
    assert organism_table.ranked_by == "patch_gain"
    first = organism_table.heads[0]
    assert (first.layer, first.head, first.chosen_in) == (2, 4, FOLDS)
    assert organism_table.held_out_share > 0.5
    low, high = organism_table.held_out_share_ci
    assert low <= organism_table.held_out_share <= high
    low, high = organism_table.held_out_effect_ci
    assert 0 < low <= organism_table.held_out_effect <= high
    lost = organism_table.margin["none"] - organism_table.margin["harm"]
    for found in organism_table.heads:
        assert found.restores_when_patched == pytest.approx(found.patch_gain / lost, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("which", ["table", "organism_table"])
def test_the_effect_is_pooled_over_items_left_out(which, request):
    """From the folds' own rows alone; a share is given where there is something to win."""
    found = request.getfixturevalue(which)
    n = sum(fold.items for fold in found.folds)
    whole = found.margin["none"] - (found.margin["harm"] if found.ranked_by == "patch_gain" else 0)
    pooled = sum(fold.effect * fold.items for fold in found.folds) / n
    assert found.held_out_effect == pytest.approx(pooled, rel=1e-4)
    if which == "organism_table":
        assert found.held_out_share == pytest.approx(pooled / whole, rel=1e-4)
    else:
        assert (found.held_out_share, found.held_out_share_ci) == (None, None)
        assert {fold.share for fold in found.folds} == {None}
    assert found.data["n_items"] == n
    for r in found.heads:
        assert r.chosen_in == sum((r.layer, r.head) in fold.heads for fold in found.folds)


def test_a_fold_is_measured_on_its_own_items(lab, table):
    fold = fold_items(lab.dataset.items, FOLDS, lab.seed)
    none = lab.attention("none", "all")
    for number, held in enumerate(table.folds):
        rows = [i for i, f in enumerate(np.repeat(fold, 2)) if f == number]
        work = Workset(lab.subject, [lab.prompts("none", "all")[i] for i in rows], reuse=False)
        edit = HeadAblation({h: none.outputs[:, h[0], h[1]].mean(dim=0) for h in held.heads})
        lost = work.margins() - work.margins([edit])
        assert held.effect == pytest.approx(float(lost.mean()), abs=1e-3)
        assert held.items == len(rows) // 2
        assert held.letter_logit == pytest.approx(
            sum(float(none.letter_logit[rows, layer, head].mean()) for layer, head in held.heads), abs=1e-4
        )


def test_heads_are_chosen_without_the_items_of_their_fold(tiny_llama, items, monkeypatch):
    """Attention, letters and every edited margin of one fold's items are spoilt: the others' choice stands."""
    subject, folds = tiny_llama(num_hidden_layers=2), 3
    before = table_of(lab_of(subject, items), folds)
    fold, many = fold_items(items[:6], folds, 0), Workset.margins_each
    moved = 0
    for number in range(folds):
        spoilt = lab_of(subject, items)
        rows = torch.from_numpy(np.repeat(fold == number, 2))

        def noise(interventions, rows=rows):
            seed = sum(layer * 17 + head for edit in interventions for layer, head in edit.describe()["heads"])
            return 20 * torch.randn(len(rows), generator=torch.Generator().manual_seed(seed)) * rows

        def margins_each(work, interventions, noise=noise, **options):
            return many(work, interventions, **options) + torch.stack([noise(several(one)) for one in interventions])

        for condition in CONDITIONS:
            reading = spoilt.attention(condition, "all")
            changed = {"mass": reading.mass.clone(), "letter_logit": reading.letter_logit.clone()}
            for name, values in changed.items():
                values[rows] = values[rows].flip(1, 2) + (name == "letter_logit")
            spoilt._attention[condition, "all"] = dataclasses.replace(reading, **changed)
        with monkeypatch.context() as patched:
            patched.setattr(Workset, "margins_each", margins_each)
            after = table_of(spoilt, folds)
        assert after.ranked_by == before.ranked_by
        assert after.folds[number].heads == before.folds[number].heads
        assert after.folds[number].effect != before.folds[number].effect
        moved += sum(a.heads != b.heads for a, b in zip(after.folds, before.folds, strict=True))
    assert moved, "spoilt items that train a fold do change its choice"


def test_no_head_selects_where_nothing_is_answered_and_a_table_says_what_it_reads(lab, organism, monkeypatch):
    """A random model's answers are chance: none of its heads is selected, and tables read the best one with a note."""
    calm = lab.work("none", "discovery").margins()
    right = int((calm > 0).sum())
    assert wilson(right, len(calm))[0] <= 0.5
    selected, ranked, _ = choose_heads(lab)
    assert selected == []
    best = ranked[0]
    with pytest.warns(UserWarning, match=f"no better than chance; reading L{best[0]}H{best[1]}, the best other head"):
        assert default_heads(lab, [best[0]], "directions") == (best,)
    selected, *_ = choose_heads(organism)
    assert selected
    assert set(default_heads(organism, [2], "organism")) <= set(selected), "without a note"
    monkeypatch.setattr(choices, "choose_heads", lambda lab: ([(2, 4), (2, 6)], [(2, 4), (2, 6), (1, 3), (1, 0)], []))
    with pytest.warns(UserWarning, match="L2H4, L2H6 read layers that 'here' does not write; reading L1H3"):
        assert default_heads(organism, [1], "here") == ((1, 3),)


def test_folds_share_no_pair_of_options(items):
    twice = [*items[:12], *(i.model_copy(update={"id": f"{i.id}'"}) for i in items[:5])]
    for n_folds in (2, 3, 5):
        fold = fold_items(twice, n_folds, 3)
        assert set(fold) == set(range(n_folds))
        for pair in {frozenset((i.correct, i.incorrect)) for i in twice}:
            assert len({f for f, i in zip(fold, twice, strict=True) if {i.correct, i.incorrect} == pair}) == 1


@pytest.mark.parametrize("folds", [-1, 0, 1, 6, 10**12])
def test_folds_that_cannot_be_made(tiny_llama, items, folds):
    """Items with the same two options share a fold, so there are fewer folds than items."""
    twin = items[0].model_copy(update={"id": "twin", "question": items[1].question})
    some = [*items[:5], twin]
    most = len({frozenset((i.correct, i.incorrect)) for i in some})
    assert most < 6
    with pytest.raises(QklensError, match=f"--folds {folds}: expected 2 to {most}, as many as there are different"):
        table_of(lab_of(tiny_llama(), some), folds)
