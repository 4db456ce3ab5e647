"""Stage `zscores`: the named pairs' virtual interaction at the chosen heads against six null distributions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qklens.analyses.contrasts import Role
from qklens.analyses.nulls import NULLS, Population, null_test, population
from qklens.analyses.statistics import benjamini_hochberg
from qklens.dictionaries.source import feature_index
from qklens.interventions.steer import Head
from qklens.models.scores import score_maps
from qklens.studies.harm_pressure.lab import Lab
from qklens.studies.journal import StageOutput
from qklens.studies.results import NullHistogram, ZScore

PAIRS: tuple[tuple[Role, Role], ...] = (
    ("refuse_redirect", "harm_detection"),
    ("refuse_redirect", "correct_answer"),
    ("need_answer", "correct_answer"),
    ("need_answer", "harm_detection"),
)
N_DRAWS = 1000
_BINS = 40


def run(lab: Lab, heads: Sequence[Head], roles: dict[Role, str]) -> StageOutput:
    """Test each named pair at each head against each null; q-values run over all tests of the stage."""
    features = {role: feature_index(lab.source, label) for role, label in roles.items()}
    rows: list[ZScore] = []
    histograms: list[NullHistogram] = []
    for layer, head in heads:
        maps = score_maps(lab.subject, layer)
        queries, keys = populations(lab, layer)
        small = queries.is_small or keys.is_small
        for null in NULLS:
            if null == "rotated" and small:  # there, random pairs are drawn within the covariance already
                continue
            for query_role, key_role in PAIRS:
                q, k = features[query_role], features[key_role]
                test = null_test(
                    null,
                    maps,
                    head,
                    lab.mean_turn(layer),
                    queries,
                    keys,
                    (queries.vectors[q], keys.vectors[k]),
                    (float(queries.frequency[q]), float(keys.frequency[k])),
                    n=N_DRAWS,
                    seed=lab.seed,
                )
                rows.append(
                    ZScore(
                        layer=layer,
                        head=head,
                        query=roles[query_role],
                        key=roles[key_role],
                        value=test.value,
                        null=null,
                        z=test.z,
                        p=test.p,
                        q=1.0,
                        query_role=query_role,
                        key_role=key_role,
                    )
                )
                if (query_role, key_role) == PAIRS[0]:
                    histograms.append(_histogram(layer, head, test))
    adjusted = benjamini_hochberg([row.p for row in rows])
    rows = [row.model_copy(update={"q": q}) for row, q in zip(rows, adjusted, strict=True)]
    return StageOutput(
        results={
            "zscores": [row.model_dump() for row in rows],
            "null_histograms": [histogram.model_dump() for histogram in histograms],
        }
    )


def populations(lab: Lab, layer: int) -> tuple[Population, Population]:
    """Query features at the answer position, key features at intent and option tokens, over all conditions."""
    vectors = lab.source.directions(layer)
    answer, spans, answer_x, span_x = [], [], [], []
    for condition in ("none", "harm", "benign"):
        streams = lab.streams(condition, "report", [layer])
        for prompt, written, stream in zip(
            lab.prompts(condition, "report"), lab.written(condition, "report", layer), streams, strict=True
        ):
            positions = [p for name in ("intent", "correct", "incorrect") for p in prompt.spans[name]]
            answer.append(written.active.at([-1]))
            spans.append(written.active.at(positions))
            answer_x.append(stream[layer][-1:])
            span_x.append(stream[layer][positions])
    return (
        population(vectors, torch.cat(answer), torch.cat(answer_x)),
        population(vectors, torch.cat(spans), torch.cat(span_x)),
    )


def _histogram(layer: int, head: int, test) -> NullHistogram:  # noqa: ANN001
    draws = test.draws.double().numpy()
    counts, edges = np.histogram(draws, bins=_BINS)
    return NullHistogram(
        layer=layer,
        head=head,
        null=test.null,
        edges=edges.tolist(),
        counts=counts.tolist(),
        mean=float(draws.mean()),
        sd=float(draws.std(ddof=1)),
        n=len(draws),
        note=test.note,
    )
