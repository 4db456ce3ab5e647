"""Which numbers depend on how the weights, or the dictionary, happen to be written: the table of analyses/gauge.py."""

from __future__ import annotations

from collections.abc import Sequence

from qklens.analyses.gauge import QUANTITIES, Gauge, Quantity, gauges_of
from qklens.report.story.parts import Section, Table
from qklens.report.text import count, listing, printable
from qklens.studies.results import Results

RESTS_ON: tuple[Quantity, ...] = (
    "contrastive feature pairs",
    "z against random_pairs",
    "z against matched",
    "pattern patching",
    "steering in activation_max units",
)
"""What this page's claims are made of."""
DESCRIBES: tuple[Quantity, ...] = (
    "realised bias terms",
    "realised error share",
    "score",
    "direct letter attribution",
    "virtual interaction",
)
"""What it also prints."""


def gauge(results: Results) -> Section:
    """What is invariant, for the gauges that the model's family has."""
    model_type = results.model.get("model_type")
    gauges = gauges_of(model_type)
    of_model = [g for g in gauges if not g.of_dictionary]
    of_dictionary = [g for g in gauges if g.of_dictionary]
    known = any(model_type in g.families for g in of_model)
    whose = (
        f"a {printable(model_type)} model" if known else "the families qklens reads (this run does not name its own)"
    )
    paragraphs = (
        "The same model can be written with other weights that give every prompt the same answers, and the same "
        "dictionary with other directions that write the same vectors. A number that changes with the writing says "
        f"how things are written, not what the model computes. Known here are {count(len(of_model), 'rewriting')} of "
        f"{whose} and {len(of_dictionary)} of a dictionary; their effects are measured on small random models.",
        _weights(of_model),
        _dictionary(of_dictionary),
    )
    return Section(
        "gauge",
        "Gauge",
        "Which of these numbers depend on how the weights happen to be written?",
        paragraphs,
        "Realised terms are weighted by the pattern on the correct option, contrastive ones by correct minus "
        "incorrect, share-weighted ones by correct minus the whole pattern. Steering, patches and ablations are read "
        "by the margin.",
        (
            Table("By number", ("number", "model rewritten", "dictionary rewritten"), _by_quantity(gauges)),
            Table(
                "By rewriting",
                ("rewriting", "what it does", "formula", "what changes"),
                tuple((_name(g), g.text, g.formula, listing(map(_words, g.changes))) for g in gauges),
            ),
        ),
    )


def _weights(gauges: Sequence[Gauge]) -> str:
    """What the claims have to fear from the weights."""
    text = f"The claims of this page rest on {listing(map(_words, RESTS_ON))}."
    moved = _moved(gauges, RESTS_ON)
    if not moved:
        text += " No rewriting of the model listed here changes any of them."
    for names, quantities in moved.items():
        text += f" Of these, rewriting the model can change {listing(map(_words, quantities))} ({names})."
    loose = _moved(gauges, DESCRIBES)
    if loose:
        told = (f"{listing(map(_words, quantities))} ({names})" for names, quantities in loose.items())
        text += f" It also changes {listing(told)}: these describe the weights as given."
    return text


def _dictionary(gauges: Sequence[Gauge]) -> str:
    """What the claims have to fear from the dictionary."""
    moved = [quantity for quantity in RESTS_ON if any(quantity in g.changes for g in gauges)]
    kept = [quantity for quantity in RESTS_ON if quantity not in moved]
    return (
        f"The dictionary is a choice of its own: rewriting it can change {listing(map(_words, moved))}. A claim about "
        f"a pair is therefore a claim about a pair of this dictionary. Free of it {'is' if len(kept) == 1 else 'are'} "
        f"{listing(map(_words, kept))}; that is why the verdict's rules are causal first."
    )


def _moved(gauges: Sequence[Gauge], quantities: Sequence[Quantity]) -> dict[str, list[str]]:
    """The quantities that some gauge changes, by which ones do."""
    found: dict[str, list[str]] = {}
    for quantity in quantities:
        names = listing(_name(g) for g in gauges if quantity in g.changes)
        if names:
            found.setdefault(names, []).append(quantity)
    return found


def _by_quantity(gauges: Sequence[Gauge]) -> tuple[tuple[str, ...], ...]:
    """Quantities with the same fate share a row; what nothing changes comes first."""
    rows: dict[tuple[str, str], list[str]] = {}
    for quantity in QUANTITIES:
        model, dictionary = (
            listing(_name(g) for g in gauges if quantity in g.changes and g.of_dictionary == side) or "kept"
            for side in (False, True)
        )
        rows.setdefault((model, dictionary), []).append(_words(quantity))
    kept_first = sorted(rows, key=lambda fate: sum(cell != "kept" for cell in fate))
    return tuple((_upper(", ".join(rows[fate])), *fate) for fate in kept_first)


def _name(gauge: Gauge) -> str:
    return gauge.name.replace("_", " ")


def _words(quantity: str) -> str:
    return quantity.replace("_", " ")


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
