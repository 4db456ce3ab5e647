"""An autoencoder of one layer as other tools store it, and what is folded into its weights to reach the native form.

    a = θ(W (x − b) + c),   x̂ = Σ aᵢ dᵢ + b

A bias that is not subtracted, a constant scale of the input and factors of the decoder are all exact folds: no
activation's support changes, and the same x̂ comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.dictionaries.activation import JumpRelu, Relu, Threshold, TopK
from qklens.dictionaries.config import FORMAT, DictionaryConfig, Fidelity, Source
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.errors import QklensError
from qklens.files import sha256_files

_ROWS = 1 << 13
SHORTEST = 1e-8
"""Decoder rows shorter than this are not scaled to unit length; they write nothing."""


@dataclass(frozen=True, eq=False)
class Plain:
    """One layer's autoencoder.

    Attributes:
        encoder: W.
        encoder_bias: c.
        decoder: dᵢ.
        decoder_bias: b.
        activation: θ.
        thresholds: tᵢ, for jumprelu alone.
        folded: what was folded, in words.
    """

    encoder: Float[Tensor, "feature d_model"]
    encoder_bias: Float[Tensor, " feature"]
    decoder: Float[Tensor, "feature d_model"]
    decoder_bias: Float[Tensor, " d_model"]
    activation: Relu | TopK | Threshold | JumpRelu
    thresholds: Float[Tensor, " feature"] | None = None
    folded: tuple[str, ...] = ()

    def bias_subtracted(self) -> Plain:
        """For a form θ(W x + c): c + W b takes the place of c."""
        bias = self.encoder_bias + product(self.encoder, self.decoder_bias)
        return self._with("decoder bias, which is not subtracted from the input", encoder_bias=bias)

    def input_scaled(self, scale: float, name: str) -> Plain:
        """For a form that reads s x and writes s x̂: s W, d / s and b / s.

        Raises:
            QklensError: a scale that is no positive number.
        """
        if not 0 < scale < float("inf"):
            raise QklensError(f"{name} is {scale}, expected a positive number")
        return self._with(
            f"input scale {scale:.6g} ({name})",
            encoder=self.encoder * scale,
            decoder=self.decoder / scale,
            decoder_bias=self.decoder_bias / scale,
        )

    def rescaled_by_norms(self, *, thresholds_too: bool = False) -> Plain:
        """For a form θ(z ‖d‖) with a / ‖d‖ decoded: W, c and d with unit decoder rows.

        `thresholds_too`: for a form θ(z) ‖d‖, whose thresholds are in units of z.
        """
        norms = row_norms(self.decoder).clamp(min=SHORTEST)
        scaled = {} if self.thresholds is None or not thresholds_too else {"thresholds": self.thresholds * norms}
        return self._with(
            "decoder norms",
            encoder=self.encoder * norms[:, None],
            encoder_bias=self.encoder_bias * norms,
            decoder=self.decoder / norms[:, None],
            **scaled,
        )

    def decoded_with(self, factors: Float[Tensor, " feature"]) -> Plain:
        """For a form that decodes aᵢ fᵢ: fᵢ dᵢ."""
        return self._with("finetuning factors of the decoder", decoder=self.decoder * factors[:, None])

    def _with(self, folded: str, **changes: Tensor) -> Plain:
        return replace(self, folded=(*self.folded, folded), **changes)  # pyright: ignore[reportArgumentType]


def product(matrix: Float[Tensor, "row d_model"], vector: Float[Tensor, " d_model"]) -> Float[Tensor, " row"]:
    """M v in float64, rounded once; block by block, so that no float64 copy of M stands in memory."""
    wide = vector.double()
    return torch.cat([block.double() @ wide for block in matrix.split(_ROWS)]).to(matrix)


def row_norms(matrix: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
    """‖row‖ in float64, rounded once."""
    return torch.cat([torch.linalg.vector_norm(block.double(), dim=1) for block in matrix.split(_ROWS)]).to(matrix)


def native(
    plain: Plain,
    layer: int,
    *,
    folder: Path,
    kind: str,
    model: str,
    site: str,
    files: Sequence[Path],
    stated: tuple[Fidelity, str] | None = None,
) -> Crosscoder:
    """The native dictionary of one layer.

    Args:
        plain: its weights, all folds done.
        layer: it reads and writes resid_pre.layer.
        folder: where it lies; it gets the folder's name.
        kind: the format it was read from.
        model: the model that the format names, or nothing.
        site: the site as the format names it.
        files: the files it was read from.
        stated: what its publisher states of it, and where.
    """
    fidelity, where = (None, "") if stated is None else stated
    sha256 = sha256_files(list(files))
    source = Source(format=kind, model=model, site=site, sha256=sha256, folded=plain.folded, stated=where)
    return Crosscoder(
        config=DictionaryConfig(
            format=FORMAT,
            name=folder.resolve().name,
            layers=(layer,),
            features_per_layer=plain.encoder.shape[0],
            d_model=plain.encoder.shape[1],
            activation=plain.activation,
            site="resid_pre",
            model_sha256="",
            training={},
            fidelity=fidelity,
            source=source,
        ),
        encoder={layer: plain.encoder},
        encoder_bias={layer: plain.encoder_bias},
        decoder={layer: plain.decoder},
        decoder_bias={layer: plain.decoder_bias},
        sha256=source.sha256,
        thresholds={} if plain.thresholds is None else {layer: plain.thresholds},
    )
