"""A dictionary directory of any format that is known, told apart by its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from qklens.dictionaries.config import CONFIG_FILE, WEIGHTS_FILE
from qklens.dictionaries.crosscoder import Crosscoder, load_crosscoder
from qklens.dictionaries.formats import dictionary_learning, gemma_scope, gemma_scope_2, openmoss, saelens, sparsify
from qklens.errors import QklensError


@runtime_checkable
class _Format(Protocol):
    """What each module of a format has."""

    @property
    def KIND(self) -> str: ...  # noqa: N802

    @property
    def LOOKS_LIKE(self) -> str: ...  # noqa: N802

    def matches(self, folder: Path) -> bool: ...

    def read(self, folder: Path, layer: int | None = None) -> Crosscoder: ...


_DIRECT: tuple[_Format, ...] = (saelens, sparsify, gemma_scope, gemma_scope_2, openmoss)
_EVERY: tuple[_Format, ...] = (*_DIRECT, dictionary_learning)
_PICKLES = ("*.pt", "*.pth", "*.bin", "*.pkl")


def is_native(folder: Path) -> bool:
    """Whether a directory is meant as qklens' own format: it has one of its files."""
    return (folder / CONFIG_FILE).is_file() or (folder / WEIGHTS_FILE).is_file()


def load_dictionary(folder: Path, device: torch.device | str = "cpu") -> Crosscoder:
    """Read a dictionary directory: qklens' own, SAELens, Gemma Scope 1 and 2, Llama Scope, sparsify.

    Other formats than qklens' own are converted in memory, exactly; see `formats`.

    Raises:
        QklensError: no format or more than one fits the files, a pickle, or what the format's reader refuses.
    """
    if is_native(folder):
        return load_crosscoder(folder, device)
    if dictionary_learning.matches(folder) or not _matching(folder, _DIRECT):
        _refuse_pickles(folder)
    return moved(_one(folder, _DIRECT).read(folder), device)


def convert(folder: Path, layer: int | None = None) -> Crosscoder:
    """Read a dictionary directory of another tool for conversion, pickles of dictionary_learning included.

    Args:
        folder: the directory.
        layer: L where it reads resid_pre.L and its format does not record it.

    Raises:
        QklensError: as `load_dictionary`; a directory that is native already.
    """
    if is_native(folder):
        raise QklensError(f"{folder}: is a qklens dictionary already; use it as it is")
    return _one(folder, _EVERY).read(folder, layer)


def moved(dictionary: Crosscoder, device: torch.device | str) -> Crosscoder:
    """The same dictionary on a device."""
    groups = ("encoder", "encoder_bias", "decoder", "decoder_bias", "thresholds")
    there = {name: {m: t.to(device) for m, t in getattr(dictionary, name).items()} for name in groups}
    return replace(dictionary, **there)


def _one(folder: Path, formats: tuple[_Format, ...]) -> _Format:
    found = _matching(folder, formats)
    if len(found) > 1:
        kinds = [module.KIND for module in found]
        raise QklensError(f"{folder}: holds files of {len(found)} formats, {kinds}; expected those of one")
    if not found:
        looks = "; ".join([f"{CONFIG_FILE} with {WEIGHTS_FILE} (qklens)", *(module.LOOKS_LIKE for module in _EVERY)])
        raise QklensError(f"{folder}: no dictionary found; looked for {looks}")
    return found[0]


def _matching(folder: Path, formats: tuple[_Format, ...]) -> list[_Format]:
    return [module for module in formats if module.matches(folder)]


def _refuse_pickles(folder: Path) -> None:
    pickle = next((file for pattern in _PICKLES for file in sorted(folder.glob(pattern))), None)
    if pickle is not None:
        raise QklensError(
            f"{pickle}: a pickle, which may run code and is not opened here; run `qklens dict convert {folder} OUT` "
            "and use OUT"
        )
