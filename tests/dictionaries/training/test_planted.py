"""Each kind of dictionary finds directions that were planted in sparse data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.source import fraction_variance_unexplained, write_parts
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.finish import as_crosscoder, as_model_diff
from qklens.dictionaries.training.rows import HeldRows
from qklens.dictionaries.training.trainer import Trained, Trainer

WIDTH, PLANTED, ACTIVE, ROWS = 24, 32, 3, 8192
COMMON = {"features": 48, "batch": 128, "learning_rate": 1e-2, "warmup_steps": 20, "dead_after_steps": 60}
NUMBERS: dict[str, dict[str, object]] = {
    "topk": {"k": 3, "steps": 300},
    "batch_topk": {"k": 3, "steps": 500, "batch": 256, "learning_rate": 5e-3},
    "relu": {"sparsity": 0.6, "sparsity_warmup_steps": 100, "steps": 500},
    "jumprelu": {
        "sparsity": 0.6,
        "sparsity_warmup_steps": 100,
        "bandwidth": 0.5,
        "steps": 500,
        "batch": 256,
    },
}


@pytest.fixture(autouse=True)
def _unchecked_shapes() -> Iterator[None]:
    """Thousands of small steps would spend most of their time on checks, which `test_sparse_step` has of each kind."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def config(activation: str, **changes: object) -> TrainingConfig:
    given = {"kind": "sae", "layers": (3,), "activation": activation, **COMMON, **NUMBERS[activation]}
    return TrainingConfig.parse({**given, **changes})


def sparse_amounts(n: int, features: int, draw: torch.Generator, active: int = ACTIVE) -> Tensor:
    chosen = torch.rand(n, features, generator=draw).topk(active, dim=1).indices
    return torch.zeros(n, features).scatter(1, chosen, 1 + torch.rand(n, active, generator=draw))


@cache
def planted() -> tuple[Tensor, Tensor]:
    """Rows that are sums of `ACTIVE` of the planted unit directions plus a constant, at a scale far from one."""
    draw = torch.Generator().manual_seed(1)
    directions = normalize(torch.randn(PLANTED, WIDTH, generator=draw), dim=-1)
    return directions, 7 * (sparse_amounts(ROWS, PLANTED, draw) @ directions + 0.5)


def found(directions: Tensor, rows: Tensor) -> float:
    """Mean over the planted directions of the largest cosine with a learnt one."""
    return float((normalize(directions, dim=1) @ normalize(rows, dim=1).T).max(dim=1).values.mean())


@cache
def sae(activation: str) -> tuple[Crosscoder, Trained]:
    trained = Trainer(HeldRows([planted()[1]]), config(activation)).run()
    return as_crosscoder(trained.learner, trained.scale, name="planted", model_sha256="cd" * 32), trained


@pytest.mark.parametrize("activation", NUMBERS)
def test_planted_directions_are_found_by_each_activation(activation: str) -> None:
    cosine = found(planted()[0], sae(activation)[0].directions(3))
    assert cosine >= 0.95, f"mean max cosine {cosine:.3f}"


@pytest.mark.parametrize("activation", NUMBERS)
def test_the_dictionary_holds_at_the_streams_own_scale(activation: str) -> None:
    """Scales are folded back, and the activation at inference is the one that was trained."""
    crosscoder, trained = sae(activation)
    rows = planted()[1]
    parts = write_parts(crosscoder, 3, lambda _: rows)
    fvu = fraction_variance_unexplained(rows, parts.error)
    l0 = float((parts.activations > 0).float().sum(dim=1).mean())
    assert fvu == pytest.approx(trained.metrics["fvu"], abs=0.02)
    assert l0 == pytest.approx(trained.metrics["l0"], abs=0.6)
    assert fvu < 0.25
    assert l0 < 3 * ACTIVE


LAYERED: dict[str, dict[str, object]] = {
    "topk": {"k": 2},
    "batch_topk": {"k": 2},
    "relu": {"sparsity": 0.6},
    "jumprelu": {"sparsity": 1.0},
}


