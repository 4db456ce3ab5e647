"""What kind of key a token is to a query, on text of no known structure; every visible key is of exactly one kind."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from qklens.data.render import Prompt
from qklens.models.batch import Batch

UNCHOSEN: tuple[str, ...] = ("first", "self")
"""Keys that every query has; both lists of kinds begin with them."""
TEXT_KINDS: tuple[str, ...] = (*UNCHOSEN, "previous", "induction", "duplicate", "other")
ANSWER_KINDS: tuple[str, ...] = (*UNCHOSEN, "options", "other")
FIRST_QUERY = 3
"""The first query position that sees a key which is neither the first token, nor itself, nor the token before it."""
_HIDDEN = -1


def text_kinds(batch: Batch, unknown: int | None = None) -> Int[Tensor, "batch q_pos k_pos"]:
    """The kind of each key j to each query p, as an index into `TEXT_KINDS`; −1 where j > p or j is padding.

    With t the tokens, the first of these that holds is the kind:

        first      j = 0, the row's first token (where attention rests when a head has nothing to do)
        self       j = p
        previous   j = p − 1
        induction  t[j − 1] = t[p]: right after an earlier occurrence of the query's token
        duplicate  t[j] = t[p]: an earlier occurrence itself
        other      any other earlier token

    Args:
        batch: the token windows.
        unknown: the id that stands for any unknown word; two of them are not taken for the same word.
    """
    ids, real = batch.input_ids, batch.attention_mask.bool()
    column = torch.arange(batch.width, device=ids.device)
    behind = column[:, None] - column[None, :]
    known = real if unknown is None else real & (ids != unknown)
    earlier = (ids[:, :, None] == ids[:, None, :]) & known[:, :, None] & known[:, None, :] & (behind > 0)
    after_earlier = torch.zeros_like(earlier)
    after_earlier[:, :, 1:] = earlier[:, :, :-1]
    kinds = torch.full(earlier.shape, TEXT_KINDS.index("other"), dtype=torch.int8, device=ids.device)
    # The weakest first: each later line overrules those above it.
    kinds[earlier] = TEXT_KINDS.index("duplicate")
    kinds[after_earlier] = TEXT_KINDS.index("induction")
    kinds[:, behind == 1] = TEXT_KINDS.index("previous")
    kinds[:, behind == 0] = TEXT_KINDS.index("self")
    kinds[_first_keys(batch)[:, None, :].expand_as(kinds)] = TEXT_KINDS.index("first")
    return kinds.masked_fill(~real[:, None, :] | (behind < 0), _HIDDEN)


def answer_kinds(batch: Batch, prompts: list[Prompt]) -> Int[Tensor, "batch 1 k_pos"]:
    """The kind of each key to the answer position, as an index into `ANSWER_KINDS`; −1 for padding.

    By precedence: `first` and `self` as on text; `options`, the tokens of both options (letter, content and line
    break); `other`.
    """
    kinds = torch.full(batch.input_ids.shape, ANSWER_KINDS.index("other"), dtype=torch.int8)
    for row, prompt in enumerate(prompts):
        padding = batch.width - len(prompt.tokens)
        at = [padding + p for name in ("option_A", "option_B") for p in prompt.span(name)]
        kinds[row, at] = ANSWER_KINDS.index("options")
    kinds = kinds.to(batch.input_ids.device)
    kinds[:, -1] = ANSWER_KINDS.index("self")
    kinds[_first_keys(batch)] = ANSWER_KINDS.index("first")
    return kinds.masked_fill(~batch.attention_mask.bool(), _HIDDEN)[:, None]


def _first_keys(batch: Batch) -> Bool[Tensor, "batch pos"]:
    return batch.attention_mask.bool() & (batch.position_ids == 0)
