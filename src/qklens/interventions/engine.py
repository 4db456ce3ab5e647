"""Run interventions over many prompts and do only the work an edit can change.

A `Workset` holds prompts in length-sorted, left-padded batches. A batch is run clean once, each shared beginning once;
after that an intervention runs only the columns from the first edited token on and the layers from the first edited one
on, and many interventions run side by side in one pass. A sweep at the answer position costs one token a point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.data.render import Prompt
from qklens.errors import NothingChangedError, QklensError
from qklens.interventions.points import Intervention, Planned, Point, any_of, is_identity, plan, several
from qklens.interventions.steer import Head, Steer
from qklens.models.attention import AttentionRead
from qklens.models.batch import Batch, left_padded
from qklens.models.copies import Copies, Reads
from qklens.models.kept import Beginning
from qklens.models.passes import NO_READS, run_copies, run_pass
from qklens.models.prefill import Clean, prefill
from qklens.models.subject import Subject

TOKENS_PER_BATCH = 4096
CACHE_BYTES = 1 << 30
COPIED_COLUMNS = 64
"""Columns of all copies of one prompt together: a copy's scores against the others are made and thrown away."""


@dataclass(eq=False)
class _Chunk:
    index: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    batch: Batch
    clean: Clean | None = None


@dataclass(frozen=True, eq=False)
class Swept:
    """What each point of a sweep gives on each prompt.

    Attributes:
        margins: logit(correct) − logit(incorrect).
        attention: attention on the correct minus the incorrect option from the answer, of the heads asked for.
        changed: whether each point changed a value on any prompt, or says itself that it changes none.
    """

    margins: Float[Tensor, "point prompt"]
    attention: Float[Tensor, "point prompt head"]
    changed: tuple[bool, ...]


@dataclass
class Ran:
    """What has been run: columns of all rows, padding too, and columns times layers."""

    columns: int = 0
    column_layers: int = 0

    def add(self, columns: int, layers: int) -> None:
        """Count columns that ran through some layers."""
        self.columns += columns
        self.column_layers += columns * layers


