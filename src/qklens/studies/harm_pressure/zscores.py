"""Stage `zscores`: the named pairs' virtual interaction at the chosen heads against six null distributions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qklens.analyses.contrasts import Role
from qklens.analyses.nulls import (
    NULLS,
    NullTest,
    seed_for,
    tests_or_reasons,
)
from qklens.analyses.statistics import benjamini_hochberg
from qklens.dictionaries.source import feature_index
from qklens.interventions.steer import Head
from qklens.models.scores import score_maps
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Lab
from qklens.studies.populations import populations
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
    """Test each named pair at each head against each null; q-values run over all tests of the stage.

    A null without spread at a head places nothing there; that is said, and the others stand.
    """
    features = {role: feature_index(lab.source, label) for role, label in roles.items()}
    index = [(features[query], features[key]) for query, key in PAIRS]
    rows: list[ZScore] = []
    histograms: list[NullHistogram] = []
    untested: list[str] = []
    for layer, head in heads:
        maps = score_maps(lab.subject, layer)
        queries, keys = populations(lab, layer)
        small = queries.is_small or keys.is_small
        for null in NULLS:
            if null == "rotated" and small:  # there, random pairs are drawn within the covariance already
                continue
            seed = seed_for(lab.seed, layer, head, null)
            turn = lab.mean_turn(layer)
            tests = tests_or_reasons(null, maps, head, turn, (queries, keys), index, n=N_DRAWS, seed=seed)
            placed = [test for test in tests if isinstance(test, NullTest)]
            if placed:
                histograms.append(_histogram(layer, head, placed[0]))
            for (query_role, key_role), test in zip(PAIRS, tests, strict=True):
                if isinstance(test, str):
                    untested.append(test)
                    continue
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
                        n_draws=N_DRAWS,
                        seed=seed,
                    )
                )
    adjusted = benjamini_hochberg([row.p for row in rows])
    rows = [row.model_copy(update={"q": q}) for row, q in zip(rows, adjusted, strict=True)]
    return StageOutput(
        results={
            "zscores": [row.model_dump() for row in rows],
            "null_histograms": [histogram.model_dump() for histogram in histograms],
            "untested": list(dict.fromkeys(untested)),
        }
    )


def _histogram(layer: int, head: int, test: NullTest) -> NullHistogram:
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
