"""The fewest heads: two planted ones are found, what a third makes up for is told, all numbers are brute force's."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

import planted_heads
from planted_heads import BACKUP, SELECTING, pressure, prompts
from qklens.analyses.head_search import Restoration, find_fewest, nested, restoration_curve
from qklens.analyses.heads import clean_pattern_patch
from qklens.analyses.readings import read_attention, read_patterns
from qklens.analyses.statistics import bootstrap_ratio
from qklens.errors import NothingChangedError
from qklens.interventions.engine import Workset
from qklens.interventions.patch import PatternPatch, frozen_patterns
from qklens.interventions.steer import Steer

CANDIDATES = [(layer, head) for layer in (1, 2) for head in range(4)]
FIRST, SECOND = sorted(SELECTING, key=lambda h: -SELECTING[h])
METHODS = ("greedy", "attribution")


def steer(heads) -> Steer:
    return Steer(pressure(), -1.0, side="query", heads=tuple(heads), tokens=("answer",))


@pytest.fixture(scope="module", params=[0.0, 0.1], ids=["alone", "with a backup"])
def bench(request, word_tokenizer) -> Restoration:
    subject = planted_heads.planted(word_tokenizer, request.param)
    clean = Workset(subject, prompts(harm=False)).margins()
    return Restoration(Workset(subject, prompts(harm=True)), clean, steer)


def has_backup(bench: Restoration) -> bool:
    return bool(bench.work.subject.output_weight(BACKUP[0])[:, BACKUP[1]].any())


@pytest.mark.parametrize("method", METHODS)
def test_the_two_planted_heads_are_the_smallest_set(bench, method):
    found = find_fewest(bench, CANDIDATES, method)
    assert found.smallest == (FIRST, SECOND)
    assert found.order[:2] == (FIRST, SECOND)
    assert found.shares[1] == pytest.approx(1, abs=0.02)
    assert found.shares[-1] == pytest.approx(found.shares[1], abs=1e-4)
    assert len(found.order) == (2 if method == "greedy" else len(CANDIDATES))
    assert set(found.sets[-1]) == set(CANDIDATES)
    assert found.describe()["smallest"] == (FIRST, SECOND)


def test_greedy_takes_the_best_next_head_in_one_sweep_a_round(bench, monkeypatch):
    sweeps, whole = [], Workset.margins_each
    monkeypatch.setattr(
        Workset, "margins_each", lambda w, points, **k: sweeps.append(len(points)) or whole(w, points, **k)
    )
    found = find_fewest(bench, CANDIDATES, "greedy")
    n = len(CANDIDATES)
    assert sweeps == [1, *range(n, n - len(found.order) - 1, -1)]
    plain = Workset(bench.work.subject, bench.work.prompts, reuse=False)
    for size in (1, 2):
        gained = {some: float(plain.margins([steer(some)]).mean()) for some in combinations(CANDIDATES, size)}
        assert set(max(gained, key=gained.__getitem__)) == set(found.order[:size])


def test_what_a_backup_does_shows_only_beside_frozen_heads(bench):
    """Free, the backup stops as the two resume; frozen, it goes on, so the two seem to restore more."""
    sets = [(FIRST,), (FIRST, SECOND), tuple(CANDIDATES)]
    rows = restoration_curve(bench, sets, 0)
    for row in rows[:2]:
        low, high = row.others_ci
        assert low <= row.others <= high
        if has_backup(bench):
            assert high < -0.05
        else:
            assert row.others == pytest.approx(0, abs=1e-5)
        assert row.others == pytest.approx(row.share - row.share_frozen, abs=1e-6)
    assert rows[2].others == pytest.approx(0, abs=1e-5), "the backup is among the heads that are free"


def test_every_number_is_that_of_one_set_at_a_time(bench):
    plain = Workset(bench.work.subject, bench.work.prompts, reuse=False)
    rows = read_patterns(plain, [(layer, head) for layer in range(4) for head in range(4)])
    harmed = plain.margins()
    lost = (bench.clean - harmed).double()
    sets = nested([FIRST, SECOND, BACKUP])
    for row, heads in zip(restoration_curve(bench, sets, 3), sets, strict=True):
        free = plain.margins([steer(heads)])
        (held,) = plain.margins_each([[steer(heads), frozen_patterns(rows, heads)]], idle_ok=True)
        assert row.heads == heads
        assert row.margin == pytest.approx(float(free.mean()), abs=1e-4)
        assert row.accuracy == float((free > 0).double().mean())
        for share, interval, margins in (
            (row.share, row.share_ci, free),
            (row.share_frozen, row.share_frozen_ci, held),
        ):
            gained = (margins - harmed).double()
            assert share == pytest.approx(float(gained.sum() / lost.sum()), abs=1e-4)
            above, below = (v.view(-1, 2).mean(dim=1).numpy() for v in (gained, lost))
            assert interval == pytest.approx(bootstrap_ratio(above, below, 3), abs=1e-4), "items are resampled"
        assert row.as_row()["others"] == row.others


def test_patterns_can_be_searched_as_well(bench):
    """The same heads by their clean patterns, which need no direction."""
    subject = bench.work.subject
    rows = read_patterns(Workset(subject, prompts(harm=False)), CANDIDATES)
    patch = clean_pattern_patch(prompts(harm=False), rows, prompts(harm=True), CANDIDATES)
    by_pattern = replace(bench, make=lambda heads: PatternPatch({head: patch.rows[head] for head in heads}))
    for method in METHODS:
        assert set(find_fewest(by_pattern, [h for h in CANDIDATES if h != BACKUP], method).smallest) == {FIRST, SECOND}


def test_attribution_of_a_change_is_that_of_what_it_changes(bench):
    """Linear in the outputs: a reading's own letters are those of its outputs, and the idle heads write nothing."""
    before, after = read_attention(bench.work), read_attention(bench.work, [steer(CANDIDATES)])
    assert not torch.allclose(before.outputs, after.outputs)
    assert after.margins.mean() > before.margins.mean() + 1
    torch.testing.assert_close(after.margins, bench.work.margins([steer(CANDIDATES)]), rtol=0, atol=1e-4)
    idle = [1, 3]
    assert not after.letter_logit[:, 1, idle].any()


