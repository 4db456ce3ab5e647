"""One forward pass with thin reads and edits.

A pass runs the model's own code. Edits return new tensors and are scoped to the pass, so a clean run after any edit,
or after an exception in one, is bit-identical to the one before. `Prefix` lets a pass skip the columns that no edit can
reach: their keys and values are taken from an earlier clean pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from qklens.errors import QklensError
from qklens.models.attention import ACTIVE_TAP, AttentionRead, attention_name
from qklens.models.batch import Batch
from qklens.models.edits import Edit, OutputEdit, PatternEdit, ScoreEdit, ScoreView, VectorEdit
from qklens.models.projections import Projection, ProjectionSide
from qklens.models.subject import Subject


@dataclass(frozen=True, eq=False)
class Reads:
    """What a pass hands out; a sink sees the tensor once and keeps what it needs.

    Attributes:
        residual: by layer, resid_pre.L after its edits; L = n_layers is the stream before the final norm.
        attention: by layer, the layer's attention.
        after: by layer, resid_post.L, before any edit of the next layer's input.
        projected: by (layer, side), the normed vectors that the side's projection reads; an edit of that side alone
            acts behind it.
    """

    residual: dict[int, Callable[[Tensor], None]]
    attention: dict[int, Callable[[AttentionRead], None]]
    after: dict[int, Callable[[Tensor], None]] = field(default_factory=dict)
    projected: dict[tuple[int, ProjectionSide], Callable[[Tensor], None]] = field(default_factory=dict)


NO_READS = Reads({}, {})


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of a clean pass for every column, one pair a layer, each `batch kv_head k_pos d_head`."""

    pairs: tuple[tuple[Tensor, Tensor], ...]

    def repeat(self, times: int) -> Prefix:
        """All rows again, `times` times below one another."""
        return Prefix(tuple((k.repeat(times, 1, 1, 1), v.repeat(times, 1, 1, 1)) for k, v in self.pairs))


@dataclass(frozen=True, eq=False)
class Outcome:
    """Logits at the answer position (last column), and for each edit whether it changed a value."""

    logits: Float[Tensor, "batch vocab"]
    changed: tuple[bool, ...]
    prefix: Prefix | None = None


class _FixedCache(DynamicCache):
    """A cache that serves the same prefix to every pass and keeps nothing of the passes' own."""

    def __init__(self, prefix: Prefix, width: int) -> None:
        super().__init__([(k[:, :, :width], v[:, :, :width]) for k, v in prefix.pairs])
        self.held = [(k[:, :, :width], v[:, :, :width]) for k, v in prefix.pairs]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.held[layer_idx]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


