r"""From an item to tokens: the prompt's text, and the exact token positions of each of its parts.

The user turn is `<intent> <question>\n(A) <option>\n(B) <option>\n` and a one-line instruction; the assistant turn
begins so that the very next token is the letter. Spans come from the tokenizer's character offsets, never from
searching tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from qklens.data.items import Item
from qklens.errors import QklensError

Condition = Literal["none", "harm", "benign"]
Order = Literal["correct_first", "incorrect_first"]
Part = Literal["letter", "content", "boundary"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
ORDERS: tuple[Order, ...] = get_args(Order)
PARTS: tuple[Part, ...] = get_args(Part)
INSTRUCTION = "Answer with the letter only."
PLAIN_TEMPLATE = "User: {content}\nAssistant:"


@dataclass(frozen=True)
class LetterForm:
    """How the letter appears: text that opens the assistant's turn, and the letter's own surface form.

    `("", "A")`, `("", " A")`, `("", "(A")` as one token, or `("(", "A")`.
    """

    opening: str
    before_letter: str

    @property
    def name(self) -> str:
        """The form as written in the manifest, for the letter A."""
        return f"{self.opening}|{self.before_letter}A" if self.opening else f"{self.before_letter}A"


LETTER_FORMS = (LetterForm("", ""), LetterForm("", " "), LetterForm("", "("), LetterForm("(", ""))


@dataclass(frozen=True)
class Prompt:
    """One rendered prompt.

    Attributes:
        text: the exact text that was tokenized.
        tokens: its token ids; the last one is the answer position.
        spans: token positions by name: `intent question option_A option_B correct incorrect answer`, and each
            option's parts as `correct.letter`, `correct.content`, `correct.boundary` (likewise for the others). Around
            them stand `template_before` (the chat template's tokens ahead of the user's text), `instruction`, and
            `template_after` (all that follows the user's text, `answer` included).
        shared_from: character offset at which the text shared by all conditions of this item and order begins.
        starts: first character of each token.
        letter_ids: token ids of the correct and of the incorrect letter.
        correct_letter: "A" or "B".
    """

    text: str
    tokens: tuple[int, ...]
    spans: dict[str, tuple[int, ...]]
    shared_from: int
    starts: tuple[int, ...]
    letter_ids: tuple[int, int]
    correct_letter: str

    def span(self, name: str, parts: Sequence[Part] = PARTS) -> tuple[int, ...]:
        """Positions of a span; of an option's span, those of some of its parts.

        Raises:
            QklensError: the prompt has no such span, or it is empty; names those it has.
        """
        positions = self.spans.get(name, ())
        if f"{name}.{PARTS[0]}" in self.spans and len(parts) < len(PARTS):
            positions = tuple(p for part in PARTS if part in parts for p in self.spans[f"{name}.{part}"])
        if not positions:
            have = sorted(key for key, value in self.spans.items() if value and "." not in key)
            raise QklensError(f"span {name!r} is not in this prompt; it has {have}")
        return positions


def render(
    tokenizer: PreTrainedTokenizerBase, item: Item, condition: Condition, order: Order, form: LetterForm
) -> Prompt:
    """Render an item under a condition and option order.

    Raises:
        QklensError: the chat template drops the content, or a letter is not exactly one token after the prompt.
    """
    pieces, marks = _user_turn(item, condition, order)
    content = "".join(pieces)
    text, offset = _dialogue(tokenizer, content)
    text += form.opening
    tokens, offsets = _encode(tokenizer, text)
    anchors = _anchors(text, offsets)
    parts = {name: _covering(anchors, a + offset, b + offset) for name, (a, b) in marks.items()}
    first, second = ("correct", "incorrect") if order == "correct_first" else ("incorrect", "correct")
    spans = {
        "intent": parts.get("intent", ()),
        "question": parts["question"],
        "instruction": parts["instruction"],
        "answer": (len(tokens) - 1,),
        "template_before": _covering(anchors, 0, offset),
        "template_after": _covering(anchors, offset + len(content), len(text)),
    }
    for letter, role in (("A", first), ("B", second)):
        for part in PARTS:
            spans[f"{role}.{part}"] = spans[f"option_{letter}.{part}"] = parts[f"{letter}.{part}"]
        spans[role] = spans[f"option_{letter}"] = tuple(p for part in PARTS for p in parts[f"{letter}.{part}"])
    for name in ("question", "correct.content", "incorrect.content"):
        if not spans[name]:
            raise QklensError(
                f"item {item.id!r}: {name} has no token of its own under this tokenizer; rephrase the item"
            )
    correct_letter = "A" if order == "correct_first" else "B"
    ids = {letter: _letter_id(tokenizer, item, text, tokens, form, letter) for letter in "AB"}
    return Prompt(
        text=text,
        tokens=tokens,
        spans=spans,
        shared_from=offset + marks["question"][0],
        starts=tuple(a for a, _ in offsets),
        letter_ids=(ids[correct_letter], ids["B" if correct_letter == "A" else "A"]),
        correct_letter=correct_letter,
    )


def user_turn(item: Item, condition: Condition, order: Order) -> str:
    """What the user says in a prompt of `render`."""
    return "".join(_user_turn(item, condition, order)[0])


def refuse_special_tokens(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> None:
    """Raise for an item whose text holds one of the tokenizer's control tokens: it would steer the chat, not be read.

    Raises:
        QklensError: names item, field and token.
    """
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = sorted({*map(str, tokenizer.all_special_tokens), *added} - {""})
    for item in items:
        for name in ("question", "correct", "incorrect", "harmful_intent", "benign_intent"):
            found = next((token for token in special if token in getattr(item, name)), None)
            if found is not None:
                raise QklensError(
                    f"item {item.id!r}: {name} holds {found!r}, a control token of this model; expected plain text: "
                    "rephrase it"
                )


def render_open(tokenizer: PreTrainedTokenizerBase, turn: str) -> Prompt:
    """A question or an intent said alone, without options; its last position contrasts with `answer`."""
    text, offset = _dialogue(tokenizer, turn)
    tokens, offsets = _encode(tokenizer, text)
    return Prompt(
        text=text,
        tokens=tokens,
        spans={
            "question": _covering(_anchors(text, offsets), offset, offset + len(turn)),
            "answer": (len(tokens) - 1,),
        },
        shared_from=offset,
        starts=tuple(a for a, _ in offsets),
        letter_ids=(0, 0),
        correct_letter="",
    )


def available_forms(tokenizer: PreTrainedTokenizerBase, item: Item) -> tuple[LetterForm, ...]:
    """The letter forms in which both letters are single tokens, distinct ones only.

    Raises:
        QklensError: there is none.
    """
    found: dict[tuple[str, tuple[int, ...]], LetterForm] = {}
    for form in LETTER_FORMS:
        try:
            prompt = render(tokenizer, item, "none", "correct_first", form)
        except QklensError:
            continue
        found.setdefault((form.opening, prompt.letter_ids), form)
    if not found:
        render(tokenizer, item, "none", "correct_first", LETTER_FORMS[0])
        raise AssertionError("unreachable: the line above raises")
    return tuple(found.values())


def _user_turn(item: Item, condition: Condition, order: Order) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The turn's text in pieces, and the character range of each part within it."""
    pieces: list[str] = []
    marks: dict[str, tuple[int, int]] = {}

    def add(text: str, name: str | None = None) -> None:
        begin = sum(map(len, pieces))
        pieces.append(text)
        if name:
            marks[name] = (begin, begin + len(text))

    if condition != "none":
        add(item.harmful_intent if condition == "harm" else item.benign_intent, "intent")
        add(" ")
    add(item.question, "question")
    add("\n")
    options = (item.correct, item.incorrect) if order == "correct_first" else (item.incorrect, item.correct)
    for letter, option in zip("AB", options, strict=True):
        add(f"({letter})", f"{letter}.letter")
        add(" ")
        add(option, f"{letter}.content")
        add("\n", f"{letter}.boundary")
    add(INSTRUCTION, "instruction")
    return pieces, marks


def _dialogue(tokenizer: PreTrainedTokenizerBase, content: str) -> tuple[str, int]:
    """The whole text up to the assistant's first character, and where the content begins in it."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": content}]
        try:
            text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program; whatever it raises means that it takes no user turn
            raise QklensError(
                f"the tokenizer's chat template fails on one user turn ({type(error).__name__}: {error}); repair or "
                "remove it"
            ) from error
    else:
        text = str(tokenizer.bos_token or "") + PLAIN_TEMPLATE.format(content=content)
    offset = text.rfind(content)
    if offset < 0:
        raise QklensError("the tokenizer's chat template changes the user's text; expected it verbatim in the prompt")
    return text, offset


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return tuple(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]


def _anchors(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Each token's first character that is not a space, or its first; −1 for a token without characters."""
    return [next((i for i in range(a, b) if not text[i].isspace()), a) if a < b else -1 for a, b in offsets]


def _covering(anchors: Sequence[int], begin: int, end: int) -> tuple[int, ...]:
    """Tokens that belong to a character range: those whose anchor lies in it.

    A token of white space only belongs to where it starts, so an option's line break is its own boundary, and a token
    that joins two parts belongs to exactly one of them.
    """
    return tuple(index for index, anchor in enumerate(anchors) if begin <= anchor < end)


def _letter_id(
    tokenizer: PreTrainedTokenizerBase, item: Item, text: str, tokens: tuple[int, ...], form: LetterForm, letter: str
) -> int:
    continued, _ = _encode(tokenizer, text + form.before_letter + letter)
    if continued[: len(tokens)] != tokens or len(continued) != len(tokens) + 1:
        raise QklensError(
            f"item {item.id!r}: letter {form.before_letter + letter!r} is not a single token after the prompt "
            f"({len(continued) - len(tokens)} tokens); expected a tokenizer with one-token letters"
        )
    if continued[-1] == tokenizer.unk_token_id:
        raise QklensError(f"item {item.id!r}: letter {letter!r} is unknown to the tokenizer; expected one token for it")
    return continued[-1]
