"""The committed loss curves of `benchmarks.dictionary_training` say what the README says of them."""

from __future__ import annotations

import json
import re
import sys

import pytest

from benchmarks import dictionary_training
from benchmarks.dictionary_training import CURVES, ROOT, off

FOUND = json.loads(CURVES.read_text(encoding="utf-8"))


def test_they_are_of_the_scripts_own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def stop(_: object, options: object) -> None:
        asked.append(vars(options))
        raise SystemExit

    monkeypatch.setattr(dictionary_training, "make_task", stop)
    monkeypatch.setattr(sys, "argv", ["dictionary_training"])
    with pytest.raises(SystemExit):
        dictionary_training.main()
    assert {name: asked[0][name] for name in FOUND["options"]} == FOUND["options"]


@pytest.mark.parametrize(("name", "most"), [("ours", 0.0), ("sparsify", 2e-3), ("saelens, constrained", 1e-4)])
def test_the_same_algorithm_gives_the_same_losses(name: str, most: float) -> None:
    """In float32, by other kernels in another order: at every step."""
    curve = FOUND["contestants"][name]["fvu"]
    assert len(curve) == FOUND["options"]["steps"]
    assert off(FOUND["contestants"]["ours"]["fvu"], curve) <= most


def test_the_readmes_table_has_their_first_and_last_values() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {
        "ours": "qklens, its shuffling buffer included",
        "sparsify": "sparsify 1.3.3",
        "saelens": "SAELens 6.54.12",
        "saelens, sparse": "SAELens, `use_sparse_activations`",
        "saelens, constrained": "SAELens, decoder at norm 1, no clipping",
    }
    assert rows.keys() == FOUND["contestants"].keys()
    for name, words in rows.items():
        line = re.search(rf"^\| {re.escape(words)} \|.*\| ([\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE)
        assert line, words
        curve = FOUND["contestants"][name]["fvu"]
        assert [float(value) for value in line.groups()] == [round(curve[0], 3), round(curve[-1], 3)]