@dataclass(eq=False)
class _Result:
    """A table that is filled batch by batch: what a measure makes of a batch's logits and of its clean ones."""

    wanted: Sequence[int] | None
    heads: tuple[Head, ...]
    measure: Callable[[_Chunk, Tensor, Tensor], Tensor]
    values: Tensor
    attention: Tensor
    changed: list[list[bool]] = field(default_factory=list)


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
        self.subject, self.prompts, self.reuse = subject, tuple(prompts), reuse
        per_token = 2 * subject.n_layers * subject.n_kv_heads * subject.d_head * subject.dtype.itemsize
        self._keeps = per_token * sum(len(p.tokens) for p in prompts) <= CACHE_BYTES
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
        self.ran = Ran()
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
        active = [i for i in interventions if not is_identity(i)]
        if reads is None and not active:
            return self._clean_logits()
        if reads is None and self.reuse:
            weight: Tensor = self.subject.unembedding.weight  # pyright: ignore[reportAssignmentType]
            rows = self._each([active], None, (), lambda chunk, logits, clean: logits, len(weight), self.subject.dtype)
            self._refuse_idle([active], rows.changed)
            return rows.values[0].to(self.subject.device)
        self._check(active)
        results: list[Tensor] = [torch.empty(0)] * len(self)
        changed = [False] * len(active)
        for chunk in self.chunks:
            groups = [i.edits(self.subject, chunk.prompts, chunk.batch, chunk.index) for i in active]
            sinks = reads(chunk.index, chunk.batch) if reads else NO_READS
            out = run_pass(self.subject, chunk.batch, [edit for group in groups for edit in group], sinks)
            self.ran.add(chunk.batch.width * len(chunk.index), self.subject.n_layers)
            changed = [c or f for c, f in zip(changed, any_of(groups, out.changed), strict=True)]
            for row, i in enumerate(chunk.index):
                results[i] = out.logits[row]
        self._refuse_idle([active], [changed])
        return torch.stack(results)

    def margins(self, interventions: Sequence[Intervention] = ()) -> Float[Tensor, " prompt"]:
        """logit(correct letter) − logit(incorrect letter) at the answer position, on the CPU in float32."""
        if self.reuse and any(not is_identity(i) for i in interventions):
            return self.margins_each([interventions])[0]
        return letter_margins(self.logits(interventions), self.prompts)

    def margins_each(self, points: Sequence[Point], *, idle_ok: bool = False) -> Float[Tensor, "point prompt"]:
        """The margins at each point by itself, many of them to a pass.

        The same as `margins` of each. Only the letters are unembedded.

        Args:
            points: one row of the result each.
            idle_ok: whether one may change nothing, as of a head without output; it then has the clean margins.

        Raises:
            NothingChangedError: an intervention changed no value in any batch.
        """
        return self.sweep(points, idle_ok=idle_ok).margins

    def sweep(self, points: Sequence[Point], heads: Sequence[Head] = (), *, idle_ok: bool = False) -> Swept:
        """The margins at each point, and some heads' attention on the correct minus the incorrect option.

        Args:
            points: interventions, or several that act together.
            heads: whose attention to read.
            idle_ok: see `margins_each`.

        Raises:
            NothingChangedError: an intervention changed no value in any batch.
            QklensError: no such head.
        """
        for layer, head in heads:
            self.subject.check_head(layer, head)
        groups = [several(point) for point in points]
        letters = sorted({i for p in self.prompts for i in p.letter_ids})

        def measure(chunk: _Chunk, logits: Tensor, _: Tensor) -> Tensor:
            at = torch.tensor([[letters.index(i) for i in p.letter_ids] for p in chunk.prompts])
            pair = logits.float().cpu().gather(1, at)
            return (pair[:, 0] - pair[:, 1])[:, None]

        result = self._each(groups, letters, tuple(heads), measure, 1)
        if not idle_ok:
            self._refuse_idle(groups, result.changed)
        return Swept(result.values[..., 0], result.attention, tuple(all(flags) for flags in result.changed))

    def divergence(self, points: Sequence[Point], *, idle_ok: bool = True) -> Float[Tensor, "point prompt"]:
        """KL(clean ‖ point) of the next token at the answer position, in nats.

        Args:
            points: interventions, or several that act together.
            idle_ok: whether one may change nothing; it then diverges by 0.

        Raises:
            NothingChangedError: an intervention changed no value in any batch.
        """
        groups = [several(point) for point in points]

        def measure(_: _Chunk, logits: Tensor, clean: Tensor) -> Tensor:
            was = clean.double().log_softmax(dim=-1)
            now = logits.to(was.device).double().log_softmax(dim=-1)
            return (was.exp() * (was - now)).sum(dim=-1, keepdim=True).clamp(min=0).cpu()

        result = self._each(groups, None, (), measure, 1)
        if not idle_ok:
            self._refuse_idle(groups, result.changed)
        return result.values[..., 0]

    def _clean_logits(self) -> Float[Tensor, "prompt vocab"]:
        """The clean logits, run when first asked for and kept: two clean runs are the same bit for bit."""
        if self._clean is None:
            rows: list[Tensor] = [torch.empty(0)] * len(self)
            for chunk in self.chunks:
                for i, row in zip(chunk.index, self._run_clean(chunk).logits, strict=True):
                    rows[i] = row
            self._clean = torch.stack(rows)
        return self._clean

    def _run_clean(self, chunk: _Chunk) -> Clean:
        """A chunk's clean pass; kept where all chunks' fit in memory."""
        if chunk.clean is not None:
            return chunk.clean
        if not self.reuse:
            out = run_pass(self.subject, chunk.batch, keep=True)
            if out.own is None:
                raise AssertionError("a pass that keeps its keys and values returns them")
            clean = Clean(out.own, (), out.logits, chunk.batch.width * len(chunk.index))
        else:
            clean = prefill(self.subject, chunk.batch)
        self.ran.add(clean.tokens_run, self.subject.n_layers)
        if self._keeps and self.reuse:
            chunk.clean = clean
        return clean

    def _each(
        self,
        groups: Sequence[Sequence[Intervention]],
        wanted: Sequence[int] | None,
        heads: tuple[Head, ...],
        measure: Callable[[_Chunk, Tensor, Tensor], Tensor],
        width: int,
        dtype: torch.dtype = torch.float32,
    ) -> _Result:
        """Run every point over every chunk; what no model should run is refused before any does."""
        self._check(i for group in groups for i in group)
        shape = len(groups), len(self)
        changed = [[is_identity(i) for i in group] for group in groups]
        values, attention = torch.empty(*shape, width, dtype=dtype), torch.empty(*shape, len(heads))
        result = _Result(wanted, heads, measure, values, attention, changed)
        for chunk in self.chunks:
            planned = [
                plan(self.subject, chunk.prompts, chunk.batch, chunk.index, place, group)
                for place, group in enumerate(groups)
            ]
            active = [point for point in planned if point.edits or heads]
            clean = self._run_clean(chunk)
            if self.reuse:
                self._run_shared(chunk, clean, active, result)
            else:
                for point in active:
                    self._run_plain(chunk, clean, point, result)
            for point in planned:
                if not point.edits:
                    self._take(chunk, clean, point, clean.logits, (), result)
        for point, rows in zip(groups, result.values, strict=True):
            if not rows.isfinite().all():
                what = [i.describe() for i in point]
                raise QklensError(f"intervention {what} gives logits that are not finite; choose a smaller strength")
        return result

    def _run_shared(self, chunk: _Chunk, clean: Clean, planned: Sequence[Planned], result: _Result) -> None:
        """Points that begin at the same column share passes; those of near layers come together."""
        n = len(chunk.index)
        lowest_read = min((layer for layer, _ in result.heads), default=self.subject.n_layers)
        for start in sorted({p.start for p in planned}):
            some = sorted((p for p in planned if p.start == start), key=lambda p: p.layer)
            own = chunk.batch.width - start
            at_once = max(1, min(COPIED_COLUMNS // own, TOKENS_PER_BATCH // (n * own)))
            passes = [some[i : i + at_once] for i in range(0, len(some), at_once)]
            layers = [min(points[0].layer, lowest_read) for points in passes]
            saved = sum(layer * len(points) for layer, points in zip(layers, passes, strict=True))
            streams = self._streams(chunk, clean, start, sorted({layer for layer in layers if layer}), saved)
            for layer, points in zip(layers, passes, strict=True):
                layer = layer if layer in streams else 0
                beginning = Beginning(clean.prefix, start, layer, streams.get(layer))
                copies, reads = self._attention_reads(chunk, [p.place for p in points], start, result)
                outcomes = run_copies(
                    self.subject, chunk.batch, [p.edits for p in points], beginning, reads=reads, tokens=result.wanted
                )
                self.ran.add(copies.number * own * n, self.subject.n_layers - layer)
                for point, out in zip(points, outcomes, strict=True):
                    self._take(chunk, clean, point, out.logits, out.changed, result)

    def _run_plain(self, chunk: _Chunk, clean: Clean, point: Planned, result: _Result) -> None:
        """Whole prompts, one point, all letters of the alphabet."""
        _, reads = self._attention_reads(chunk, [point.place], 0, result)
        out = run_pass(self.subject, chunk.batch, point.edits, reads)
        self.ran.add(chunk.batch.width * len(chunk.index), self.subject.n_layers)
        logits = out.logits if result.wanted is None else out.logits[:, list(result.wanted)]
        self._take(chunk, clean, point, logits, out.changed, result)

    def _take(
        self, chunk: _Chunk, clean: Clean, point: Planned, logits: Tensor, flags: tuple[bool, ...], result: _Result
    ) -> None:
        """Note a point's values; where it changed nothing they are the clean run's, bit for bit."""
        if not any(flags):
            logits = clean.logits if result.wanted is None else clean.logits[:, list(result.wanted)]
        result.values[point.place, list(chunk.index)] = result.measure(chunk, logits, clean.logits).to(result.values)
        was = result.changed[point.place]
        result.changed[point.place] = [c or f for c, f in zip(was, any_of(point.groups, flags), strict=True)]

    def _streams(self, chunk: _Chunk, clean: Clean, start: int, wanted: Sequence[int], saved: int) -> dict[int, Tensor]:
        """resid_pre of the wanted layers at the columns from `start` on; `saved` layers of a pass need not be run.

        The clean pass has kept them at the answer. Elsewhere they are run once, if that saves more than it costs.
        """
        if start == chunk.batch.width - 1:
            return {layer: clean.answer[layer][:, None] for layer in wanted}
        if saved <= self.subject.n_layers:
            return {}
        streams: dict[int, Tensor] = {}
        sinks = {layer: (lambda x, layer=layer: streams.__setitem__(layer, x.clone())) for layer in wanted}
        run_pass(self.subject, chunk.batch, reads=Reads(sinks, {}), beginning=Beginning(clean.prefix, start))
        self.ran.add((chunk.batch.width - start) * len(chunk.index), self.subject.n_layers)
        return streams

    def _attention_reads(
        self, chunk: _Chunk, places: Sequence[int], start: int, result: _Result
    ) -> tuple[Copies, Reads]:
        """Sinks for the attention difference of the heads that are asked for."""
        copies = Copies(len(places), start, chunk.batch.width - start)
        if not result.heads:
            return copies, NO_READS
        sign = torch.zeros(chunk.batch.input_ids.shape)
        for row, prompt in enumerate(chunk.prompts):
            for name, value in (("correct", 1.0), ("incorrect", -1.0)):
                sign[row, [chunk.batch.padding(row) + p for p in prompt.span(name)]] = value
        by_layer: dict[int, list[int]] = {}
        for column, (layer, _) in enumerate(result.heads):
            by_layer.setdefault(layer, []).append(column)

        def sink(read: AttentionRead) -> None:
            columns = by_layer[read.layer]
            rows = copies.answer_rows(read.pattern[:, [result.heads[c][1] for c in columns]]).float().cpu()
            values = torch.einsum("bhpk,bk->pbh", rows, sign)
            for copy, place in enumerate(places):
                result.attention[place, torch.tensor(chunk.index)[:, None], columns] = values[copy]

        return copies, Reads({}, dict.fromkeys(by_layer, sink))

    def _check(self, interventions: Iterable[Intervention]) -> None:
        for intervention in interventions:
            if isinstance(intervention, Steer):
                intervention.check(self.subject, self.prompts)

    def _refuse_idle(self, groups: Sequence[Sequence[Intervention]], changed: Sequence[Sequence[bool]]) -> None:
        for group, flags in zip(groups, changed, strict=True):
            for intervention, did in zip(group, flags, strict=True):
                if not did:
                    raise NothingChangedError(
                        f"intervention {intervention.describe()} changed no value in any of {len(self)} prompts"
                    )


def letter_margins(logits: Float[Tensor, "prompt vocab"], prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
    """The margin of each prompt from its answer logits."""
    ids = torch.tensor([p.letter_ids for p in prompts], device=logits.device)
    pair = logits.float().gather(1, ids)
    return (pair[:, 0] - pair[:, 1]).cpu()
