"""Who does a feature draw in or push away? Every feature of a dictionary ranked at some heads, from both ends.

Weights alone: no activations, no prompt but for the distances between answer and option. A dictionary directory of
qklens is read from disk block by block, so its size does not matter; one of another tool is converted in memory. z
places a feature among all features of the dictionary; it is no test (`qklens qk` tests pairs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from qklens.analyses.contrasts import ROLES
from qklens.analyses.interactions import Side
from qklens.analyses.partners import Block, Ranked, rank_partners
from qklens.dictionaries.decoder_file import open_decoder
from qklens.dictionaries.formats.detect import is_native, load_dictionary
from qklens.dictionaries.source import FeatureSource, feature_index
from qklens.dictionaries.unit import unit_directions
from qklens.errors import QklensError
from qklens.interventions.steer import Head
from qklens.models.scores import Rotation, offset_rotation, score_maps, virtual_reader
from qklens.strict import Strict
from qklens.studies.choices import belief_candidates, default_heads
from qklens.studies.config import LabConfig
from qklens.studies.dictionary_fit import check_belongs
from qklens.studies.lab import Lab
from qklens.studies.opening import load_source, open_lab, threads_for, use_source
from qklens.studies.resources import SourceChoice, source_choice
from qklens.studies.roles import find_roles


class PartnerRow(Strict):
    """One feature."""

    feature: str
    value: float = Field(description="virtual interaction, score units for unit vectors; negative lowers attention")
    z: float | None = Field(description="its place among all features at this head: (value - mean) / sd")


class PartnerColumn(Strict):
    """One head, or the mean over all of them."""

    head: str = Field(description="L2H4, or `mean`")
    n: int = Field(description="features that write this head's input")
    mean: float
    sd: float | None
    lowest: list[PartnerRow]
    highest: list[PartnerRow]


class PartnerTable(Strict):
    """The whole of `qklens partners --json`."""

    model: dict[str, Any]
    dictionary: str
    data: dict[str, Any] = Field(description="items decide the heads, a role's feature and the mean rotation")
    seed: int
    n_features: int
    asked: str = Field(description="the feature or role that was asked for")
    feature: str
    side: Side = Field(description="where the feature is held; the listed ones are on the other side")
    offsets: str = Field(description="which distances p - j the rotations are averaged over")
    columns: list[PartnerColumn] = Field(description="one a head, then the mean over heads")


@dataclass(frozen=True)
class PartnerRequest:
    """What to rank.

    Attributes:
        feature: a feature's label, or a role, whose feature is then found.
        side: where it is held.
        heads: the heads; none means the answer-selection heads, `every` all that the dictionary reaches.
        every: all heads of the layers that the dictionary and the feature write.
        top: how many from each end.
        offset: a distance p − j; None is the mean over those of the data, answer to correct option.
    """

    feature: str
    side: Side = "query"
    heads: tuple[Head, ...] = ()
    every: bool = False
    top: int = 50
    offset: int | None = None

    @classmethod
    def parse(cls, *, side: str, **rest: Any) -> PartnerRequest:  # noqa: ANN401
        """A request with the side by name.

        Raises:
            QklensError: neither query nor key.
        """
        if side not in get_args(Side):
            raise QklensError(f"--side {side!r}: expected 'query' or 'key'")
        return cls(side="query" if side == "query" else "key", **rest)

    def __post_init__(self) -> None:
        if self.top < 1:
            raise QklensError(f"--top {self.top}: expected at least 1")
        if self.offset is not None and self.offset < 0:
            raise QklensError(f"--offset {self.offset}: a query sees keys at or before it; expected 0 or more")


class _Decoder(Protocol):
    """Features' directions, in memory or on disk."""

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def n_features(self) -> int: ...

    def label(self, feature: int) -> str: ...

    def find(self, label: str) -> int: ...

    def direction(self, feature: int) -> dict[int, Float[Tensor, " d_model"]]: ...

    def blocks(self, layers: Sequence[int], *, centred: bool) -> Iterable[Block]: ...


@dataclass(frozen=True, eq=False)
class _InMemory:
    """A source's directions."""

    source: FeatureSource

    @property
    def layers(self) -> tuple[int, ...]:
        return self.source.layers

    @property
    def n_features(self) -> int:
        return len(self.source.labels)

    def label(self, feature: int) -> str:
        return self.source.labels[feature]

    def find(self, label: str) -> int:
        return feature_index(self.source, label)

    def direction(self, feature: int) -> dict[int, Float[Tensor, " d_model"]]:
        return {layer: self.source.directions(layer)[feature] for layer in self.layers}

    def blocks(self, layers: Sequence[int], *, centred: bool) -> Iterable[Block]:
        return [tuple(unit_directions(self.source.directions(layer), centred=centred) for layer in layers)]


