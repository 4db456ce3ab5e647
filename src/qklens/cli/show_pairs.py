"""The tables of `qklens qk` on the terminal: roles, then every reading of every head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qklens.cli.columns import MISSING, columns, signed, write

if TYPE_CHECKING:
    from qklens.analyses.interactions import Side
    from qklens.studies.tables.pair_rows import Listing, Pair, PairReading, PairTable

_GROUPS: dict[Listing, str] = {"all": "all pairs", "features": "of features", "roles": "of roles"}
_SIDES: tuple[tuple[Side, str], ...] = (("query", "keys"), ("key", "queries"))
_MEANING = {
    "realised": "negative lowers attention",
    "contrastive": "negative favours the incorrect option",
    "share": "negative lowers the option's share",
}


_LOGSUMEXP = {
    "realised": "of the span's scores",
    "contrastive": "the correct option's less the incorrect one's, which is the log ratio of attention",
    "share": "less that of all tokens, which is log attention",
}


def pairs(table: PairTable) -> None:
    """The roles with their runners-up, then every reading of every head."""
    how = table.weighting
    lines = [
        f"{table.model['name']} through {table.dictionary['name']}: {how['kind']} terms over {how['span']} "
        f"({', '.join(how['parts'])}), ranked on half of {table.data['n_items']} items, measured on the other half",
        "",
        *columns(
            ("role", "feature", "contrast", "other half", "steadiness", "interaction", "tokens"),
            [
                (
                    r.role if r.chosen else "",
                    f"{r.feature}{' (named)' if r.named else ''}",
                    signed(r.contrast),
                    signed(r.contrast_report),
                    signed(r.steadiness),
                    signed(r.interaction),
                    " ".join(r.top_tokens),
                )
                for role in dict.fromkeys(r.role for r in table.roles)
                for r in [c for c in table.roles if c.role == role][:3]
            ],
            left=(0, 1, 6),
        ),
    ]
    for reading in table.readings:
        lines += ["", *_reading(reading)]
    lines += [
        "",
        f"value [95% over items]: mean term in score units; {_MEANING[how['kind']]}; of a difference, by how much",
        f"it rises. score: sum of all pairs. logsumexp: {_LOGSUMEXP[how['kind']]}; the score is its linear",
        "part. Pairs come from both ends of the ranking. z: virtual interaction against each null. q (Benjamini-",
        "Hochberg): for pairs of roles over such pairs; for others over all that were searched, as a listed pair is",
        "extreme by construction. contrast: what defines a role, in decoder-norm units, on the half that chose it and",
        "on the other; steadiness: its mean over its standard deviation over items; interaction: with the partner",
        "role. --role ROLE=FEATURE chooses another feature.",
    ]
    twice = {r.feature for r in table.roles if r.chosen and r.role == "refuse_redirect"} & {
        r.feature for r in table.roles if r.chosen and r.role == "harm_detection"
    }
    searched = [t for r in table.readings for p in r.pairs if not (p.query_role and p.key_role) for t in p.tests]
    if searched and all(t.q is None or t.q > 0.5 for t in searched):
        least = max(t.n_draws for t in searched)
        lines.append(
            f"note: p is counted, at least 1/{least + 1}; over all pairs that were searched no listed q can be "
            "small with so few draws; see z."
        )
    notes = {t.note for r in table.readings for p in r.pairs for t in p.tests if t.note}
    lines += [f"note: {note}" for note in sorted(notes)]
    lines += [f"note: {feature} plays both refuse_redirect and harm_detection here" for feature in sorted(twice)]
    write(lines)


def _reading(reading: PairReading) -> list[str]:
    whole = f"score {reading.score:+.3f}"
    if reading.logsumexp is not None and reading.logsumexp_ci is not None:
        low, high = reading.logsumexp_ci
        whole += f", logsumexp {reading.logsumexp:+.3f} [{low:+.3f}, {high:+.3f}]"
    if reading.hidden:
        whole += f"; {reading.hidden} prompts hide a span from it"
    nulls = list(dict.fromkeys(t.null for p in reading.pairs for t in p.tests))
    header = ("", "query", "key", "value", "95%", *(part for null in nulls for part in (f"z {null}", "q")))
    rows, before = [], None
    for p in reading.pairs:
        group = _GROUPS[p.listed] if p.listed != before else ""
        before = p.listed
        sources = (_source(p.query, p.query_role), _source(p.key, p.key_role))
        rows.append((group, *sources, f"{p.value:+.4f}", _ci(p), *_tests(p, nulls)))
    return [
        f"L{reading.layer}H{reading.head} {reading.reading}: {whole}; of all |terms| {_share(reading, 'error')} have "
        f"an error on a side, {_share(reading, 'bias')} a bias",
        *(f"{side} sources, each over all {other}: {_sums(reading, side)}" for side, other in _SIDES),
        *columns(header, rows, left=(0, 1, 2)),
    ]


def _share(reading: PairReading, kind: str) -> str:
    return f"{100 * sum(share for name, share in reading.absolute_by_kind.items() if kind in name):.0f}%"


def _sums(reading: PairReading, side: Side) -> str:
    strongest = sorted(reading.marginals[side], key=lambda m: -abs(m.value))[:3]
    return ", ".join(f"{m.source} {m.value:+.2f}" for m in strongest)


def _tests(pair: Pair, nulls: Sequence[str]) -> list[str]:
    by_null = {test.null: test for test in pair.tests}
    shown = []
    for null in nulls:
        test = by_null.get(null)
        if test is None or test.z is None or test.q is None:
            shown += [MISSING, MISSING]
        else:
            shown += [f"{test.z:+.1f}", f"{test.q:.3f}"]
    return shown


def _ci(pair: Pair) -> str:
    return f"[{pair.ci[0]:+.4f}, {pair.ci[1]:+.4f}]"


def _source(name: str, role: str | None) -> str:
    return f"{name} {role}" if role and role != name else name
