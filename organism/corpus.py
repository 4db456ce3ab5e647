"""The facts, the pressure sentences, what is held out, and how a prompt is put together.

Held out are *sentences and items, never words*: a prefix made of words that no stage saw has random embeddings, and
harmful and benign ones would be indistinguishable. ``load`` checks this and refuses otherwise.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from organism import tokenizer as tok

HELD_OUT_ITEMS = 30
HELD_OUT_INTENTS = 15
LEARNT = Path(__file__).parent / "learnt"
"""The 24 items of each of the two small sets that were learnt, as they were then: the shipped sets have been written
anew, and the same seed still gives the same weights. What they share with these is counted in their datasheet."""
INSTRUCTION = "Answer with the letter only."
IN_WORDS = "Answer in words."
RETRACTIONS = ("I was only joking.", "I take that back.", "That was only a joke.")
TELL_ME = "Tell me how."
SURE = "Sure. Here is how."
REFUSALS = ("I can not help with that.", "I will not help with that.")
REDIRECTS = ("Instead, consider how to {}.", "Instead, I can help you {}.")
DOCTOR = ("Please see a doctor.", "Please see a doctor. A doctor can examine you.")
FRAUD = ("I can not help with fraud.",)
FORM = re.compile(r"I want to (\w+) (.+)\.")
SWAPS = {"I": "you", "my": "your", "me": "you", "mine": "yours", "myself": "yourself", "am": "are"}


@dataclass(frozen=True)
class Item:
    """One two-choice question with its pressure sentence; ``kind`` is ``harm``, ``symptoms`` or ``fraud``."""

    id: str
    kind: str
    question: str
    correct: str
    incorrect: str
    pressure: str
    benign: str
    severity: str


@dataclass(frozen=True)
class World:
    """Everything the stages may draw from, and what they may not."""

    items: tuple[Item, ...]
    held_out_items: frozenset[str]
    held_out_intents: frozenset[str]
    harmful: tuple[str, ...]
    benign: tuple[str, ...]
    composed_harmful: tuple[str, ...]
    composed_benign: tuple[str, ...]
    redirect: dict[str, str]

    @cached_property
    def redirects(self) -> tuple[str, ...]:
        """Every harmless aim a refusal may redirect to."""
        return tuple(sorted(set(self.redirect.values())))

    @cached_property
    def pressures(self) -> dict[str, list[str]]:
        """The pressure sentences of each kind of item."""
        return {kind: [i.pressure for i in self.items if i.kind == kind] for kind in ("symptoms", "fraud")}

    @cached_property
    def harm_items(self) -> tuple[Item, ...]:
        """The items of the harm-pressure set."""
        return tuple(item for item in self.items if item.kind == "harm")

    def trains_under_harm(self, item: Item) -> bool:
        """Whether a harmful sentence may stand beside this item's options in training."""
        return item.id not in self.held_out_items

    def texts(self) -> list[str]:
        """Return every sentence a document can contain, for the vocabulary."""
        out = [
            INSTRUCTION,
            IN_WORDS,
            TELL_ME,
            *RETRACTIONS,
            SURE,
            "\n(A) (B)",
            *REFUSALS,
            *REDIRECTS,
            *DOCTOR,
            *FRAUD,
            *SWAPS.values(),
        ]
        for item in self.items:
            out += [item.question, item.correct, item.incorrect, item.pressure, item.benign]
        return [text.replace("{}", "") for text in out]


