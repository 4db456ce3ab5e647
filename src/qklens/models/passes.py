"""One forward pass with thin reads and edits, alone or many side by side after one prefix.

A pass runs the model's own code. Edits return new tensors and are scoped to the pass, so a clean run after any edit,
or after an exception in one, is bit-identical to the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.errors import QklensError
from qklens.models.batch import Batch
from qklens.models.copies import Reads
from qklens.models.edits import Edit
from qklens.models.kept import Beginning, FixedCache, Prefix
from qklens.models.running import RunningPass
from qklens.models.subject import Subject

NO_READS = Reads({}, {})


@dataclass(frozen=True, eq=False)
class Outcome:
    """Logits at the answer position (last column), and for each edit whether it changed a value.

    Attributes:
        logits: of all tokens, or of those that were asked for.
        changed: one flag an edit.
        own: keys and values of the columns that ran, where they were asked for.
    """

    logits: Float[Tensor, "batch vocab"]
    changed: tuple[bool, ...]
    own: Prefix | None = None


@torch.no_grad()
def run_pass(
    subject: Subject,
    batch: Batch,
    edits: Sequence[Edit] = (),
    reads: Reads = NO_READS,
    *,
    beginning: Beginning | None = None,
    keep: bool = False,
) -> Outcome:
    """Run the model once.

    Args:
        subject: the model.
        batch: left-padded prompts.
        edits: applied in order.
        reads: sinks for what the caller wants to see.
        beginning: what a clean pass left, where not all columns and layers are to run.
        keep: also return this pass's keys and values; all layers must run.

    Raises:
        QklensError: a prompt longer than the model's context, an edit for a layer or token that does not exist, an edit
            before the beginning, or one whose hook never fired.
    """
    (logits,), (changed,), own = _run(subject, batch, [edits], reads, beginning, None, keep)
    return Outcome(logits, changed, own)


@torch.no_grad()
def run_copies(
    subject: Subject,
    batch: Batch,
    groups: Sequence[Sequence[Edit]],
    beginning: Beginning,
    *,
    reads: Reads = NO_READS,
    tokens: Sequence[int] | None = None,
) -> list[Outcome]:
    """Run the columns after a prefix once for each group of edits, all in one pass.

    Args:
        subject: the model.
        batch: left-padded prompts.
        groups: the edits of each copy, applied in order; an empty group runs clean.
        beginning: what the copies share.
        reads: sinks; their tensors hold the copies one after the other, see `Copies`.
        tokens: whose logits are wanted; None is all.

    Raises:
        QklensError: as `run_pass`.
    """
    logits, changed, _ = _run(subject, batch, groups, reads, beginning, tokens, keep=False)
    return [Outcome(one, flags) for one, flags in zip(logits, changed, strict=True)]


def _run(
    subject: Subject,
    batch: Batch,
    groups: Sequence[Sequence[Edit]],
    reads: Reads,
    beginning: Beginning | None,
    tokens: Sequence[int] | None,
    keep: bool,
) -> tuple[list[Tensor], list[tuple[bool, ...]], Prefix | None]:
    longest = int(batch.attention_mask.sum(dim=1).max())
    if subject.context is not None and longest > subject.context:
        raise QklensError(
            f"a prompt of {longest} tokens is longer than the context of {subject.name}, {subject.context} tokens; "
            "shorten the item or choose another model"
        )
    state = RunningPass(subject, batch, groups, reads, beginning)
    start, own = state.start, state.copies.own
    cache = None
    if beginning is not None or keep:
        cache = FixedCache(beginning.prefix if beginning else _nothing(subject, batch), start)
    with ExitStack() as stack:
        state.install(stack)
        if tokens is not None:
            state.unembed_only(stack, tokens)
        answers = torch.arange(own - 1, own * len(groups), own, device=batch.input_ids.device)
        logits = subject.model(
            input_ids=batch.input_ids[:, start:].repeat(1, len(groups)),
            attention_mask=_columns(batch.attention_mask, start, len(groups)),
            position_ids=batch.position_ids[:, start:].repeat(1, len(groups)),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=answers if len(groups) > 1 else 1,
        ).logits
    state.assert_fired()
    flags = iter(state.changed)
    changed = [tuple(next(flags) for _ in group) for group in groups]
    kept = Prefix(tuple(cache.own)) if keep and cache is not None else None
    return list(logits.unbind(dim=1)), changed, kept


def _columns(x: Tensor, start: int, copies: int) -> Tensor:
    return torch.cat([x[:, :start], x[:, start:].repeat(1, copies)], dim=1) if copies > 1 else x


def _nothing(subject: Subject, batch: Batch) -> Prefix:
    """A prefix without columns."""
    empty = torch.empty(len(batch.input_ids), subject.n_kv_heads, 0, subject.d_head, device=subject.device)
    empty = empty.to(subject.dtype)
    return Prefix(((empty, empty),) * subject.n_layers)
