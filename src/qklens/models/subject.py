"""A subject: one loaded model with its tokenizer, and the few numbers that everything above asks for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from qklens.errors import QklensError, nearest, reason
from qklens.files import sha256_files
from qklens.models.attention import attention_name
from qklens.models.checkpoint import Checkpoint, inspect_checkpoint
from qklens.models.family import Family
from qklens.models.norms import NormMap, norm_map
from qklens.models.projections import HeadCounts, Projection, ProjectionSide
from qklens.models.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def load_subject(path: Path, *, device: str = "cpu", dtype: str = "float32") -> Subject:
    """Load a model directory after inspecting it; nothing is fetched and no code of the checkpoint runs.

    Raises:
        QklensError: see `inspect_checkpoint`; also an unknown device or dtype, a tokenizer without offsets, weights
            that hold NaN or infinity, or shapes that do not fit the config.
    """
    if dtype not in DTYPES:
        raise QklensError(f"--dtype {dtype!r} is unknown; expected one of {sorted(DTYPES)}{nearest(dtype, DTYPES)}")
    checkpoint = inspect_checkpoint(path)
    target = _device(device)
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(path)
    model = _load_model(checkpoint, DTYPES[dtype])
    rows = int(model.config.vocab_size)
    if len(tokenizer) > rows:
        raise QklensError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows; they are of two models"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise QklensError(f"{path}: tensor {name!r} holds NaN or infinity; the checkpoint is damaged")
    nn.Module.to(model, target)
    return wrap_model(model, tokenizer, checkpoint.family, path=path, sha256=sha256_files(list(checkpoint.weights)))


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
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Subject(
        name=path.name if path else config.model_type,
        model=model,
        tokenizer=tokenizer,
        family=family,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        d_model=config.hidden_size,
        d_head=d_head,
        path=path,
        sha256=sha256,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise QklensError(f"--device {name!r} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def _load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(checkpoint.path),
                dtype=dtype,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # transformers raises many kinds here; all mean the same to the user
        raise QklensError(f"{checkpoint.path}: the model does not load ({reason(error)})") from error
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        found = sorted(str(key) for key in info[kind] if "rotary_emb.inv_freq" not in str(key))
        if found:
            first = found[0]
            raise QklensError(f"{checkpoint.path}: {kind.replace('_', ' ')}: {first}; weights and config do not fit")
    return model
