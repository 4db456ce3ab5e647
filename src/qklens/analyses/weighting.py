"""How much each key token counts when a head's scores are summed over tokens.

For a weighting w the term of a pair is Σ_j w_j c ⟨q_i(p), k_k(j)⟩:

- realised on a span: w = softmax of the scores within the span (the gradient of its logsumexp);
- contrastive: w(correct) − w(incorrect), in which constants cancel as they do in the softmax; nothing for a head that
  sees one option alone (a sliding window), because there they would not;
- share: w(span) − the head's whole pattern, the gradient of log attention on the span; nothing for a head that sees
  nothing of the span, whose log attention is not finite.

Each w is the gradient, by the head's scores, of one number that needs no weights: the span's logsumexp, the difference
of two (the log ratio of attention on the options), the log of attention on the span. Under a soft cap S = τ tanh(u / τ)
that is the gradient by S, while terms are of u, because only u is a sum of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.lens import HeadLens
from qklens.analyses.written import WrittenPrompt
from qklens.data.render import PARTS, Part, Prompt
from qklens.errors import QklensError, nearest

Kind = Literal["realised", "contrastive", "share"]
WEIGHTING_KINDS: tuple[Kind, ...] = get_args(Kind)
_OPTIONS = {"correct", "incorrect", "option_A", "option_B"}
"""Spans that have parts."""


@dataclass(frozen=True, eq=False)
class Weighed:
    """One head's scores from the answer position of one prompt, taken over tokens.

    Attributes:
        weights: w.
        logsumexp: the number of which w is the gradient; None where the head sees no token of a span.
    """

    weights: Float[Tensor, " k_pos"]
    logsumexp: float | None


@dataclass(frozen=True)
class Weighting:
    """Which tokens a score is taken over.

    Attributes:
        kind: see above.
        span: the span of `realised` and `share`.
        parts: which parts of an option's span count.
    """

    kind: Kind
    span: str = "correct"
    parts: tuple[Part, ...] = PARTS

    def describe(self) -> dict[str, Any]:
        """As results say it."""
        span = "correct - incorrect" if self.kind == "contrastive" else self.span
        parts = {"parts": list(self.parts)} if set(self.spans()) <= _OPTIONS else {}
        return {"kind": self.kind, "span": span, **parts}

    def spans(self) -> tuple[str, ...]:
        """The spans whose tokens it weighs."""
        return ("correct", "incorrect") if self.kind == "contrastive" else (self.span,)

    def weigh(self, lens: HeadLens, prompt: Prompt, written: WrittenPrompt) -> Weighed:
        """The weights of a head at the answer position of one prompt, and what they are the gradient of.

        Raises:
            QklensError: the prompt has no such span.
        """
        scores = lens.scores(written, prompt.spans["answer"][0])
        spans = [list(prompt.span(name, self.parts)) for name in self.spans()]
        within = [within_span(scores, span) for span in spans]
        if not all(bool(weights.any()) for weights in within):
            return Weighed(torch.zeros_like(scores), None)
        if self.kind == "share":
            pattern, most = lens.pattern(scores), int(scores.argmax())
            everything = scores[most] - pattern[most].log()  # with a sink, where the head has one
            return Weighed(within[0] - pattern, float(scores[spans[0]].logsumexp(dim=0) - everything))
        first, *rest = (float(scores[span].logsumexp(dim=0)) for span in spans)
        return Weighed(within[0] - within[1] if rest else within[0], first - sum(rest))

    def fits(self, of: Prompt, to: Prompt) -> bool:
        """Whether one prompt's weights can be carried to another: it weighs spans alone, of as many tokens in both."""
        lengths = [[len(p.span(name, self.parts)) for name in self.spans()] for p in (of, to)]
        return self.kind != "share" and lengths[0] == lengths[1]

    def carried(self, weights: Float[Tensor, " k_pos"], of: Prompt, to: Prompt) -> Float[Tensor, " to_pos"]:
        """One prompt's weights at the same tokens of another that asks the same, which it must fit.

        Under pressure a head's own weights leave the very token that is pushed away, and its terms with them. Weighed
        as without pressure it counts whole; what all terms sum to is then the mean of the pressed scores over the
        tokens that the head would have looked at.
        """
        moved = weights.new_zeros(len(to.tokens))
        for name in self.spans():
            moved[list(to.span(name, self.parts))] = weights[list(of.span(name, self.parts))]
        return moved


def weighting_named(kind: str, span: str, parts: Sequence[str]) -> Weighting:
    """A weighting from names.

    Raises:
        QklensError: an unknown kind or part, or no part.
    """
    if kind not in WEIGHTING_KINDS:
        raise QklensError(
            f"--kind {kind!r} is unknown; expected one of {list(WEIGHTING_KINDS)}{nearest(kind, WEIGHTING_KINDS)}"
        )
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise QklensError(f"--parts {list(parts)}: expected some of {list(PARTS)}")
    option = kind == "contrastive" or span in _OPTIONS
    if kind == "contrastive" and span != "correct":
        raise QklensError(f"--span {span!r} has no say in --kind contrastive, which is correct - incorrect; drop one")
    if not option and len(set(parts)) < len(PARTS):
        raise QklensError(f"--parts has no say in span {span!r}; only options have letter, content and boundary")
    return Weighting(WEIGHTING_KINDS[WEIGHTING_KINDS.index(kind)], span, tuple(part for part in PARTS if part in parts))


REALISED, CONTRASTIVE, SHARE = Weighting("realised"), Weighting("contrastive"), Weighting("share")


def within_span(scores: Float[Tensor, " k_pos"], positions: Sequence[int]) -> Float[Tensor, " k_pos"]:
    """Softmax of the scores within a span, zero elsewhere: the gradient of the span's logsumexp.

    A span of which the head sees nothing (a sliding window) has no weight.

    Raises:
        QklensError: the span is empty.
    """
    if not positions:
        raise QklensError("a span without tokens has no score")
    weights = torch.zeros_like(scores)
    index = torch.tensor(list(positions), device=scores.device)
    if bool(scores[index].isfinite().any()):
        weights[index] = scores[index].softmax(dim=0)
    return weights
