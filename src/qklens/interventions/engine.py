"""Run interventions over many prompts and do only the work an edit can change.

A `Workset` holds prompts in length-sorted, left-padded batches. The first clean pass keeps keys and values; a later
pass re-runs only the columns from the first edited token on. Sweeps at the answer position cost one token a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.data.render import Prompt
from qklens.errors import NothingChangedError, QklensError
from qklens.interventions.steer import Steer
from qklens.models.batch import Batch, left_padded
from qklens.models.edits import Edit, ScoreEdit, VectorEdit, on_rows
from qklens.models.passes import NO_READS, Prefix, Reads, run_pass
from qklens.models.subject import Subject

TOKENS_PER_BATCH = 4096
CACHE_BYTES = 1 << 30
ROWS_AT_ONCE = 256
TILED_BYTES = 1 << 29


@runtime_checkable
class Intervention(Protocol):
    """A frozen value that turns into edits for each batch."""

    def edits(self, subject: Subject, prompts: Sequence[Prompt], batch: Batch, index: Sequence[int]) -> list[Edit]:
        """The edits of one pass over some prompts; `index` gives their places in the workset."""
        ...

    def describe(self) -> dict[str, Any]:
        """The spec as echoed into results."""
        ...


@dataclass(eq=False)
class _Chunk:
    index: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    batch: Batch
    prefix: Prefix | None = None


class Workset:
    """Prompts ready to run, in order; the engine behind every sweep."""

    def __init__(self, subject: Subject, prompts: Sequence[Prompt], *, reuse: bool = True) -> None:
        """Batch the prompts.

        Args:
            subject: the model.
            prompts: rendered prompts.
            reuse: share what an edit cannot change; False always runs whole prompts (the plain path).

        Raises:
            QklensError: there are no prompts.
        """
        if not prompts:
            raise QklensError("there are no prompts to run; check --items and the data file")
        self.subject, self.prompts = subject, tuple(prompts)
        self._per_token = 2 * subject.n_layers * subject.n_kv_heads * subject.d_head * 4
        self.reuse = reuse and self._per_token * sum(len(p.tokens) for p in prompts) <= CACHE_BYTES
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
        self.chunks: list[_Chunk] = []
        while order:
            width, rows = len(prompts[order[0]].tokens), 0
            while rows < len(order):
                width = max(width, len(prompts[order[rows]].tokens))
                if rows and width * (rows + 1) > TOKENS_PER_BATCH:
                    break
                rows += 1
            index, order = tuple(order[:rows]), order[rows:]
            chosen = tuple(prompts[i] for i in index)
            batch = left_padded([p.tokens for p in chosen], subject.pad_id, subject.device)
            self.chunks.append(_Chunk(index, chosen, batch))
        self.columns_run = 0
        self._clean: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def logits(
        self,
        interventions: Sequence[Intervention] = (),
        reads: Callable[[Sequence[int], Batch], Reads] | None = None,
    ) -> Float[Tensor, "prompt vocab"]:
        """Logits at the answer position, in the order of the prompts.

        Args:
            interventions: applied together.
            reads: given a batch's prompt indices and the batch, the sinks for that pass; forces whole prompts to run.

        Raises:
            NothingChangedError: an intervention changed no value in any batch.
        """
        active = [i for i in interventions if not _is_identity(i)]
        if not active and reads is None and self._clean is not None:
            return self._clean
        rows: list[Tensor] = [torch.empty(0)] * len(self.prompts)
        changed = [False] * len(active)
        for chunk in self.chunks:
            edits = [i.edits(self.subject, chunk.prompts, chunk.batch, chunk.index) for i in active]
            flat = [edit for group in edits for edit in group]
            sinks = reads(chunk.index, chunk.batch) if reads else NO_READS
            whole = reads is not None or not self.reuse or not flat
            start = 0 if whole else _first_column(flat, chunk.batch)
            if start > 0:
                self._prefix(chunk)
            keep = self.reuse and not flat and chunk.prefix is None
            out = run_pass(self.subject, chunk.batch, flat, sinks, prefix=chunk.prefix, start=start, keep_prefix=keep)
            self.columns_run += (chunk.batch.width - start) * len(chunk.index)
            chunk.prefix = out.prefix if keep else chunk.prefix
            flags = iter(out.changed)
            for which, group in enumerate(edits):
                changed[which] |= sum(next(flags) for _ in group) > 0
            for row, i in enumerate(chunk.index):
                rows[i] = out.logits[row]
        self._refuse_idle(active, changed)
        stacked = torch.stack(rows)
        if not active:
            self._clean = stacked
        return stacked

    def margins(self, interventions: Sequence[Intervention] = ()) -> Float[Tensor, " prompt"]:
        """logit(correct letter) − logit(incorrect letter) at the answer position, on the CPU in float32."""
        return letter_margins(self.logits(interventions), self.prompts)

    def margins_each(
        self, interventions: Sequence[Intervention], *, idle_ok: bool = False
    ) -> Float[Tensor, "intervention prompt"]:
        """The margins under each intervention by itself, many of them to a pass: their rows stand below one another.

        The same as `margins([intervention])` for each; weights are read once for many, and prompts' beginnings not run.

        Args:
            interventions: one row of the result each.
            idle_ok: whether one may change nothing, as of a head without output; it then has the clean margins.

        Raises:
            NothingChangedError: an intervention changed no value in any batch.
        """
        result = torch.empty(len(interventions), len(self.prompts))
        changed = [_is_identity(i) for i in interventions]
        for chunk in self.chunks:
            n = len(chunk.index)
            at_once = max(1, min(ROWS_AT_ONCE // n, TILED_BYTES // (self._per_token * n * chunk.batch.width)))
            at_once = at_once if self.reuse else 1
            for begin in range(0, len(interventions), at_once):
                some = interventions[begin : begin + at_once]
                edits = [i.edits(self.subject, chunk.prompts, chunk.batch, chunk.index) for i in some]
                owners = [begin + k for k, group in enumerate(edits) for _ in group]
                flat = [on_rows(e, k * n, n, len(some) * n) for k, group in enumerate(edits) for e in group]
                start = _first_column([e for group in edits for e in group], chunk.batch) if self.reuse else 0
                out = run_pass(
                    self.subject,
                    chunk.batch.repeat(len(some)),
                    flat,
                    prefix=self._prefix(chunk).repeat(len(some)) if start else None,
                    start=start,
                )
                self.columns_run += (chunk.batch.width - start) * n * len(some)
                for owner, did in zip(owners, out.changed, strict=True):
                    changed[owner] |= did
                margins = letter_margins(out.logits, chunk.prompts * len(some)).view(len(some), n)
                result[begin : begin + len(some), list(chunk.index)] = margins
        if not idle_ok:
            self._refuse_idle(interventions, changed)
        idle = [i for i, did in enumerate(changed) if not did]
        result[idle] = self.margins() if idle else result[idle]
        return result

    def _prefix(self, chunk: _Chunk) -> Prefix:
        """A chunk's clean keys and values, run when first asked for."""
        if chunk.prefix is None:
            chunk.prefix = run_pass(self.subject, chunk.batch, keep_prefix=True).prefix
            self.columns_run += chunk.batch.width * len(chunk.index)
        if chunk.prefix is None:
            raise AssertionError("a pass that keeps its prefix returns it")
        return chunk.prefix

    def _refuse_idle(self, interventions: Sequence[Intervention], changed: Sequence[bool]) -> None:
        for intervention, did in zip(interventions, changed, strict=True):
            if not did:
                raise NothingChangedError(
                    f"intervention {intervention.describe()} changed no value in any of {len(self)} prompts"
                )


def letter_margins(logits: Float[Tensor, "prompt vocab"], prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
    """The margin of each prompt from its answer logits."""
    ids = torch.tensor([p.letter_ids for p in prompts], device=logits.device)
    pair = logits.float().gather(1, ids)
    return (pair[:, 0] - pair[:, 1]).cpu()


def _is_identity(intervention: Intervention) -> bool:
    """Whether it says itself that it changes nothing."""
    return isinstance(intervention, Steer) and intervention.is_identity


def _first_column(edits: Sequence[Edit], batch: Batch) -> int:
    """The first column that any edit touches; patches and score shifts act at the last one."""
    first = batch.width - 1
    for edit in edits:
        if isinstance(edit, VectorEdit | ScoreEdit) and edit.mask is not None:
            first = min(first, int(edit.mask.any(dim=0).nonzero()[0]))
    return first
