"""Which items of the other sets are measured: all, or a seeded sample drawn as the main set's is."""

from __future__ import annotations

import pytest

from qklens.data.items import load_dataset
from qklens.errors import QklensError
from qklens.studies.config import LabConfig
from qklens.studies.harm_pressure.transfer import SETS, transfer_lab
from qklens.studies.opening import ready_lab, sample_items


@pytest.fixture(scope="module")
def lab():
    return ready_lab(LabConfig(items=8, seed=3, dictionary="directions"))


@pytest.mark.parametrize("name", SETS)
def test_other_sets_are_sampled_like_the_main_one(lab, name: str) -> None:
    whole = load_dataset(name)
    drawn = transfer_lab(lab, name, 20).dataset
    assert drawn.items == sample_items(whole, 20, 3).items
    assert len(drawn.items) == 20
    assert drawn.sha256 == whole.sha256
    places = [whole.items.index(i) for i in drawn.items]
    assert places == sorted(places)
    assert max(places) >= 24, "not only the items that stand first"
    assert drawn.items != sample_items(whole, 20, 4).items


@pytest.mark.parametrize("items", [None, 60, 129])
def test_a_sample_no_smaller_than_the_set_is_the_set(lab, items: int | None) -> None:
    assert transfer_lab(lab, "fraud", items).dataset == load_dataset("fraud")


def test_a_sample_too_small_for_a_study_is_refused(lab) -> None:
    with pytest.raises(QklensError, match="--items 3: expected at least 4"):
        transfer_lab(lab, "symptoms", 3)
