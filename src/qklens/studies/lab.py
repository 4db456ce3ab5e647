"""What stages and tables share: the subject, the source, both halves' prompts, and readings that are made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.contrasts import Readings, contrast_directions
from qklens.analyses.lens import HeadLens, head_lens
from qklens.analyses.readings import AttentionReading, read_attention, read_streams
from qklens.analyses.written import WrittenPrompt, write_prompts
from qklens.data.items import Dataset, Item
from qklens.data.render import (
    CONDITIONS,
    ORDERS,
    Condition,
    LetterForm,
    Prompt,
    refuse_special_tokens,
    render,
    render_open,
)
from qklens.data.sameness import same_form
from qklens.dictionaries.directions import Directions, joined
from qklens.dictionaries.source import FeatureSource
from qklens.errors import QklensError
from qklens.interventions.engine import Workset
from qklens.models.scores import Rotation, offset_rotation, score_maps
from qklens.models.subject import Subject

Half = Literal["discovery", "report", "all"]
Open = Literal["open", "open_harm", "open_benign"]
Spoken = Condition | Open
HALVES: tuple[Half, ...] = ("discovery", "report")
MIN_ITEMS = 4
_STREAM_BYTES = 1 << 29


@dataclass(eq=False)
class Lab:
    """One model, one source and one set of items on the bench.

    Prompts of a condition come item by item, both orders of an item next to each other, so row i is the same item and
    order in every condition.
    """

    subject: Subject
    dataset: Dataset
    form: LetterForm
    seed: int
    halves: dict[Half, tuple[Item, ...]] = field(init=False)
    source: FeatureSource = field(init=False)

    def __post_init__(self) -> None:
        refuse_special_tokens(self.subject.tokenizer, self.dataset.items)
        self.halves = {**split_items(self.dataset.items, self.seed), "all": self.dataset.items}
        self._prompts: dict[tuple[str, Half], list[Prompt]] = {}
        self._works: dict[tuple[str, Half], Workset] = {}
        self._attention: dict[tuple[str, Half], AttentionReading] = {}
        self._streams: dict[tuple[str, Half], list[dict[int, Tensor]]] = {}
        self._written: dict[tuple[str, Half, int], list[WrittenPrompt]] = {}
        self._lenses: dict[tuple[int, int], HeadLens] = {}

    def prompts(self, condition: Spoken, half: Half) -> list[Prompt]:
        """Rendered prompts; `open` is the question without options, `open_harm` and `open_benign` the intent alone.

        These stand twice an item, to align with the others.
        """
        key = (condition, half)
        if key not in self._prompts:
            tokenizer, items = self.subject.tokenizer, self.halves[half]
            if condition in ("open", "open_harm", "open_benign"):
                self._prompts[key] = [render_open(tokenizer, _alone(item, condition)) for item in items for _ in ORDERS]
            else:
                self._prompts[key] = [
                    render(tokenizer, item, condition, order, self.form) for item in items for order in ORDERS
                ]
        return self._prompts[key]

    def item_index(self, half: Half) -> np.ndarray:
        """Which item each prompt of a half belongs to; the cluster of the bootstrap."""
        return np.repeat(np.arange(len(self.halves[half])), len(ORDERS))

    def work(self, condition: Spoken, half: Half) -> Workset:
        """The prompts, ready to run."""
        key = (condition, half)
        if key not in self._works:
            self._works[key] = Workset(self.subject, self.prompts(condition, half))
        return self._works[key]

    def attention(self, condition: Condition, half: Half) -> AttentionReading:
        """Attention and margins of the clean run."""
        key = (condition, half)
        if key not in self._attention:
            self._attention[key] = read_attention(self.work(condition, half))
        return self._attention[key]

    def streams(
        self, condition: Spoken, half: Half, layers: Sequence[int]
    ) -> list[dict[int, Float[Tensor, "_pos d_model"]]]:
        """resid_pre of the clean run at every token."""
        key = (condition, half)
        kept = self._streams.setdefault(key, [{} for _ in self.prompts(condition, half)])
        missing = [layer for layer in layers if layer not in kept[0]]
        if missing:
            for mine, new in zip(kept, read_streams(self.work(condition, half), missing), strict=True):
                mine.update(new)
        return kept

    def few_at_once(self, layers: Sequence[int]) -> list[Sequence[int]]:
        """Layers in runs whose streams of one half fit in memory together."""
        tokens = sum(len(p.tokens) for c in (*CONDITIONS, *get_args(Open)) for p in self.prompts(c, "discovery"))
        at_once = max(1, _STREAM_BYTES // (tokens * self.subject.d_model * 4))
        return [layers[begin : begin + at_once] for begin in range(0, len(layers), at_once)]

    def drop_streams(self) -> None:
        """Forget residual streams and what was written of them; they are the largest things kept."""
        self._streams.clear()
        self._written.clear()

    def written(self, condition: Spoken, half: Half, layer: int) -> list[WrittenPrompt]:
        """The streams at a layer, written by the source."""
        key = (condition, half, layer)
        if key not in self._written:
            streams = self.streams(condition, half, self.source.reads(layer))
            maps = score_maps(self.subject, layer)
            self._written[key] = write_prompts(self.subject, self.source, maps, streams)
        return self._written[key]

    def lens(self, layer: int, head: int) -> HeadLens:
        """A lens on one head."""
        if (layer, head) not in self._lenses:
            self._lenses[layer, head] = head_lens(self.subject, self.source, layer, head)
        return self._lenses[layer, head]

    def lens_on(self, source: FeatureSource, layer: int, head: int) -> HeadLens:
        """A lens on one head through the study's source (kept) or another (made anew)."""
        return self.lens(layer, head) if source is self.source else head_lens(self.subject, source, layer, head)

    def activation_readings(self, half: Half, layer: int) -> Readings:
        """The source's activations at every token, in decoder-norm units, for the contrasts."""
        directions = self.source.directions(layer)
        norms = self.subject.input_norm(layer, torch.float32).centre(directions.float()).norm(dim=-1)

        def read(condition: Spoken, prompt: int, positions: Sequence[int]) -> Tensor:
            values = self.written(condition, half, layer)[prompt].active.at(positions)
            return values * norms.to(values)

        return self._readings(half, read)

    def residual_readings(self, half: Half, layer: int) -> Readings:
        """The residual stream at every token, for the contrasts."""
        return self._readings(half, lambda c, i, at: self.streams(c, half, [layer])[i][layer][list(at)])

    def _readings(self, half: Half, read: Callable[[Spoken, int, Sequence[int]], Tensor]) -> Readings:
        def last(condition: Open) -> Tensor:
            return torch.cat([read(condition, i, [-1]) for i in range(len(self.prompts(condition, half)))])

        return Readings(
            prompts={c: self.prompts(c, half) for c in CONDITIONS},
            read=read,
            open_last=last("open"),
            refusal=last("open_harm") - last("open_benign"),
        )

    def fit_directions(self, *, whitened: bool = False) -> Directions:
        """The four contrast directions at every layer, from the discovery half; a few layers in memory at a time."""
        fitted: list[Directions] = []
        for layers in self.few_at_once(range(self.subject.n_layers)):
            for condition in (*CONDITIONS, *get_args(Open)):
                self.streams(condition, "discovery", layers)
            fitted.append(
                contrast_directions(layers, lambda layer: self.residual_readings("discovery", layer), whitened=whitened)
            )
            if len(layers) < self.subject.n_layers:
                self.drop_streams()
        return joined(fitted)

    def mean_turn(self, layer: int, half: Half = "report") -> Rotation:
        """A layer's mean rotation over the offsets from the answer to the correct option that the data really has."""
        offsets = [
            p.spans["answer"][0] - j for c in ("none", "harm") for p in self.prompts(c, half) for j in p.span("correct")
        ]
        return offset_rotation(self.subject, layer, torch.tensor(offsets))


