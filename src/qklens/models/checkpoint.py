"""Look at a model directory before anything of it runs: config, safetensors headers, tensor names and shapes.

Everything here reads JSON only. Weights that are not safetensors, code that a checkpoint wants to run, missing tensors
and truncated files are refused with the file's name.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qklens.errors import QklensError
from qklens.files import read_json
from qklens.models.config_check import check_readable, check_values
from qklens.models.family import Family, family_of

_CODE_KEYS = (
    "auto_map", "_attn_implementation_internal", "_attn_implementation", "attn_implementation",
    "_experts_implementation_internal", "_experts_implementation", "experts_implementation",
)  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, or a GGUF file, that passed inspection: its config, its family and its weight files."""

    path: Path
    config: dict[str, Any]
    family: Family
    weights: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that decides what the model does with a prompt: weights, config, tokenizer, chat template."""
        if self.path.is_file():
            return self.weights
        others = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")
        names = {p for pattern in (*others, "*.jinja", "*.model") for p in self.path.glob(pattern) if p.is_file()}
        return (*self.weights, *sorted(names - set(self.weights)))

    @property
    def source(self) -> tuple[str, dict[str, str]]:
        """How transformers wants a directory or a GGUF file named."""
        return (str(self.path.parent), {"gguf_file": self.path.name}) if self.path.is_file() else (str(self.path), {})


def inspect_checkpoint(path: Path) -> Checkpoint:
    """Check a model directory without loading it.

    Raises:
        QklensError: no such directory, no config, an unproven family, code in the config, weights that are missing,
            pickled, truncated or outside the directory, or a tensor that the family needs and the files lack.
    """
    if not path.is_dir():
        raise QklensError(f"{path}: no such model directory; expected config.json and *.safetensors there")
    if not (path / "config.json").is_file():
        raise QklensError(f"{path}: no config.json; expected a Hugging Face model directory")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise QklensError(f"{path / 'config.json'}: holds a {type(config).__name__}, expected a JSON object")
    for key in _CODE_KEYS:
        if config.get(key):
            raise QklensError(
                f"{path / 'config.json'}: key {key!r} asks to run other code; remove it to load the model"
            )
    if config.get("transformers_weights"):
        raise QklensError(
            f"{path / 'config.json'}: key 'transformers_weights' points to other weights than model.safetensors; "
            "remove it"
        )
    if (path / "adapter_config.json").exists():
        raise QklensError(
            f"{path / 'adapter_config.json'}: an adapter would load another base model; expected merged weights: "
            "merge the adapter, or remove this file"
        )
    family = family_of(config, str(path))
    layers = check_values(config, path / "config.json")
    _refuse_links_out(path)
    weights = _weight_files(path)
    shapes: dict[str, list[int]] = {}
    for file in weights:
        shapes.update(_header_shapes(file))
    _check_tensors(path, layers, family, shapes)
    _check_embedding(path, config, shapes)
    check_readable(config, path / "config.json")
    return Checkpoint(path, config, family, weights)


def _refuse_links_out(path: Path) -> None:
    """A link must stay in the directory; the hub's cache links to the blobs beside its snapshots."""
    roots = [path.resolve()]
    if path.resolve().parent.name == "snapshots":
        roots.append(path.resolve().parent.parent / "blobs")
    for file in sorted(path.iterdir()):
        if file.is_symlink() and not any(file.resolve().is_relative_to(root) for root in roots):
            raise QklensError(f"{file}: a link out of the directory; expected the file itself: copy it here")


def _weight_files(path: Path) -> tuple[Path, ...]:
    """The files that transformers will load: the single file wins over an index."""
    if (path / "model.safetensors").is_file():
        return (path / "model.safetensors",)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        content = read_json(index)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise QklensError(f"{index}: no 'weight_map' of tensor names to file names; download the index again")
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise QklensError(f"{index}: names {name!r}; expected a .safetensors file in the same directory")
            if not (path / name).is_file():
                raise QklensError(f"{path / name}: missing; the index names it, download it again")
        return tuple(path / name for name in files)
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in path.glob(pattern))
    if pickled:
        raise QklensError(
            f"{path / pickled[0]}: weights are pickled and can run code; expected model.safetensors: convert them "
            "with the safetensors project's converter"
        )
    raise QklensError(f"{path}: no weights; expected model.safetensors or model.safetensors.index.json")


def _header_shapes(file: Path) -> dict[str, list[int]]:
    """The tensors of a safetensors file by its header, with the file's length checked against it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 2 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise QklensError(f"{file}: not a safetensors file or truncated ({size} bytes); download it again")
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            if type(end) is not int:
                raise TypeError("data_offsets are not integers")
            shapes = {name: list(entry["shape"]) for name, entry in tensors.items()}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise QklensError(
                f"{file}: damaged safetensors header ({type(error).__name__}); download it again"
            ) from error
    if 8 + length + end != size:
        raise QklensError(f"{file}: {size} bytes, its header promises {8 + length + end}; truncated, download it again")
    return shapes


_EMBEDDINGS = ("model.embed_tokens.weight", "wte.weight", "gpt_neox.embed_in.weight")


def _check_embedding(path: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """A config's sizes against the embedding's shape, before anything of that size is allocated."""
    name = next((n for n in shapes if n.endswith(_EMBEDDINGS)), None)
    stated = (config.get("vocab_size"), config.get("hidden_size", config.get("n_embd")))
    if name is None or None in stated or (len(shapes[name]) == 2 and tuple(shapes[name]) == stated):
        return
    raise QklensError(
        f"{path}: tensor {name!r} has shape {shapes[name]}, config.json says {list(stated)}; weights and config do "
        "not fit"
    )


def _check_tensors(path: Path, layers: int, family: Family, shapes: dict[str, list[int]]) -> None:
    prefix = family.tensor_prefix
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    names = (pattern.format(layer=layer) for layer in range(layers) for pattern in family.tensors)
    missing = next((name for name in names if name not in shapes), None)
    if missing:
        raise QklensError(f"{path}: tensor {missing!r} is missing; the checkpoint is incomplete or of another family")