def test_an_edit_that_changes_nothing_anywhere_is_an_error(bench):
    silent = pressure()
    nothing = replace(silent, read=lambda layer, stream: torch.zeros(len(stream(layer))))
    idle = replace(bench, make=lambda heads: replace(steer(heads), direction=nothing, mode="ablate"))
    for method in METHODS:
        with pytest.raises(NothingChangedError, match="changed no value in any of 8 prompts"):
            find_fewest(idle, CANDIDATES, method)


def test_large_sets_grow_by_half():
    order = [(0, head) for head in range(40)]
    assert [len(some) for some in nested(order)] == [*range(1, 13), 18, 27, 40]
    assert nested(order[:3]) == [((0, 0),), ((0, 0), (0, 1)), ((0, 0), (0, 1), (0, 2))]
    assert nested([]) == []


class Toy(Restoration):
    """What sets of heads gain, by rule; half of what is lost is 1."""

    def __init__(self, rule) -> None:
        object.__setattr__(self, "rule", rule)

    lost = torch.tensor([1.0, 1.0])

    def gains(self, sets, held=(), *, idle_ok=True):
        return torch.tensor([[self.rule(set(heads))] * 2 for heads in sets])


@pytest.mark.parametrize(
    ("rule", "order", "smallest"),
    [
        (lambda s: 0.0, (), ()),
        (lambda s: -0.3 * len(s), (), ()),
        (lambda s: 1.0 if {(0, 1), (0, 3)} <= s else 0.0, (), ((0, 0), (0, 1), (0, 2), (0, 3))),
        (lambda s: 0.92 * ((0, 2) in s) + 0.08 * ((0, 1) in s), ((0, 2), (0, 1)), ((0, 2),)),
        (lambda s: {1: 0.5, 2: 0.8, 3: 0.3, 4: 0.1}[len(s)], ((0, 0), (0, 1)), ((0, 0), (0, 1))),
        (lambda s: 0.6 * ((0, 0) in s) + 0.004 * len(s), ((0, 0),), ((0, 0),)),
    ],
    ids=["nothing", "harm", "only together", "90% suffices", "too many", "crumbs"],
)
def test_when_a_greedy_search_ends_and_what_it_calls_smallest(rule, order, smallest):
    found = find_fewest(Toy(rule), [(0, head) for head in range(4)], "greedy")
    assert (found.order, found.smallest) == (order, smallest)
    assert len(found.sets) == len(found.shares)
    assert np.isfinite(found.shares).all()
