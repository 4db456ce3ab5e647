"""Whom else does refuse-and-redirect push away?"""

from __future__ import annotations

from qklens.report.story.parts import Section, Table, empty
from qklens.report.text import count, finite, listing, number, printable, role_words, signed, source_words, z_value
from qklens.studies.results import Results


def partners(results: Results) -> Section:
    """Both ends of the ranking of key features."""
    title = "Other features that refuse-and-redirect meets"
    question = "Which other key features does refuse-and-redirect push the selected heads away from?"
    ordered = sorted((p for p in results.partners if finite(p.value)), key=lambda p: p.value)
    if not ordered or "partners" in results.skipped:
        return empty(results, "partners", title, question)

    def name(index: int) -> str:
        partner = ordered[index]
        tokens = ", ".join(printable(token) for token in partner.top_tokens[:3])
        label = source_words(partner.feature, partner.role)
        return f"{label} at z {z_value(partner.z)}" + (f" (active on {tokens})" if tokens else "")

    negative = [i for i, p in enumerate(ordered) if p.value < 0][:3]
    paragraphs = [
        f"Of {count(len(ordered), 'key feature')} listed from both ends of the ranking, the most negative "
        + (
            f"{'is' if len(negative) == 1 else 'are'} {listing(map(name, negative))}."
            if negative
            else "does not exist: none is below zero."
        )
    ]
    harm = [i + 1 for i, p in enumerate(ordered) if p.role == "harm_detection"]
    if harm:
        paragraphs.append(
            f"Counted from the negative end of this list, harm detection ranks {listing(map(str, harm))}."
        )
    else:
        paragraphs.append("Harm detection is not in this list: at neither end is it among the strongest partners.")
    sets = list(dict.fromkeys(s for p in ordered for s in p.activation))
    table = Table(
        "Partners",
        (
            "rank",
            "feature",
            "role",
            "interaction",
            "z",
            "most active on",
            *(f"activation: {printable(s)}" for s in sets),
        ),
        tuple(
            (
                number(p.rank, 0),
                printable(p.feature),
                role_words(p.role) if p.role else "",
                signed(p.value, 3),
                z_value(p.z),
                ", ".join(map(printable, p.top_tokens)),
                *(number(p.activation.get(s)) for s in sets),
            )
            for p in ordered
        ),
    )
    return Section(
        "partners",
        title,
        question,
        tuple(paragraphs),
        "Virtual interaction with refuse-and-redirect as the query, mean over the selected heads. Rank 1 is the most "
        "negative; negative ranks count from the positive end. Right: mean activation on the intents of each set, "
        "which says where the partner could act; it is not a causal test.",
        (table,),
    )