def _alone(item: Item, condition: Open) -> str:
    """What an item's user says in an open prompt."""
    return {"open": item.question, "open_harm": item.harmful_intent, "open_benign": item.benign_intent}[condition]


def split_items(items: Sequence[Item], seed: int) -> dict[Half, tuple[Item, ...]]:
    """Two halves of near-equal size; items with the same two options stay together.

    Raises:
        QklensError: fewer than four items, or all with the same two options.
    """
    if len(items) < MIN_ITEMS:
        raise QklensError(
            f"{len(items)} items; the study needs at least {MIN_ITEMS}, to choose on one half and report on the other"
        )
    half = fold_items(items, 2, seed)
    if not half.any():
        raise QklensError("all items have the same two options; the study needs at least two different pairs")
    return {
        name: tuple(item for item, fold in zip(items, half, strict=True) if fold == number)
        for number, name in enumerate(("report", "discovery"))
    }


def fold_items(items: Sequence[Item], n_folds: int, seed: int) -> np.ndarray:
    """A fold for each item, of near-equal size; items with the same two options share one."""
    groups: dict[frozenset[str], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(frozenset(map(same_form, (item.correct, item.incorrect))), []).append(index)
    blocks, fold, sizes = list(groups.values()), np.zeros(len(items), dtype=int), [0] * n_folds
    for block in np.random.default_rng(seed).permutation(len(blocks)):
        smallest = sizes.index(min(sizes))
        fold[blocks[block]] = smallest
        sizes[smallest] += len(blocks[block])
    return fold
