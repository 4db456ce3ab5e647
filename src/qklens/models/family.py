"""What a model family must declare so that attention scores can be rebuilt from sources.

A family file says where things are (layers, norms, projections) and which code is the family's own eager attention. It
holds no algebra: that stands once, in `scores.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qklens.errors import QklensError, nearest


@dataclass(frozen=True)
class Family:
    """One family of decoder-only models, as transformers implements it.

    Attributes:
        model_type: the `model_type` of its config.
        eager: the family's own eager attention function; every scored pass runs it.
        layers: the decoder layers.
        final_norm: the norm before the unembedding.
        attention: a layer's attention module, with `q_proj`, `k_proj`, `v_proj` and `o_proj`.
        input_norm: the norm whose output the projections read.
        norm_weight: a norm's γ, as it multiplies.
        norm_epsilon: the epsilon inside a norm's root.
        score_scale: the c of an attention module.
        rotary: (residual, position_ids) -> (cos, sin), each `batch pos d_head`.
        tensors: the tensor-name patterns that a checkpoint must have for each layer.
    """

    model_type: str
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    layers: Callable[[Any], nn.ModuleList]
    final_norm: Callable[[Any], nn.Module]
    attention: Callable[[Any], nn.Module]
    input_norm: Callable[[Any], nn.Module]
    norm_weight: Callable[[Any], Tensor]
    norm_epsilon: Callable[[Any], float]
    score_scale: Callable[[Any], float]
    rotary: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    tensors: tuple[str, ...]


def family_of(model_type: str | None, where: str) -> Family:
    """The family for a config's `model_type`.

    Raises:
        QklensError: no `model_type`, or one whose score decomposition is not proven.
    """
    from qklens.models.families import FAMILIES

    if not model_type:
        raise QklensError(f"{where}: config.json has no 'model_type'; expected one of {sorted(FAMILIES)}")
    if model_type not in FAMILIES:
        raise QklensError(
            f"{where}: model_type {model_type!r} has no proven score decomposition (missing: a family file that passes "
            f"the completeness test); supported: {sorted(FAMILIES)}{nearest(model_type, FAMILIES)}"
        )
    return FAMILIES[model_type]
