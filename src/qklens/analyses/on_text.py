"""What a head does on ordinary text, beside what it does at MCQ answer positions.

A head that selects answers need not be a head for answers: the published one's strongest examples over text are no MCQs
at all (HeadVis, 2026). So the same few numbers are read in both places, and no word is said on what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qklens.analyses.head_tally import Example, HeadReading, Tally, look
from qklens.analyses.key_kinds import ANSWER_KINDS, FIRST_QUERY, TEXT_KINDS, answer_kinds, text_kinds
from qklens.analyses.statistics import Array, Interval, bootstrap_ratio_of_means
from qklens.analyses.text_windows import TextWindow, text_windows
from qklens.errors import QklensError
from qklens.interventions.engine import TOKENS_PER_BATCH, Workset
from qklens.interventions.steer import Head
from qklens.models.batch import Batch, left_padded
from qklens.models.copies import Reads
from qklens.models.passes import run_pass
from qklens.models.subject import Subject

SHOWN_EXAMPLES = 10
CONTEXT_TOKENS = 6


@dataclass(frozen=True)
class TextExample:
    """One query that reads one key, by how much the key writes there.

    All texts are raw characters of the file: whoever prints them escapes them.

    Attributes:
        window: which window, from 0.
        query: the query's token position in it, BOS counted.
        key: the key's.
        query_token: the query's own characters.
        key_token: the key's.
        query_context: the characters of the 6 tokens before the query and of the 6 after it.
        key_context: likewise for the key.
        kind: the key's kind, of `TEXT_KINDS`.
        attention: pattern[query, key].
        weight: attention · ‖W_O v_key‖, in units of the residual stream.
    """

    window: int
    query: int
    key: int
    query_token: str
    key_token: str
    query_context: tuple[str, str]
    key_context: tuple[str, str]
    kind: str
    attention: float
    weight: float


@dataclass(frozen=True)
class TextReading(HeadReading):
    """A head over text windows; a part is a window, a query every position from `FIRST_QUERY` on.

    Attributes:
        unknown: share of the text's tokens that stand for unknown words; near 1 the tokenizer cannot read this text.
        examples: the (query, key) pairs of largest weight among keys that are neither the first token nor the query
            itself, each (query token, key token) once, largest first.
    """

    unknown: float
    examples: tuple[TextExample, ...]


@dataclass(frozen=True)
class HeadOnText:
    """One head in both places.

    Attributes:
        layer: the head's layer.
        head: its number there.
        text: over text windows.
        answers: at MCQ answer positions; its shares are by `ANSWER_KINDS`.
        ratio: writes on text / writes at MCQ answers; nothing where the head writes nothing there.
        interval: percentile 95% bootstrap interval of the ratio, windows and items resampled apart.
        words: the same in one sentence.
    """

    layer: int
    head: int
    text: TextReading
    answers: HeadReading
    ratio: float | None
    interval: Interval | None
    words: str


def heads_on_text(
    work: Workset, path: Path, heads: Sequence[Head], *, items: Sequence[int] | None = None, seed: int = 0
) -> list[HeadOnText]:
    """Some heads on a text file beside the same heads at the answer positions of MCQ prompts.

    Args:
        work: the MCQ prompts, with their model.
        path: the text file.
        heads: (layer, head) pairs; the order is kept.
        items: which item each prompt asks, for the interval; without it every prompt counts as one of its own.
        seed: of the bootstrap.

    Raises:
        QklensError: a head that does not exist, or a file that cannot be used.
    """
    subject = work.subject
    _check(subject, heads)
    text = read_on_text(subject, text_windows(subject, path), heads)
    answers = read_at_answers(work, heads)
    found = []
    for head in text:
        ratio, interval = writes_ratio(text[head], answers[head], items=items, seed=seed)
        words = in_words(head, text[head], answers[head], ratio, interval)
        found.append(HeadOnText(*head, text[head], answers[head], ratio, interval, words))
    return found


def read_on_text(
    subject: Subject, windows: Sequence[TextWindow], heads: Sequence[Head], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> dict[Head, TextReading]:
    """What heads do over text windows; whole patterns are never kept, and only those of `heads` are looked at.

    Args:
        subject: the model.
        windows: from `text_windows`.
        heads: (layer, head) pairs.
        tokens_per_batch: most tokens of one pass, padding included; a longer window has a pass of its own.

    Raises:
        QklensError: a head that does not exist, or no window with a query to look at.
    """
    _check(subject, heads)
    if all(len(window.tokens) <= FIRST_QUERY for window in windows):
        raise QklensError(f"no text window has more than {FIRST_QUERY} tokens; a head has nothing to choose there")
    tallies = {head: Tally(len(windows), len(TEXT_KINDS), SHOWN_EXAMPLES) for head in heads}
    unknown = subject.tokenizer.unk_token_id
    for index in _batches(windows, tokens_per_batch):
        batch = left_padded([windows[i].tokens for i in index], subject.pad_id, subject.device)
        queries = batch.position_ids >= FIRST_QUERY
        kinds = text_kinds(batch, unknown)  # pyright: ignore[reportArgumentType]
        run_pass(subject, batch, reads=look(subject, batch, index, kinds, queries, tallies))
    n_tokens = sum(len(window.ranges) for window in windows)
    share = sum(window.unknown for window in windows) / n_tokens
    return {
        head: TextReading(
            **vars(tally.reading(TEXT_KINDS)),
            unknown=share,
            examples=tuple(_shown(windows[e.part], e) for e in tally.examples),
        )
        for head, tally in tallies.items()
    }


def read_at_answers(work: Workset, heads: Sequence[Head]) -> dict[Head, HeadReading]:
    """The same numbers at the answer position of MCQ prompts; a part is a prompt, and its one query the last token.

    Raises:
        QklensError: a head that does not exist, or a prompt without options.
    """
    _check(work.subject, heads)
    tallies = {head: Tally(len(work), len(ANSWER_KINDS), 0) for head in heads}

    def reads(index: Sequence[int], batch: Batch) -> Reads:
        kinds = answer_kinds(batch, [work.prompts[i] for i in index])
        queries = batch.attention_mask[:, -1:].bool()
        return look(work.subject, batch, index, kinds, queries, tallies)

    work.logits(reads=reads)
    return {head: tally.reading(ANSWER_KINDS) for head, tally in tallies.items()}


def writes_ratio(
    text: HeadReading, answers: HeadReading, *, items: Sequence[int] | None = None, seed: int = 0
) -> tuple[float | None, Interval | None]:
    """(Writes on text) / (writes at MCQ answers), with its bootstrap interval; nothing over zero.

    Windows are resampled on one side, items (with all their prompts) on the other.

    Raises:
        QklensError: not one item a prompt.
    """
    prompts = len(answers.queries_by_part)
    items = range(prompts) if items is None else items
    if len(items) != prompts:
        raise QklensError(f"{len(items)} items named for {prompts} prompts; expected one for each prompt")
    if answers.writes == 0:
        return None, None
    windows = range(len(text.queries_by_part))
    interval = bootstrap_ratio_of_means(_by_unit(text, windows), _by_unit(answers, items), seed)
    return text.writes / answers.writes, interval


def in_words(
    head: Head, text: TextReading, answers: HeadReading, ratio: float | None, interval: Interval | None
) -> str:
    """The numbers in one sentence; tokens are quoted as Python writes them, so that none can move a terminal's cursor.

    What a token's characters mean to a markup language is the printer's to escape.
    """
    parts = [
        f"L{head[0]}H{head[1]}: on ordinary text {text.active:.0%} of its attention goes to tokens other than the "
        f"first and its own ({answers.active:.0%} at MCQ answers)"
    ]
    if ratio is not None and interval is not None:
        parts.append(f", and it writes {ratio:.2f} [{interval[0]:.2f}, {interval[1]:.2f}] times as much")
    if text.examples:
        strongest = text.examples[0]
        parts.append(f"; strongest: {strongest.query_token!r} <- {strongest.key_token!r} ({strongest.kind})")
    return "".join(parts)


def _by_unit(reading: HeadReading, units: Sequence[int]) -> tuple[Array, Array]:
    """Σ writes and the number of queries of each unit that has any."""
    _, unit = np.unique(np.asarray(units), return_inverse=True)
    writes: Array = np.bincount(unit, reading.writes_by_part).astype(np.float64)
    queries: Array = np.bincount(unit, reading.queries_by_part).astype(np.float64)
    return writes[queries > 0], queries[queries > 0]


def _check(subject: Subject, heads: Sequence[Head]) -> None:
    if not heads:
        raise QklensError("no head to look at; name at least one, like L2H4")
    for layer, head in heads:
        subject.check_head(layer, head)


def _batches(windows: Sequence[TextWindow], most: int) -> list[list[int]]:
    """Indices of windows in batches of like length, the shortest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(windows)), key=lambda i: len(windows[i].tokens)):
        if not batches or len(windows[i].tokens) * (len(batches[-1]) + 1) > most:
            batches.append([])
        batches[-1].append(i)
    return batches


def _shown(window: TextWindow, example: Example) -> TextExample:
    def around(at: int) -> tuple[str, str]:
        return window.piece(at - CONTEXT_TOKENS, at), window.piece(at + 1, at + 1 + CONTEXT_TOKENS)

    query, key = example.query, example.key
    return TextExample(
        example.part,
        query,
        key,
        window.piece(query, query + 1),
        window.piece(key, key + 1),
        around(query),
        around(key),
        TEXT_KINDS[example.kind],
        example.attention,
        example.weight,
    )
