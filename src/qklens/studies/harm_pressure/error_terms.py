"""Stage `error_terms`: how much of refuse-and-redirect's effect meets the dictionary's error in the keys?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qklens.analyses.contrasts import Role
from qklens.analyses.interactions import mean_terms
from qklens.analyses.lens import BIAS, ERROR
from qklens.analyses.statistics import bootstrap_mean, item_means
from qklens.analyses.weighting import REALISED
from qklens.dictionaries.source import feature_index
from qklens.interventions.steer import Head
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Lab
from qklens.studies.results import ErrorTerms


def run(lab: Lab, heads: Sequence[Head], roles: dict[Role, str]) -> StageOutput:
    """Split the refuse-and-redirect row of the pair table on the correct option by kind of key source."""
    feature = feature_index(lab.source, roles["refuse_redirect"])
    rows = []
    for layer, head in heads:
        lens = lab.lens(layer, head)
        for condition in ("harm", "benign"):
            prompts, written = lab.prompts(condition, "report"), lab.written(condition, "report", layer)
            means = mean_terms(lens, prompts, written, REALISED)
            by_prompt = []
            for query, keys in zip(means.query, means.key, strict=True):
                terms = (means.scale * keys.vectors @ query.of(feature)).double().cpu().numpy()
                by_prompt.append([terms[:-2].sum(), terms[-2], terms[-1]])
            by_item = item_means(np.asarray(by_prompt))
            kinds = ("features", BIAS, ERROR)
            rows.append(
                ErrorTerms(
                    layer=layer,
                    head=head,
                    condition=condition,
                    through={kind: float(by_item[:, i].mean()) for i, kind in enumerate(kinds)},
                    ci={kind: bootstrap_mean(by_item[:, i], lab.seed) for i, kind in enumerate(kinds)},
                    total=float(by_item.sum(axis=1).mean()),
                )
            )
    return StageOutput(results={"error_terms": [row.model_dump() for row in rows]})
