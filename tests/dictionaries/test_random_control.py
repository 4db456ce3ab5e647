"""The frozen-random control: a dictionary's densities, lengths and layers, and nothing of its directions."""

from __future__ import annotations

import pytest
import torch

from qklens.analyses.fidelity import stream_rows
from qklens.dictionaries.crosscoder import load_crosscoder
from qklens.dictionaries.directions import Directions
from qklens.dictionaries.random_control import LAWS, RandomLaw, random_control
from qklens.dictionaries.source import FeatureSource, write_parts
from qklens.errors import QklensError
from qklens.models.loading import load_subject
from qklens.studies.resources import organism_folder
from sparse_source import sparse_source

WIDTH, FEATURES, LAYER = 24, 120, 1
ROWS = {LAYER: torch.randn(700, WIDTH, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, 1.5, WIDTH)}


def original() -> FeatureSource:
    return sparse_source(WIDTH, FEATURES, (LAYER,), size=3.0)


def active(source: FeatureSource, layer: int, rows: dict[int, torch.Tensor]) -> torch.Tensor:
    return source.encode(layer, rows.__getitem__)


@pytest.mark.parametrize("law", LAWS)
def test_each_feature_keeps_its_density_its_length_and_its_mean_activation(law: RandomLaw) -> None:
    source = original()
    control = random_control(source, ROWS, seed=4, law=law)
    before, after = active(source, LAYER, ROWS), active(control, LAYER, ROWS)
    counts = (before != 0).sum(dim=0)
    assert int(counts.min()) == 0
    assert int(counts.max()) > 40
    torch.testing.assert_close((after != 0).sum(dim=0), counts)
    torch.testing.assert_close(after.abs().sum(dim=0), before.abs().sum(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(control.directions(LAYER).norm(dim=1), source.directions(LAYER).norm(dim=1))
    torch.testing.assert_close(control.bias(LAYER), source.bias(LAYER))
    own = torch.nn.functional.cosine_similarity(control.directions(LAYER), source.directions(LAYER), dim=1)
    assert abs(float(own.mean())) < 0.06
    assert float(own.abs().max()) < 0.9


def test_activations_are_the_documented_formula_also_on_other_tokens() -> None:
    control = random_control(original(), ROWS, seed=4)
    other = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(9))
    found = control.encode(LAYER, lambda _: other)
    unit = control.directions(LAYER) / control.directions(LAYER).norm(dim=1, keepdim=True)
    along = (other - control.bias(LAYER)) @ unit.T
    on_batch = ((ROWS[LAYER] - control.bias(LAYER)) @ unit.T).sort(dim=0).values
    for feature, count in enumerate((active(original(), LAYER, ROWS) != 0).sum(dim=0).tolist()):
        if count == 0:
            assert not bool(found[..., feature].any())
            continue
        cut = on_batch[-count - 1 : len(on_batch) - count + 1, feature].mean()
        gain = active(original(), LAYER, ROWS)[:, feature].abs().sum() / on_batch[-count:, feature].abs().sum()
        expected = gain * along[..., feature] * (along[..., feature] > cut)
        torch.testing.assert_close(found[..., feature], expected, rtol=1e-3, atol=1e-4)
    parts = write_parts(control, LAYER, lambda _: other)
    torch.testing.assert_close(parts.activations @ parts.directions + parts.bias + parts.error, other)


def test_the_laws_differ_as_named_and_the_seed_decides() -> None:
    """Both are isotropic once the covariance is divided out of the one that was drawn within it."""
    rows = {LAYER: torch.randn(900, WIDTH, generator=torch.Generator().manual_seed(2)) * torch.logspace(0, 1, WIDTH)}
    source = sparse_source(WIDTH, 600, (LAYER,))
    drawn = {law: random_control(source, rows, seed=0, law=law).directions(LAYER) for law in LAWS}
    values, basis = torch.linalg.eigh(torch.cov(rows[LAYER].T))
    level = {"isotropic": drawn["isotropic"], "covariance": drawn["covariance"] @ basis / values.sqrt()}
    for directions in level.values():
        spread = torch.nn.functional.normalize(directions, dim=1).square().mean(dim=0)
        torch.testing.assert_close(spread, torch.full((WIDTH,), 1 / WIDTH), rtol=0.25, atol=0)
    uneven = torch.nn.functional.normalize(drawn["covariance"], dim=1).square().mean(dim=0)
    assert float(uneven[-1] / uneven[0]) > 20
    assert torch.equal(random_control(source, rows, seed=0).directions(LAYER), drawn["isotropic"])
    assert not torch.equal(random_control(source, rows, seed=1).directions(LAYER), drawn["isotropic"])


def test_a_weakly_causal_crosscoders_control_reads_and_writes_the_same_layers() -> None:
    subject = load_subject(organism_folder() / "chat")
    source = load_crosscoder(organism_folder() / "dictionary")
    sequences = [list(range(8, 60)), list(range(100, 160)), list(range(300, 340))]
    rows = stream_rows(subject, sequences, source.layers)
    control = random_control(source, rows, seed=0)
    assert control.layers == source.layers
    assert control.labels == source.labels
    for layer in source.layers:
        assert control.reads(layer) == source.reads(layer)
        written = source.directions(layer).any(dim=1)
        torch.testing.assert_close(control.directions(layer).any(dim=1), written)
        before, after = active(source, layer, rows), active(control, layer, rows)
        torch.testing.assert_close((after != 0).sum(dim=0), (before != 0).sum(dim=0))
    reader = source.layers[0]
    first = [i for i, label in enumerate(source.labels) if label.startswith(f"L{reader}/")]
    late = {layer: active(control, layer, rows)[:, first] for layer in source.layers}
    torch.testing.assert_close(late[source.layers[-1]], late[reader])  # what one layer's features read does not change
    assert control.describe()["control_of"] == source.describe()
    assert control.describe()["law"] == "isotropic"


@pytest.mark.parametrize("law", LAWS)
def test_directions_are_drawn_anew_and_stay_least_squares(law: RandomLaw) -> None:
    vectors = {LAYER: torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))}
    vectors[LAYER][2] = 0
    source = Directions(("a", "b", "c"), vectors, {LAYER: ROWS[LAYER].mean(dim=0)})
    control = random_control(source, ROWS, seed=0, law=law)
    assert isinstance(control, Directions)
    assert control.describe()["kind"] == "random control"
    torch.testing.assert_close(control.directions(LAYER).norm(dim=1), vectors[LAYER].norm(dim=1))
    parts = write_parts(control, LAYER, ROWS.__getitem__)
    assert float((parts.error @ parts.directions.T).abs().max()) < 1e-4 * float(ROWS[LAYER].square().sum(dim=1).max())


def test_no_tokens_and_no_covariance_are_refused() -> None:
    with pytest.raises(QklensError, match=r"resid_pre\.1 has 1 tokens; expected at least 2"):
        random_control(original(), {LAYER: torch.zeros(1, WIDTH)}, seed=0)
    with pytest.raises(QklensError, match="does not vary"):
        random_control(original(), {LAYER: torch.ones(9, WIDTH)}, seed=0, law="covariance")
