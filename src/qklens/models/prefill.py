"""A clean pass over prompts that runs each shared beginning once.

Prompts share a chat template, and an item's two orders share the question. Their beginnings form a tree; its nodes are
run depth by depth, each depth in one pass over what the one before left. The result is as of one pass over all prompts:
positions, masks and windows count tokens, not columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.models.batch import Batch
from qklens.models.copies import Reads
from qklens.models.kept import Beginning, Prefix, left_packed
from qklens.models.passes import run_pass
from qklens.models.subject import Subject

MIN_SHARED = 8
"""Tokens that at least two prompts must share for a pass of their own: a pass reads all weights."""


@dataclass(frozen=True, eq=False)
class Clean:
    """What a clean pass over a batch leaves.

    Attributes:
        prefix: keys and values of every column.
        answer: by layer, resid_pre at the last column.
        logits: at the last column.
        tokens_run: columns that were run, padding too.
    """

    prefix: Prefix
    answer: tuple[Float[Tensor, "batch d_model"], ...]
    logits: Float[Tensor, "batch vocab"]
    tokens_run: int


@dataclass(eq=False)
class Node:
    """A run of tokens that some prompts share.

    Attributes:
        rows: the prompts.
        begin: where the run begins in them.
        end: where it ends.
        parent: place of the node before it among the nodes one level up, or −1.
        children: the nodes after it.
    """

    rows: tuple[int, ...]
    begin: int
    end: int
    parent: int = -1
    children: list[Node] = field(default_factory=list)


def shared_levels(sequences: Sequence[Sequence[int]], least: int = MIN_SHARED) -> list[list[Node]]:
    """The tree of shared beginnings, by depth. Every prompt ends in a node of its own, which has its last token."""
    levels, nodes = [], _grow(sequences, tuple(range(len(sequences))), 0, least)
    while nodes:
        levels.append(nodes)
        following = []
        for place, node in enumerate(nodes):
            for child in node.children:
                child.parent = place
                following.append(child)
        nodes = following
    return levels


def _grow(sequences: Sequence[Sequence[int]], rows: tuple[int, ...], begin: int, least: int) -> list[Node]:
    """The nodes that begin at a place, for prompts that agree up to it."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        alone = len(sequences[row]) <= begin + least  # its last token would be shared
        key = (-1, row) if alone else tuple(sequences[row][begin : begin + least])
        groups.setdefault(key, []).append(row)
    nodes = []
    for group in groups.values():
        node = Node(tuple(group), begin, len(sequences[group[0]]))
        if len(group) > 1:
            node.end = begin + _shared(sequences, group, begin)
            node.children = _grow(sequences, node.rows, node.end, least)
        nodes.append(node)
    return nodes


def _shared(sequences: Sequence[Sequence[int]], rows: Sequence[int], begin: int) -> int:
    """How many tokens from `begin` on all rows share, leaving each its last."""
    first = sequences[rows[0]][begin:]
    longest = min(len(sequences[row]) for row in rows) - 1 - begin
    return next((i for i in range(longest) if any(sequences[r][begin + i] != first[i] for r in rows)), longest)


def prefill(subject: Subject, batch: Batch, least: int = MIN_SHARED) -> Clean:
    """Run a batch's prompts clean, each shared beginning once.

    Args:
        subject: the model.
        batch: left-padded prompts.
        least: tokens that must be shared for a pass of their own.
    """
    n, width, device = len(batch.input_ids), batch.width, batch.input_ids.device
    paddings = [batch.padding(row) for row in range(n)]
    sequences = [batch.input_ids[row, paddings[row] :].tolist() for row in range(n)]
    answer: list[Tensor | None] = [None] * subject.n_layers
    pairs: list[tuple[Tensor, Tensor]] = []
    logits: Tensor | None = None
    before, lengths, tokens_run = None, [0], 0
    for level in shared_levels(sequences, least):
        parents = torch.tensor([max(node.parent, 0) for node in level], device=device)
        part, beginning, real = _level_batch(sequences, level, before, lengths, parents, subject.pad_id)
        last, reads = _last_columns(subject.n_layers)
        out = run_pass(subject, part, reads=reads, beginning=beginning, keep=True)
        if out.own is None:
            raise AssertionError("a pass that keeps its keys and values returns them")
        tokens_run += len(level) * (part.width - (beginning.start if beginning else 0))
        whole = beginning.prefix.followed_by(out.own) if beginning else out.own
        before = whole.columns(left_packed(real, device))
        lengths = [node.end for node in level]
        ends = [i for i, node in enumerate(level) if not node.children]
        if not ends:
            continue
        if logits is None:
            logits = out.logits.new_empty(n, out.logits.shape[1])
            pairs = [
                (k.new_zeros(n, k.shape[1], width, k.shape[3]), v.new_zeros(n, v.shape[1], width, v.shape[3]))
                for k, v in before.pairs
            ]
            answer = [last[layer].new_empty(n, subject.d_model) for layer in range(subject.n_layers)]
        rows = torch.tensor([level[i].rows[0] for i in ends], device=device)
        which = torch.tensor(ends, device=device)
        logits[rows.to(logits.device)] = out.logits[which.to(logits.device)]
        for layer, ((keys, values), (k, v)) in enumerate(zip(pairs, before.pairs, strict=True)):
            there, here = rows.to(k.device), which.to(k.device)
            keys[there, :, width - k.shape[2] :] = k[here]
            values[there, :, width - v.shape[2] :] = v[here]
            kept = answer[layer]
            if kept is not None:
                kept[rows.to(kept.device)] = last[layer][which.to(kept.device)]
    if logits is None:
        raise AssertionError("every prompt ends in a node of its own")
    return Clean(Prefix(tuple(pairs)), tuple(x for x in answer if x is not None), logits, tokens_run)


def _last_columns(n_layers: int) -> tuple[dict[int, Tensor], Reads]:
    """A place for every layer's stream at the last column, and the sinks that fill it."""
    last: dict[int, Tensor] = {}
    return last, Reads({m: (lambda x, m=m: last.__setitem__(m, x[:, -1])) for m in range(n_layers)}, {})


def _level_batch(
    sequences: Sequence[Sequence[int]],
    level: Sequence[Node],
    before: Prefix | None,
    lengths: Sequence[int],
    parents: Tensor,
    pad_id: int,
) -> tuple[Batch, Beginning | None, list[list[int]]]:
    """A level's nodes as a batch, padded on the left of the prefix and between it and their own tokens.

    Also what the level before left, and each row's real columns.
    """
    held = before.pairs[0][0].shape[2] if before is not None else 0
    own = max(node.end - node.begin for node in level)
    ids = torch.full((len(level), held + own), pad_id)
    mask, position = torch.zeros_like(ids), torch.zeros_like(ids)
    real = []
    for row, node in enumerate(level):
        earlier = lengths[node.parent] if before is not None else 0
        columns = [*range(held - earlier, held), *range(held + own - (node.end - node.begin), held + own)]
        ids[row, columns] = torch.tensor(sequences[node.rows[0]][: node.end])
        mask[row, columns] = 1
        position[row, columns] = torch.arange(node.end)
        real.append(columns)
    batch = Batch(*(x.to(parents.device) for x in (ids, mask, position)))
    return batch, None if before is None else Beginning(before.rows(parents), held), real
