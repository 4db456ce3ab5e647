"""The features that a head's nulls are drawn from."""

from __future__ import annotations

from collections.abc import Sequence

from qklens.analyses.nulls import Population, population
from qklens.data.render import CONDITIONS
from qklens.studies.lab import Lab

KEY_SPANS = ("intent", "correct", "incorrect")


def key_spans(weighed: Sequence[str]) -> tuple[str, ...]:
    """The spans that key features are drawn from: intent and options, or what is weighed where that is elsewhere."""
    return KEY_SPANS if set(weighed) <= {*KEY_SPANS, "option_A", "option_B"} else tuple(weighed)


def populations(lab: Lab, layer: int, spans_of_keys: Sequence[str] = KEY_SPANS) -> tuple[Population, Population]:
    """Query features at the answer position, key features at some spans' tokens, over all conditions."""
    answers, spans = [], []
    for condition in CONDITIONS:
        for prompt, written in zip(
            lab.prompts(condition, "report"), lab.written(condition, "report", layer), strict=True
        ):
            answers.append((written, prompt.spans["answer"]))
            spans.append((written, [p for name in spans_of_keys for p in prompt.spans[name]]))
    vectors = lab.source.directions(layer)
    return population(vectors, answers), population(vectors, spans)
