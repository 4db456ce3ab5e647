"""A subject: one loaded model with its tokenizer, and the few numbers that everything above asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qklens.errors import QklensError
from qklens.models.attention import attention_name
from qklens.models.batch import Batch, left_padded
from qklens.models.family import Family
from qklens.models.norms import NormMap, norm_map
from qklens.models.projections import HeadCounts, Projection, ProjectionSide


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded model under study.

    Attributes:
        name: the directory's name.
        model: the transformers model, in eval mode, without gradients, on its device.
        tokenizer: a fast tokenizer (it gives character offsets).
        family: how the model's parts are found.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    path: Path | None = None
    sha256: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lives."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return next(self.model.parameters()).dtype

    @property
    def pad_id(self) -> int:
        """The token that fills the left of short rows; masked, so any will do."""
        return int(self.tokenizer.pad_token_id or 0)  # pyright: ignore[reportArgumentType]

    @property
    def unembedding(self) -> nn.Module:
        """The map from the final norm's output to logits; its `weight` is `vocab d_model`."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise QklensError(f"{self.name} has no unembedding; expected a causal language model")
        return head

    @property
    def context(self) -> int | None:
        """The longest prompt the config allows, or nothing where it names none."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.family.layers(self.model)

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer."""
        return self.family.attention(self.layers[layer])

    @property
    def counts(self) -> HeadCounts:
        """Heads, key heads and their width."""
        return HeadCounts(self.n_heads, self.n_kv_heads, self.d_head)

    def projection(self, layer: int, side: ProjectionSide) -> Projection:
        """W_Q, W_K or W_V of a layer, one matrix a head."""
        return self.family.projections(self.attention(layer), self.counts, side)

    def output_weight(self, layer: int) -> Float[Tensor, "d_model head d_head"]:
        """W_O of a layer, by head."""
        module = getattr(self.attention(layer), self.family.output)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        return weight.reshape(self.d_model, self.n_heads, self.d_head)

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """The bias of W_O, if it has one."""
        return getattr(self.attention(layer), self.family.output).bias

    def input_norm(self, layer: int, dtype: torch.dtype) -> NormMap:
        """The norm that a layer's projections read through."""
        return norm_map(self.family.norm, self.family.input_norm(self.layers[layer]), dtype)

    def output_norm(self, layer: int, dtype: torch.dtype) -> NormMap:
        """The norm on a layer's attention output, the identity in most families."""
        return norm_map(self.family.norm, self.family.output_norm(self.layers[layer]), dtype)

    def final_norm(self, dtype: torch.dtype) -> NormMap:
        """The norm before the unembedding."""
        return norm_map(self.family.norm, self.family.final_norm(self.model), dtype)

    def qk_norm_module(self, layer: int, side: ProjectionSide) -> nn.Module | None:
        """The norm between a projection and the rotation, if the family has one on that side."""
        if self.family.qk_norm is None or side == "value":
            return None
        attention: Any = self.attention(layer)
        return attention.q_norm if side == "query" else attention.k_norm

    def qk_norm(self, layer: int, side: ProjectionSide, dtype: torch.dtype) -> NormMap:
        """The numbers of that norm."""
        return norm_map(self.family.norm, self.qk_norm_module(layer, side), dtype)

    def batch(self, prompts: Sequence[str | Sequence[int]]) -> Batch:
        """Texts (tokenised as they stand) or token ids, left-padded, on the model's device."""
        tokens = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        return left_padded(tokens, self.pad_id, self.device)

    def check_head(self, layer: int, head: int) -> None:
        """Raise unless (layer, head) exists; names the valid range."""
        if not 0 <= layer < self.n_layers:
            raise QklensError(f"layer {layer} does not exist in {self.name}; expected 0 to {self.n_layers - 1}")
        if not 0 <= head < self.n_heads:
            raise QklensError(f"head {head} does not exist in {self.name}; expected 0 to {self.n_heads - 1}")

    def describe(self) -> dict[str, Any]:
        """What results and manifest say of the model."""
        return {
            "name": self.name,
            "model_type": self.family.model_type,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "d_model": self.d_model,
            "d_head": self.d_head,
            "n_parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "sha256": self.sha256,
        }


def wrap_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    *,
    path: Path | None = None,
    sha256: str | None = None,
) -> Subject:
    """A subject around a model in memory; its attention is set to the registered function."""
    model.eval().requires_grad_(False)
    model.set_attn_implementation(attention_name(family))
    if family.experts and next(model.parameters()).dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped kernels stop at float32
    config = model.config
    d_head, n_kv_heads = config.hidden_size // config.num_attention_heads, config.num_attention_heads
    if family.grouped:
        d_head = getattr(config, "head_dim", None) or d_head
        n_kv_heads = getattr(config, "num_key_value_heads", None) or n_kv_heads
    return Subject(
        name=_name_of(path) if path else config.model_type,
        model=model,
        tokenizer=tokenizer,
        family=family,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=n_kv_heads,
        d_model=config.hidden_size,
        d_head=d_head,
        path=path,
        sha256=sha256,
    )


def _name_of(path: Path) -> str:
    """A directory's or file's name; a hub snapshot lies in models--owner--name/snapshots/<commit>."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.stem if path.is_file() else path.name
