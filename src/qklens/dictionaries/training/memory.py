"""What a run takes at least, reckoned before any of it is allocated, and what there is.

    weights and moments   3 · 4 bytes · Σ_groups features · (columns read + columns written + biases)
    batch                 4 bytes · rows · (Σ_groups features + 3 · columns)
    at the end            4 bytes · Σ_groups features · (columns read + all columns + biases)
                          + the most of: weights; 3 · weights; 4 · 64 MiB

Three of everything that is learnt, because Adam keeps two moments; of a batch, pre-activations of all features and the
rows as they wait, as they are scaled, and as their error. At the end the moments are gone, and the dictionary, whose
decoder has a row over every layer for each feature, meets in turn the weights that it is made of, the activations of a
block of held-out rows with what makes them, and the copies that saving makes: in the file's dtype, in its format, and
as bytes. The end is the CPU's, wherever training was.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from qklens.dictionaries import blocks
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.layout import Layout
from qklens.errors import QklensError

_FLOAT = 4
_COPIES_SAVED, _BLOCKS = 3, 4
_MEMORY = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def refuse_too_large(config: TrainingConfig, layout: Layout, world: int, device: torch.device) -> None:
    """Refuse what does not fit, before anything is allocated.

    Args:
        config: features and batch.
        layout: columns.
        world: processes, which share each batch; each has all weights.
        device: where weights lie.

    Raises:
        QklensError: names the bytes that are needed at least, and those that are there.
    """
    learnt, batch, end = needed_bytes(config, layout, world)
    there = available_bytes(device)
    if there is not None and learnt + batch > there:
        raise QklensError(
            f"training needs at least {learnt + batch:,} bytes on {device.type} ({learnt:,} for weights and Adam's "
            f"moments of features {config.features:,}, {batch:,} for batch {config.batch:,}), {there:,} are free; give "
            "fewer --features or a smaller --batch"
        )
    there = available_bytes(torch.device("cpu"))
    if there is not None and end > there:
        raise QklensError(
            f"measuring and saving a dictionary of features {config.features:,} need at least {end:,} bytes on cpu, "
            f"{there:,} are free; give fewer --features"
        )


def needed_bytes(config: TrainingConfig, layout: Layout, world: int = 1) -> tuple[int, int, int]:
    """Bytes of weights and moments, of a batch beside them, and of the end, when both are gone."""
    biases = 2 if config.activation == "jumprelu" else 1
    columns = sum((len(group.reads) + len(group.writes)) * group.d_model + biases for group in layout.groups)
    features = len(layout.groups) * config.features
    weights = _FLOAT * config.features * columns
    dictionary = (
        _FLOAT
        * config.features
        * sum(len(group.reads) * group.d_model + layout.width + biases for group in layout.groups)
    )
    block = _FLOAT * max(features, blocks.ENTRIES_AT_ONCE)
    return (
        3 * weights,
        _FLOAT * -(-config.batch // world) * (features + 3 * layout.width),
        dictionary + max(_COPIES_SAVED * weights, _BLOCKS * block),
    )


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [_free_of_machine(), _free_of_group()]
    return min((n for n in found if n is not None), default=None)


def _free_of_machine() -> int | None:
    try:
        for line in _MEMORY.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _free_of_group() -> int | None:
    """What a container's limit leaves; the page cache, which it would give back, counts as free."""
    try:
        most = int((_GROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        lines = (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such file, or "max"
        return None
    cached = sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
    return max(0, most - used + cached)
