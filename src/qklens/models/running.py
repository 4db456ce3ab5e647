"""A pass while it runs: what its hooks do at every layer. Made and started by `passes.py`.

A pass runs one or several copies of the columns from its first one on, side by side along the axis of positions. Each
copy has edits of its own and sees the prefix and itself, so many interventions share one prefix that is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qklens.errors import QklensError
from qklens.models.attention import ACTIVE_TAP, AttentionRead, attention_name
from qklens.models.batch import Batch
from qklens.models.copies import Copies, Reads
from qklens.models.edits import Edit, OutputEdit, PatternEdit, ScoreEdit, ScoreView, VectorEdit
from qklens.models.kept import Beginning, visible
from qklens.models.projections import ProjectionSide
from qklens.models.subject import Subject


class RunningPass:
    """The state of one running pass; implements `AttentionTap`."""

    def __init__(
        self,
        subject: Subject,
        batch: Batch,
        groups: Sequence[Sequence[Edit]],
        reads: Reads,
        beginning: Beginning | None,
    ) -> None:
        self.subject, self.batch, self.reads, self.beginning = subject, batch, reads, beginning
        self.start, self.from_layer = (beginning.start, beginning.layer) if beginning else (0, 0)
        self.copies = Copies(len(groups), self.start, batch.width - self.start)
        self.edits = [(copy, edit) for copy, group in enumerate(groups) for edit in group]
        self.fired = [False] * len(self.edits)
        self.changed = [False] * len(self.edits)
        self.residual: dict[int, Tensor] = {}
        self.attended: set[int] = set()
        self.looked_at = self._layers_looked_at()
        for group in groups:
            for index, edit in enumerate(group):
                self._check(edit, group[:index])

    def _check(self, edit: Edit, earlier: Sequence[Edit]) -> None:
        if not 0 <= edit.layer < self.subject.n_layers:
            raise QklensError(f"layer {edit.layer} does not exist; expected 0 to {self.subject.n_layers - 1}")
        if min((edit.layer, *(edit.sees if isinstance(edit, VectorEdit | ScoreEdit) else ()))) < self.from_layer:
            raise QklensError(f"an edit of layer {edit.layer} acts before layer {self.from_layer}, which does not run")
        if isinstance(edit, VectorEdit):
            self._check_side(edit, earlier)
        for other in earlier:
            own = isinstance(edit, ScoreEdit) or isinstance(other, ScoreEdit)
            if own and other.layer == edit.layer and self._key_heads(edit) & self._key_heads(other):
                _refuse_same(edit, other, "key")
        if isinstance(edit, VectorEdit | ScoreEdit) and edit.mask is not None:
            if not edit.mask.any():
                raise QklensError(f"an edit of layer {edit.layer} matches no token")
            if edit.mask[:, : self.start].any():
                raise QklensError(
                    f"an edit of layer {edit.layer} touches columns before {self.start}, which do not run"
                )

    def _check_side(self, edit: VectorEdit, earlier: Sequence[Edit]) -> None:
        """One side's edits must name heads that exist, and no two of them the same head at the same token."""
        if edit.side == "residual":
            return
        n = self.subject.counts.of(edit.side)
        heads = set(range(n)) if edit.heads is None else set(edit.heads)
        if not heads or not heads <= set(range(n)):
            raise QklensError(
                f"an edit of layer {edit.layer} on the {edit.side} side names heads {sorted(heads)}; expected some of "
                f"0 to {n - 1}"
            )
        pooled = self.subject.family.qk_norm is not None and self.subject.family.qk_norm.over == "all"
        for other in earlier:
            if not isinstance(other, VectorEdit) or (other.layer, other.side) != (edit.layer, edit.side):
                continue
            shared = heads & (set(range(n)) if other.heads is None else set(other.heads))
            if shared or (pooled and edit.frozen_norm):
                _refuse_same(edit, other, edit.side)

    def _key_heads(self, edit: Edit) -> set[int]:
        """The query heads that meet an edited key."""
        if isinstance(edit, ScoreEdit):
            return set(edit.keys_of)
        if not isinstance(edit, VectorEdit) or edit.side != "key":
            return set()
        group = self.subject.n_heads // self.subject.n_kv_heads
        return {h for h in range(self.subject.n_heads) if edit.heads is None or h // group in edit.heads}

    def _layers_looked_at(self) -> set[int]:
        """Layers whose stream an edit looks at; it is held until the last such edit is done."""
        layers: set[int] = set()
        for _, edit in self.edits:
            if isinstance(edit, VectorEdit) or (isinstance(edit, ScoreEdit) and edit.mask is not None):
                layers |= {edit.layer, *edit.sees}
        return layers

    def install(self, stack: ExitStack) -> None:
        """Hook what this pass needs; everything is undone when the stack closes."""
        family, layers = self.subject.family, self.subject.layers

        def before(module: nn.Module, hook: Callable[..., Any]) -> None:
            stack.callback(module.register_forward_pre_hook(self._own(hook), with_kwargs=True).remove)

        def after(module: nn.Module, hook: Callable[..., Any]) -> None:
            stack.callback(module.register_forward_hook(self._own(hook)).remove)

        begins = {self.from_layer} if self.from_layer else set()
        for index in range(self.from_layer):
            _override(stack, layers[index], lambda hidden_states, *_args, **_kwargs: hidden_states)
        for index in sorted(self.looked_at | begins | {m for m in self.reads.residual if m < len(layers)}):
            before(layers[index], self._residual_hook(index))
        if len(layers) in self.reads.residual:
            before(family.final_norm(self.subject.model), _input_reader(self.reads.residual[len(layers)]))
        for index in self.looked_at:
            after(layers[index], self._let_go(index))
        for layer, sink in self.reads.after.items():
            after(layers[layer], _stream_reader(sink))
        for (layer, side), sink in self.reads.projected.items():
            before(self.subject.projection(layer, side).module, _input_reader(sink))
        projected: dict[tuple[int, ProjectionSide], list[int]] = {}
        for index, (_, edit) in enumerate(self.edits):
            if isinstance(edit, VectorEdit) and edit.side != "residual":
                projected.setdefault((edit.layer, edit.side), []).append(index)
        for (layer, side), indices in projected.items():
            clean: list[Tensor] = []
            after(self.subject.projection(layer, side).module, self._projection_hook(layer, side, indices, clean))
            norm = self.subject.qk_norm_module(layer, side)
            held = [i for i in indices if isinstance(e := self.edits[i][1], VectorEdit) and e.frozen_norm]
            if held and norm is not None:
                after(norm, self._frozen_hook(layer, side, held, clean))
        token = ACTIVE_TAP.set(self)
        stack.callback(ACTIVE_TAP.reset, token)

    def unembed_only(self, stack: ExitStack, tokens: Sequence[int]) -> None:
        """Let the unembedding give the logits of these tokens alone, in this order."""
        head = self.subject.unembedding
        weight: Tensor = head.weight  # pyright: ignore[reportAssignmentType]
        bias: Tensor | None = getattr(head, "bias", None)
        at = torch.tensor(list(tokens), device=weight.device)
        some = weight[at], None if bias is None else bias[at]
        _override(stack, head, lambda x: nn.functional.linear(x.to(some[0].device), *some))

    def _own(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, deaf while another pass runs inside this one."""
        return lambda *args: hook(*args) if ACTIVE_TAP.get() is self else None

    def _edits_of(self, kind: type, layer: int) -> list[tuple[int, int, Any]]:
        """Index, copy and edit of a layer's edits of one kind, in order."""
        return [(i, copy, e) for i, (copy, e) in enumerate(self.edits) if isinstance(e, kind) and e.layer == layer]

    def _mask(self, edit: VectorEdit | ScoreEdit, device: torch.device) -> Tensor:
        """Which of the columns that run are the edit's; none for an edit without a mask."""
        mask = torch.zeros_like(self.batch.attention_mask, dtype=torch.bool) if edit.mask is None else edit.mask
        return mask[:, self.start :].to(device)

    def _residual_hook(self, layer: int) -> Callable[..., tuple[tuple, dict]]:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            stream: Tensor = args[0] if args else kwargs["hidden_states"]
            if self.beginning is not None and self.beginning.stream is not None and layer == self.from_layer:
                stream = self.beginning.stream.to(stream).repeat(1, self.copies.number, 1)
            for index, copy, edit in self._edits_of(VectorEdit, layer):
                if edit.side == "residual":
                    stream = stream.clone()
                    self.residual[layer] = stream
                    mask = self._mask(edit, stream.device)
                    part = stream[:, self.copies.columns(copy)]
                    rows = part[mask]
                    edited = edit.change(rows, self._rows(mask, copy))
                    self._note(index, rows, edited)
                    part[mask] = edited
            if layer in self.looked_at:
                self.residual[layer] = stream
            if layer in self.reads.residual:
                self.reads.residual[layer](stream)
            if args:
                return (stream, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": stream}

        return hook

    def _let_go(self, layer: int) -> Callable[..., None]:
        """Drop a layer's stream once no later edit looks at it."""
        later = any(
            isinstance(e, VectorEdit | ScoreEdit) and e.layer > layer and layer in e.sees for _, e in self.edits
        )

        def hook(*_: object) -> None:
            if not later:
                self.residual.pop(layer, None)

        return hook

    def _projection_hook(
        self, layer: int, side: ProjectionSide, indices: Sequence[int], clean: list[Tensor]
    ) -> Callable[..., Tensor]:
        module = self.subject.family.input_norm(self.subject.layers[layer])
        projection = self.subject.projection(layer, side)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            clean.append(output[..., projection.columns().flatten().to(output.device)])
            new = output.clone()
            for index in indices:
                copy, edit = self.edits[index]
                if not isinstance(edit, VectorEdit):
                    raise AssertionError("only vector edits act on a projection")
                mask, here = self._mask(edit, output.device), self.copies.columns(copy)
                rows = self.residual[layer][:, here][mask]
                edited = edit.change(rows, self._rows(mask, copy))
                self._note(index, rows, edited)
                if edit.frozen_norm:
                    norm = self.subject.input_norm(layer, rows.dtype)
                    normed = inputs[0][:, here][mask] + norm.linear(edited - rows) / norm.scale(rows)[:, None]
                else:
                    normed = edited if module is None else module(edited)
                projected = torch.einsum("nd,hed->nhe", normed, projection.weight(edit.heads))
                bias = projection.bias(edit.heads)
                projected = projected if bias is None else projected + bias
                part = new[:, here]
                selected = part[mask]
                selected[:, projection.columns(edit.heads).flatten().to(output.device)] = projected.flatten(1)
                part[mask] = selected
            return new

        return hook

    def _frozen_hook(
        self, layer: int, side: ProjectionSide, indices: Sequence[int], clean: list[Tensor]
    ) -> Callable[..., Tensor]:
        """Divide the edits' queries or keys by what their norm divided the unedited ones by."""
        rule = self.subject.family.qk_norm
        by_head = rule is not None and rule.over == "head"
        n_heads = self.subject.counts.of(side)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            norm = self.subject.qk_norm(layer, side, inputs[0].dtype)
            before = clean.pop()
            held = torch.zeros(*before.shape[:2], n_heads, dtype=torch.bool, device=before.device)
            for index in indices:
                copy, edit = self.edits[index]
                if not isinstance(edit, VectorEdit):
                    raise AssertionError("only vector edits act on a projection")
                heads = slice(None) if edit.heads is None or not by_head else list(edit.heads)
                held[:, self.copies.columns(copy), heads] |= self._mask(edit, before.device)[..., None]
            if by_head and rule is not None:
                before = before.unflatten(-1, (-1, self.subject.d_head))
                swap = rule.layout == "head pos"
                before, held = (before.transpose(1, 2), held.transpose(1, 2)) if swap else (before, held)
                held = held[..., None]
            else:
                held = held.any(dim=-1, keepdim=True)
            return torch.where(held, norm.linear(inputs[0]) / norm.scale(before)[..., None], output)

        return hook

    def _rows(self, mask: Tensor, copy: int) -> Callable[[int], Tensor]:
        def rows(layer: int) -> Tensor:
            if layer not in self.residual:
                raise QklensError(f"an edit looks at the stream of layer {layer}, which it did not name in `sees`")
            stream = self.residual[layer][:, self.copies.columns(copy)]
            return stream[mask.to(stream.device)].to(mask.device)

        return rows

    def _note(self, index: int, before: Tensor, after: Tensor) -> None:
        self.fired[index] = True
        if after.shape != before.shape:
            raise QklensError(f"an edit returned shape {tuple(after.shape)}, expected {tuple(before.shape)}")
        self.changed[index] = self.changed[index] or not torch.equal(before, after)

    def mask(self, allowed: Callable[..., Tensor], dtype: torch.dtype) -> Tensor | None:
        """The mask of a pass that has a prefix, by positions: `allowed(batch, head, q, k)` is the layer's own rule."""
        if self.beginning is None:
            return None
        position, seen = visible(self.batch, self.start, self.copies.number)
        queries = position[:, self.start :, None]
        rows = torch.arange(len(position), device=position.device)[:, None, None]
        may = allowed(rows, torch.zeros_like(rows), queries, position[:, None]) & seen
        hidden = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        return torch.where(may, 0.0, hidden).to(dtype)[:, None]

    def score_bias(self, layer: int, query: Tensor, key: Tensor, scale: float) -> Tensor | None:
        """What the layer's score edits add."""
        total: Tensor | None = None
        for index, copy, edit in self._edits_of(ScoreEdit, layer):
            here = self.copies.columns(copy)
            own_key = self.copies.take_keys(key, copy)
            rows = self._rows(self._mask(edit, query.device), copy)
            bias = edit.bias(ScoreView(query[:, :, here], own_key, rows, scale, self.start))
            self.fired[index] = True
            self.changed[index] = bool((bias != 0).any())
            total = query.new_zeros((*query.shape[:3], key.shape[2])) if total is None else total
            self.copies.put(total, copy, self.copies.take(total, copy) + bias)
        return total

    def new_pattern(self, layer: int, pattern: Tensor) -> Tensor | None:
        """The pattern after the layer's edits, if it has any."""
        result: Tensor | None = None
        for index, copy, edit in self._edits_of(PatternEdit, layer):
            result = pattern.clone() if result is None else result
            before = self.copies.take(result, copy).clone()
            after = edit.replace(before.clone(), self.start)
            self._note(index, before, after)
            self.copies.put(result, copy, after)
        return result

    def new_output(self, layer: int, output: Tensor) -> Tensor | None:
        """The heads' outputs after the layer's edits, if it has any."""
        result: Tensor | None = None
        for index, copy, edit in self._edits_of(OutputEdit, layer):
            result = output.clone() if result is None else result
            here = self.copies.columns(copy)
            before = result[:, here].clone()
            after = edit.replace(before.clone(), self.start)
            self._note(index, before, after)
            result[:, here] = after
        return result

    def read(self, read: AttentionRead) -> None:
        """Hand a layer's finished attention to its sink."""
        self.attended.add(read.layer)
        if read.layer in self.reads.attention:
            self.reads.attention[read.layer](read)

    def assert_fired(self) -> None:
        """An edit that never ran is an error, not a null result; so is attention that went another way."""
        unread = sorted(set(self.reads.attention) - self.attended)
        if unread:
            raise QklensError(
                f"the attention of layer {unread[0]} was not read: the model runs attn_implementation "
                f"{self.subject.model.config._attn_implementation!r}, expected {attention_name(self.subject.family)!r}"
            )
        for (_, edit), fired in zip(self.edits, self.fired, strict=True):
            if not fired:
                raise QklensError(
                    f"an edit of layer {edit.layer} never fired; the model did not run that layer's attention through "
                    "the registered function"
                )


def _refuse_same(edit: Edit, other: Edit, side: str) -> None:
    """Refuse two edits of one head where they share a token."""
    masks = [e.mask for e in (edit, other) if isinstance(e, VectorEdit | ScoreEdit) and e.mask is not None]
    if len(masks) == 2 and bool((masks[1] & masks[0].to(masks[1].device)).any()):
        raise QklensError(
            f"two edits of layer {edit.layer} on the {side} side act on the same head and token; write them as one "
            "edit whose `change` does both"
        )


def _override(stack: ExitStack, module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Let a module compute something else until the stack closes; its hooks still run."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    if before is None:
        stack.callback(module.__dict__.pop, "forward")
    else:
        stack.callback(module.__dict__.__setitem__, "forward", before)


def _stream_reader(sink: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        sink(output if isinstance(output, Tensor) else output[0])

    return hook


def _input_reader(sink: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        del kwargs
        sink(inputs[0])

    return hook
