"""sparsify (EleutherAI): `cfg.json` and `sae.safetensors` in a folder that is named after the hook point.

    a = the k largest of relu((x − b_dec) encoderᵀ + bias),   x̂ = a W_dec + b_dec

The hook point is the folder's name, `layers.<L>`: the output of decoder layer L. `multi_topk` changes the training loss
alone and is accepted; groupmax, signed selection, skip connections and transcoders are refused.

Source: sparsify, `sparsify/sparse_coder.py` and `sparsify/config.py` (github.com/EleutherAI/sparsify).
"""

from __future__ import annotations

from pathlib import Path

from qklens.dictionaries.activation import TopK
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.formats.fields import Fields
from qklens.dictionaries.formats.plain import Plain, native
from qklens.dictionaries.formats.sites import agreed_layer, reading_layer
from qklens.dictionaries.stored import read_safetensors
from qklens.errors import QklensError

KIND = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
LOOKS_LIKE = f"{CONFIG} with {WEIGHTS} (sparsify)"

_REFUSED = ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed")
_KNOWN = ("activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "d_in", *_REFUSED)


def matches(folder: Path) -> bool:
    """Whether a folder holds this format's files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path, layer: int | None = None) -> Crosscoder:
    """The dictionary of a sparsify directory.

    Raises:
        QklensError: a kind that the native form cannot hold, another site than a layer's output, or damage.
    """
    fields = Fields.read(folder / CONFIG, _KNOWN)
    for key in _REFUSED:
        if fields.get(key, False, bool):
            raise QklensError(
                f"{fields.path}: {key} is set, which is no plain autoencoder of one site; expected it unset"
            )
    if (activation := fields.get("activation", "topk", str)) != "topk":
        raise QklensError(f"{fields.path}: activation {activation!r} is not supported; expected 'topk'")
    name = folder.resolve().name
    named = any(part in name for part in ("layers", "h.")) or layer is None
    recorded = reading_layer(name, folder) if named else None
    where = agreed_layer(recorded, layer, folder, "its folder's name is no hook point")
    d_in = fields.need("d_in", int)
    n = fields.get("num_latents", 0, int) or d_in * fields.need("expansion_factor", int)
    k = fields.need("k", int)
    if k < 1:
        raise QklensError(f"{fields.path}: key 'k' is {k}, expected at least 1")
    stored = read_safetensors(folder / WEIGHTS)
    plain = Plain(
        encoder=stored.take("encoder.weight", n, d_in),
        encoder_bias=stored.take("encoder.bias", n),
        decoder=stored.take("W_dec", n, d_in),
        decoder_bias=stored.take("b_dec", d_in),
        activation=TopK(k=k),
    )
    files = (folder / CONFIG, folder / WEIGHTS)
    return native(plain, where, folder=folder, kind=KIND, model="", site=name, files=files)
