"""Training finds planted sparse directions, keeps weak causality, and gives the same bytes for the same seed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qklens.dictionaries.crosscoder import Crosscoder, save_crosscoder
from qklens.dictionaries.source import fraction_variance_unexplained, write_parts
from qklens.dictionaries.training import TrainingConfig, train_crosscoder

WIDTH, PLANTED, ACTIVE, ROWS = 24, 32, 3, 6000
CONFIG = TrainingConfig(
    features_per_layer=48,
    active_per_layer=3,
    steps=600,
    batch=256,
    learning_rate=1e-2,
    auxiliary_weight=0.03,
    dead_after_steps=100,
    seed=0,
)


@cache
def planted() -> tuple[Tensor, Tensor]:
    """Rows that are sums of `ACTIVE` of the planted unit directions plus a constant, at a scale far from one."""
    draw = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(PLANTED, WIDTH, generator=draw), dim=-1)
    chosen = torch.rand(ROWS, PLANTED, generator=draw).topk(ACTIVE, dim=1).indices
    amounts = torch.zeros(ROWS, PLANTED).scatter(1, chosen, 1 + torch.rand(ROWS, ACTIVE, generator=draw))
    return directions, 7 * (amounts @ directions + 0.5)


def train(activations: dict[int, Tensor], **changes: object) -> tuple[Crosscoder, list[tuple[int, dict[str, float]]]]:
    reports: list[tuple[int, dict[str, float]]] = []
    crosscoder = train_crosscoder(
        activations,
        CONFIG.model_copy(update=changes),
        name="planted",
        model_sha256="cd" * 32,
        report=lambda step, metrics: reports.append((step, metrics)),
    )
    return crosscoder, reports


@cache
def trained() -> tuple[Crosscoder, list[tuple[int, dict[str, float]]]]:
    return train({3: planted()[1]})


def test_planted_directions_are_found() -> None:
    directions, _ = planted()
    found = torch.nn.functional.normalize(trained()[0].directions(3), dim=-1)
    best = (directions @ found.T).max(dim=1).values
    assert float(best.mean()) >= 0.95, f"mean max cosine {float(best.mean()):.3f}"


def test_the_stream_is_reconstructed_at_its_own_scale() -> None:
    """The scale used in training is folded back: error and sparsity hold for the rows as they came."""
    crosscoder, reports = trained()
    rows = planted()[1]
    parts = write_parts(crosscoder, 3, lambda _: rows)
    assert fraction_variance_unexplained(rows, parts.error) < 0.1
    l0 = float((parts.activations > 0).float().sum(dim=1).mean())
    assert abs(l0 - CONFIG.active_per_layer) < 1.0
    assert reports[-1][1]["fvu"] < reports[0][1]["fvu"]
    assert reports[-1][0] == CONFIG.steps - 1


def test_what_it_was_trained_with_is_kept() -> None:
    config = trained()[0].config
    assert config.training == CONFIG.model_dump()
    assert (config.name, config.layers, config.d_model, config.features_per_layer) == ("planted", (3,), WIDTH, 48)
    assert config.activation.threshold > 0


@pytest.fixture(scope="module")
def two_layers() -> dict[int, Tensor]:
    """The second layer repeats some of the first and adds what is its own."""
    rows = planted()[1]
    return {1: rows[:2000], 4: 0.1 * rows[:2000] + rows[2000:4000].roll(1, dims=1)}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, two_layers: dict[int, Tensor]) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_crosscoder(train(two_layers, steps=40, seed=seed)[0], tmp_path / name)
    a, b, c = ((tmp_path / name / "dictionary.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_training_keeps_weak_causality(two_layers: dict[int, Tensor]) -> None:
    crosscoder, _ = train(two_layers, steps=60)
    group = CONFIG.features_per_layer
    assert (crosscoder.directions(1)[group:] == 0).all()
    assert (crosscoder.directions(1)[:group] != 0).any(dim=1).all()
    assert (crosscoder.directions(4)[:group] != 0).any(dim=1).all()
    other = {1: two_layers[1], 4: torch.randn_like(two_layers[4])}
    clean = crosscoder.encode(1, two_layers.__getitem__)
    assert torch.equal(clean, crosscoder.encode(1, other.__getitem__))
