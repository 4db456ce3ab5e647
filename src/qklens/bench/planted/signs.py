"""Planted pairs against what the study finds of them: every one counts, whether its roles were found or not.

A pair's value is realised, on prompts where both of its sides are written: under harm where pressure's query or harm's
key is in it, else without pressure; tokens are weighed as the head weighs them without pressure. Where there are none
(harm took the correct-answer key away) or the study read no pairs at the head (it selects nothing, as a decoy's), it is
the virtual one, of the same two features, from the weights alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from qklens.bench.planted.folder import PlantedSign, Truth
from qklens.bench.planted.words import planted_prompts
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.models.loading import load_subject
from qklens.models.scores import offset_rotation, score_maps, virtual_interaction
from qklens.models.subject import Subject
from qklens.strict import Strict
from qklens.studies.results import Results


class PairSign(Strict):
    """A planted pair and what was found of it.

    Attributes:
        planted: the pair.
        held: the dictionary has features that stand for both of its directions.
        kind: of the value; None where a role was given another feature, or one that does not write the head's layer.
        value: of the pair of features that were found.
    """

    planted: PlantedSign
    held: bool
    kind: Literal["realised", "virtual"] | None = None
    value: float | None = None

    @property
    def right(self) -> bool:
        """Whether a value was found and has the planted sign."""
        return self.value is not None and self.value * self.planted.sign > 0


def find_signs(
    truth: Truth, folder: Path, dictionary: Crosscoder, held: set[str], chosen: dict[str, str], results: Results
) -> list[PairSign]:
    """Every planted pair's value.

    Args:
        truth: what is planted.
        folder: the model.
        dictionary: the source.
        held: roles that some feature stands for.
        chosen: the feature of each role that was found rightly.
        results: the study's.
    """
    realised = {
        (row.layer, row.head, row.query_role, row.key_role, row.condition): row.weighed_as_none
        for row in results.interactions
        if row.kind == "realised"
    }
    found, subject = [], None
    for pair in truth.signs:
        roles = {pair.query_role, pair.key_role}
        sign = PairSign(planted=pair, held=roles <= held)
        features = [dictionary.labels.index(chosen[r]) for r in (pair.query_role, pair.key_role) if r in chosen]
        if len(features) == 2 and all(bool(dictionary.directions(pair.layer)[f].any()) for f in features):
            pressed = "refuse_redirect" in roles or "harm_detection" in roles
            erased = truth.expected == "belief_change" and pressed
            at = (pair.layer, pair.head, pair.query_role, pair.key_role, "harm" if pressed else "none")
            value = None if erased else realised.get(at)
            if value:
                sign = sign.model_copy(update={"kind": "realised", "value": value})
            else:
                subject = subject or load_subject(folder)
                value = _virtual(subject, dictionary, pair, features)
                sign = sign.model_copy(update={"kind": "virtual", "value": value})
        found.append(sign)
    return found


def _virtual(subject: Subject, dictionary: Crosscoder, pair: PlantedSign, features: list[int]) -> float:
    offsets = [p.spans["answer"][0] - j for p in planted_prompts("none") for j in p.span("correct")]
    turn = offset_rotation(subject, pair.layer, torch.tensor(offsets))
    query, key = dictionary.directions(pair.layer)[features].float()[:, None]
    return float(virtual_interaction(score_maps(subject, pair.layer), pair.head, turn, query, key)[0])
