"""Numbers and foreign strings as the report prints them.

Prompts, tokens, feature labels and model names come from files that anyone may have written. They are escaped where
they meet markup (Jinja2 in the page, Vega in the figures); here they lose only what would break XML itself or let a
string reorder the text around it.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

MISSING = "not available"
MINUS = "\u2212"

_ROLE_WORDS = {
    "correct_answer": "correct answer",
    "need_answer": "need answer",
    "harm_detection": "harm detection",
    "refuse_redirect": "refuse-and-redirect",
}
_VISIBLE_SPACES = {"\n": "\u21b5", "\r": "\u21b5", "\t": "\u21e5"}
# Cc/Cs are illegal or invisible in XML 1.0; Cf holds the bidirectional overrides that can reverse neighbouring text.
_UNPRINTABLE = {"Cc", "Cs", "Cf", "Co", "Cn"}


def printable(value: object) -> str:
    """`value` as one line of text that XML can hold: newlines and tabs drawn, other control characters replaced."""
    out: list[str] = []
    for char in str(value):
        if char in _VISIBLE_SPACES:
            out.append(_VISIBLE_SPACES[char])
        elif unicodedata.category(char) in _UNPRINTABLE:
            out.append("\ufffd")
        else:
            out.append(char)
    return "".join(out)


def shorten(value: object, limit: int) -> str:
    """`printable(value)`, cut in the middle to at most `limit` characters: both ends of a label carry meaning."""
    text = printable(value)
    if len(text) <= limit:
        return text
    tail = max(1, (limit - 1) // 3)
    return f"{text[: limit - 1 - tail]}\u2026{text[-tail:]}"


def finite(value: float | None) -> bool:
    """Whether `value` is a number that can be drawn."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 2) -> str:
    """`value` with `digits` decimals and a true minus sign; what would round to zero keeps digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-4:
        text = re.sub(r"e([+-])0+", r"e\1", f"{value:.1e}")
    elif size < 0.5 * 10**-digits:
        text = f"{value:.2g}"  # rounding would print a small number as none at all
    else:
        text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def signed(value: float | None, digits: int = 2) -> str:
    """`number` with an explicit plus sign."""
    text = number(value, digits)
    return f"+{text}" if value is not None and math.isfinite(value) and value > 0 else text


def tick(value: float, digits: int = 2) -> str:
    """A signed number of fixed width, for the cells of a figure: what rounds to nothing prints as 0.00."""
    text = f"{value:+.{digits}f}"
    return (text[1:] if float(text) == 0 else text).replace("-", MINUS)


def z_value(value: float) -> str:
    """A z-score with its sign and one decimal; what rounds to nothing prints as 0.0."""
    return tick(value, 1) if math.isfinite(value) else MISSING


def dose(value: float) -> str:
    """A strength as it was set: `1`, `1.5`, with a true minus sign."""
    return f"{value:g}".replace("-", MINUS) if math.isfinite(value) else MISSING


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent; 1 prints as 100%."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{100 * value:.{digits}f}"
    text = text.removesuffix("." + "0" * digits) if digits else text
    return ("0" if text in {"-0", "-0.0"} else text).replace("-", MINUS) + "%"


def percent_interval(interval: Sequence[float]) -> str:
    """A 95% interval of a share."""
    if not all(math.isfinite(bound) for bound in interval):
        return f"interval {MISSING}"
    return f"95% interval {percent(interval[0])} to {percent(interval[1])}"


def interval(bounds: Sequence[float], digits: int = 2) -> str:
    """A 95% interval of a number."""
    if not all(math.isfinite(bound) for bound in bounds):
        return f"interval {MISSING}"
    return f"95% interval {number(bounds[0], digits)} to {number(bounds[1], digits)}"


def signed_estimate(value: Sequence[float] | None, digits: int = 2) -> str:
    """A mean with its 95% interval, `+0.31 [0.16, 0.49]`; nothing for none."""
    if value is None:
        return ""
    return f"{signed(value[0], digits)} [{number(value[1], digits)}, {number(value[2], digits)}]"


def signed_share(value: Sequence[float] | None) -> str:
    """A share with its 95% interval in whole per cent, `−4% [−6, −2]`; nothing for none."""
    if value is None:
        return ""
    mean_, low, high = (percent(part, 0).removesuffix("%") for part in value)
    return f"{mean_}% [{low}, {high}]"


def includes(bounds: Sequence[float], point: float) -> bool:
    """Whether an interval holds `point`. One with an unknown bound excludes nothing, so it does."""
    if not all(math.isfinite(bound) for bound in bounds):
        return True
    return min(bounds) <= point <= max(bounds)


def p_value(value: float) -> str:
    """`p = 0.012`, or `p < 0.001`."""
    if not math.isfinite(value):
        return f"p {MISSING}"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def role_words(role: str | None) -> str:
    """A role as prose: `refuse_redirect` is `refuse-and-redirect`."""
    if role is None:
        return "unnamed"
    return _ROLE_WORDS.get(role, printable(role).replace("_", " "))


def source_words(name: str, role: str | None) -> str:
    """A source with its role: `harm detection (L2/271)`, or the role alone where the source is named after it."""
    if role is None:
        return printable(name)
    words = role_words(role)
    return words if name in {role, words} else f"{words} ({printable(name)})"


def head_name(layer: int, head: int) -> str:
    """`L3H1`."""
    return f"L{layer}H{head}"


def listing(words: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    items = list(words)
    if len(items) <= 1:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def count(n: int, noun: str, plural: str | None = None) -> str:
    """`1 head`, `3 heads`."""
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def mean(values: Iterable[float]) -> float:
    """Mean of the finite values; NaN of none."""
    kept = [value for value in values if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan
