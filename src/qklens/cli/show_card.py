"""A feature's card on the terminal: highlights by colour, or by marks where there is none.

All tokens and labels are foreign text: they lose what could move a cursor or reorder a line, and are never markup.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from qklens.analyses.passages import PLACES
from qklens.cli.columns import MISSING, columns
from qklens.report.text import printable

if TYPE_CHECKING:
    from qklens.analyses.feature_card import Density, Example, FeatureCard, Promoted
    from qklens.studies.cards import ShownCard
    from qklens.studies.pair import Checkpoints

SHADES = ("grey93 on grey30", "black on light_goldenrod3", "black on orange1", "bold white on red3")
_STRONG = 0.25
_BARS = " ▁▂▃▄▅▆▇█"


def card(shown: ShownCard, top: int) -> None:
    """The whole card."""
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
    colour = console.color_system is not None and not console.no_color
    for line in _lines(shown, top, colour):
        console.print(line)


def _lines(shown: ShownCard, top: int, colour: bool) -> list[Text]:
    c, text = shown.card, shown.text
    head = [
        f"{c.feature} at resid_pre.{c.layer} of {c.model}, {c.dictionary}; length {c.norm:.3f}",
        *([_whose(shown.checkpoints)] if shown.checkpoints else []),
        *([f"label: {c.label}"] if c.label else []),
        *([f"roles in {shown.run}: {', '.join(c.roles) or 'none'}"] if shown.run else []),
        "",
        *columns(
            ("on", "tokens", "active", "mean", "largest", "log10 of activation"),
            [
                (
                    d.group,
                    str(d.tokens),
                    f"{100 * d.share:.2f}%",
                    MISSING if d.mean is None else f"{d.mean:.3g}",
                    f"{d.largest:.3g}",
                    _bars(d),
                )
                for d in c.density
            ],
            left=(0, 5),
        ),
        "",
        *_places(c),
    ]
    lines = [Text(printable(line)) for line in head]
    for title, examples in (
        (f"strongest in {text.name} ({text.windows} windows, {text.tokens} tokens)", c.top[:top]),
        ("most negative there", c.bottom[:top]),
        ("one at random from each tenth of its active tokens there, strongest first", c.deciles[::-1]),
        *((f"strongest under {g}", [e for e in c.prompts if e.group == g][:top]) for g in ("none", "harm", "benign")),
    ):
        if examples:
            lines += [Text(""), Text(printable(title)), *(marked(e, c, colour) for e in examples)]
    rest = [
        "",
        *columns(
            ("promotes", "logit", "suppresses", "logit", "nearest", "cosine", "opposite", "cosine"),
            [
                (
                    *_token(c.promoted, i),
                    *_token(c.suppressed, i),
                    *(
                        part
                        for some in (c.nearest, c.opposite)
                        for part in ((some[i].feature, f"{some[i].cosine:+.2f}") if i < len(some) else ("", ""))
                    ),
                )
                for i in range(min(top, max(len(c.promoted), len(c.nearest))))
            ],
            left=(0, 2, 4, 6),
        ),
        "",
        "logit: W_U (C d γ) / σ of the unit direction past all later layers, less the vocabulary's mean; positive",
        f"promotes; the final norm's σ is held at {c.logit_scale:.3g}. First tokens of texts and prompts do not count.",
    ]
    if text.unknown > 0.05:
        rest.append(f"note: {100 * text.unknown:.0f}% of the text's words are unknown to the tokenizer")
    return lines + [Text(printable(line)) for line in rest]


def _whose(pair: Checkpoints) -> str:
    return (
        f"length {pair.norm_base:.3f} in {pair.base}, {pair.norm_chat:.3f} in {pair.chat}; at equal mean squares "
        f"{100 * (1 - pair.relative_norm):.0f}% is base's and {100 * pair.relative_norm:.0f}% chat's; cosine of the "
        f"two {pair.cosine:+.2f}"
    )


def marked(example: Example, c: FeatureCard, colour: bool) -> Text:
    """One example: active tokens shaded; without colour the token itself is in [[ ]] and other strong ones in [ ]."""
    most = max((max(abs(d.largest), abs(d.least)) for d in c.density if d.group == example.group), default=0.0)
    where = example.where if example.place is None else f"{example.where}, {example.place}"
    line = Text(printable(f"  {example.activation:8.3f}  "))
    for i, token in enumerate(example.tokens):
        text = printable(token.text)
        word = text.strip()
        before, _, after = text.partition(word) if word else (text, "", "")
        line.append(before)
        share = abs(token.activation) / most if most else 0.0
        if colour and share > 0:
            line.append(word, style=SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)])
        elif i == example.at:
            line.append(f"[[{word}]]")
        else:
            line.append(f"[{word}]" if share >= _STRONG and word else word)
        line.append(after)
    line.append(printable(f"   ({where})"))
    return line


def _bars(density: Density) -> str:
    if not density.counts:
        return MISSING
    most = max(density.counts)
    bars = "".join(_BARS[-(-n * (len(_BARS) - 1) // most)] for n in density.counts)
    return f"{density.edges[0]:+.1f} {bars} {density.edges[-1]:+.1f}"


def _places(c: FeatureCard) -> Sequence[str]:
    names = sorted({p.place for p in c.places}, key=PLACES.index)
    groups = list(dict.fromkeys(p.condition for p in c.places))
    if not names:
        return ()
    cells = {(p.condition, p.place): p for p in c.places}
    return columns(
        ("share of tokens active, mean activation", *groups),
        [
            (
                name,
                *(f"{100 * p.share:.0f}% {p.mean:.2f}" if (p := cells.get((g, name))) else MISSING for g in groups),
            )
            for name in names
        ],
    )


def _token(rows: Sequence[Promoted], i: int) -> tuple[str, str]:
    return (repr(rows[i].token), f"{rows[i].logit:+.3f}") if i < len(rows) else ("", "")
