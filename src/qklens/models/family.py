"""What a model family must declare so that attention scores can be rebuilt from sources.

A family file says where things are (layers, norms, projections) and which code is the family's own eager attention. It
holds no algebra: that stands once, in `scores.py`, `norms.py` and `projections.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from qklens.errors import QklensError, nearest
from qklens.models.norms import RMS, NormRule
from qklens.models.projections import Layout, separate

Rotary = Callable[[Any, int, Tensor, Tensor], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class QKNorm:
    """A norm on queries and keys, between the projection and the rotation.

    Attributes:
        over: `head`, each head's own vector; or `all`, all heads' vectors as one.
        layout: the order of axes in which the modules see it.
    """

    over: Literal["head", "all"]
    layout: Literal["pos head", "head pos"] = "pos head"


def shared_rotary(model: Any, layer: int, residual: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """One rotary module for all layers."""
    del layer
    return model.model.rotary_emb(residual, position_ids=position_ids)


@dataclass(frozen=True)
class Family:
    """One family of decoder-only models, as transformers implements it; defaults are Llama's.

    Attributes:
        model_type: the `model_type` of its config.
        eager: the family's own eager attention function; every scored pass runs it.
        tensors: the tensor-name patterns that a checkpoint must have for each layer.
        tensor_prefix: a beginning that a checkpoint's tensor names may have or lack.
        layers: the decoder layers.
        final_norm: the norm before the unembedding.
        attention: a layer's attention module, with its `scaling` and `layer_idx`.
        norm: how its norms compute.
        input_norm: the norm whose output the projections read, or nothing when they read the stream.
        output_norm: a norm on the attention's output before it joins the stream, or nothing.
        projections: where W_Q, W_K, W_V lie.
        output: the name of W_O in the attention module.
        qk_norm: the norm on queries and keys (modules `q_norm`, `k_norm`), or nothing.
        rotary: (model, layer, residual, position_ids) -> (cos, sin), each `batch pos rotary`, or nothing for layers
            without positions.
        score_cap: the τ of an attention module's soft cap, or nothing.
        sinks: an attention module's sink logits, one a head, or nothing.
        window: how many last tokens a layer's queries see, or nothing for all.
        experts: whether its MLPs are mixtures of experts.
        grouped: whether heads may share keys and have a width of their own; if not, stray config keys mean nothing.
        unproven: what a config asks for that this file does not cover, or nothing.
    """

    model_type: str
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    tensors: tuple[str, ...]
    tensor_prefix: str = ""
    layers: Callable[[Any], nn.ModuleList] = lambda model: model.model.layers
    final_norm: Callable[[Any], nn.Module] = lambda model: model.model.norm
    attention: Callable[[Any], nn.Module] = lambda layer: layer.self_attn
    norm: NormRule = RMS
    input_norm: Callable[[Any], nn.Module | None] = lambda layer: layer.input_layernorm
    output_norm: Callable[[Any], nn.Module | None] = lambda layer: None
    projections: Layout = separate
    output: str = "o_proj"
    qk_norm: QKNorm | None = None
    rotary: Rotary = shared_rotary
    score_cap: Callable[[Any], float | None] = lambda attention: None
    sinks: Callable[[Any], Tensor | None] = lambda attention: None
    window: Callable[[Any], int | None] = lambda attention: None
    experts: bool = False
    grouped: bool = True
    unproven: Callable[[dict[str, Any]], str | None] = lambda config: None


_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
_OTHER_ROPE_TYPES = ("dynamic", "longrope", "su")  # their angles depend on the prompt's length
_LAYER_TYPES = ("full_attention", "sliding_attention")


def _unproven_anywhere(config: dict[str, Any]) -> str | None:
    """What no family here covers: rotary that depends on the prompt's length, other layers, quantised weights."""
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key)
        tables = [given, *given.values()] if isinstance(given, dict) else []
        for table in tables:
            kind = (table.get("rope_type") or table.get("type") or "default") if isinstance(table, dict) else "default"
            if kind not in _ROPE_TYPES and kind in _OTHER_ROPE_TYPES:
                return f"{key} of type {kind!r} (proven: {', '.join(_ROPE_TYPES)})"
    types = config.get("layer_types")
    other = [t for t in types if t not in _LAYER_TYPES] if isinstance(types, list) else []
    if other:
        return f"layer_types {other[0]!r} (proven: {', '.join(_LAYER_TYPES)})"
    if config.get("per_layer_config"):
        return "per_layer_config"
    if config.get("quantization_config"):
        return "quantization_config (dequantise the weights and remove it)"
    return None


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family for a config's `model_type`.

    Raises:
        QklensError: no `model_type`, one whose score decomposition is not proven, or a config of a proven family that
            asks for something that is not.
    """
    from qklens.models.families import FAMILIES, MISSING, load_family

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise QklensError(f"{where}: config.json has no 'model_type'; expected one of {sorted(FAMILIES)}")
    if model_type not in FAMILIES:
        missing = MISSING.get(model_type, "a family file that passes the completeness test")
        raise QklensError(
            f"{where}: model_type {model_type!r} has no proven score decomposition (missing: {missing}); supported: "
            f"{sorted(FAMILIES)}{nearest(model_type, FAMILIES)}"
        )
    family = load_family(model_type)
    asked = _unproven_anywhere(config) or family.unproven(config)
    if asked:
        raise QklensError(f"{where}: {model_type} with {asked} has no proven score decomposition; not supported")
    return family
