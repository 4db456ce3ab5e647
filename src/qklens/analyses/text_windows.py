"""A plain text file, cut into token windows; its text is only ever read, never obeyed as a model's control tokens."""

from __future__ import annotations

import codecs
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qklens.analyses.key_kinds import FIRST_QUERY
from qklens.errors import QklensError
from qklens.models.subject import Subject

MIN_TOKENS = 8
BYTES_PER_TOKEN = 16
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")


@dataclass(frozen=True)
class TextWindow:
    """Some consecutive tokens of a text.

    Attributes:
        tokens: token ids, the tokenizer's BOS in front where it puts one.
        text: the characters of the window.
        ranges: for each token the characters [begin, end) of `text` that it covers, the white space before it included;
            BOS covers none. Tokens that share a character's bytes each cover that character.
        unknown: how many of the tokens stand for an unknown word.
    """

    tokens: tuple[int, ...]
    text: str
    ranges: tuple[tuple[int, int], ...]
    unknown: int

    def piece(self, begin: int, end: int) -> str:
        """The characters that tokens [begin, end) cover, those beyond the window left out."""
        covered = [r for r in self.ranges[max(begin, 0) : max(end, 0)] if r[0] < r[1]]
        return self.text[covered[0][0] : covered[-1][1]] if covered else ""


def text_windows(subject: Subject, path: Path, width: int = 128, limit: int = 64) -> list[TextWindow]:
    """The first windows of a UTF-8 text file, consecutive and without overlap.

    The text is tokenised once, so that windows hold the tokens that the model would see. A window ends at the last
    paragraph (blank line) in its second half where there is one, else when it is full. Of the file, 16 bytes for each
    token that the windows can hold are read, and no more. A rest of fewer than 8 tokens is left out.

    Args:
        subject: the model.
        path: the text file.
        width: tokens of a full window, BOS included; a shorter context of the model shortens it.
        limit: most windows.

    Raises:
        QklensError: a file that cannot be read, is not UTF-8, holds no text, or less than a head can be judged on;
            a width or limit too small; control tokens that this tokenizer cannot read as plain text.
    """
    width = width if subject.context is None else min(width, subject.context)
    if width <= MIN_TOKENS or limit < 1:
        raise QklensError(
            f"{limit} windows of {width} tokens; expected at least 1 window of at least {MIN_TOKENS + 1} tokens"
        )
    text = _read(path, BYTES_PER_TOKEN * width * limit)
    tokenizer = subject.tokenizer
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    ids = [int(i) for i in encoded["input_ids"]]
    _refuse_control_tokens(tokenizer, ids, path)
    front = _front(tokenizer)
    if len(front) + len(ids) <= FIRST_QUERY:
        raise QklensError(
            f"{path}: its text is {len(ids)} tokens under {subject.name}'s tokenizer; expected at least "
            f"{FIRST_QUERY + 1 - len(front)}, and rather some pages of prose"
        )
    ranges = _ranges(encoded["offset_mapping"])
    windows = []
    for begin, end in _cuts(text, ranges, width - len(front)):
        offset = ranges[begin][0]
        inside = [(a - offset, b - offset) for a, b in ranges[begin:end]]
        tokens = ids[begin:end]
        unknown = sum(token == tokenizer.unk_token_id for token in tokens)
        windows.append(
            TextWindow(
                (*front, *tokens), text[offset : ranges[end - 1][1]], (*((0, 0) for _ in front), *inside), unknown
            )
        )
        if len(windows) == limit:
            break
    return windows


def _read(path: Path, most: int) -> str:
    """The text of a file's first bytes, cut at white space where the file goes on."""
    try:
        with path.open("rb") as file:
            data = file.read(most)
            ended = not file.read(1)
    except OSError as error:
        raise QklensError(f"{path}: cannot read ({error.strerror}); expected a plain text file") from error
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=ended)
    except UnicodeDecodeError as error:
        raise QklensError(
            f"{path}: not UTF-8 text ({error.reason} near byte {error.start}); expected plain text, save it as UTF-8"
        ) from error
    if not text.strip():
        raise QklensError(f"{path}: holds no text; expected some pages of prose in UTF-8")
    text = text.replace("\r\n", "\n")
    # What the cut left of the last word would be tokens of no word.
    return text if ended else text.rsplit(maxsplit=1)[0]


def _refuse_control_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], path: Path) -> None:
    """A vocabulary may hold its control tokens as words of their own; then splitting them does not help."""
    added = tokenizer.added_tokens_decoder
    control = {i for i, token in added.items() if token.special and i != tokenizer.unk_token_id}
    found = next((i for i in ids if i in control), None)
    if found is not None:
        raise QklensError(
            f"{path}: holds {str(added[found])!r}, which this tokenizer can only read as a control token; remove it "
            "from the text"
        )


def _front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS, where the tokenizer itself puts one before a text."""
    if tokenizer.bos_token_id is None:
        return []
    bos = int(tokenizer.bos_token_id)  # pyright: ignore[reportArgumentType]
    return [bos] if tokenizer.encode("a")[:1] == [bos] else []


def _ranges(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Character ranges that leave no gap: some tokenizers do not count a token's leading white space."""
    ranges, before = [], 0
    for begin, end in offsets:
        ranges.append((min(int(begin), before), int(end)))
        before = int(end)
    return ranges


def _cuts(text: str, ranges: Sequence[tuple[int, int]], body: int) -> Iterator[tuple[int, int]]:
    """Token ranges of the windows; a short text is one window, however short."""
    ends = [end for _, end in ranges]
    paragraphs = sorted({bisect_right(ends, found.end()) for found in _PARAGRAPH.finditer(text)})
    begin = 0
    while begin == 0 or len(ranges) - begin >= MIN_TOKENS:
        end = min(begin + body, len(ranges))
        if end < len(ranges):
            at = bisect_right(paragraphs, end) - 1
            if at >= 0 and paragraphs[at] >= begin + max(body // 2, MIN_TOKENS):
                end = paragraphs[at]
        yield begin, end
        begin = end
