"""A dictionary that is not what it was is refused: deliberately broken copies of a good one, each in one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qklens.analyses.fidelity import measure_fidelity
from qklens.data.items import Dataset, load_dataset
from qklens.data.render import LetterForm
from qklens.dictionaries.activation import JumpRelu, Relu, Threshold, TopK
from qklens.dictionaries.config import BATCH_FILE
from qklens.dictionaries.crosscoder import Crosscoder, load_crosscoder, save_crosscoder
from qklens.errors import QklensError
from qklens.models.loading import load_subject
from qklens.models.subject import Subject
from qklens.studies.dictionary_check import check_dictionary
from qklens.studies.fidelity_record import deviations, record_fidelity, recorded_batch
from qklens.studies.lab import Lab
from qklens.studies.opening import load_source
from qklens.studies.resources import organism_folder
from tiny_folders import edit_tensors, tree

SEQUENCES = 30


@dataclass(frozen=True)
class Good:
    """The organism, its dictionary with a short recorded batch, and a TopK one with a record of its own."""

    subject: Subject
    sequences: list[list[int]]
    folders: dict[str, Path]

    def load(self, kind: str) -> Crosscoder:
        return load_crosscoder(self.folders[kind])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    subject = load_subject(organism_folder() / "chat")
    shipped = organism_folder() / "dictionary"
    dictionary = load_crosscoder(shipped)
    batch = recorded_batch([subject], dictionary, shipped)
    assert batch is not None
    sequences = batch.sequences[::10][:SEQUENCES]
    folders = {}
    same = dictionary.config.activation
    assert isinstance(same, Threshold)
    thresholds = {m: torch.full((dictionary.config.features_per_layer,), same.threshold) for m in dictionary.layers}
    for kind, activation in (("threshold", same), ("topk", TopK(k=10)), ("jumprelu", JumpRelu())):
        folders[kind] = tmp_path_factory.mktemp("good") / kind
        config = dictionary.config.model_copy(update={"activation": activation, "batch": None, "fidelity": None})
        copy = replace(dictionary, config=config, thresholds=thresholds if kind == "jumprelu" else {})
        save_crosscoder(copy, folders[kind], torch.float32)
        record_fidelity([subject], copy, folders[kind], measure_fidelity(subject, copy, sequences), sequences)
    return Good(subject, sequences, folders)


def off(good: Good, dictionary: Crosscoder, folder: Path) -> list[str]:
    """What a load of the dictionary would name, held against the record in a folder."""
    batch = recorded_batch([good.subject], dictionary, folder)
    assert batch is not None
    measured = measure_fidelity(good.subject, dictionary, batch.sequences, losses=False)
    return deviations([good.subject], dictionary, batch, measured)


def threshold_of(dictionary: Crosscoder) -> float:
    assert isinstance(dictionary.config.activation, Threshold)
    return dictionary.config.activation.threshold


def changed(dictionary: Crosscoder, **tensors: Any) -> Crosscoder:
    return replace(dictionary, **tensors)


def scaled(values: dict[int, torch.Tensor], factor: float) -> dict[int, torch.Tensor]:
    return {m: factor * value for m, value in values.items()}


def with_activation(activation: Any) -> Callable[[Crosscoder], Crosscoder]:
    return lambda d: replace(d, config=d.config.model_copy(update={"activation": activation}))


def _earlier(by_layer: dict[int, Any]) -> dict[int, Any]:
    return {m - 1: value for m, value in by_layer.items()}


def one_layer_early(d: Crosscoder) -> Crosscoder:
    """resid_post taken for resid_pre."""
    tensors = {
        n: {m - 1: t for m, t in getattr(d, n).items()} for n in ("encoder", "encoder_bias", "decoder", "decoder_bias")
    }
    layers = tuple(m - 1 for m in d.layers)
    fidelity = d.config.fidelity
    assert fidelity is not None
    moved = fidelity.model_copy(
        update={n: {m - 1: v for m, v in getattr(fidelity, n).items()} for n in type(fidelity).model_fields}
    )
    return replace(d, config=d.config.model_copy(update={"layers": layers, "fidelity": moved}), **tensors)


def scale_lost(factor: float) -> Callable[[Crosscoder], Crosscoder]:
    """The form that reads factor · x, with the factor forgotten."""
    return lambda d: changed(
        d,
        encoder=scaled(d.encoder, 1 / factor),
        decoder=scaled(d.decoder, factor),
        decoder_bias=scaled(d.decoder_bias, factor),
    )


def bias_not_subtracted(d: Crosscoder) -> Crosscoder:
    """b_dec added at the end, and forgotten at the beginning."""
    offset = {m: d.encoder_bias[m] + d.encoder[m] @ d.decoder_bias[m] for m in d.layers}
    return changed(d, encoder_bias=offset)


def reordered(d: Crosscoder) -> Crosscoder:
    """Features under each other's labels; what they write together stays the same."""
    group, layers = d.config.features_per_layer, len(d.layers)
    order = torch.cat([torch.arange(group).flip(0) + i * group for i in range(layers)])
    return changed(
        d,
        encoder={m: e.flip(0) for m, e in d.encoder.items()},
        encoder_bias={m: b.flip(0) for m, b in d.encoder_bias.items()},
        decoder={m: rows[order] for m, rows in d.decoder.items()},
    )


