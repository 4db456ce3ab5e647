"""Where a tiny model's parameters meet the residual stream, and how to rewrite them in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qklens.models.subject import Subject

_WRITERS = {
    r"(embed_tokens|embed_in|wte|wpe)\.weight": 1,
    r"(o_proj|attention\.dense|mlp\.down_proj|dense_4h_to_h)\.weight": 0,
    r"c_proj\.weight": 1,
    r"(o_proj|dense|c_proj|dense_4h_to_h)\.bias": 0,
    r"experts\.down_proj": None,
    r"experts\.down_proj_bias": 1,
}
"""Parameters that write the stream, and the axis along which its vectors lie (None: the one of the stream's width)."""
_READERS = {
    "attention": {r"([qkv]|qkv)_proj\.weight": 1, r"c_attn\.weight": 0, r"query_key_value\.weight": 1},
    "mlp": {
        r"mlp\.(gate|up|gate_up)_proj\.weight": 1,
        r"mlp\.gate\.weight": 1,
        r"router\.weight": 1,
        r"experts\.gate_up_proj": None,
        r"c_fc\.weight": 0,
        r"dense_h_to_4h\.weight": 1,
    },
}


def weight_of(module: nn.Module) -> Tensor:
    """A linear map's weight as `out in`, writable."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def output(subject: Subject, layer: int) -> Tensor:
    return weight_of(getattr(subject.attention(layer), subject.family.output))


def map_heads(subject: Subject, layer: int, side: str, maps: Tensor) -> None:
    projection = subject.projection(layer, side)
    rows = projection.columns()
    weight_of(projection.module)[rows] = maps @ projection.weight()
    if (bias := projection.bias()) is not None:
        projection.module.bias.data[rows] = (maps @ bias[..., None])[..., 0]


def shift_heads(subject: Subject, layer: int, side: str, shift: Tensor) -> None:
    projection = subject.projection(layer, side)
    projection.module.bias.data[projection.columns()] += shift


def untie(subject: Subject) -> None:
    subject.unembedding.weight = nn.Parameter(subject.unembedding.weight.detach().clone(), requires_grad=False)


def along(parameter: Tensor, axis: int, change: Callable[[Tensor], Tensor]) -> None:
    parameter.data = change(parameter.data.movedim(axis, -1)).movedim(-1, axis).contiguous()


def _find(subject: Subject, table: dict[str, int | None], prefix: str = "") -> Iterator[tuple[str, Tensor, int]]:
    for name, parameter in subject.model.named_parameters():
        for pattern, axis in table.items():
            if name.startswith(prefix) and re.search(rf"(^|\.){pattern}$", name):
                yield name, parameter, list(parameter.shape).index(subject.d_model) if axis is None else axis


def writers(subject: Subject) -> list[tuple[Tensor, int]]:
    """What writes the stream; where the attention's and MLP's outputs have norms of their own, those do."""
    normed = subject.family.output_norm(subject.layers[0]) is not None
    return [(p, axis) for name, p, axis in _find(subject, _WRITERS) if not normed or "embed" in name]


def norms(subject: Subject) -> Iterator[tuple[nn.Module, list[tuple[Tensor, int, Tensor | None]]]]:
    """Every norm that reads the stream, with the matrices that read the norm, and their biases; the final norm last."""
    names = {id(module): name for name, module in subject.model.named_modules()}
    parameters = dict(subject.model.named_parameters())
    for layer in subject.layers:
        own = [m for n, m in layer.named_children() if re.search("norm|ln_", n)]
        mlp = layer.pre_feedforward_layernorm if len(own) == 4 else own[1]
        for norm, table in ((subject.family.input_norm(layer), "attention"), (mlp, "mlp")):
            found = _find(subject, _READERS[table], names[id(layer)] + ".")
            yield norm, [(p, axis, parameters.get(re.sub("weight$", "bias", name))) for name, p, axis in found]
    yield subject.family.final_norm(subject.model), [(subject.unembedding.weight, 1, None)]


def scale_norm(subject: Subject, norm: nn.Module, factor: Tensor) -> None:
    offset = subject.family.norm.offset
    factor = factor.repeat(len(norm.weight) // len(factor))
    norm.weight.data = (norm.weight.data + offset) * factor - offset
    for name, parameter in norm.named_parameters():
        if name == "bias":
            parameter.data *= factor


def scale_epsilon(norm: nn.Module, factor: float) -> None:
    for name in ("eps", "variance_epsilon"):
        if name in vars(norm):
            setattr(norm, name, getattr(norm, name) * factor)
