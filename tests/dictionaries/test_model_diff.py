"""A crosscoder over two checkpoints on disk and in use: the formulas, whose a feature is, and damaged files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qklens.dictionaries.activation import Activation, JumpRelu, Relu, Threshold, TopK
from qklens.dictionaries.config import DiffFidelity
from qklens.dictionaries.model_diff import (
    ModelDiff,
    ModelDiffConfig,
    load_model_diff,
    save_model_diff,
)
from qklens.dictionaries.random_control import LAWS, RandomLaw, random_control
from qklens.dictionaries.source import FeatureSource, write_parts
from qklens.errors import QklensError
from tiny_folders import edit_json, edit_tensors

FEATURES, WIDTH = 6, 4


def made(activation: Activation | None = None) -> ModelDiff:
    draw = torch.Generator().manual_seed(0)
    chosen = activation or Threshold(threshold=0.25)
    config = ModelDiffConfig(
        name="diff", layer=2, features=FEATURES, d_model=WIDTH, activation=chosen, site="resid_pre",
        base_sha256="ab", chat_sha256="cd", training={"k": 3},
        fidelity=DiffFidelity(
            l0=2.0,
            fraction_variance_unexplained={"base": 0.1, "chat": 0.2},
            mean_square={"base": 1.0, "chat": 1.0},
        ),
    )  # fmt: skip
    encoder, decoder = (torch.randn(2, FEATURES, WIDTH, generator=draw) for _ in range(2))
    bias, at = torch.randn(FEATURES, generator=draw), torch.randn(2, WIDTH, generator=draw)
    thresholds = torch.rand(FEATURES, generator=draw) if isinstance(chosen, JumpRelu) else None
    return ModelDiff(config, encoder, bias, decoder, at, torch.tensor([0.5, 2.0]), thresholds)


def streams() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    base, chat = torch.randn(2, 3, 5, WIDTH, generator=draw).unbind(0)
    return base, chat


def both(_: int) -> torch.Tensor:
    return torch.cat(streams(), dim=-1)


@pytest.mark.parametrize("activation", [Relu(), TopK(k=2), Threshold(threshold=0.25), JumpRelu()])
def test_it_reads_and_writes_both_streams_and_survives_the_disk(tmp_path: Path, activation: Activation) -> None:
    diff, (base, chat) = made(activation), streams()
    before = (
        torch.einsum("bpd,fd->bpf", base - diff.decoder_bias[0], diff.encoder[0])
        + torch.einsum("bpd,fd->bpf", chat - diff.decoder_bias[1], diff.encoder[1])
        + diff.encoder_bias
    )
    on = before > {"relu": 0.0, "topk": 0.0, "threshold": 0.25}.get(activation.kind, diff.thresholds)
    if isinstance(activation, TopK):
        on &= before >= before.topk(2, dim=-1).values[..., -1:]
    expected = before * on
    save_model_diff(diff, tmp_path)
    for one in (diff, load_model_diff(tmp_path)):
        torch.testing.assert_close(one.encode(2, both), expected)
        written = one.decode(2, expected).chunk(2, dim=-1)
        left = one.error(2, both).chunk(2, dim=-1)
        for side, x in enumerate((base, chat)):
            torch.testing.assert_close(written[side], expected @ diff.decoder[side] + diff.decoder_bias[side])
            torch.testing.assert_close(left[side], x - written[side])
    again = load_model_diff(tmp_path)
    assert again.config == diff.config
    assert again.sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dictionary.json", "dictionary.safetensors"]


def test_the_relative_norm_compares_streams_at_their_own_scale() -> None:
    """Lengths count after each stream was brought to mean square 1."""
    diff = made()
    diff.decoder[:] = 0
    diff.decoder[0, :3, 0] = torch.tensor([4.0, 4.0, 0.0])
    diff.decoder[1, :3, 0] = torch.tensor([1.0, 0.0, 7.0])
    assert diff.relative_norm()[:3].tolist() == pytest.approx([0.5, 0.0, 1.0])


def test_as_a_source_it_writes_both_streams_side_by_side_exactly() -> None:
    diff = made()
    assert isinstance(diff, FeatureSource)
    assert torch.equal(diff.directions(2)[:, WIDTH:], diff.decoder[1])
    assert (diff.layers, diff.reads(2), diff.labels[1]) == ((2,), (2,), "L2/1")
    parts = write_parts(diff, 2, both)
    torch.testing.assert_close(parts.activations @ parts.directions + parts.bias + parts.error, both(2))
    with pytest.raises(QklensError, match="side by side, 8 numbers a token; the stream has 4, and that of one model"):
        diff.encode(2, lambda _: streams()[1])
    with pytest.raises(QklensError, match="layer"):
        diff.directions(3)


@pytest.mark.parametrize("law", LAWS)
def test_its_control_keeps_density_and_the_length_in_either_stream(law: RandomLaw) -> None:
    """And within the covariance law follows each model's own: base varies along one axis alone, chat along others."""
    diff = made(Threshold(threshold=1.5))
    draw = torch.Generator().manual_seed(3)
    spread = torch.tensor([[3.0, 0.1, 0.1, 0.1], [0.1, 2.0, 2.0, 2.0]]).flatten()
    rows = {2: torch.randn(400, 2 * WIDTH, generator=draw) * spread}
    control = random_control(diff, rows, seed=0, law=law, streams=2)
    before, after = (source.encode(2, rows.__getitem__) for source in (diff, control))
    assert int((before != 0).sum()) > 100
    torch.testing.assert_close((after != 0).sum(dim=0), (before != 0).sum(dim=0))
    for side, (drawn, own) in enumerate(zip(control.directions(2).chunk(2, dim=1), diff.decoder, strict=True)):
        torch.testing.assert_close(drawn.norm(dim=1), own.norm(dim=1))
        first = torch.nn.functional.normalize(drawn, dim=1)[:, 0].square().median()
        assert law == "isotropic" or (float(first) > 0.9) == (side == 0)
    assert control.describe()["control_of"] == diff.describe()


