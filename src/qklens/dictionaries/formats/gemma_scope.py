"""Gemma Scope: `params.npz` with W_enc, b_enc, W_dec, b_dec and threshold; what it is for stands in the path alone.

    z = x W_enc + b_enc,   a = max(z, 0) · 1[z > threshold],   x̂ = a W_dec + b_dec

Published as `gemma-scope-<size>-<pt|it>-<res|mlp|att|transcoders>/layer_<L>/width_<W>/average_l0_<N>/params.npz`; the
residual ones are of the stream after layer L, which is resid_pre.(L+1).

Source: the Gemma Scope tutorial and model cards (huggingface.co/google/gemma-scope); Lieberum et al. 2024.
"""

from __future__ import annotations

import re
from pathlib import Path

from qklens.dictionaries.activation import JumpRelu
from qklens.dictionaries.config import Fidelity
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.formats.npz import read_npz
from qklens.dictionaries.formats.plain import Plain, native
from qklens.dictionaries.formats.sites import agreed_layer
from qklens.errors import QklensError

KIND = "gemma-scope"
WEIGHTS = "params.npz"
LOOKS_LIKE = f"{WEIGHTS} (Gemma Scope)"

_RELEASE = re.compile(r"gemma-scope-(\w+)-(pt|it)-(res|mlp|att|transcoders)(?:-|$)")
_L0 = re.compile(r"average_l0_([1-9]\d{0,5})")
_LAYER = re.compile(r"layer_(\d{1,4})")
_ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def matches(folder: Path) -> bool:
    """Whether a folder holds this format's file."""
    return (folder / WEIGHTS).is_file()


def read(folder: Path, layer: int | None = None) -> Crosscoder:
    """The dictionary of a Gemma Scope directory; its layer and site come from the path or from `layer`.

    Raises:
        QklensError: another site than the residual stream, a path that says neither layer nor site, or damage.
    """
    model, recorded = _path_says(folder)
    why = "a Gemma Scope file does not record its site and layer, and its path (…-res/layer_<L>/…) does not say them"
    where = agreed_layer(recorded, layer, folder, why)
    stored = read_npz(folder / WEIGHTS, _ARRAYS)
    d_model, n = stored.shape("W_enc", 2)
    plain = Plain(
        encoder=stored.take("W_enc", d_model, n).T.contiguous(),
        encoder_bias=stored.take("b_enc", n),
        decoder=stored.take("W_dec", n, d_model),
        decoder_bias=stored.take("b_dec", d_model),
        activation=JumpRelu(),
        thresholds=stored.take("threshold", n).clamp(min=0),
    ).bias_subtracted()
    files, site = (folder / WEIGHTS,), f"resid_pre.{where}"
    stated = _stated_l0(folder, where)
    return native(plain, where, folder=folder, kind=KIND, model=model, site=site, files=files, stated=stated)


def _stated_l0(folder: Path, layer: int) -> tuple[Fidelity, str] | None:
    """The average L0 that the path names, on the publisher's text."""
    named = next((match for part in reversed(folder.absolute().parts) if (match := _L0.fullmatch(part))), None)
    return None if named is None else (Fidelity(l0={layer: float(named[1])}), f"{named[0]} in its path")


def _path_says(folder: Path) -> tuple[str, int | None]:
    """The model and the layer that the path names, where it names a release of residual dictionaries."""
    parts = folder.absolute().parts
    release = next((match for part in reversed(parts) if (match := _RELEASE.search(part))), None)
    if release is not None and release[3] != "res":
        raise QklensError(
            f"{folder}: of the release {release[0]!r}, which is not of the residual stream; use one of -res"
        )
    if "embedding" in parts:
        raise QklensError(f"{folder}: of the embedding, whose scale the model changes before layer 0; use layer_<L>")
    named = next((match for part in reversed(parts) if (match := _LAYER.fullmatch(part))), None)
    if release is None or named is None:
        return "", None
    size, tuned = release[1], "-it" if release[2] == "it" else ""
    return f"google/gemma-2-{size}{tuned}", int(named[1]) + 1
