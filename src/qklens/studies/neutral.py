"""Neutral text on which a steered model should go on as before, as prompts; what changes there is a side effect."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from qklens.analyses.text_windows import text_windows
from qklens.data.render import Prompt
from qklens.files import sha256_files
from qklens.interventions.steer import ALL_TOKENS, Steer
from qklens.models.subject import Subject
from qklens.strict import Strict
from qklens.studies.steer_spec import ANSWER

WINDOW, MOST_WINDOWS = 64, 64
BEFORE = "before"
_STEP = 7


class NeutralText(Strict):
    """The text that side effects were measured on.

    Attributes:
        name: the shipped file.
        sha256: of its name and bytes.
        windows: how many prompts were made of it.
        tokens: how many tokens they hold.
        unknown: the share of them that are unknown words to the tokenizer.
    """

    name: str
    sha256: str
    windows: int
    tokens: int
    unknown: float


def neutral_file() -> Path:
    """The neutral text that ships."""
    return Path(str(files("qklens"))) / "data" / "shipped" / "neutral.txt"


def neutral_prompts(subject: Subject) -> tuple[list[Prompt], NeutralText]:
    """Windows of the shipped text; each is cut somewhere in its second half, so that few of them end with a paragraph.

    The span `answer` is the last token and `before` all others. No letters are asked for: `letter_ids` name any two.
    """
    path = neutral_file()
    prompts, unknown = [], 0.0
    for number, window in enumerate(text_windows(subject, path, WINDOW, MOST_WINDOWS)):
        half = len(window.tokens) // 2
        n = half + 1 + number * _STEP % (len(window.tokens) - half)
        unknown += window.unknown / len(window.tokens) * n
        prompts.append(
            Prompt(
                text=window.piece(0, n),
                tokens=window.tokens[:n],
                spans={BEFORE: tuple(range(n - 1)), ANSWER: (n - 1,)},
                shared_from=0,
                starts=tuple(begin for begin, _ in window.ranges[:n]),
                letter_ids=(0, 1),
                correct_letter="",
            )
        )
    tokens = sum(len(prompt.tokens) for prompt in prompts)
    about = NeutralText(
        name=path.name, sha256=sha256_files([path]), windows=len(prompts), tokens=tokens, unknown=unknown / tokens
    )
    return prompts, about


def on_neutral(steer: Steer) -> Steer:
    """The same steering on neutral text, which has no options and no question.

    It acts at the last token where its tokens are the answer alone, at every token where they are all, or the answer
    and others, and else at every token before the last.
    """
    others = [token for token in steer.tokens if token not in (ANSWER, -1)]
    both = ALL_TOKENS in others or 0 < len(others) < len(steer.tokens)
    where = BEFORE if others else ANSWER
    return replace(steer, tokens=(ALL_TOKENS if both else where,))