@torch.no_grad()
def run_pass(
    subject: Subject,
    batch: Batch,
    edits: Sequence[Edit] = (),
    reads: Reads = NO_READS,
    *,
    prefix: Prefix | None = None,
    start: int = 0,
    keep_prefix: bool = False,
) -> Outcome:
    """Run the model once.

    Args:
        subject: the model.
        batch: left-padded prompts.
        edits: applied in order.
        reads: sinks for what the caller wants to see.
        prefix: clean keys and values; columns before `start` are taken from it and not run.
        start: the first column to run.
        keep_prefix: also return this pass's keys and values, for later passes.

    Raises:
        QklensError: a prompt longer than the model's context, an edit for a layer or token that does not exist, an edit
            before `start`, or one whose hook never fired.
    """
    if subject.context is not None and batch.width > subject.context:
        raise QklensError(
            f"a prompt of {batch.width} tokens is longer than the context of {subject.name}, {subject.context} tokens; "
            "shorten the item or choose another model"
        )
    state = _Pass(subject, batch, edits, reads, start)
    cache = None
    if prefix is not None and start > 0:
        cache = _FixedCache(prefix, start)
    elif keep_prefix:
        cache = DynamicCache()
    with ExitStack() as stack:
        state.install(stack)
        out = subject.model(
            input_ids=batch.input_ids[:, start:],
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids[:, start:],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
    state.assert_fired()
    kept = _kept(cache) if keep_prefix and cache is not None else None
    return Outcome(out.logits[:, -1], tuple(state.changed), kept)


def _kept(cache: DynamicCache) -> Prefix:
    layers: tuple[Any, ...] = tuple(cache.layers)
    return Prefix(tuple((layer.keys, layer.values) for layer in layers))


def _stream_reader(sink: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        sink(output if isinstance(output, Tensor) else output[0])

    return hook


def _input_reader(sink: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        del kwargs
        sink(inputs[0])

    return hook


class _Pass:
    """The state of one running pass; implements `AttentionTap`."""

    def __init__(self, subject: Subject, batch: Batch, edits: Sequence[Edit], reads: Reads, start: int) -> None:
        self.subject, self.batch, self.reads, self.start = subject, batch, reads, start
        self.edits = tuple(edits)
        self.fired = [False] * len(self.edits)
        self.changed = [False] * len(self.edits)
        self.residual: dict[int, Tensor] = {}
        self.attended: set[int] = set()
        self.edited = self._edited_layers()
        for index, edit in enumerate(self.edits):
            if not 0 <= edit.layer < subject.n_layers:
                raise QklensError(f"layer {edit.layer} does not exist; expected 0 to {subject.n_layers - 1}")
            if isinstance(edit, VectorEdit):
                self._check_side(edit, self.edits[:index])
            if isinstance(edit, VectorEdit | ScoreEdit) and edit.mask is not None:
                if not edit.mask.any():
                    raise QklensError(f"an edit of layer {edit.layer} matches no token")
                if edit.mask[:, :start].any():
                    raise QklensError(f"an edit of layer {edit.layer} touches columns before {start}, which do not run")

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
            if (shared or (pooled and edit.frozen_norm)) and bool((other.mask & edit.mask.to(other.mask.device)).any()):
                raise QklensError(
                    f"two edits of layer {edit.layer} on the {edit.side} side act on the same head and token; write "
                    "them as one edit whose `change` does both"
                )

    def install(self, stack: ExitStack) -> None:
        """Hook what this pass needs; everything is undone when the stack closes."""
        family, layers = self.subject.family, self.subject.layers

        def before(module: nn.Module, hook: Callable[..., Any]) -> None:
            stack.callback(module.register_forward_pre_hook(self._own(hook), with_kwargs=True).remove)

        def after(module: nn.Module, hook: Callable[..., Any]) -> None:
            stack.callback(module.register_forward_hook(self._own(hook)).remove)

        for index in sorted(self.edited | {layer for layer in self.reads.residual if layer < len(layers)}):
            before(layers[index], self._residual_hook(index))
        if len(layers) in self.reads.residual:
            before(family.final_norm(self.subject.model), _input_reader(self.reads.residual[len(layers)]))
        for index in self.edited:
            after(layers[index], self._let_go(index))
        for layer, sink in self.reads.after.items():
            after(layers[layer], _stream_reader(sink))
        for (layer, side), sink in self.reads.projected.items():
            before(self.subject.projection(layer, side).module, _input_reader(sink))
        for index, edit in enumerate(self.edits):
            if isinstance(edit, VectorEdit) and edit.side != "residual":
                projection = self.subject.projection(edit.layer, edit.side)
                clean: list[Tensor] = []
                after(projection.module, self._projection_hook(index, edit, edit.side, projection, clean))
                norm = self.subject.qk_norm_module(edit.layer, edit.side)
                if edit.frozen_norm and norm is not None:
                    after(norm, self._frozen_hook(edit.layer, edit.side, clean))
        token = ACTIVE_TAP.set(self)
        stack.callback(ACTIVE_TAP.reset, token)

    def _own(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, deaf while another pass runs inside this one."""
        return lambda *args: hook(*args) if ACTIVE_TAP.get() is self else None

    def _residual_hook(self, layer: int) -> Callable[..., tuple[tuple, dict]]:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            stream: Tensor = args[0] if args else kwargs["hidden_states"]
            if layer in self.edited:
                self.residual[layer] = stream
            for index, edit in enumerate(self.edits):
                if isinstance(edit, VectorEdit) and edit.side == "residual" and edit.layer == layer:
                    mask = edit.mask[:, self.start :].to(stream.device)
                    rows = stream[mask]
                    edited = edit.change(rows, self._rows(mask))
                    self._note(index, rows, edited)
                    stream = stream.clone()
                    stream[mask] = edited
                    self.residual[layer] = stream
            if layer in self.reads.residual:
                self.reads.residual[layer](stream)
            if args:
                return (stream, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": stream}

        return hook

    def _let_go(self, layer: int) -> Callable[..., None]:
        """Drop a layer's stream once no later edit looks at it."""
        later = any(isinstance(e, VectorEdit) and e.layer > layer and layer in e.sees for e in self.edits)

        def hook(*_: object) -> None:
            if not later:
                self.residual.pop(layer, None)

        return hook

    def _edited_layers(self) -> set[int]:
        """Layers whose stream an edit looks at; it is held until the last such edit is done."""
        layers: set[int] = set()
        for edit in self.edits:
            if isinstance(edit, VectorEdit):
                layers |= {edit.layer, *edit.sees}
            elif isinstance(edit, ScoreEdit):
                layers.add(edit.layer)
        return layers

    def _projection_hook(
        self, index: int, edit: VectorEdit, side: ProjectionSide, projection: Projection, clean: list[Tensor]
    ) -> Callable[..., Tensor]:
        module = self.subject.family.input_norm(self.subject.layers[edit.layer])

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            mask = edit.mask[:, self.start :].to(output.device)
            rows = self.residual[edit.layer][mask]
            edited = edit.change(rows, self._rows(mask))
            self._note(index, rows, edited)
            if edit.frozen_norm:
                norm = self.subject.input_norm(edit.layer, rows.dtype)
                normed = inputs[0][mask] + norm.linear(edited - rows) / norm.scale(rows)[:, None]
            else:
                normed = edited if module is None else module(edited)
            projected = torch.einsum("nd,hed->nhe", normed, projection.weight(edit.heads))
            bias = projection.bias(edit.heads)
            projected = projected if bias is None else projected + bias
            if edit.frozen_norm:
                clean.append(output[..., projection.columns().flatten().to(output.device)])
            new, selected = output.clone(), output[mask]
            selected[:, projection.columns(edit.heads).flatten().to(output.device)] = projected.flatten(1)
            new[mask] = selected
            return new

        return hook

    def _frozen_hook(self, layer: int, side: ProjectionSide, clean: list[Tensor]) -> Callable[..., Tensor]:
        """Divide queries or keys by what their norm divided the unedited ones by."""
        rule = self.subject.family.qk_norm

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            norm = self.subject.qk_norm(layer, side, inputs[0].dtype)
            before = clean.pop()
            if rule is not None and rule.over == "head":
                before = before.unflatten(-1, (-1, self.subject.d_head))
                before = before.transpose(1, 2) if rule.layout == "head pos" else before
            changed = (inputs[0] != before).any(dim=-1, keepdim=True)
            return torch.where(changed, norm.linear(inputs[0]) / norm.scale(before)[..., None], output)

        return hook

    def _rows(self, mask: Tensor) -> Callable[[int], Tensor]:
        def rows(layer: int) -> Tensor:
            if layer not in self.residual:
                raise QklensError(f"an edit looks at the stream of layer {layer}, which it did not name in `sees`")
            stream = self.residual[layer]
            return stream[mask.to(stream.device)].to(mask.device)

        return rows

    def _note(self, index: int, before: Tensor, after: Tensor) -> None:
        self.fired[index] = True
        if after.shape != before.shape:
            raise QklensError(f"an edit returned shape {tuple(after.shape)}, expected {tuple(before.shape)}")
        self.changed[index] = self.changed[index] or not torch.equal(before, after)

    def score_bias(self, layer: int, query: Tensor, key: Tensor, scale: float) -> Tensor | None:
        total: Tensor | None = None
        for index, edit in enumerate(self.edits):
            if isinstance(edit, ScoreEdit) and edit.layer == layer:
                bias = edit.bias(ScoreView(query, key, self.residual[layer], scale, self.start))
                self.fired[index] = True
                self.changed[index] = bool((bias != 0).any())
                total = bias if total is None else total + bias
        return total

    def new_pattern(self, layer: int, pattern: Tensor) -> Tensor | None:
        return self._replace(PatternEdit, layer, pattern)

    def new_output(self, layer: int, output: Tensor) -> Tensor | None:
        return self._replace(OutputEdit, layer, output)

    def _replace(self, kind: type[PatternEdit] | type[OutputEdit], layer: int, value: Tensor) -> Tensor | None:
        result: Tensor | None = None
        for index, edit in enumerate(self.edits):
            if isinstance(edit, kind) and edit.layer == layer:
                before = value if result is None else result
                result = edit.replace(before.clone(), self.start)
                self._note(index, before, result)
        return result

    def read(self, read: AttentionRead) -> None:
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
        for edit, fired in zip(self.edits, self.fired, strict=True):
            if not fired:
                raise QklensError(
                    f"an edit of layer {edit.layer} never fired; the model did not run that layer's attention through "
                    "the registered function"
                )
