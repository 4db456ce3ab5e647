"""What the verdict reads is a fact about the model: the same weights written in another way give the same numbers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from reparameterise import REWRITES, Sparse

from qklens.analyses.gauge import GAUGES
from qklens.bench.planted.folder import Planted, Spec, planted_model
from qklens.bench.planted.words import items_file
from qklens.data.items import Dataset, load_dataset
from qklens.data.render import LetterForm
from qklens.models.loading import load_subject
from qklens.studies.harm_pressure.causes import Causes, measure_causes
from qklens.studies.lab import Lab

LINES = [
    (architecture, gauge.name)
    for architecture, family in (("gpt2", "gpt2"), ("llama_gqa", "llama"), ("qwen3", "qwen3"))
    for gauge in GAUGES
    if family in gauge.families
]
NOTHING = Sparse(*(torch.zeros(*size, dtype=torch.float64) for size in ((96, 1), (1,), (1, 96), (96,))))


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("items") / "planted.jsonl"
    path.write_text("".join(items_file().splitlines(keepends=True)[:8]))
    return load_dataset(str(path))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("models")

    @cache
    def of(architecture: str) -> Planted:
        spec = {"mechanism": "attention_harm_key", "architecture": architecture, "noise": 2, "seed": 1}
        return planted_model(Spec.model_validate(spec), folder)

    return of


def numbers(causes: Causes) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in causes.model_dump(exclude={"origin"}).items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if isinstance(value, float)}


@pytest.fixture(scope="module")
def measured(planted, items: Dataset):
    def of(architecture: str, rewrite: str | None = None) -> dict[str, float]:
        found: Planted = planted(architecture)
        subject = load_subject(found.folder, dtype="float64")
        if rewrite:
            with torch.no_grad():
                REWRITES[rewrite](subject, NOTHING, torch.Generator().manual_seed(9))
        lab = Lab(subject, items, LetterForm("", ""), 0)
        return numbers(measure_causes(lab, [tuple(head) for head in found.truth.selecting]))

    return of


@pytest.fixture(scope="module")
def before(measured):
    return cache(measured)


@pytest.mark.parametrize(("architecture", "rewrite"), LINES)
def test_the_verdict_reads_the_same_numbers_in_every_gauge(architecture: str, rewrite: str, before, measured) -> None:
    was, now = before(architecture), measured(architecture, rewrite)
    assert was["pattern.through"] > 0.5, "harm does pull these heads"
    assert was["removal.harm_key"] > 0.2
    assert now == pytest.approx(was, abs=2e-3)