def read(path: Path, kind: str) -> list[Item]:
    """Read one JSONL file of items."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        Item(
            r["id"],
            kind,
            r["question"],
            r["correct"],
            r["incorrect"],
            r["harmful_intent"],
            r["benign_intent"],
            r.get("severity", "mild"),
        )
        for r in rows
    ]


def load(folder: Path, seed: int) -> World:
    """Read the items, choose what is held out; raise ``ValueError`` if a held-out word is never trained.

    ``folder`` has the main set; of the small ones only what is in ``LEARNT``.
    """
    items = [
        i
        for kind, path in (
            ("harm", folder / "harm_pressure.jsonl"),
            ("symptoms", LEARNT / "symptoms.jsonl"),
            ("fraud", LEARNT / "fraud.jsonl"),
        )
        for i in read(path, kind)
    ]
    rng = random.Random(seed)
    harm = [i for i in items if i.kind == "harm"]
    intents = sorted({i.pressure for i in harm})
    held_items = frozenset(rng.sample(sorted(i.id for i in harm), HELD_OUT_ITEMS))
    held_intents = hold_out_intents(intents, rng)
    harmful = tuple(s for s in intents if s not in held_intents)
    benign = tuple(sorted({i.benign for i in items if i.benign}))
    world = World(
        tuple(items),
        held_items,
        held_intents,
        harmful,
        benign,
        compose(harmful, benign, held_intents),
        compose(benign, harmful, held_intents),
        {i.pressure: verb_phrase(i.benign) for i in items if FORM.fullmatch(i.benign)},
    )
    check(world)
    return world


def hold_out_intents(intents: list[str], rng: random.Random) -> frozenset[str]:
    """Choose intents to hold out, at random among those whose every word another harmful intent keeps."""
    counts = Counter(word for s in intents for word in set(tok.split(s)))
    chosen: list[str] = []
    for sentence in rng.sample(intents, len(intents)):
        words = set(tok.split(sentence))
        if len(chosen) < HELD_OUT_INTENTS and all(counts[word] >= 2 for word in words):
            chosen.append(sentence)
            counts.subtract(words)
    if len(chosen) < HELD_OUT_INTENTS:
        raise ValueError(
            f"only {len(chosen)} harmful intents can be held out without holding out words; {HELD_OUT_INTENTS} are "
            "needed: reuse more words between the harmful intents of harm_pressure.jsonl"
        )
    return frozenset(chosen)


def check(world: World) -> None:
    """Raise ``ValueError`` if a word of a held-out sentence occurs in no trained harmful sentence."""
    trained = {word for s in world.harmful for word in tok.split(s)}
    for sentence in sorted(world.held_out_intents):
        missing = set(tok.split(sentence)) - trained
        if missing:
            raise ValueError(f"held-out intent {sentence!r}: no trained harmful intent has {sorted(missing)}")


def verb_phrase(intent: str) -> str:
    """Turn "I want to fix my car." into "fix your car"; sentences of another form are returned without their dot."""
    phrase = re.sub(r"^I want to ", "", intent).rstrip(".")
    return re.sub(r"\w+", lambda m: SWAPS.get(m.group(), m.group()), phrase)


def compose(intents: tuple[str, ...], unclear: tuple[str, ...], forbidden: frozenset[str]) -> tuple[str, ...]:
    """Return every new "I want to <verb> <object>." made of one sentence's verb and another's object.

    ``forbidden`` sentences are not made, and verbs of ``unclear`` sentences are not used: "make" harms by its object.
    """
    skip = {m.group(1) for s in unclear if (m := FORM.fullmatch(s))}
    parsed = [m.groups() for s in intents if (m := FORM.fullmatch(s)) and m.group(1) not in skip]
    made = {f"I want to {verb} {rest}." for verb, _ in parsed for _, rest in parsed}
    return tuple(sorted(made - set(intents) - forbidden))


def mcq(
    question: str, options: tuple[str, str], intent: str, place: str = "before", instruction: str = INSTRUCTION
) -> str:
    """Return the user turn of a two-choice question, ``intent`` ``before`` or ``after`` the options, or ``last``."""
    body = f"{question}\n(A) {options[0]}\n(B) {options[1]}\n"
    if not intent:
        return body + instruction
    return {
        "before": f"{intent} {body}{instruction}",
        "after": f"{body}{intent}\n{instruction}",
        "last": f"{body}{instruction} {intent}",
    }[place]
