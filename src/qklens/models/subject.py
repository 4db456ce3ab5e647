"""A subject: one loaded model with its tokenizer, and the few numbers that everything above asks for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from qklens.errors import QklensError, nearest
from qklens.files import sha256_files
from qklens.models.attention import attention_name
from qklens.models.batch import Batch, left_padded
from qklens.models.checkpoint import Checkpoint, inspect_checkpoint
from qklens.models.family import Family
from qklens.models.gguf import inspect_gguf
from qklens.models.locate import locate_model
from qklens.models.norms import NormMap, norm_map
from qklens.models.projections import HeadCounts, Projection, ProjectionSide

AUTO = "auto"
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


def load_subject(path: Path | str, *, device: str = "cpu", dtype: str = "float32") -> Subject:
    """Load a model after inspecting it; no code of the checkpoint runs.

    Args:
        path: a directory with safetensors, a GGUF file, or a hub id `owner/name@<40-hex commit>` (`locate_model`).
        device: a torch device, or `auto`: the layers are spread over all GPUs, as accelerate does it.
        dtype: what the model computes in; score algebra stays in float32 or better.

    Raises:
        QklensError: see `locate_model`, `inspect_checkpoint`, `inspect_gguf`; also an unknown device or dtype, a
            tokenizer without offsets, weights that hold NaN or infinity, or shapes that do not fit the config.
    """
    if dtype not in DTYPES:
        raise QklensError(f"--dtype {dtype!r} is unknown; expected one of {sorted(DTYPES)}{nearest(dtype, DTYPES)}")
    checkpoint = inspect_model(locate_model(str(path)))
    place = None if device == AUTO else _device(device)
    if place is None and find_spec("accelerate") is None:
        raise QklensError(f"--device {AUTO} needs the package 'accelerate': pip install 'qklens[spread]'")
    where = checkpoint.path
    transformers_logging.disable_progress_bar()
    tokenizer = _load_tokenizer(where)
    model = _load_model(checkpoint, DTYPES[dtype], spread=place is None)
    rows = int(model.config.vocab_size)
    if len(tokenizer) > rows:
        raise QklensError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows; they are of two models"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise QklensError(f"{where}: tensor {name!r} does not fit on the devices; choose a smaller --dtype")
        if not torch.isfinite(parameter).all():
            raise QklensError(f"{where}: tensor {name!r} holds NaN or infinity; the checkpoint is damaged")
    if place is not None:
        nn.Module.to(model, place)
    return wrap_model(model, tokenizer, checkpoint.family, path=where, sha256=sha256_files(list(checkpoint.weights)))


def inspect_model(path: Path) -> Checkpoint:
    """Look at a directory or a GGUF file before anything of it runs."""
    return inspect_gguf(path) if path.is_file() else inspect_checkpoint(path)


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
        name=_name_of(path) if path else config.model_type,
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


def _name_of(path: Path) -> str:
    """A directory's or file's name; a hub snapshot lies in models--owner--name/snapshots/<commit>."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.stem if path.is_file() else path.name


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise QklensError(f"--device {name!r} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def _source(path: Path) -> tuple[str, dict[str, str]]:
    """How transformers wants a directory or a GGUF file named."""
    return (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (str(path), {})


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    where, options = _source(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds here; all mean the same to the user
        reason = str(error).strip().splitlines()
        raise QklensError(f"{path}: no usable tokenizer ({reason[0] if reason else type(error).__name__})") from error
    if not tokenizer.is_fast:
        raise QklensError(
            f"{path}: tokenizer {type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer "
            "(tokenizer.json): convert it with transformers"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _load_model(checkpoint: Checkpoint, dtype: torch.dtype, *, spread: bool) -> PreTrainedModel:
    where, options = _source(checkpoint.path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                device_map=AUTO if spread else None,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:  # see _load_tokenizer
        reason = str(error).strip().splitlines()
        raise QklensError(
            f"{checkpoint.path}: the model does not load ({reason[0] if reason else type(error).__name__})"
        ) from error
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        found = sorted(str(key) for key in info[kind] if "rotary_emb.inv_freq" not in str(key))
        if found:
            first = found[0]
            raise QklensError(f"{checkpoint.path}: {kind.replace('_', ' ')}: {first}; weights and config do not fit")
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if checkpoint.path.is_file() and head.weight is not embedding.weight and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight  # the GGUF reader copies what the model ties
    return model