def partner_table(
    config: LabConfig, request: PartnerRequest, *, tick: Callable[[int], Callable[[], None]] = lambda _: lambda: None
) -> PartnerTable:
    """Rank every feature of the configuration's dictionary against one.

    Args:
        config: model, dictionary, items, and a feature for the role that the request names.
        request: what to rank.
        tick: called with the number of steps, which is one, when work begins.

    Raises:
        QklensError: an unknown feature or head, a head whose input the dictionary or the feature does not write, or
            bad input of any other kind.
    """
    stray = next((role for role in config.roles if role != request.feature or role not in ROLES), None)
    if stray is not None:
        raise QklensError(f"--role {stray}: expected the role that --feature asks for, one of {list(ROLES)}")
    choice = source_choice(config)
    lab = open_lab(config)
    context = lab.subject.context
    if request.offset is not None and context is not None and request.offset >= context:
        raise QklensError(f"--offset {request.offset}: {lab.subject.name} sees {context} tokens; expected less")
    tick(1)
    with threads_for(lab.subject):
        decoder, name = _decoder(lab, choice)
        source = name if choice.law or choice.folder is None else str(choice.folder)
        heads = _heads(lab, request, decoder, source)
        feature = _feature(lab, config, request, decoder, source, choice)
        directions = decoder.direction(feature)
        written = [layer for layer, vector in directions.items() if bool(vector.any())]
        if request.every:
            heads = tuple(h for h in heads if h[0] in written)
            if not heads:
                raise QklensError(f"feature {decoder.label(feature)!r} writes no layer; choose another feature")
        silent = next((h for h in heads if h[0] not in written), None)
        if silent is not None:
            raise QklensError(
                f"feature {decoder.label(feature)!r} does not write resid_pre.{silent[0]}, the input of head "
                f"L{silent[0]}H{silent[1]}; it writes layers {written}"
            )
        layers = sorted({layer for layer, _ in heads})
        columns = [head for layer in layers for head in heads if head[0] == layer]
        readers = [
            torch.stack([_reader(lab, head, directions[layer], request) for head in columns if head[0] == layer])
            for layer in layers
        ]
        ranked = rank_partners(decoder.blocks(layers, centred=lab.subject.family.norm.centred), readers, request.top)
    names = [f"L{layer}H{head}" for layer, head in columns] + ["mean"]
    return PartnerTable(
        model=lab.subject.describe(),
        dictionary=name,
        data=lab.dataset.describe(),
        seed=lab.seed,
        asked=request.feature,
        n_features=decoder.n_features,
        feature=decoder.label(feature),
        side=request.side,
        offsets="answer to correct option, as in the data" if request.offset is None else str(request.offset),
        columns=[
            PartnerColumn(
                head=head,
                n=int(ranked.count[i]),
                mean=float(ranked.mean[i]),
                sd=_number(ranked.sd[i]),
                lowest=_rows(decoder, ranked.lowest, i, float(ranked.mean[i]), float(ranked.sd[i])),
                highest=_rows(decoder, ranked.highest, i, float(ranked.mean[i]), float(ranked.sd[i])),
            )
            for i, head in enumerate(names)
        ],
    )


def _decoder(lab: Lab, choice: SourceChoice) -> tuple[_Decoder, str]:
    if choice.folder is None or choice.law is not None:
        use_source(lab, choice, *load_source(lab, choice.folder))
        return _InMemory(lab.source), lab.source.name
    if not is_native(choice.folder):
        source = load_dictionary(choice.folder, lab.subject.device)
        check_belongs(source.config, lab.subject, choice.folder)
        return _InMemory(source), source.name
    decoder = open_decoder(choice.folder)
    check_belongs(decoder.config, lab.subject, choice.folder)
    return decoder, decoder.config.name


def _heads(lab: Lab, request: PartnerRequest, decoder: _Decoder, source: str) -> tuple[Head, ...]:
    if request.every:
        return tuple((layer, head) for layer in decoder.layers for head in range(lab.subject.n_heads))
    if not request.heads:
        return default_heads(lab, decoder.layers, source)
    for layer, head in request.heads:
        lab.subject.check_head(layer, head)
        if layer not in decoder.layers:
            raise QklensError(
                f"dictionary {source} does not write resid_pre.{layer}, the input of head "
                f"L{layer}H{head}; it writes layers {list(decoder.layers)}"
            )
    return request.heads


def _feature(
    lab: Lab, config: LabConfig, request: PartnerRequest, decoder: _Decoder, name: str, choice: SourceChoice
) -> int:
    """The feature's index; a role's feature is found as the study finds it, with the whole dictionary in memory."""
    named = config.roles.get(request.feature)
    if named is not None or request.feature not in ROLES or choice.folder is None:
        return decoder.find(named or request.feature)
    if choice.law is None:
        use_source(lab, choice, *load_source(lab, choice.folder))
    belief = lab.source.labels[belief_candidates(lab)[0].feature]
    heads = request.heads or default_heads(lab, decoder.layers, name)
    return find_roles(lab, heads, belief)[0].chosen[ROLES[ROLES.index(request.feature)]]


def _reader(lab: Lab, head: Head, direction: Tensor, request: PartnerRequest) -> Tensor:
    return virtual_reader(
        score_maps(lab.subject, head[0]), head[1], _turn(lab, head[0], request.offset), direction, request.side
    )


def _turn(lab: Lab, layer: int, offset: int | None) -> Rotation:
    if offset is None:
        return lab.mean_turn(layer)
    window = score_maps(lab.subject, layer).window
    if window is not None and offset >= window:
        raise QklensError(f"--offset {offset}: heads of layer {layer} see {window} tokens; expected less")
    return offset_rotation(lab.subject, layer, torch.tensor([offset]))


def _rows(decoder: _Decoder, end: Ranked, column: int, mean: float, sd: float) -> list[PartnerRow]:
    return [
        PartnerRow(feature=decoder.label(f), value=v, z=_number((v - mean) / sd) if sd else None)
        for f, v in zip(end.index[column].tolist(), end.value[column].tolist(), strict=True)
        if f >= 0
    ]


def _number(value: float | Tensor) -> float | None:
    number = float(value)
    return number if number == number else None
