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
TITLE = "Same model, other weights"
_WORDS: dict[str, str] = {
    "z against random_pairs": "z against random pairs",
    "z against matched": "z against matched pairs",
    "steering in raw units": "steering by a fixed multiple of a direction",
    "steering in activation_max units": "steering by a feature's largest activation",
    "steering in resid_norm units": "steering by the residual stream's length",
}
_PAIR_TERMS = tuple(
    q for q in QUANTITIES if q.endswith((" feature pairs", " bias terms", " marginals", " error share"))
)
_ALL_PAIR_TERMS = "all pair terms and their sums"


def gauge(results: Results) -> Section:
    """What is invariant, for the gauges that the model's family has."""
    model_type = results.model.get("model_type")
    gauges = gauges_of(model_type)
    of_model = [g for g in gauges if not g.of_dictionary]
    of_dictionary = [g for g in gauges if g.of_dictionary]
    known = any(model_type in g.families for g in of_model)
    whose = (
        f"the {printable(model_type)} family" if known else "all families qklens reads (this run does not name its own)"
    )
    paragraphs = (
        "The same model can be written with other weights that give every prompt the same answers, and the same "
        "dictionary with other directions that add up to the same vectors. A number that such a rewriting changes "
        f"tells how the weights are written, not what the model computes. Known are "
        f"{count(len(of_model), 'rewriting')} for {whose} and {len(of_dictionary)} for a dictionary. What "
        "each changes was measured on small random models.",
        _weights(of_model),
        _dictionary(of_dictionary),
    )
    return Section(
        "gauge",
        TITLE,
        "Which of these numbers depend on how the weights happen to be written?",
        paragraphs,
        "Realised terms weigh the tokens of the correct option by the head's attention to them; contrastive terms take "
        "the incorrect option's off; share-weighted terms take all of the head's attention off. A bias term has a bias "
        "on either side, an error share counts terms with the dictionary's error on either side, and a marginal sums a "
        "source's terms over all its partners. Steering, patches and ablations are read by the margin. In the formulas "
        "\u21a6 reads \u201cbecomes\u201d; E, W_O and W_out write the residual stream (embedding, attention, MLP), "
        "\u03b3 and \u03b2 are a norm's gain and shift, \u03b5 is the number inside its root, d\u1d62 and a\u1d62 are "
        "a feature's direction and activation, b after a semicolon is the dictionary's bias, 1 is a vector of ones.",
        (
            Table("By number", ("number", "model rewritten", "dictionary rewritten"), _by_quantity(gauges)),
            Table(
                "By rewriting",
                ("rewriting", "what it does", "formula", "what changes"),
                tuple((_name(g), g.text, g.formula, listing(_grouped(g.changes))) for g in gauges),
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
        text += (
            f" Rewriting the model does change {listing(told)}. This page prints these too; they describe the weights "
            "as given. Names in brackets are rows of the second table."
        )
    return text


def _dictionary(gauges: Sequence[Gauge]) -> str:
    """What the claims have to fear from the dictionary."""
    moved = [quantity for quantity in RESTS_ON if any(quantity in g.changes for g in gauges)]
    kept = [quantity for quantity in RESTS_ON if quantity not in moved]
    return (
        f"Rewriting the dictionary can change {listing(map(_words, moved))}: a claim about a pair is a claim about a "
        f"pair of this dictionary. It cannot change {listing(map(_words, kept))}; that is why the verdict's rules ask "
        "for interventions first."
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
    return _WORDS.get(quantity, quantity)


def _grouped(quantities: Sequence[Quantity]) -> list[str]:
    """The quantities in words; where all pair terms are among them, they are told as one."""
    together = set(_PAIR_TERMS) <= set(quantities)
    words = [_ALL_PAIR_TERMS if together and quantity in _PAIR_TERMS else _words(quantity) for quantity in quantities]
    return list(dict.fromkeys(words))


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
