"""dictionary_learning's pickles: read through a process of their own, equal to each class's forward, or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qklens.dictionaries.formats.detect import convert, load_dictionary
from qklens.dictionaries.formats.unpickle import unpickled
from qklens.errors import QklensError
from tests.dictionaries.formats.published import FEATURES, WIDTH, Draw, k_largest
from tests.dictionaries.formats.test_readers import close, stream

K = 4


def written(folder: Path, kind: str, **trainer: object) -> tuple[Path, dict[str, Tensor]]:
    """`config.json` and `ae.pt` with the state dict of a class."""
    draw = Draw(11)
    linear = {"encoder.weight": draw(FEATURES, WIDTH), "encoder.bias": draw(FEATURES)}
    linear |= {"decoder.weight": draw(WIDTH, FEATURES)}
    matrices = {"W_enc": draw(WIDTH, FEATURES), "b_enc": draw(FEATURES), "W_dec": draw(FEATURES, WIDTH)}
    bias, threshold, k = draw(WIDTH), torch.tensor(0.625).double(), torch.tensor(K, dtype=torch.int)
    t = {
        "AutoEncoder": {**linear, "bias": bias},
        "AutoEncoderNew": {**linear, "decoder.bias": bias},
        "AutoEncoderTopK": {**linear, "b_dec": bias, "k": k, "threshold": threshold},
        "BatchTopKSAE": {**linear, "b_dec": bias, "k": k, "threshold": threshold},
        "MatryoshkaBatchTopKSAE": {**matrices, "b_dec": bias, "k": k, "threshold": threshold, "group_sizes": k[None]},
        "JumpReluAutoEncoder": {**matrices, "b_dec": bias, "threshold": draw(FEATURES)},
        "GatedAutoEncoder": {
            "encoder.weight": linear["encoder.weight"], "decoder.weight": linear["decoder.weight"],
            "decoder_bias": bias, "r_mag": 0.3 * draw(FEATURES).float().double(),
            "gate_bias": draw(FEATURES), "mag_bias": draw(FEATURES),
        },
    }[kind]  # fmt: skip
    folder.mkdir(parents=True)
    stored = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in t.items()}
    torch.save(stored, folder / "ae.pt")
    config = {"dict_class": kind, "activation_dim": WIDTH, "dict_size": FEATURES, "k": K, "layer": 3}
    config |= {"lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3", **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"ctx_len": 128}}))
    return folder, {name: tensor.double() for name, tensor in stored.items()}


def forward(kind: str, t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """As `dictionary.py` and the trainers write it."""
    if kind == "AutoEncoder":
        acts = torch.relu((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"])
        return acts, acts @ t["decoder.weight"].T + t["bias"]
    if kind == "AutoEncoderNew":
        acts = torch.relu(x @ t["encoder.weight"].T + t["encoder.bias"])
        return acts, acts @ t["decoder.weight"].T + t["decoder.bias"]
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        z = torch.relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
        acts = k_largest(z, K) if kind == "AutoEncoderTopK" else z * (z > t["threshold"])
        return acts, acts @ t["decoder.weight"].T + t["b_dec"]
    if kind == "MatryoshkaBatchTopKSAE":
        z = torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
        acts = z * (z > t["threshold"])
        return acts, acts @ t["W_dec"] + t["b_dec"]
    if kind == "JumpReluAutoEncoder":
        z = x @ t["W_enc"] + t["b_enc"]
        norms = t["W_dec"].norm(dim=1)
        acts = torch.relu(z * (z > t["threshold"])) * norms
        return acts, (acts / norms) @ t["W_dec"] + t["b_dec"]
    z = (x - t["decoder_bias"]) @ t["encoder.weight"].T
    norms = t["decoder.weight"].norm(dim=0)
    acts = (z + t["gate_bias"] > 0) * torch.relu(t["r_mag"].exp() * z + t["mag_bias"]) * norms
    return acts, (acts / norms) @ t["decoder.weight"].T + t["decoder_bias"]


KINDS = (
    "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder",
    "GatedAutoEncoder",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_is_its_own_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    folder, tensors = written(tmp_path / "ae", kind)
    if kind != KINDS[-1]:  # one real process is enough to wait for
        from qklens.dictionaries.formats import dictionary_learning
        from qklens.dictionaries.stored import StoredTensors

        held = StoredTensors(folder / "ae.pt", {name: tensor.float() for name, tensor in tensors.items()})
        monkeypatch.setattr(dictionary_learning, "unpickled", lambda _: held)
    dictionary = convert(folder)
    assert dictionary.layers == (4,)
    x = stream()
    activations, reconstruction = forward(kind, tensors, x)
    got = dictionary.encode(4, lambda _: x)
    close(got, activations)
    close(dictionary.decode(4, got), reconstruction)
    assert 0.02 < (activations != 0).double().mean() < 0.9


def test_nothing_but_convert_opens_a_pickle(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "ae", "AutoEncoder")
    with pytest.raises(QklensError, match=r"ae\.pt: a pickle, which may run code.*qklens dict convert .* OUT`"):
        load_dictionary(folder)
    (folder / "config.json").unlink()
    with pytest.raises(QklensError, match=r"ae\.pt: a pickle"):
        load_dictionary(folder)


class Harm:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "ae", "AutoEncoder")
    torch.save({"encoder.weight": Harm(tmp_path / "ran")}, folder / "ae.pt")
    with pytest.raises(QklensError, match="not opened, for it holds more than tensors or is damaged") as caught:
        convert(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state": {"w": torch.zeros(2)}}, tmp_path / "ae.pt")
    with pytest.raises(QklensError, match="entry 'state' is no tensor"):
        unpickled(tmp_path / "ae.pt")


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"dict_class": "AutoEncodr"}, "did you mean 'AutoEncoder'"),
        ({"submodule_name": "mlp_out_layer_3"}, "submodule_name is 'mlp_out_layer_3', expected resid_post_layer_<L>"),
        ({"submodule_name": None}, "the site is unknown; run `qklens dict convert` with --layer L"),
        ({"dict_size": "many"}, "key 'dict_size' is 'many', expected a whole number"),
    ],
)
def test_what_is_not_supported_is_named_before_the_pickle_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: dict[str, object], says: str
) -> None:
    from qklens.dictionaries.formats import dictionary_learning

    folder, _ = written(tmp_path / "ae", "AutoEncoder", **trainer)
    monkeypatch.setattr(dictionary_learning, "unpickled", lambda _: pytest.fail("opened"))
    with pytest.raises(QklensError) as caught:
        convert(folder)
    assert says in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)
