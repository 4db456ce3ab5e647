"""Loading: from a name to a subject whose scores are known to be rebuilt exactly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qklens.errors import QklensError, nearest, reason
from qklens.files import sha256_files
from qklens.models.checkpoint import Checkpoint, inspect_checkpoint
from qklens.models.gguf import inspect_gguf
from qklens.models.locate import locate_model
from qklens.models.selfcheck import self_check
from qklens.models.subject import Subject, wrap_model
from qklens.models.tokenizer import load_tokenizer

AUTO = "auto"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_subject(path: Path | str, *, device: str | Mapping[str, str] = "cpu", dtype: str = "float32") -> Subject:
    """Load a model after inspecting it, and check that its scores are rebuilt; no code of the checkpoint runs.

    Args:
        path: a directory with safetensors, a GGUF file, or a hub id `owner/name@<40-hex commit>` (`locate_model`).
        device: a torch device; `auto`, which spreads the layers over all GPUs, as accelerate does it; or a device map,
            module names to devices.
        dtype: what the model computes in; score algebra stays in float32 or better.

    Raises:
        QklensError: see `locate_model`, `inspect_checkpoint`, `inspect_gguf`, `self_check`; also an unknown device or
            dtype, a tokenizer without offsets, weights that hold NaN or infinity, or shapes that do not fit the config.
    """
    if dtype not in DTYPES:
        raise QklensError(f"--dtype {dtype!r} is unknown; expected one of {sorted(DTYPES)}{nearest(dtype, DTYPES)}")
    checkpoint = inspect_model(locate_model(str(path)))
    place = _device(device) if isinstance(device, str) and device != AUTO else None
    spread = device if place is None else None
    if spread is not None and find_spec("accelerate") is None:
        raise QklensError(f"--device {AUTO} needs the package 'accelerate': pip install 'qklens[spread]'")
    where = checkpoint.path
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(checkpoint)
    model = _load_model(checkpoint, DTYPES[dtype], spread)
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
    weights = sha256_files(list(checkpoint.weights))
    try:
        subject = wrap_model(model, tokenizer, checkpoint.family, path=where, sha256=weights)
        self_check(subject)
    except QklensError:
        raise
    except Exception as error:  # whatever the family's own code says of a config that builds but does not run
        raise QklensError(f"{where}: the model does not run ({reason(error)}); check config.json") from error
    return subject


def inspect_model(path: Path) -> Checkpoint:
    """Look at a directory or a GGUF file before anything of it runs."""
    return inspect_gguf(path) if path.is_file() else inspect_checkpoint(path)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise QklensError(f"--device {name!r} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def _load_model(checkpoint: Checkpoint, dtype: torch.dtype, spread: str | Mapping[str, str] | None) -> PreTrainedModel:
    where, options = checkpoint.source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                device_map=dict(spread) if isinstance(spread, Mapping) else spread,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:  # transformers raises many kinds here; all mean the same to the user
        raise QklensError(f"{checkpoint.path}: the model does not load ({reason(error)})") from error
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
