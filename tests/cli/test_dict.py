"""`qklens dict check|convert|export` from the command line: round trips, records, refusals, and a full disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qklens import files
from qklens.dictionaries.activation import JumpRelu, Relu, Threshold, TopK
from qklens.dictionaries.config import FORMAT, DictionaryConfig
from qklens.dictionaries.crosscoder import Crosscoder, load_crosscoder, save_crosscoder
from qklens.dictionaries.formats.detect import load_dictionary
from tests.dictionaries.formats import published
from tests.dictionaries.formats.test_readers import close, stream
from tests.dictionaries.test_crosscoder import random_crosscoder
from tiny_folders import edit_json, edit_tensors, tree

WIDTH = 16


def mirror(activation: Any = None) -> Crosscoder:
    """Two features a coordinate, which write resid_pre.1 of the tiny model as it is."""
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    config = DictionaryConfig(
        format=FORMAT, name="mirror", layers=(1,), features_per_layer=2 * WIDTH, d_model=WIDTH,
        activation=activation or Relu(), site="resid_pre", model_sha256="", training={}, fidelity=None,
    )  # fmt: skip
    zeros = {1: torch.zeros(2 * WIDTH)}
    return Crosscoder(config, {1: both}, zeros, {1: both.clone()}, {1: torch.zeros(WIDTH)})


def test_check_records_and_holds_a_dictionary_to_its_record(
    qklens: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mirror"
    save_crosscoder(mirror(), folder, torch.float32)
    first = qklens("dict", "check", folder, "--model", model)
    assert first.status == 0, first
    assert "--record stores it" in first.out
    assert "recorded, with the batch" in qklens("dict", "check", folder, "--model", model, "--record").out
    again = qklens("dict", "check", folder, "--model", model, "--json")
    found = json.loads(again.out)
    assert (found["measured_on"], found["held_against"]) == ("recorded batch", "the record of the same batch")
    assert found["measured"]["l0"] == found["recorded"]["l0"]
    edit_json(folder / "dictionary.json", activation={"kind": "topk", "k": 3})
    assert "L0 at resid_pre.1 is 3" in qklens("dict", "check", folder, "--model", model).refused()


def test_convert_writes_a_dictionary_that_reads_the_same(qklens: Callable[..., Any], tmp_path: Path) -> None:
    written = published.saelens(tmp_path / "sae", "jumprelu", subtract=False)
    ended = qklens("dict", "convert", written.folder, "out")
    assert ended.status == 0, ended
    assert "names its model 'gemma-2-2b'" in ended.out
    close(load_crosscoder(Path("out")).encode(4, lambda _: stream()), written.forward(stream())[0])
    assert "is not an empty directory" in qklens("dict", "convert", written.folder, "out").refused()
    assert "is a qklens dictionary already" in qklens("dict", "convert", "out", "again").refused()


@pytest.mark.parametrize("activation", [Relu(), TopK(k=3), Threshold(threshold=0.4), JumpRelu()])
def test_export_and_back_is_exact(qklens: Callable[..., Any], tmp_path: Path, activation: Any) -> None:
    random = random_crosscoder(layers=(3,))
    thresholds = {3: torch.rand(7)} if isinstance(activation, JumpRelu) else {}
    config = random.config.model_copy(update={"activation": activation})
    single = Crosscoder(
        config, random.encoder, random.encoder_bias, random.decoder, random.decoder_bias, thresholds=thresholds
    )
    save_crosscoder(single, tmp_path / "native", torch.float32)
    ended = qklens("dict", "export", tmp_path / "native", "out", "--to", "saelens")
    assert ended.status == 0, ended
    back, x = load_dictionary(Path("out")), torch.randn(50, 5, generator=torch.Generator().manual_seed(3))
    activations = single.encode(3, lambda _: x)
    assert torch.equal(back.encode(3, lambda _: x), activations)
    assert torch.equal(back.decode(3, activations), single.decode(3, activations))


def test_a_crosscoder_is_exported_for_its_first_layer_alone(qklens: Callable[..., Any], tmp_path: Path) -> None:
    crosscoder = random_crosscoder()
    save_crosscoder(crosscoder, tmp_path / "native", torch.float32)
    export = ("dict", "export", tmp_path / "native", "out")
    assert "a crosscoder of layers [0, 2, 5]" in qklens(*export).refused()
    assert "only those of --layer 0 are" in qklens(*export, "--layer", 2).refused()
    assert "choose one of them" in qklens(*export, "--layer", 1).refused()
    assert "--to 'sparsify' is not known" in qklens(*export, "--to", "sparsify").refused()
    assert tree(Path()) == {}
    assert qklens(*export, "--layer", 0).status == 0
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(load_dictionary(Path("out")).encode(0, lambda _: x), crosscoder.encode(0, lambda _: x)[:, :7])


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_full_disk_leaves_nothing(
    qklens: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Full at the second of the two files."""
    save_crosscoder(random_crosscoder(layers=(3,)), tmp_path / "native", torch.float32)
    source = published.sparsify(tmp_path).folder if command == "convert" else tmp_path / "native"
    sync, calls = files.os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    assert "No space left on device" in qklens("dict", command, source, "out").refused()
    assert list(Path().iterdir()) == []


