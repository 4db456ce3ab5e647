"""Which pairs of sources pull heads where: realised pairs by condition and by difference, tested against nulls.

Pairs are ranked on the discovery half of the items and measured on the other, with an interval over items; their
virtual interaction stands against null distributions beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

import numpy as np

from qklens.analyses.contrasts import QUERY_ROLES, ROLES, Role
from qklens.analyses.interactions import PairTerms, Side, mean_terms, refuse_silence
from qklens.analyses.lens import ERROR, HeadLens
from qklens.analyses.nulls import MIN_PAIRS, NULLS, NullName, NullTest, seed_for, tests_or_reasons
from qklens.analyses.statistics import Array, benjamini_hochberg, bootstrap_mean, bootstrap_means, item_means
from qklens.analyses.weighting import REALISED, Weighting
from qklens.data.render import CONDITIONS
from qklens.errors import QklensError, nearest
from qklens.interventions.steer import Head
from qklens.models.scores import score_maps, virtual_interaction
from qklens.studies.choices import belief_candidates, default_heads
from qklens.studies.lab import HALVES, Half, Lab
from qklens.studies.populations import key_spans, populations
from qklens.studies.progress import Tick, silent
from qklens.studies.roles import find_roles, known_roles
from qklens.studies.tables.pair_rows import Listing, Marginal, Pair, PairReading, PairTable, Test

READINGS: tuple[str, ...] = ("none", "harm", "benign", "harm-none", "harm-benign")
CLAIM_NULLS: tuple[NullName, ...] = ("random_pairs", "matched")
MAX_DRAWS = 100_000


@dataclass(frozen=True)
class PairRequest:
    """What to list.

    Attributes:
        heads: the heads; none means the answer-selection heads of the lab's items.
        weighting: over which tokens scores are taken.
        readings: of `READINGS`.
        top: how many pairs from either end.
        nulls: which nulls.
        draws: pairs drawn from each.
    """

    heads: tuple[Head, ...] = ()
    weighting: Weighting = REALISED
    readings: tuple[str, ...] = READINGS
    top: int = 10
    nulls: tuple[NullName, ...] = CLAIM_NULLS
    draws: int = 1000

    @classmethod
    def parse(
        cls,
        *,
        readings: Sequence[str],
        nulls: Sequence[str],
        **rest: Any,  # noqa: ANN401
    ) -> PairRequest:
        """A request with readings and nulls by name; `all` stands for every null.

        Raises:
            QklensError: an unknown reading or null, or none.
        """
        for option, names, known in (("--reading", readings, READINGS), ("--nulls", nulls, (*NULLS, "all"))):
            strange = next((name for name in names if name not in known), None)
            if strange is not None or not names:
                hint = nearest(strange, known) if strange else ""
                raise QklensError(f"{option} {strange or ''!r}: expected some of {list(known)}{hint}")
        tested: tuple[NullName, ...] = tuple(null for null in NULLS if null in nulls or "all" in nulls)
        return cls(readings=tuple(dict.fromkeys(readings)), nulls=tested, **rest)

    def __post_init__(self) -> None:
        if self.top < 1:
            raise QklensError(f"--top {self.top}: expected at least 1")
        if not MIN_PAIRS <= self.draws <= MAX_DRAWS:
            raise QklensError(f"--draws {self.draws}: a null needs at least {MIN_PAIRS} pairs, at most {MAX_DRAWS}")
        intent = self.weighting.kind != "contrastive" and self.weighting.span == "intent"
        if intent and any("none" in reading for reading in self.readings):
            raise QklensError("span 'intent' is not in the bare question; ask for harm, benign or harm-benign")


def pair_table(
    lab: Lab, request: PairRequest, named: Mapping[str, str] = MappingProxyType({}), *, tick: Tick = silent
) -> PairTable:
    """Read the pairs of some heads.

    Args:
        lab: model, items and source.
        request: what to list.
        named: features that a person gave roles.
        tick: given the number of steps, what to call after each.

    Raises:
        QklensError: a head that does not exist or whose input the source does not write, a span in which no feature is
            active, an unknown feature or role.
    """
    known_roles(lab.source, named)
    heads = request.heads or default_heads(lab, lab.source.layers, lab.source.name)
    lenses = [lab.lens(*head) for head in heads]
    step = tick(len(lenses))
    belief = belief_candidates(lab)[0].feature
    roles, candidates = find_roles(lab, heads, lab.source.labels[belief], named)
    listed = [one for lens in lenses for one in _list_pairs(lab, lens, request, roles.chosen)]
    tests: dict[tuple[Head, int, int], list[NullTest | str]] = {}
    for head in heads:
        tests |= _test_pairs(lab, head, [one for one in listed if one.head == head], request)
        step()
    named_pairs = {(one.head, *pair) for one in listed for pair in one.named}
    searched = len(request.nulls) * sum(one.searched for one in listed)
    tested = _adjusted({p: row for p, row in tests.items() if p in named_pairs}, request, 0)
    tested |= _adjusted({p: row for p, row in tests.items() if p not in named_pairs}, request, searched)
    virtual = {pair: value for head in heads for pair, value in _virtual(lab, head, [p for p in tests if p[0] == head])}
    return PairTable(
        model=lab.subject.describe(),
        dictionary=lab.source.describe(),
        data={**lab.dataset.describe(), "letter_form": lab.form.name},
        seed=lab.seed,
        weighting=request.weighting.describe(),
        heads=list(heads),
        null_keys=list(key_spans(request.weighting.spans())),
        searched=searched,
        roles=candidates,
        readings=[_reading(one, roles.chosen, tested, virtual, request.top, lab.seed) for one in listed],
    )


@dataclass(frozen=True)
class _Listed:
    """The pairs of one head in one reading: indices, and their values on both halves.

    `logsumexp` is by item, NaN where a span is hidden; `named` are the pairs of roles, `searched` is how many pairs of
    features the others were chosen from.
    """

    head: Head
    reading: str
    report: PairTerms
    logsumexp: Array
    pairs: list[tuple[int, int]]
    listing: list[Listing]
    named: list[tuple[int, int]]
    searched: int
    chosen: Array
    value: Array
    low: Array
    high: Array


def _list_pairs(lab: Lab, lens: HeadLens, request: PairRequest, roles: dict[Role, int]) -> list[_Listed]:
    terms: dict[tuple[str, Half], PairTerms] = {}
    for half in HALVES:
        for c in CONDITIONS:
            if any(c in reading.split("-") for reading in request.readings):
                written = lab.written(c, half, lens.layer)
                prompts = lab.prompts(c, half)
                terms[c, half] = mean_terms(lens, prompts, written, request.weighting)
                refuse_silence(lens, prompts, written, request.weighting, terms[c, half])
    index = {name: i for i, name in enumerate(lens.names)}
    written = lab.source.directions(lens.layer).any(dim=-1)
    named = [(roles[q], roles[k]) for q in QUERY_ROLES for k in ROLES if k not in QUERY_ROLES]
    named = [pair for pair in named if all(bool(written[f]) for f in pair)]
    found = []
    for reading in request.readings:
        first, *rest = reading.split("-")
        halves = {
            half: terms[first, half].minus(terms[rest[0], half]) if rest else terms[first, half] for half in HALVES
        }
        kinds: tuple[tuple[Listing, bool], ...] = (("all", False), ("features", True))
        ends: dict[Listing, list[tuple[int, int]]] = {
            kind: [(index[q], index[k]) for q, k, _ in halves["discovery"].top(request.top, features_only=only)]
            for kind, only in kinds
        }
        ends["roles"] = named
        listing: dict[tuple[int, int], Listing] = {}
        for kind, some in ends.items():
            for pair in some:
                listing.setdefault(pair, kind)
        pairs = list(listing)
        by_half = {
            half: _by_item(terms[first, half], pairs) - (_by_item(terms[rest[0], half], pairs) if rest else 0.0)
            for half in HALVES
        }
        low, high = bootstrap_means(by_half["report"], lab.seed)
        found.append(
            _Listed(
                (lens.layer, lens.head),
                reading,
                halves["report"],
                _logsumexp(terms[first, "report"]) - (_logsumexp(terms[rest[0], "report"]) if rest else 0.0),
                pairs,
                list(listing.values()),
                named,
                halves["discovery"].searched(),
                by_half["discovery"].mean(axis=0),
                by_half["report"].mean(axis=0),
                low,
                high,
            )
        )
    return found


def _by_item(terms: PairTerms, pairs: Sequence[tuple[int, int]]) -> Array:
    return item_means(terms.by_prompt(pairs).double().numpy())


def _logsumexp(terms: PairTerms) -> Array:
    return item_means(np.array([math.nan if value is None else value for value in terms.logsumexp]))


def _test_pairs(
    lab: Lab, head: Head, listed: Sequence[_Listed], request: PairRequest
) -> dict[tuple[Head, int, int], list[NullTest | str]]:
    """Each listed pair of features against each null, once however often it is listed; or why it cannot be placed."""
    queries, keys = populations(lab, head[0], key_spans(request.weighting.spans()))
    n = len(queries.vectors)
    pairs = list(dict.fromkeys(pair for one in listed for pair in one.pairs if max(pair) < n))
    if not pairs:
        return {}
    maps, turn = score_maps(lab.subject, head[0]), lab.mean_turn(head[0])

    def against(null: NullName) -> list[NullTest | str]:
        seed = seed_for(lab.seed, *head, null)
        return tests_or_reasons(null, maps, head[1], turn, (queries, keys), pairs, n=request.draws, seed=seed)

    by_null = [against(null) for null in request.nulls]
    return {(head, *pair): list(row) for pair, row in zip(pairs, zip(*by_null, strict=True), strict=True)}


def _adjusted(
    tests: dict[tuple[Head, int, int], list[NullTest | str]], request: PairRequest, searched: int
) -> dict[tuple[Head, int, int], list[Test]]:
    """One family of tests with its q-values."""
    p_values = [test.p for row in tests.values() for test in row if isinstance(test, NullTest)]
    q_values = iter(benjamini_hochberg(p_values, searched))

    def shown(null: str, test: NullTest | str) -> Test:
        if isinstance(test, str):
            return Test(null=null, z=None, p=None, q=None, n_draws=request.draws, seed=None, note=test)
        return Test(
            null=null, z=test.z, p=test.p, q=next(q_values), n_draws=request.draws, seed=test.seed, note=test.note
        )

    return {pair: [shown(null, t) for null, t in zip(request.nulls, row, strict=True)] for pair, row in tests.items()}


def _virtual(lab: Lab, head: Head, pairs: Sequence[tuple[Head, int, int]]) -> list[tuple[tuple[Head, int, int], float]]:
    if not pairs:
        return []
    directions = lab.source.directions(head[0])
    query, key = (directions[[pair[side] for pair in pairs]] for side in (1, 2))
    maps, turn = score_maps(lab.subject, head[0]), lab.mean_turn(head[0])
    return list(zip(pairs, virtual_interaction(maps, head[1], turn, query, key).tolist(), strict=True))


def _reading(
    one: _Listed,
    roles: dict[Role, int],
    tested: dict[tuple[Head, int, int], list[Test]],
    virtual: dict[tuple[Head, int, int], float],
    top: int,
    seed: int,
) -> PairReading:
    names, seen = one.report.names, one.logsumexp[~np.isnan(one.logsumexp)]
    role_of: dict[Side, dict[int, str]] = {
        "query": {f: role for role, f in roles.items() if role in QUERY_ROLES},
        "key": {f: role for role, f in roles.items() if role not in QUERY_ROLES},
    }
    shares = one.report.absolute_shares()
    return PairReading(
        layer=one.head[0],
        head=one.head[1],
        reading=one.reading,
        score=one.report.total,
        logsumexp=float(seen.mean()) if len(seen) else None,
        logsumexp_ci=bootstrap_mean(seen, seed) if len(seen) else None,
        hidden=one.report.logsumexp.count(None),
        by_kind=one.report.shares(),
        absolute_by_kind=shares,
        error_share=sum(share for name, share in shares.items() if ERROR in name),
        marginals={side: _marginals(one.report, side, top) for side in get_args(Side)},
        pairs=[
            Pair(
                listed=one.listing[i],
                query=names[q],
                key=names[k],
                query_role=role_of["query"].get(q),
                key_role=role_of["key"].get(k),
                value=float(one.value[i]),
                ci=(float(one.low[i]), float(one.high[i])),
                value_when_chosen=float(one.chosen[i]),
                virtual=virtual.get((one.head, q, k)),
                tests=tested.get((one.head, q, k), []),
            )
            for i, (q, k) in enumerate(one.pairs)
        ],
    )


def _marginals(terms: PairTerms, side: Side, top: int) -> list[Marginal]:
    """The strongest sources from both ends, then bias and error where they are not among them."""
    values = terms.marginal(side)
    order = values.argsort(stable=True).tolist()
    ends = [i for i in order[:top] if values[i] < 0] + [i for i in order[::-1][:top] if values[i] > 0]
    rest = [i for i in (len(values) - 2, len(values) - 1) if i not in ends]
    return [Marginal(source=terms.names[i], value=float(values[i])) for i in [*ends, *rest]]