def test_tied_weights_are_stored_twice(tmp_path: Path) -> None:
    diff = made()
    tied = ModelDiff(diff.config, diff.encoder, diff.encoder_bias, diff.encoder, diff.decoder_bias, diff.scale)
    save_model_diff(tied, tmp_path)
    assert torch.equal(load_model_diff(tmp_path).decoder, diff.encoder)


GOOD = {"l0": 1, "fraction_variance_unexplained": {"base": 0.1, "chat": 0.2}}


def cut(folder: Path) -> None:
    path = folder / "dictionary.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, r"dictionary.safetensors: damaged .*; copy it again"),
        (lambda f: (f / "dictionary.safetensors").unlink(), "dictionary.safetensors: damaged"),
        (lambda f: (f / "dictionary.json").unlink(), "dictionary.json"),
        (lambda f: edit_json(f / "dictionary.json", format="qklens-dictionary-2"), "dictionary.json: key 'format'"),
        (lambda f: edit_json(f / "dictionary.json", featurs=3), "key 'featurs': .* did you mean 'features'"),
        (lambda f: edit_json(f / "dictionary.json", features=7), r"'encoder' has shape \(2, 6, 4\), expected \(2, 7"),
        (lambda f: edit_tensors(f / "dictionary.safetensors", lambda t: t.pop("scale")), "tensor 'scale' is missing"),
        (lambda f: edit_tensors(f / "dictionary.safetensors", lambda t: t["scale"].fill_(math.nan)), "scale' holds"),
        (lambda f: edit_tensors(f / "dictionary.safetensors", lambda t: t["scale"].fill_(-3)), "'scale' holds -3; exp"),
        (
            lambda f: edit_json(f / "dictionary.json", fidelity={**GOOD, "mean_square": {"chta": 1}}),
            "key 'fidelity.mean_square.chta",
        ),
        (
            lambda f: edit_json(f / "dictionary.json", fidelity={**GOOD, "mean_square": {"chat": 1}}),
            "key 'fidelity': .*mean_square of base is missing",
        ),
    ],
)  # fmt: skip
def test_a_damaged_directory_is_refused(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    save_model_diff(made(), tmp_path)
    damage(tmp_path)
    with pytest.raises(QklensError, match=said):
        load_model_diff(tmp_path)


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    diff = made()
    diff.encoder_bias[2] = float("inf")
    with pytest.raises(QklensError, match="not written: tensor 'encoder_bias' holds NaN or infinity"):
        save_model_diff(diff, tmp_path)
    assert not list(tmp_path.iterdir())