def rescaled(factor: float) -> Callable[[Crosscoder], Crosscoder]:
    """Activations and thresholds off by a factor that the decoder takes back: x̂ and L0 stay the same."""
    return lambda d: changed(
        d,
        encoder=scaled(d.encoder, factor),
        encoder_bias=scaled(d.encoder_bias, factor),
        decoder=scaled(d.decoder, 1 / factor),
    )


BROKEN: dict[str, tuple[str, Callable[[Crosscoder], Crosscoder]]] = {
    "topk as relu": ("topk", with_activation(Relu())),
    "topk of another k": ("topk", with_activation(TopK(k=16))),
    "topk as a threshold": ("topk", with_activation(Threshold(threshold=0.0))),
    "threshold as relu": ("threshold", with_activation(Relu())),
    "another threshold": ("threshold", with_activation(Threshold(threshold=0.9))),
    "resid_post as resid_pre": ("threshold", one_layer_early),
    "scale lost": ("threshold", scale_lost(2.0)),
    "scale lost of 1.1": ("threshold", scale_lost(1.1)),
    "scale of the decoder lost": ("threshold", lambda d: changed(d, decoder=scaled(d.decoder, 0.5))),
    "encoder of 1.02": ("threshold", lambda d: changed(d, encoder=scaled(d.encoder, 1.02))),
    "decoder of 1.05": ("threshold", lambda d: changed(d, decoder=scaled(d.decoder, 1.05))),
    "decoder of 1.02": ("threshold", lambda d: changed(d, decoder=scaled(d.decoder, 1.02))),
    "threshold of 1.05": ("threshold", lambda d: with_activation(Threshold(threshold=1.05 * threshold_of(d)))(d)),
    "thresholds of 1.05": ("jumprelu", lambda d: changed(d, thresholds=scaled(d.thresholds, 1.05))),
    "scale lost of 1.01": ("threshold", scale_lost(1.01)),
    "encoder bias of 1.05": ("threshold", lambda d: changed(d, encoder_bias=scaled(d.encoder_bias, 1.05))),
    "b_dec of 0.9": ("threshold", lambda d: changed(d, decoder_bias=scaled(d.decoder_bias, 0.9))),
    "a factor between encoder and decoder": ("topk", rescaled(1.01)),
    "features in another order": ("threshold", reordered),
    "b_dec missing": ("threshold", lambda d: changed(d, decoder_bias=scaled(d.decoder_bias, 0))),
    "b_dec not subtracted": ("threshold", bias_not_subtracted),
    "b_enc missing": ("threshold", lambda d: changed(d, encoder_bias=scaled(d.encoder_bias, 0))),
    "encoder transposed": (
        "threshold",
        lambda d: changed(d, encoder={m: e.T.reshape(e.shape).contiguous() for m, e in d.encoder.items()}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["threshold", "topk", "jumprelu"])
def test_the_good_one_passes(good: Good, kind: str) -> None:
    found = check_dictionary(good.subject, good.folders[kind])
    assert found.measured_on == "recorded batch"
    assert found.tokens == sum(map(len, good.sequences))
    assert found.recorded == good.load(kind).config.fidelity
    for name in ("l0", "fraction_variance_unexplained", "loss_recovered"):
        for layer, value in getattr(found.recorded, name).items():
            assert getattr(found.measured, name)[layer] == pytest.approx(value, rel=1e-6)
    assert found.held_against == "the record of the same batch"


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_copy_is_outside_the_tolerance_at_load(good: Good, name: str) -> None:
    """By what is measured at every load, L0 and variance unexplained, without the losses."""
    kind, change = BROKEN[name]
    broken = change(good.load(kind))
    assert off(good, broken, good.folders[kind]) != []


@pytest.mark.parametrize("name", ["a factor between encoder and decoder", "features in another order"])
def test_what_sums_cannot_see_is_seen_at_the_fixed_tokens(good: Good, name: str) -> None:
    kind, change = BROKEN[name]
    found = off(good, change(good.load(kind)), good.folders[kind])
    assert found
    assert all(clause.startswith("an activation at resid_pre.") for clause in found)


@pytest.mark.parametrize(("kind", "dtype"), [("threshold", "float64"), ("topk", "bfloat16")])
def test_a_copy_that_is_off_by_rounding_alone_passes(good: Good, kind: str, dtype: str) -> None:
    """Weights off by a float32's last bits, in a model that runs in another dtype than that of the record."""
    d = good.load(kind)
    near = changed(d, encoder=scaled(d.encoder, 1 + 3e-7), decoder=scaled(d.decoder, 1 + 3e-7))
    other = replace(good, subject=load_subject(organism_folder() / "chat", dtype=dtype))
    assert off(other, near, good.folders[kind]) == []
    halved = changed(near, decoder=scaled(near.decoder, 0.8))
    assert off(other, halved, good.folders[kind]) != [], "half precision hides no broken copy"


def test_a_broken_copy_on_disk_is_refused_by_check_and_by_a_study(good: Good, tmp_path: Path) -> None:
    kind, change = BROKEN["topk as relu"]
    broken = change(good.load(kind))
    save_crosscoder(broken, tmp_path, torch.float32)
    (tmp_path / BATCH_FILE).write_bytes((good.folders[kind] / BATCH_FILE).read_bytes())
    with pytest.raises(
        QklensError, match=r"L0 at resid_pre\.1 is .*, recorded as .*activation function, site"
    ) as caught:
        check_dictionary(good.subject, tmp_path)
    assert str(tmp_path) in str(caught.value)
    lab = Lab(good.subject, Dataset("few", load_dataset("harm_pressure").items[:6], "00"), LetterForm("", ""), 0)
    with pytest.raises(QklensError, match=r"L0 at resid_pre\.1"):
        load_source(lab, tmp_path)


def test_another_batch_than_the_recorded_one_is_refused(good: Good, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    save_crosscoder(good.load("topk"), folder, torch.float32)
    with pytest.raises(QklensError, match=r"fidelity\.safetensors: no such file, but the configuration records"):
        check_dictionary(good.subject, folder)
    whole = (good.folders["topk"] / BATCH_FILE).read_bytes()
    (folder / BATCH_FILE).write_bytes(whole[:-4])
    with pytest.raises(QklensError, match=r"fidelity\.safetensors: damaged"):
        check_dictionary(good.subject, folder)
    (folder / BATCH_FILE).write_bytes(whole[:-4] + b"\1\0\0\0")
    with pytest.raises(QklensError, match="not the batch that the configuration records"):
        check_dictionary(good.subject, folder)
    (folder / BATCH_FILE).write_bytes(whole)
    edit_tensors(folder / BATCH_FILE, lambda t: [t.pop(name) for name in list(t) if name.startswith("peak")])
    with pytest.raises(QklensError, match="holds no activations at fixed tokens; set 'batch' and 'fidelity' to null"):
        check_dictionary(good.subject, folder)


def test_without_a_record_it_is_measured_on_neutral_text_and_recorded_when_asked(good: Good, tmp_path: Path) -> None:
    dictionary = good.load("threshold")
    config = dictionary.config.model_copy(update={"batch": None, "fidelity": None, "layers": (1,)})
    alone = Crosscoder(
        config, dictionary.encoder, dictionary.encoder_bias, {1: dictionary.decoder[1][:384]}, dictionary.decoder_bias
    )
    save_crosscoder(alone, tmp_path, torch.float32)
    before = tree(tmp_path)
    first = check_dictionary(good.subject, tmp_path)
    assert (first.measured_on, first.recorded, first.tolerance) == ("neutral.txt", None, None)
    assert tree(tmp_path) == before
    check_dictionary(good.subject, tmp_path, record=True)
    after = check_dictionary(good.subject, tmp_path)
    assert (after.measured_on, after.recorded, after.tokens) == ("recorded batch", first.measured, first.tokens)
    with pytest.raises(QklensError, match="has a record already"):
        check_dictionary(good.subject, tmp_path, record=True)


def test_a_batch_without_fidelity_is_no_record(good: Good, tmp_path: Path) -> None:
    dictionary = good.load("topk")
    save_crosscoder(replace(dictionary, config=dictionary.config.model_copy(update={"fidelity": None})), tmp_path)
    with pytest.raises(QklensError, match="records a batch but no fidelity"):
        load_crosscoder(tmp_path)
