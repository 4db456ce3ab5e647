"""A decoder read from disk in blocks: what load_crosscoder gives, and one line for each kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qklens.analyses.partners import rank_partners
from qklens.dictionaries import decoder_file
from qklens.dictionaries.config import CONFIG_FILE, WEIGHTS_FILE
from qklens.dictionaries.crosscoder import Crosscoder, load_crosscoder, save_crosscoder
from qklens.dictionaries.decoder_file import open_decoder
from qklens.dictionaries.unit import unit_directions
from qklens.errors import QklensError
from tests.dictionaries.test_crosscoder import random_crosscoder

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def saved(folder: Path, dtype: torch.dtype = torch.float32, group: int = 70) -> Crosscoder:
    save_crosscoder(random_crosscoder(group=group), folder, dtype)
    return load_crosscoder(folder)


@pytest.mark.parametrize("size", [1, 64, 99, 210, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_the_dictionary_s_unit_directions(tmp_path, monkeypatch, dtype, size):
    """In memory and from disk, at layers out of order, with zero rows for later readers, converted in pieces."""
    monkeypatch.setattr(decoder_file, "_AT_ONCE", 32)
    loaded = saved(tmp_path, dtype)
    layers = (5, 0)
    rows, present, sizes = [[], []], [[], []], []
    for block in open_decoder(tmp_path).blocks(layers, size):
        sizes.append(len(block[0]))
        for i, units in enumerate(block):  # cloned, because the block after next overwrites it
            rows[i].append(units.rows.clone())
            present[i].append(units.present.clone())
    assert sizes == [size] * (210 // size) + [210 % size] * (210 % size > 0)
    for i, layer in enumerate(layers):
        expected = unit_directions(loaded.directions(layer))
        assert torch.equal(torch.cat(rows[i]), expected.rows)
        assert torch.equal(torch.cat(present[i]), expected.present)


def test_ranking_a_stream_is_ranking_in_memory(tmp_path):
    loaded = saved(tmp_path, torch.float16)
    readers = [torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    memory = rank_partners([[unit_directions(loaded.directions(m)) for m in loaded.layers]], readers, 9)
    stream = rank_partners(open_decoder(tmp_path).blocks(loaded.layers, 64), readers, 9)
    assert torch.equal(stream.lowest.index, memory.lowest.index)
    assert torch.equal(stream.highest.index, memory.highest.index)
    torch.testing.assert_close(stream.highest.value, memory.highest.value)
    torch.testing.assert_close(stream.sd, memory.sd)


def test_labels_and_single_features_are_the_crosscoder_s(tmp_path):
    loaded = saved(tmp_path)
    file = open_decoder(tmp_path)
    assert file.layers == loaded.layers
    assert tuple(file.label(i) for i in range(file.n_features)) == loaded.labels
    for feature in (0, 69, 70, 209):
        found = file.direction(feature)
        assert list(found) == [m for m in loaded.layers if loaded.decoder[m][feature].any()]
        for layer, direction in found.items():
            assert torch.equal(direction, loaded.decoder[layer][feature])
    for feature in (-1, 210):
        with pytest.raises(QklensError, match=f"no feature {feature}; expected 0 to 209"):
            file.label(feature)
        with pytest.raises(QklensError, match="expected 0 to 209"):
            file.direction(feature)


def test_a_layer_that_is_not_written_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(QklensError, match=r"does not write layer 1; it writes layers \[0, 2, 5\]"):
        open_decoder(tmp_path).blocks((0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_named_with_its_row(tmp_path, dtype, value):
    saved(tmp_path, dtype)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors["decoder.2"][101, 3] = value
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    file = open_decoder(tmp_path)
    with pytest.raises(QklensError, match=r"dictionary\.safetensors: tensor 'decoder\.2': row 101 holds NaN"):
        list(file.blocks((0, 2), 64))
    with pytest.raises(QklensError, match="row 101 holds NaN"):
        file.direction(101)
    assert 0 in file.direction(69)


def edit_header(path: Path, change) -> None:
    """Rewrite the header in place, padded to its old length where it fits."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda h: h.pop("decoder.2"), r"tensor 'decoder\.2' is missing"),
        (lambda h: h["decoder.2"].update(shape=[5, 140]), r"has shape \(5, 140\), expected \(140, 5\)"),
        (lambda h: h["decoder.2"].update(dtype="I64"), r"stored as 'I64', expected one of \['BF16', 'F16', 'F32'\]"),
        (lambda h: h["decoder.2"].update(dtype="F16"), "which do not hold it"),
        (lambda h: h["decoder.2"].update(data_offsets=[10**9, 10**9 + 2800]), "which do not hold it"),
        (lambda h: h["decoder.2"].update(data_offsets=[-2800, 0]), "which do not hold it"),
        (lambda h: h["decoder.2"].update(data_offsets=[0.5, 7]), "not one of safetensors"),
        (lambda h: h["decoder.2"].update(data_offsets=7), "not one of safetensors"),
        (lambda h: h["decoder.2"].update(shape=None), "not one of safetensors"),
        (lambda h: h["decoder.2"].pop("dtype"), "not one of safetensors"),
        (lambda h: h.update({"decoder.2": [1]}), "not one of safetensors"),
        (lambda h: h["decoder.2"].update(dtype=["F32"]), "stored as"),
    ],
)
def test_a_header_that_lies_is_refused_before_any_row_is_read(tmp_path, change, line):
    saved(tmp_path)
    edit_header(tmp_path / WEIGHTS_FILE, change)
    with pytest.raises(QklensError, match=line) as caught:
        open_decoder(tmp_path)
    assert str(tmp_path / WEIGHTS_FILE) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_truncated_weights_are_refused(tmp_path, keep):
    saved(tmp_path)
    edit_header(tmp_path / WEIGHTS_FILE, lambda h: _last(h, "decoder.5"))
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(QklensError, match=r"dictionary\.safetensors: damaged"):
        open_decoder(tmp_path)


def _last(header: dict, name: str) -> None:
    """Say that a tensor ends where the data end, so that the loss of a byte is the loss of one of its."""
    end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    first, last = header[name]["data_offsets"]
    header[name]["data_offsets"] = [end - (last - first), end]


def test_a_file_cut_while_it_is_read_is_refused(tmp_path):
    saved(tmp_path)
    file = open_decoder(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[: file.decoder[2].offset + 100])
    with pytest.raises(QklensError, match=r"damaged \(it ends inside tensor 'decoder\.2'\)"):
        list(file.blocks((2,)))


@pytest.mark.parametrize("header", [b"[]", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_a_header_that_is_no_json_object_is_refused(tmp_path, header):
    saved(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(QklensError, match="damaged"):
        open_decoder(tmp_path)


def test_unknown_keys_and_missing_files_are_refused_as_load_crosscoder_does(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"treshold": 1}))
    with pytest.raises(QklensError, match="did you mean 'threshold'"):
        open_decoder(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(QklensError, match="no such file"):
        open_decoder(tmp_path)
