"""The features that a head's nulls are drawn from."""

from __future__ import annotations

from qklens.analyses.nulls import Population, population
from qklens.data.render import CONDITIONS
from qklens.studies.lab import Lab


def populations(lab: Lab, layer: int) -> tuple[Population, Population]:
    """Query features at the answer position, key features at intent and option tokens, over all conditions."""
    answers, spans = [], []
    for condition in CONDITIONS:
        for prompt, written in zip(
            lab.prompts(condition, "report"), lab.written(condition, "report", layer), strict=True
        ):
            answers.append((written, prompt.spans["answer"]))
            spans.append((written, [p for name in ("intent", "correct", "incorrect") for p in prompt.spans[name]]))
    vectors = lab.source.directions(layer)
    return population(vectors, answers), population(vectors, spans)
