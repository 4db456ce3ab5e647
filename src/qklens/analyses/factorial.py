"""Which part of the score pulls a head away: the query's change, the keys' change, or both together?

For an item under harm (h) and under its benign twin (b), at one head, with queries and keys before rotary, at every
token the two prompts share (the question, the options, what follows):

    u_h(j) = c ⟨R_p (q_b + Δq), R_j (k_b + Δk)⟩
           = ordinary            q_b · k_b
           + key_only            q_b · Δk     the keys look different to an unchanged query
           + answer_key          Δq · k_b     the pressed query meets the correct option's keys that were there anyway
           + harm_key            Δq · Δk      the pressed query meets what pressure wrote into these keys
           + elsewhere           Δq · k_h     the pressed query at all other tokens, the incorrect option's too
           + a constant                       what the pressed query adds at all tokens alike: softmax does not see it

The constant is the median of Δq · k_b, and that of Δq · Δk, over the tokens that are neither the correct option's nor
the sentence's; each stands for what the query's change does to a token that nothing singles out. So no term depends on
how the weights are written: one vector added to all keys moves the constant alone.

At the sentence itself, which has no twin token by token, `intent_key` is the rise of the logsumexp of its scores for
the ordinary query.

This needs no dictionary and no rotary approximation. Any set of terms can be taken out of the scores of the real run (a
score shift before softmax). Softmax makes terms stand in for one another, so one term's part is its Shapley value: the
margin that comes back when it is taken out, averaged over all orders of taking them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import factorial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.data.render import Prompt
from qklens.interventions.patch import ScoreShift
from qklens.interventions.steer import Head
from qklens.models.scores import rotation, score_maps
from qklens.models.subject import Subject

Term = Literal["answer_key", "harm_key", "key_only", "elsewhere", "intent_key"]
TERMS: tuple[Term, ...] = get_args(Term)
Streams = Sequence[dict[int, Float[Tensor, "_pos d_model"]]]


def factorial_terms(
    subject: Subject, head: Head, harm: Prompt, benign: Prompt, pressed: Tensor, calm: Tensor
) -> tuple[dict[Term, Float[Tensor, " k_pos"]], Float[Tensor, " k_pos"], Float[Tensor, " k_pos"]]:
    """The five terms of one head's scores at the answer position, over the harm prompt's tokens.

    Args:
        subject: the model.
        head: (layer, head).
        harm: the harm prompt.
        benign: its benign twin, same item and order.
        pressed: resid_pre of the head's layer under harm, `pos d_model`.
        calm: the same under benign.

    Returns:
        The terms, the ordinary scores q_b · k_b, and by how much the pressed scores q_h · k_h would change if the
        query's norms had the benign run's scales.
    """
    layer, h = head
    maps = score_maps(subject, layer)
    pressed, calm = pressed.to(subject.device), calm.to(subject.device)
    q_b = maps.whole_query(calm[benign.spans["answer"][0]], h)
    q_h = maps.whole_query(pressed[harm.spans["answer"][0]], h)
    q_held = maps.whole_query(pressed[harm.spans["answer"][0]], h, maps.scales(calm[benign.spans["answer"][0]]))
    k_h, k_calm = maps.whole_key(pressed, h), maps.whole_key(calm, h)
    k_b = k_h.clone()
    n = len(harm.tokens)
    shared = shared_tokens(harm, benign)
    k_b[shared[:, 0]] = k_calm[shared[:, 1]]
    correct, intent = torch.zeros(2, n, dtype=torch.bool, device=k_h.device)
    correct[list(harm.span("correct"))] = True
    intent[list(harm.span("intent"))] = True
    turn = rotation(subject, layer, torch.arange(n))
    answer = harm.spans["answer"][0]

    def scores(query: Tensor, key: Tensor) -> Tensor:
        return maps.scale * turn(key) @ turn.at(answer)(query)

    change, others = q_h - q_b, ~(correct | intent)

    def over_others(row: Tensor) -> Tensor:
        return row - row[others].median()

    at_ordinary, at_written = over_others(scores(change, k_b)), over_others(scores(change, k_h - k_b))
    there = list(benign.span("intent"))
    calm_turn = rotation(subject, layer, torch.arange(len(benign.tokens)))
    calm_intent = maps.scale * (calm_turn(k_calm)[there] @ calm_turn.at(benign.spans["answer"][0])(q_b))
    rise = scores(q_b, k_h)[intent].logsumexp(dim=0) - calm_intent.logsumexp(dim=0)
    terms: dict[Term, Tensor] = {
        "answer_key": torch.where(correct, at_ordinary, 0.0),
        "harm_key": torch.where(correct, at_written, 0.0),
        "key_only": scores(q_b, k_h - k_b),
        "elsewhere": torch.where(correct, 0.0, at_ordinary + at_written),
        "intent_key": torch.where(intent, rise, 0.0),
    }
    return terms, scores(q_b, k_b), scores(q_held - q_h, k_h)


def shared_tokens(harm: Prompt, benign: Prompt) -> Tensor:
    """(harm position, benign position) of the tokens that hold the same characters from the question on."""
    shift = benign.shared_from - harm.shared_from
    where = {start: position for position, start in enumerate(benign.starts)}
    pairs = [
        (position, where[start + shift])
        for position, start in enumerate(harm.starts)
        if start >= harm.shared_from and start + shift in where
    ]
    return torch.tensor(pairs)


@dataclass(frozen=True)
class TermRows:
    """What `factorial_terms` gives at some heads: one row a prompt over the harm prompt's tokens."""

    terms: dict[Term, dict[Head, list[Float[Tensor, "_k_pos"]]]]
    ordinary: dict[Head, list[Float[Tensor, "_k_pos"]]]
    rescaled: dict[Head, list[Float[Tensor, "_k_pos"]]]


