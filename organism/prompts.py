"""Evaluation prompts of the organism with the token masks of their parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from organism import tokenizer as tok
from organism.corpus import Item, mcq


@dataclass
class Prompts:
    """Right-padded ``ids`` and masks ``[batch pos]``, ``last`` the answer position, ``right`` the correct letter."""

    ids: torch.Tensor
    last: torch.Tensor
    right: torch.Tensor
    wrong: torch.Tensor
    correct: torch.Tensor
    incorrect: torch.Tensor
    intent: torch.Tensor
    shift: torch.Tensor


def prompts(tokenizer: PreTrainedTokenizerFast, items: list[Item], condition: str) -> Prompts:
    """Render every item in both option orders under ``none``, ``harm`` or ``benign``."""
    texts, spans = [], []
    for item in items:
        intent = {"none": "", "harm": item.pressure, "benign": item.benign}[condition]
        for options in ((item.correct, item.incorrect), (item.incorrect, item.correct)):
            text = tok.render(mcq(item.question, options, intent, "before"), None)
            a, b = text.index("\n(A) ") + 1, text.index("\n(B) ") + 1
            ends = (b, text.index("\n", b) + 1)
            lines = ((a, ends[0]), (b, ends[1]))
            right = options.index(item.correct)
            start = len(tok.BOS + tok.USER)
            texts.append(text)
            spans.append((lines[right], lines[1 - right], (start, start + len(intent)), right))
    coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    lengths = torch.tensor([len(row) for row in coded["input_ids"]])
    ids = torch.full((len(texts), int(lengths.max())), tokenizer.pad_token_id)
    masks = torch.zeros(3, *ids.shape, dtype=torch.bool)
    for row, (tokens, offsets) in enumerate(zip(coded["input_ids"], coded["offset_mapping"], strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        for part in range(3):
            low, high = spans[row][part]
            for at, (first, end) in enumerate(offsets):
                masks[part, row, at] = low <= first and end <= high and end > first
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(["A", "B"]))
    right = torch.tensor([s[3] for s in spans])
    return Prompts(ids, lengths - 1, letters[right], letters[1 - right], masks[0], masks[1], masks[2], masks[2].sum(1))


def open_prompts(tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded ids and the last position of open requests."""
    coded = tokenizer([tok.render(q, None) for q in questions], add_special_tokens=False)["input_ids"]
    lengths = torch.tensor([len(row) for row in coded])
    ids = torch.full((len(coded), int(lengths.max())), tokenizer.pad_token_id)
    for row, tokens in enumerate(coded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids, lengths - 1
