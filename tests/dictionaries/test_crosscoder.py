"""The crosscoder: files, the encoder against a plain loop, weak causality, and the exact writing of a stream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qklens.dictionaries.activation import JumpRelu, Relu, Threshold, TopK
from qklens.dictionaries.config import DictionaryConfig
from qklens.dictionaries.crosscoder import Crosscoder, load_crosscoder, save_crosscoder
from qklens.dictionaries.source import feature_index, write_parts
from qklens.errors import QklensError


def random_crosscoder(seed: int = 0, layers: tuple[int, ...] = (0, 2, 5), group: int = 7, width: int = 5) -> Crosscoder:
    """Random weights; decoder rows of later readers are zero, as the format says."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    decoder = {}
    for i, layer in enumerate(layers):
        decoder[layer] = torch.cat([normal((i + 1) * group, width), torch.zeros((len(layers) - i - 1) * group, width)])
    return Crosscoder(
        config=DictionaryConfig(
            format="qklens-dictionary-2",
            name="random",
            layers=layers,
            features_per_layer=group,
            d_model=width,
            activation=Threshold(threshold=0.4),
            site="resid_pre",
            model_sha256="ab" * 32,
            training={"seed": seed},
            fidelity=None,
        ),
        encoder={layer: normal(group, width) for layer in layers},
        encoder_bias={layer: normal(group) for layer in layers},
        decoder=decoder,
        decoder_bias={layer: normal(width) for layer in layers},
    )


def streams(
    crosscoder: Crosscoder, rows: int = 4, seed: int = 1, dtype: torch.dtype = torch.float64
) -> dict[int, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {m: torch.randn(rows, crosscoder.config.d_model, generator=draw, dtype=dtype) for m in crosscoder.layers}


def tensors_of(crosscoder: Crosscoder) -> dict[str, Tensor]:
    groups = ("encoder", "encoder_bias", "decoder", "decoder_bias")
    by_layer = {group: getattr(crosscoder, group) for group in groups}
    return {f"{group}.{layer}": tensor for group in groups for layer, tensor in by_layer[group].items()}


def test_float32_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    before = random_crosscoder()
    save_crosscoder(before, tmp_path, torch.float32)
    after = load_crosscoder(tmp_path)
    assert after.config == before.config
    assert tensors_of(after).keys() == tensors_of(before).keys()
    for name, tensor in tensors_of(before).items():
        assert torch.equal(tensors_of(after)[name], tensor), name


def test_float16_round_trip_keeps_half_precision(tmp_path: Path) -> None:
    before = random_crosscoder()
    save_crosscoder(before, tmp_path)
    changed = False
    for name, tensor in tensors_of(load_crosscoder(tmp_path)).items():
        assert torch.equal(tensor, tensors_of(before)[name].half().float()), name
        changed |= not torch.equal(tensor, tensors_of(before)[name])
    assert changed, "the default dtype is half"


def test_saving_twice_gives_the_same_bytes_and_hash(tmp_path: Path) -> None:
    for name in "ab":
        save_crosscoder(random_crosscoder(), tmp_path / name)
    a, b = (load_crosscoder(tmp_path / name).sha256 for name in "ab")
    assert a == b
    save_crosscoder(random_crosscoder(seed=5), tmp_path / "c")
    assert load_crosscoder(tmp_path / "c").sha256 != a


def test_encode_equals_a_plain_loop() -> None:
    crosscoder = random_crosscoder()
    x = streams(crosscoder)
    expected = []
    for row in range(4):
        activations = []
        for reader in crosscoder.layers:
            for i in range(crosscoder.config.features_per_layer):
                before = float(crosscoder.encoder_bias[reader][i])
                for d in range(crosscoder.config.d_model):
                    centred = float(x[reader][row, d]) - float(crosscoder.decoder_bias[reader][d])
                    before += centred * float(crosscoder.encoder[reader][i, d])
                activations.append(before if before > crosscoder.config.activation.threshold else 0.0)
        expected.append(activations)
    got = crosscoder.encode(5, x.__getitem__)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert 0 < (got == 0).double().mean() < 1


def test_labels_and_order_agree_with_the_activations() -> None:
    """A feature's index points at the row of the layer that it reads."""
    crosscoder = random_crosscoder()
    assert len(crosscoder.labels) == len(set(crosscoder.labels)) == 21
    index = feature_index(crosscoder, "L2/3")
    x = streams(crosscoder)
    moved = {**x, 2: x[2] + 10 * crosscoder.encoder[2][3]}
    assert (crosscoder.encode(5, moved.__getitem__)[:, index] > crosscoder.encode(5, x.__getitem__)[:, index]).all()
    with pytest.raises(QklensError, match=r"'L2/33' is not in dictionary 'random'.*did you mean 'L2/3'\?"):
        feature_index(crosscoder, "L2/33")


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), layer=st.sampled_from([0, 2, 5]))
def test_later_layers_never_change_earlier_activations(seed: int, layer: int) -> None:
    crosscoder = random_crosscoder(seed)
    x = streams(crosscoder, seed=seed + 1)
    later = {m: value + 100 * (m > layer) for m, value in x.items()}
    earlier = {m: value + 100 * (m <= layer) for m, value in x.items()}
    clean = crosscoder.encode(layer, x.__getitem__)
    assert torch.equal(clean, crosscoder.encode(layer, later.__getitem__))
    assert not torch.equal(clean, crosscoder.encode(layer, earlier.__getitem__))


