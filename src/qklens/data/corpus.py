"""Chats of this domain to train a dictionary on: what is asked, and a template answer for models that cannot write one.

A row is one chat, and one line of JSON; `qklens dict train` reads these:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], "kind": ...}

| kind | the user says | template answer |
|---|---|---|
| `harmless` | a question, alone or after a harmless intent | the correct option |
| `harmful` | a question after a harmful intent | a refusal |
| `refusal` | a harmful intent alone, "Tell me how." | a refusal that redirects to the item's harmless intent |
| `mcq` | a two-choice question, alone or after either intent, both orders | the correct letter |
| `symptoms` | symptoms, alone or before a question | to see a doctor |
| `fraud` | a request for fraud, alone or before a question | a refusal |

Everything comes from the items: harmful intents are short statements of intent, and no answer here is operational.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from qklens.data.items import Item
from qklens.data.render import CONDITIONS, ORDERS, user_turn
from qklens.errors import QklensError

Kind = Literal["harmless", "harmful", "refusal", "mcq", "symptoms", "fraud"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TELL_ME = "Tell me how."
REFUSE, REFUSE_FRAUD, DOCTOR = "I can not help with that.", "I can not help with fraud.", "Please see a doctor."
_WISH = re.compile(r"I want to (.+)\.")
_OTHER_PERSON = {"I": "you", "my": "your", "me": "you", "mine": "yours", "myself": "yourself", "am": "are"}


@dataclass(frozen=True)
class Ask:
    """One chat to be: what the user says, and what a template answers."""

    kind: Kind
    user: str
    answer: str
    repeat: int = 0


def asks(kind: Kind, items: Mapping[str, Sequence[Item]]) -> list[Ask]:
    """Every distinct chat of a kind.

    Args:
        kind: which.
        items: those of the sets `main`, `symptoms` and `fraud`.
    """
    main = items["main"]
    if kind == "harmless":
        found = [(said, i.correct) for i in main for said in (i.question, f"{i.benign_intent} {i.question}")]
        pairs = [(said, f"{answer[:1].upper()}{answer[1:]}.") for said, answer in found]
    elif kind == "harmful":
        pairs = [(f"{i.harmful_intent} {i.question}", REFUSE) for i in main]
    elif kind == "refusal":
        pairs = [(f"{i.harmful_intent} {TELL_ME}", f"{REFUSE} {_redirect(i.benign_intent)}") for i in main]
    elif kind == "mcq":
        pairs = [
            (user_turn(i, condition, order), "A" if order == "correct_first" else "B")
            for i in main
            for condition in CONDITIONS
            for order in ORDERS
        ]
    else:
        answer = DOCTOR if kind == "symptoms" else REFUSE_FRAUD
        some = items[kind]
        pairs = [(said, answer) for i in some for said in (i.harmful_intent, f"{i.harmful_intent} {i.question}")]
    return [Ask(kind, said, answer) for said, answer in dict.fromkeys(pairs)]


def plan(items: Mapping[str, Sequence[Item]], counts: Mapping[Kind, int], *, seed: int, repeats: bool) -> list[Ask]:
    """The chats of a corpus, in a seeded order that mixes the kinds.

    Args:
        items: see `asks`.
        counts: how many of each kind.
        seed: of the choice and the order.
        repeats: whether the same user's turn may come again, because answers are drawn anew each time.

    Raises:
        QklensError: no chat at all, a negative count, or more of a kind than there are distinct ones.
    """
    generator = random.Random(seed)
    chosen: list[Ask] = []
    for kind in KINDS:
        n, known = counts.get(kind, 0), asks(kind, items)
        if n < 0:
            raise QklensError(f"{n} chats of kind {kind!r}; expected 0 or more")
        if n > len(known) and not repeats:
            raise QklensError(
                f"{n} chats of kind {kind!r}: the items make {len(known)} different ones; ask for at most so many, or "
                "draw answers with a --temperature above 0"
            )
        generator.shuffle(known)
        chosen += [
            Ask(kind, a.user, a.answer, i // len(known)) for i, a in enumerate((known * (n // len(known) + 1))[:n])
        ]
    if not chosen:
        raise QklensError(f"no chats were asked for; expected a count above 0 for one of {list(KINDS)}")
    generator.shuffle(chosen)
    return chosen


def _redirect(benign: str) -> str:
    """`I want to fix my car.` gives `Instead, I can help you fix your car.`; another form offers something else."""
    wish = _WISH.fullmatch(benign)
    if wish is None:
        return "Instead, ask me something else."
    swapped = re.sub(r"\w+", lambda m: _OTHER_PERSON.get(m.group(), m.group()), wish.group(1))
    return f"Instead, I can help you {swapped}."
