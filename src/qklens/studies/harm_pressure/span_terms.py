"""Pair terms on the tokens of some spans, each token counting alike: what a pair adds to a head's score there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qklens.analyses.interactions import PairTerms
from qklens.data.render import Condition
from qklens.interventions.steer import Head
from qklens.studies.lab import Half, Lab


def span_terms(lab: Lab, head: Head, condition: Condition, half: Half, spans: Sequence[str]) -> PairTerms:
    """Terms from the answer at one head: on each prompt the mean over the spans' tokens, norms at observed values."""
    lens, prompts = lab.lens(*head), lab.prompts(condition, half)
    queries, keys = [], []
    for prompt, parts in zip(prompts, lab.written(condition, half, head[0]), strict=True):
        weights = torch.zeros(len(prompt.tokens), device=parts.residual.device)
        at = [p for name in spans for p in prompt.span(name)]
        weights[at] = 1 / len(at)
        queries.append(lens.query(parts, prompt.spans["answer"][0]))
        keys.append(lens.keys(parts, weights))
    share = tuple(1 / len(prompts) for _ in prompts)
    return PairTerms(lens.names, lens.maps.scale, tuple(queries), tuple(keys), share, (None,) * len(prompts))