def test_a_foreign_dictionary_is_held_against_the_model(
    qklens: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    written = published.saelens(tmp_path / "sae")
    assert "its vectors have 6 dimensions" in qklens("dict", "check", written.folder, "--model", model).refused()
    assert "no such directory" in qklens("dict", "check", "gone", "--model", model).refused()
    line = qklens("dict", "check", written.folder, "--model", model, "--record").refused()
    assert "--record writes into a qklens dictionary" in line


def test_the_last_layer_s_output_is_read_by_no_head(qklens: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    save_crosscoder(mirror(), tmp_path / "native", torch.float32)
    assert qklens("dict", "export", tmp_path / "native", tmp_path / "sae").status == 0
    metadata = {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}
    edit_json(tmp_path / "sae" / "cfg.json", metadata=metadata)
    assert (
        "its last layer's output, which no head reads"
        in qklens("dict", "check", tmp_path / "sae", "--model", model).refused()
    )


def gemma_scope(root: Path, average_l0: int) -> Path:
    """The mirror as Gemma Scope writes it; its L0 is the width of the stream."""
    folder = root / "gemma-scope-2b-pt-res" / "layer_0" / "width_16k" / f"average_l0_{average_l0}"
    folder.mkdir(parents=True)
    made = mirror()
    arrays = {"W_enc": made.encoder[1].T, "W_dec": made.decoder[1], "b_enc": made.encoder_bias[1]}
    arrays |= {"b_dec": made.decoder_bias[1], "threshold": torch.zeros(2 * WIDTH)}
    np.savez(folder / "params.npz", **{name: array.numpy() for name, array in arrays.items()})
    return folder


def test_the_l0_that_a_path_states_is_held_against_also_after_conversion(
    qklens: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    for stated in (WIDTH, 2 * WIDTH - 1):
        right = qklens("dict", "check", gemma_scope(tmp_path, stated), "--model", model)
        assert right.status == 0, right
        assert f"held against its card (average_l0_{stated} in its path): near enough" in right.out
    wrong = gemma_scope(tmp_path, 71)
    says = "16 active features a token at resid_pre.1 on neutral.txt, its card (average_l0_71 in its path) says 71"
    assert says in qklens("dict", "check", wrong, "--model", model).refused()
    assert qklens("dict", "convert", wrong, "out").status == 0
    assert says in qklens("dict", "check", "out", "--model", model).refused()
    assert "expected 35.5 to 142" in qklens("dict", "check", "out", "--model", model, "--record").refused()


def test_a_card_s_fidelity_without_a_batch_is_held_against(
    qklens: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mirror"
    save_crosscoder(mirror(), folder, torch.float32)
    check = ("dict", "check", folder, "--model", model)
    edit_json(folder / "dictionary.json", fidelity={"l0": {"1": 20}, "fraction_variance_unexplained": {"1": 0.01}})
    found = json.loads(qklens(*check, "--json").out)
    assert (found["held_against"], found["recorded"]["l0"]) == ("its card", {"1": 20})
    assert found["tolerance"] is None
    edit_tensors(folder / "dictionary.safetensors", lambda t: t["decoder.1"].mul_(0.5))
    assert "unexplained on neutral.txt, its card says 0.01; expected at most 0.07" in qklens(*check).refused()
    edit_json(folder / "dictionary.json", activation={"kind": "topk", "k": 4}, fidelity={"l0": {"1": 20}})
    assert "4 active features a token at resid_pre.1 on neutral.txt, its card says 20" in qklens(*check).refused()
