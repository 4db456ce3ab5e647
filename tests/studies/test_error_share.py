"""How much of the terms the error takes is read off contrastive terms, which no way of writing the weights changes."""

from __future__ import annotations

import pytest

from qklens.analyses.interactions import mean_terms
from qklens.analyses.weighting import CONTRASTIVE, REALISED
from qklens.data.items import Dataset
from qklens.data.render import CONDITIONS, LetterForm
from qklens.studies.harm_pressure import interactions
from qklens.studies.lab import Lab


def test_the_recorded_error_share_is_of_contrastive_terms_alone(tiny_llama, items):
    lab = Lab(tiny_llama(), Dataset("few", items[:8], "0"), LetterForm("", ""), 0)
    lab.source = lab.fit_directions()
    heads = [(1, 0), (2, 3)]
    recorded = interactions.run(lab, heads, None, {}).results["completeness"]["error_share"]

    def share(weighting) -> float:
        found = [
            mean_terms(
                lab.lens(*head), lab.prompts(c, "report"), lab.written(c, "report", head[0]), weighting
            ).error_share()
            for head in heads
            for c in CONDITIONS
        ]
        return sum(found) / len(found)

    assert recorded == pytest.approx(share(CONTRASTIVE), rel=1e-6)
    assert abs(share(REALISED) - share(CONTRASTIVE)) > 0.01