def test_a_later_layer_is_not_even_read() -> None:
    crosscoder = random_crosscoder()
    x, read = streams(crosscoder), []

    def stream(layer: int) -> Tensor:
        read.append(layer)
        return x[layer]

    crosscoder.encode(2, stream)
    assert sorted(set(read)) == [0, 2]


def test_later_readers_neither_fire_nor_write(tmp_path: Path) -> None:
    save_crosscoder(random_crosscoder(), tmp_path)
    crosscoder = load_crosscoder(tmp_path)
    group = crosscoder.config.features_per_layer
    for i, layer in enumerate(crosscoder.layers):
        x = streams(crosscoder)
        assert (crosscoder.encode(layer, x.__getitem__)[:, (i + 1) * group :] == 0).all()
        assert (crosscoder.directions(layer)[(i + 1) * group :] == 0).all()
        assert (crosscoder.directions(layer)[: (i + 1) * group] != 0).any(dim=1).all()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), layer=st.sampled_from([0, 2, 5]))
def test_written_parts_add_up_to_the_stream(seed: int, layer: int) -> None:
    crosscoder = random_crosscoder(seed)
    x = streams(crosscoder, seed=seed + 1)
    parts = write_parts(crosscoder, layer, x.__getitem__)
    total = parts.activations @ parts.directions + parts.bias + parts.error
    torch.testing.assert_close(total, x[layer], rtol=1e-12, atol=1e-12)
    assert torch.equal(parts.activations, crosscoder.encode(layer, x.__getitem__))
    torch.testing.assert_close(parts.directions, crosscoder.decoder[layer].double(), rtol=0, atol=0)


@pytest.mark.parametrize("layer", [0, 5])
def test_the_error_is_what_encode_and_decode_leave(layer: int) -> None:
    """Also of a stream in another dtype, in which it comes back, and of activations that are given."""
    crosscoder = random_crosscoder()
    x = streams(crosscoder)
    written = sum(
        a[:, None] * d.double()
        for a, d in zip(crosscoder.encode(layer, x.__getitem__).T, crosscoder.decoder[layer], strict=True)
    )
    expected = x[layer] - written - crosscoder.decoder_bias[layer].double()
    torch.testing.assert_close(crosscoder.error(layer, x.__getitem__), expected)
    none = torch.zeros(len(x[layer]), len(crosscoder.labels))
    torch.testing.assert_close(
        crosscoder.error(layer, x.__getitem__, none), x[layer] - crosscoder.decoder_bias[layer].double()
    )
    half = crosscoder.error(layer, lambda m: x[m].bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("activation", [Relu(), TopK(k=3), TopK(k=99), JumpRelu()])
def test_every_activation_function_equals_a_plain_loop_and_survives_a_round_trip(
    tmp_path: Path, activation: Any
) -> None:
    base = random_crosscoder()
    thresholds = {m: torch.rand(7) for m in base.layers} if isinstance(activation, JumpRelu) else {}
    config = base.config.model_copy(update={"activation": activation})
    save_crosscoder(replace(base, config=config, thresholds=thresholds), tmp_path, torch.float32)
    crosscoder = load_crosscoder(tmp_path)
    assert crosscoder.config.activation == activation
    x, rows = streams(crosscoder), []
    for row in range(4):
        for m in crosscoder.layers:
            centred = x[m][row] - crosscoder.decoder_bias[m].double()
            z = [
                float(e @ centred + c)
                for e, c in zip(crosscoder.encoder[m].double(), crosscoder.encoder_bias[m], strict=True)
            ]
            limits = [float(t) for t in thresholds[m]] if thresholds else [0.0] * len(z)
            best = sorted(z, reverse=True)[: activation.k] if isinstance(activation, TopK) else z
            rows += [value if value > limit and value in best else 0.0 for value, limit in zip(z, limits, strict=True)]
    expected = torch.tensor(rows, dtype=torch.float64).view(4, -1)
    torch.testing.assert_close(crosscoder.encode(5, x.__getitem__), expected, rtol=1e-10, atol=1e-10)


def test_a_layer_it_does_not_write_is_refused() -> None:
    crosscoder = random_crosscoder()
    for ask in (crosscoder.directions, crosscoder.bias, lambda layer: crosscoder.encode(layer, torch.zeros)):
        with pytest.raises(QklensError, match=r"'random' does not write resid_pre\.3.*layers \[0, 2, 5\]"):
            ask(3)


def test_a_stream_of_another_width_is_refused() -> None:
    with pytest.raises(QklensError, match=r"vectors of 5 dimensions.*has 9; it belongs to another model"):
        write_parts(random_crosscoder(), 0, lambda layer: torch.zeros(3, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tied_weights_are_stored_twice(tmp_path: Path, dtype: torch.dtype) -> None:
    """Encoder and decoder that are one tensor, or views of one, come back as two."""
    crosscoder = random_crosscoder(layers=(3,))
    tied = replace(crosscoder, decoder=dict(crosscoder.encoder))
    save_crosscoder(tied, tmp_path, dtype=dtype)
    loaded = load_crosscoder(tmp_path)
    assert torch.equal(loaded.decoder[3], loaded.encoder[3])
    assert torch.equal(loaded.encoder[3], crosscoder.encoder[3].to(dtype).float())
