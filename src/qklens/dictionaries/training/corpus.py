"""A corpus as token sequences: a text file, chats or texts a line of JSON, or parquet.

| file | documents |
|---|---|
| `.txt` | paragraphs, which a blank line ends |
| `.jsonl` | `{"messages": [{"role", "content"}, ...]}` through the model's chat template, or `{"text": ...}` |
| `.parquet` | the same by column; needs pyarrow (`pip install 'qklens[parquet]'`) |
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qklens.errors import QklensError, reason

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_FEWEST = 2
_ORDER_SEED = 0


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token sequences in a fixed random order.

    Attributes:
        sequences: each of at least two tokens and at most the context.
        held_out: others, which are not trained on.
        sha256: of all tokens.
    """

    sequences: tuple[Sequence[int], ...]
    held_out: tuple[Sequence[int], ...]
    sha256: str


def read_corpus(path: Path, tokenizer: PreTrainedTokenizerBase, context: int, held_out: int = 64) -> Corpus:
    """Read a file; documents longer than the context are cut into pieces.

    Args:
        path: the file.
        tokenizer: the model's.
        context: most tokens of a sequence.
        held_out: most sequences that are kept from training, and at most a twentieth.

    Raises:
        QklensError: another kind of file, one that cannot be read, a line that is no document (with its number), a
            tokenizer without chat template where chats are given, or fewer than two usable documents.
    """
    if path.suffix not in _SUFFIXES:
        raise QklensError(f"--corpus {path}: expected a name that ends in {', '.join(_SUFFIXES)}")
    read = {".txt": _paragraphs, ".jsonl": _lines, ".parquet": _parquet}[path.suffix]
    sequences = []
    try:
        for document in read(path, tokenizer):
            tokens: list[int] = document
            pieces = (tokens[i : i + context] for i in range(0, len(tokens), context))
            sequences += [piece for piece in pieces if len(piece) >= _FEWEST]
    except OSError as error:
        raise QklensError(f"--corpus {path}: cannot read ({error.strerror or error}); check the path") from error
    except UnicodeDecodeError as error:
        raise QklensError(f"--corpus {path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    return corpus_of(sequences, held_out, f"--corpus {path}")


def corpus_of(sequences: Sequence[Sequence[int]], held_out: int = 64, name: str = "corpus") -> Corpus:
    """Sequences in a fixed random order, with some held out.

    Raises:
        QklensError: fewer than two sequences.
    """
    if len(sequences) < _FEWEST:
        raise QklensError(f"{name}: holds {len(sequences)} documents of two tokens or more; expected at least two")
    ordered = list(sequences)
    random.Random(_ORDER_SEED).shuffle(ordered)
    digest = hashlib.sha256()
    for sequence in ordered:
        digest.update(np.asarray([len(sequence), *sequence], dtype=np.int64).tobytes())
    n = max(1, min(held_out, len(ordered) // 20))
    return Corpus(tuple(ordered[n:]), tuple(ordered[:n]), digest.hexdigest())


def _paragraphs(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in [*file, ""]:
            if line.strip():
                lines.append(line)
            elif lines:
                yield _tokens(tokenizer, "".join(lines).strip(), special=True)
                lines = []


def _lines(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise QklensError(f"{path}, line {number}: not JSON ({error}); repair the line") from error
                yield _document(value, tokenizer, f"{path}, line {number}")


def _parquet(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise QklensError(f"--corpus {path}: needs the package 'pyarrow': pip install 'qklens[parquet]'") from error
    try:
        file = parquet.ParquetFile(path)
        column = next((name for name in ("messages", "text") if name in file.schema_arrow.names), None)
        if column is None:
            raise QklensError(f"{path}: columns are {file.schema_arrow.names}; expected 'messages' or 'text'")
        number = 0
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _document({column: value}, tokenizer, f"{path}, row {number}")
    except (ValueError, OSError) as error:  # pyarrow's own errors are of these kinds
        raise QklensError(f"--corpus {path}: not a parquet file that can be read ({reason(error)})") from error


def _document(value: object, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return _tokens(tokenizer, _whole(value["text"], where), special=True)
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages) or not messages:
        raise QklensError(
            f'{where}: expected {{"messages": [{{"role", "content"}}, ...]}} or {{"text": ...}}; repair the line'
        )
    if not tokenizer.chat_template:
        raise QklensError(f"{where}: is a chat, and the model's tokenizer has no chat template; give texts")
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template may raise what it likes
        raise QklensError(f"{where}: the model's chat template refuses it ({reason(error)})") from error
    return _tokens(tokenizer, _whole(str(rendered), where), special=False)


def _whole(text: str, where: str) -> str:
    """Text that UTF-8 has a form for: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise QklensError(f"{where}: holds {half}, half of a surrogate pair and no character; remove it") from error
    return text


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])  # pyright: ignore
