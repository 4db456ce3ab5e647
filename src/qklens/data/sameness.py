"""When two texts are the same to a reader, and which characters no reader sees.

same form = NFKC, without format characters, case folded, single spaces, without final sentence punctuation
"""

from __future__ import annotations

import unicodedata

_SENTENCE_ENDS = ".,;:!?。、،؛؟۔।"
_JOINERS = "\u200c\u200d"  # zero-width, but spelling: Persian, Indic scripts and emoji need them
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def same_form(text: str) -> str:
    """The form in which texts are compared: equal for texts that look alike but for case, spacing and final stops.

    Text of nothing but punctuation keeps it, so that "?" and "!" differ.
    """
    seen = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    folded = " ".join(unicodedata.normalize("NFKC", seen.casefold()).split())
    return folded.rstrip(_SENTENCE_ENDS + " ") or folded


def unseen_character(text: str) -> str | None:
    """The first character that breaks a line, steers the terminal or does not show, by code point and name."""
    for character in text:
        if unicodedata.category(character) in _UNSEEN and character not in _JOINERS:
            return f"U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()
    return None


def holds_joiner(text: str) -> bool:
    """Whether a zero-width joiner or non-joiner stands in a text."""
    return any(joiner in text for joiner in _JOINERS)