@cache
def layered() -> tuple[list[Tensor], list[Tensor]]:
    """Three layers: features appear at the first, second or third, and stay, turned a little from layer to layer."""
    draw = torch.Generator().manual_seed(2)
    born = [normalize(torch.randn(14, WIDTH, generator=draw), dim=1) for _ in range(3)]
    rows, truth = [torch.zeros(ROWS, WIDTH) for _ in range(3)], []
    for first, directions in enumerate(born):
        amounts = sparse_amounts(ROWS, 14, draw, active=2)
        for layer in range(first, 3):
            turned = normalize(directions + 0.3 * (layer - first) * directions.roll(1, dims=1), dim=1)
            rows[layer] += (layer + 1) * amounts @ turned
            if layer == first:
                truth.append(turned)
    return truth, rows


@pytest.mark.parametrize("activation", LAYERED)
def test_a_weakly_causal_crosscoder_finds_where_directions_begin(activation: str) -> None:
    # Two of a layer's own directions are active in each row; those of the last layer are a third of that layer alone.
    numbers = {**COMMON, "features": 32, "steps": 400, "dead_after_steps": 20, **LAYERED[activation]}
    c = config(activation, kind="crosscoder", layers=(1, 2, 5), **numbers)
    trained = Trainer(HeldRows(layered()[1]), c).run()
    crosscoder = as_crosscoder(trained.learner, trained.scale, name="planted", model_sha256="cd" * 32)
    cosines = [found(truth, crosscoder.directions(layer)) for truth, layer in zip(layered()[0], (1, 2, 5), strict=True)]
    assert sum(cosines) / 3 >= 0.95, cosines
    assert (crosscoder.directions(1)[c.features :] == 0).all()
    assert (crosscoder.directions(2)[2 * c.features :] == 0).all()
    streams = dict(zip((1, 2, 5), layered()[1], strict=True))
    other = {**streams, 5: torch.randn_like(streams[5])}
    assert torch.equal(crosscoder.encode(2, streams.__getitem__), crosscoder.encode(2, other.__getitem__))


DIFFS: dict[str, dict[str, object]] = {"topk": {}, "batch_topk": {}, "relu": {}, "jumprelu": {"sparsity": 1.0}}
OWN_BY_NORM = {"topk": 4, "batch_topk": 4, "relu": 4, "jumprelu": 3}
"""How many of the four have 0.9 of their length in the chat model; a count of active features shrinks nothing."""


@cache
def two_models() -> tuple[Tensor, Tensor, Tensor]:
    """The chat model has all directions of the base model, and four that fire in every eighth row of it alone."""
    draw = torch.Generator().manual_seed(4)
    directions = normalize(torch.randn(28, WIDTH, generator=draw), dim=1)
    shared = sparse_amounts(ROWS, 24, draw) @ directions[:24]
    own = sparse_amounts(ROWS, 4, draw, active=1) * (torch.rand(ROWS, 1, generator=draw) < 0.125)
    return directions, 3 * shared, 5 * (shared + 2 * own @ directions[24:])


@pytest.mark.parametrize("activation", NUMBERS)
def test_a_crosscoder_over_two_checkpoints_finds_what_only_the_chat_model_has(activation: str) -> None:
    directions, base, chat = two_models()
    trained = Trainer(HeldRows([base, chat]), config(activation, kind="model_diff", **DIFFS[activation])).run()
    diff = as_model_diff(trained.learner, trained.scale, name="planted", base_sha256="ab", chat_sha256="cd")
    assert found(directions, diff.decoder[1]) >= 0.95
    cosine = normalize(directions, dim=1) @ normalize(diff.decoder[1], dim=1).T
    whose = diff.relative_norm()[cosine.argmax(dim=1)]
    assert (whose[24:] > 0.9).sum() >= OWN_BY_NORM[activation], whose
    assert (whose[24:] > 0.65).all(), whose
    assert ((whose[:24] > 0.35) & (whose[:24] < 0.65)).all(), whose
    for x, left in zip((base, chat), diff.error(3, lambda _: torch.cat([base, chat], dim=1)).chunk(2, 1), strict=True):
        assert fraction_variance_unexplained(x, left) < 0.1
