"""Feature cards: what one feature of a source is, from what it is active on and what it writes.

One pass over the passages serves many features; `card_tally` says what is kept of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qklens.analyses.card_tally import BEFORE, CardTally, Found, place_sums
from qklens.analyses.card_values import Passages, ScaleMean
from qklens.analyses.direct_logits import Ends, direct_logits, nearest_directions
from qklens.analyses.feature_card import CardToken, Density, Example, FeatureCard, Neighbour, PlaceActivation, Promoted
from qklens.analyses.passages import GROUPS, PLACES, Group, Passage
from qklens.dictionaries.source import FeatureSource, check_layer
from qklens.errors import QklensError
from qklens.models.subject import Subject


def feature_cards(
    subject: Subject,
    source: FeatureSource,
    layer: int,
    features: Sequence[int],
    groups: Sequence[Passages],
    scale: ScaleMean,
    *,
    k: int = 8,
    roles: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> list[FeatureCard]:
    """Cards of some features of a source at a layer.

    Args:
        subject: the model.
        source: the features; of one that writes several models' streams side by side the subject's is the last.
        layer: resid_pre.layer, which they write.
        features: their indices.
        groups: passages by group, at most one of each group.
        scale: filled while the first group is read.
        k: examples and list entries from each end.
        roles: roles held in a study, by label.
        seed: of the random examples.

    Raises:
        QklensError: the source does not write the layer, a feature that writes nothing there, or no token to read.
    """
    check_layer(source, layer)
    written = source.directions(layer)
    directions = written[:, -subject.d_model :]
    for feature in features:
        if not bool(written[feature].any()):
            elsewhere = [m for m in source.layers if bool(source.directions(m)[feature].any())]
            raise QklensError(
                f"feature {source.labels[feature]!r} writes nothing to resid_pre.{layer}; it writes layers {elsewhere}"
            )
    tallies = {group.group: CardTally(len(features), k, seed) for group in groups}
    sums = {group.group: _PlaceSums(len(features)) for group in groups}
    for group in groups:
        for index, values in group.values():
            tallies[group.group].add(index, values)
            sums[group.group].add(values, group.passages[index].places)
    chosen = torch.tensor(list(features), device=directions.device)
    near = nearest_directions(directions, chosen, k, centred=subject.family.norm.centred)
    logits = direct_logits(subject, directions[chosen], scale.value(), k)
    passages: dict[Group, Sequence[Passage]] = {group.group: group.passages for group in groups}
    cards = []
    for row, feature in enumerate(features):
        label = source.labels[feature]
        text = tallies.get("text")
        cards.append(
            FeatureCard(
                feature=label,
                layer=layer,
                dictionary=source.name,
                model=subject.name,
                norm=float(directions[feature].norm()),
                roles=list((roles or {}).get(label, ())),
                density=[_density(tallies[g], g, row) for g in GROUPS if g in tallies],
                top=_examples(passages, "text", text.top(row) if text else []),
                bottom=_examples(passages, "text", text.bottom(row) if text else []),
                deciles=_examples(passages, "text", text.deciles(row) if text else []),
                prompts=[e for g in GROUPS[1:] if g in tallies for e in _examples(passages, g, tallies[g].top(row))],
                places=[p for g in GROUPS[1:] if g in tallies for p in sums[g].rows(g, row)],
                promoted=_promoted(subject, logits, row, "highest"),
                suppressed=_promoted(subject, logits, row, "lowest"),
                logit_scale=scale.value(),
                nearest=_neighbours(source, *near.highest, row),
                opposite=_neighbours(source, *near.lowest, row),
            )
        )
    return cards


class _PlaceSums:
    def __init__(self, n_features: int) -> None:
        self.tokens = torch.zeros(len(PLACES), dtype=torch.long)
        self.active = torch.zeros(len(PLACES), n_features, dtype=torch.long)
        self.sum = torch.zeros(len(PLACES), n_features, dtype=torch.float64)

    def add(self, values: Tensor, places: Sequence[str | None]) -> None:
        tokens, active, sums = place_sums(values, places, PLACES)
        self.tokens, self.active, self.sum = self.tokens + tokens, self.active + active, self.sum + sums

    def rows(self, condition: Group, feature: int) -> list[PlaceActivation]:
        return [
            PlaceActivation(
                condition=condition,
                place=place,
                tokens=n,
                share=int(self.active[i, feature]) / n,
                mean=float(self.sum[i, feature]) / n,
            )
            for i, place in enumerate(PLACES)
            if (n := int(self.tokens[i]))
        ]


def _density(tally: CardTally, group: Group, row: int) -> Density:
    active, histogram = int(tally.active[row]), tally.histogram(row)
    return Density(
        group=group,
        tokens=tally.tokens,
        active=active,
        share=active / max(tally.tokens, 1),
        mean=float(tally.sum[row]) / active if active else None,
        largest=float(tally.largest[row]),
        least=float(tally.least[row]),
        edges=list(histogram.edges),
        counts=list(histogram.counts),
    )


def _examples(passages: Mapping[Group, Sequence[Passage]], group: Group, found: Sequence[Found]) -> list[Example]:
    """Examples of a group, strongest first; of an item's two prompts only the first."""
    shown: dict[str, Example] = {}
    for f in found:
        passage = passages[group][f.passage]
        shown.setdefault(passage.item or f"{f.passage}.{f.position}", _example(passage, f))
    return list(shown.values())


def _example(passage: Passage, found: Found) -> Example:
    begin = max(found.position - BEFORE, 0)
    texts = passage.texts[begin : found.position - BEFORE + len(found.context)]
    offset = begin - (found.position - BEFORE)
    return Example(
        group=passage.group,
        where=passage.where,
        item=passage.item,
        place=passage.places[found.position],
        position=found.position,
        activation=found.activation,
        at=found.position - begin,
        tokens=[CardToken(text=t, activation=found.context[offset + i]) for i, t in enumerate(texts)],
        decile=found.decile,
    )


def _promoted(subject: Subject, ends: Ends, row: int, side: str) -> list[Promoted]:
    index, value = ends.highest if side == "highest" else ends.lowest
    return [
        Promoted(token=str(subject.tokenizer.decode([i])), token_id=i, logit=v)
        for i, v in zip(index[row].tolist(), value[row].tolist(), strict=True)
        if i >= 0
    ]


def _neighbours(source: FeatureSource, index: Tensor, value: Tensor, row: int) -> list[Neighbour]:
    return [
        Neighbour(feature=source.labels[i], cosine=v)
        for i, v in zip(index[row].tolist(), value[row].tolist(), strict=True)
        if i >= 0
    ]
