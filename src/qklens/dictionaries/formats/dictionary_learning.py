"""dictionary_learning: `config.json` and `ae.pt`, a pickle, which only `qklens dict convert` opens, in another process.

    AutoEncoder             a = relu(W (x − bias) + c),                    x̂ = D a + bias
    AutoEncoderNew          a = relu(W x + c),                             x̂ = D a + b
    AutoEncoderTopK         a = the k largest of relu(W (x − b) + c),      x̂ = D a + b
    BatchTopKSAE, Matryoshka…  a = z · 1[z > threshold], z = relu(W (x − b) + c),  x̂ = D a + b
    JumpReluAutoEncoder     a = relu(z · 1[z > tᵢ]) ‖dᵢ‖, z = x W + c,     x̂ = (a / ‖d‖) W_dec + b
    GatedAutoEncoder        gates share the encoder, so that it is a jumprelu; activations times ‖dᵢ‖

Source: dictionary_learning, `dictionary_learning/dictionary.py`, `utils.py` and `trainers/` (github.com/saprmarks).
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from qklens.dictionaries.activation import JumpRelu, Relu, Threshold, TopK
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.formats.fields import Fields
from qklens.dictionaries.formats.plain import Plain, native
from qklens.dictionaries.formats.sites import agreed_layer
from qklens.dictionaries.formats.unpickle import unpickled
from qklens.dictionaries.stored import StoredTensors
from qklens.errors import QklensError, nearest

KIND = "dictionary_learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"
LOOKS_LIKE = f"{CONFIG} with {WEIGHTS} (dictionary_learning; `qklens dict convert` alone opens it)"

_SITE = re.compile(r"resid_post_layer_(\d{1,4})")


def matches(folder: Path) -> bool:
    """Whether a folder holds this format's files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path, layer: int | None = None) -> Crosscoder:
    """The dictionary of a dictionary_learning directory, its pickle opened in a process of its own.

    Raises:
        QklensError: a class or site that is not supported, or damage.
    """
    fields = Fields.read(folder / CONFIG).inner("trainer")
    kind, n, width = fields.need("dict_class", str), fields.need("dict_size", int), fields.need("activation_dim", int)
    site = fields.get("submodule_name", "", str)
    match = _SITE.fullmatch(site)
    if site and not match:
        raise QklensError(
            f"{fields.path}: submodule_name is {site!r}, expected resid_post_layer_<L>: heads read the stream"
        )
    recorded = int(match[1]) + 1 if match else None
    where = agreed_layer(recorded, layer, fields.path, "key 'submodule_name' is empty, so that the site is unknown")
    if kind not in _CLASSES:
        raise QklensError(
            f"{fields.path}: dict_class {kind!r} is not supported; expected one of {list(_CLASSES)}"
            f"{nearest(kind, _CLASSES)}"
        )
    stored = unpickled(folder / WEIGHTS)
    plain = _CLASSES[kind](stored, fields, n, width)
    files = (folder / CONFIG, folder / WEIGHTS)
    return native(
        plain,
        where,
        folder=folder,
        kind=KIND,
        model=fields.get("lm_name", "", str),
        site=site or "resid_pre",
        files=files,
    )


def _linear(stored: StoredTensors, n: int, width: int, bias: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encoder, its bias, decoder and its bias, of two linear maps."""
    decoder = stored.take("decoder.weight", width, n).T.contiguous()
    return stored.take("encoder.weight", n, width), stored.take("encoder.bias", n), decoder, stored.take(bias, width)


def _standard(stored: StoredTensors, _: Fields, n: int, width: int) -> Plain:
    return Plain(*_linear(stored, n, width, "bias"), Relu())


def _april(stored: StoredTensors, _: Fields, n: int, width: int) -> Plain:
    return Plain(*_linear(stored, n, width, "decoder.bias"), Relu()).bias_subtracted()


def _topk(stored: StoredTensors, fields: Fields, n: int, width: int) -> Plain:
    k = fields.need("k", int)
    if "k" in stored and (held := int(stored.take("k"))) != k:
        raise QklensError(f"{stored.path}: holds k = {held}, {fields.path.name} says {k}; expected the same")
    if k < 1:
        raise QklensError(f"{fields.path}: key 'k' is {k}, expected at least 1")
    return Plain(*_linear(stored, n, width, "b_dec"), TopK(k=k))


def _batchtopk(stored: StoredTensors, _: Fields, n: int, width: int) -> Plain:
    return Plain(*_linear(stored, n, width, "b_dec"), _trained_threshold(stored))


def _matryoshka(stored: StoredTensors, _: Fields, n: int, width: int) -> Plain:
    return Plain(*_matrices(stored, n, width), _trained_threshold(stored))


def _jumprelu(stored: StoredTensors, _: Fields, n: int, width: int) -> Plain:
    plain = Plain(*_matrices(stored, n, width), JumpRelu(), stored.take("threshold", n).clamp(min=0)).bias_subtracted()
    return _scaled_by_norms(plain)


def _gated(stored: StoredTensors, _: Fields, n: int, width: int) -> Plain:
    scale, offset = stored.take("r_mag", n).exp(), stored.take("mag_bias", n)
    plain = Plain(
        encoder=stored.take("encoder.weight", n, width) * scale[:, None],
        encoder_bias=offset,
        decoder=stored.take("decoder.weight", width, n).T.contiguous(),
        decoder_bias=stored.take("decoder_bias", width),
        activation=JumpRelu(),
        thresholds=(offset - scale * stored.take("gate_bias", n)).clamp(min=0),
        folded=("gates, as thresholds",),
    )
    return _scaled_by_norms(plain)


def _matrices(stored: StoredTensors, n: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    encoder = stored.take("W_enc", width, n).T.contiguous()
    return encoder, stored.take("b_enc", n), stored.take("W_dec", n, width), stored.take("b_dec", width)


def _trained_threshold(stored: StoredTensors) -> Threshold:
    threshold = float(stored.take("threshold"))
    if threshold < 0:
        raise QklensError(f"{stored.path}: threshold is {threshold}: never set in training; expected at least 0")
    return Threshold(threshold=threshold)


def _scaled_by_norms(plain: Plain) -> Plain:
    """Activations in units of the decoder's norms; what was above a threshold stays above the scaled one."""
    return plain.rescaled_by_norms(thresholds_too=True)


_CLASSES = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _april,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
    "GatedAutoEncoder": _gated,
}