def term_rows(
    subject: Subject,
    heads: Sequence[Head],
    harm: Sequence[Prompt],
    benign: Sequence[Prompt],
    pressed: Streams,
    calm: Streams,
) -> TermRows:
    """Each term at each head, for aligned prompts and their streams."""
    of_heads = [{head: list[Tensor]() for head in heads} for _ in range(len(TERMS) + 2)]
    rows = TermRows(dict(zip(TERMS, of_heads, strict=False)), *of_heads[-2:])
    for i, (h, b) in enumerate(zip(harm, benign, strict=True)):
        for head in heads:
            terms, ordinary, rescaled = factorial_terms(subject, head, h, b, pressed[i][head[0]], calm[i][head[0]])
            rows.ordinary[head].append(ordinary.float())
            rows.rescaled[head].append(rescaled.float())
            for term, values in terms.items():
                rows.terms[term][head].append(values.float())
    return rows


def option_pulls(rows: TermRows, options: Sequence[Sequence[Sequence[int]]]) -> Float[Tensor, "prompt head option"]:
    """What the query's change does to the score of each option, over what it does to other tokens.

    An option's score is that of its tokens by the ordinary query's attention within it: Σ_j softmax(q_b · k_b)_j u_j.

    Args:
        rows: every term at some heads.
        options: of each prompt, each option's tokens.
    """

    def pull(i: int, head: Head, tokens: Sequence[int]) -> Tensor:
        change = torch.stack([rows.terms[term][head][i] for term in ("answer_key", "harm_key", "elsewhere")]).sum(dim=0)
        return rows.ordinary[head][i][tokens].softmax(dim=0) @ change[tokens]

    return torch.tensor(
        [
            [[float(pull(i, head, list(tokens))) for tokens in spans] for head in rows.ordinary]
            for i, spans in enumerate(options)
        ]
    )


def removal(rows: TermRows, terms: Sequence[Term]) -> ScoreShift:
    """The score shift that takes a set of terms out at all heads."""
    return ScoreShift(
        {
            head: [-torch.stack([rows.terms[term][head][i] for term in terms]).sum(dim=0) for i in range(len(values))]
            for head, values in rows.ordinary.items()
        }
    )


def shapley_values(value: Callable[[frozenset[Term]], float]) -> dict[Term, float]:
    """Each term's mean marginal value over all orders; they sum to value(all) − value(none).

    φ_t = Σ_{S ∌ t} |S|! (n − |S| − 1)! / n! · (value(S ∪ t) − value(S))
    """
    n = len(TERMS)
    known = {frozenset(s): value(frozenset(s)) for k in range(n + 1) for s in combinations(TERMS, k)}
    result = {}
    for term in TERMS:
        without = [s for s in known if term not in s]
        result[term] = sum(
            factorial(len(s)) * factorial(n - len(s) - 1) / factorial(n) * (known[s.union((term,))] - known[s])
            for s in without
        )
    return result
