"""A llama written by hand: two heads select the answer, harm turns their queries away, and a third may back them up.

The stream's axes: a mark on the right option's token and on the wrong one's, the letters, the answer position, harm
where it is said, and the pressure that layer 0 copies from there to the answer. Rotary turns nothing that is used.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qklens.data.render import PARTS, Prompt
from qklens.interventions.direction import Direction
from qklens.models.families import load_family
from qklens.models.subject import Subject, wrap_model

RIGHT, WRONG, A, B, ANSWER, HARM, PRESSURE, START, WORD = range(9)
WIDTH, D_HEAD, HEADS, LAYERS = 32, 8, 4, 4
STILL = 3
"""The head's dimension that carries scores: the slowest rotary pair."""
_START, _HARM, _ASK, _RIGHT_A, _WRONG_A, _RIGHT_B, _WRONG_B, _SAY, LETTER_A, LETTER_B, _WORDS = range(11)
PRESSED = 0.2
"""How far harm moves the answer along the pressure's axis."""
SELECTING = {(1, 0): 0.2, (1, 2): 0.12}
BACKUP = (2, 1)
ASKS, MARKED = {ANSWER: 0.6, PRESSURE: -8.0}, {RIGHT: 3.0, WORD: 2.5}


def planted(tokenizer, backup: float = 0.0) -> Subject:
    """The model; `backup` is how strongly the third head writes the letter while nobody else has."""
    config = LlamaConfig(
        vocab_size=_WORDS + 8, hidden_size=WIDTH, intermediate_size=4, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embed = model.model.embed_tokens.weight
        for token, axes in {
            _START: [START], _HARM: [HARM], _ASK: [START], _RIGHT_A: [RIGHT, A], _WRONG_A: [WRONG, A],
            _RIGHT_B: [RIGHT, B], _WRONG_B: [WRONG, B], _SAY: [ANSWER],
        }.items():  # fmt: skip
            embed[token, axes] = 1.0
        for i, word in enumerate(range(_WORDS, _WORDS + 8)):
            embed[word, 16 + i] = 1.0  # words differ, so that items do
            embed[word, WORD] = 0.15 * i
        model.lm_head.weight[LETTER_A, A] = model.lm_head.weight[LETTER_B, B] = 1.0
        head(model, 0, 0, {ANSWER: 6.0}, {HARM: 6.0, START: 2.0}, {HARM: PRESSURE}, PRESSED / WIDTH**0.5)
        for (layer, h), size in SELECTING.items():
            head(model, layer, h, ASKS, MARKED, {A: A, B: B}, size)
        for idle in (1, 3):  # look where the others look and write nothing
            head(model, 1, idle, ASKS, MARKED, {}, 0.0)
        head(model, *BACKUP, {ANSWER: 0.6, A: -1.0, B: -1.0}, MARKED, {A: A, B: B}, backup)
    return wrap_model(model, tokenizer, load_family("llama"))


def head(model, layer: int, h: int, query: dict, key: dict, carries: dict[int, int], size: float) -> None:
    """Scores by weighted axes of either side, in one dimension; carries axes to axes at some size."""
    attention, first = model.model.layers[layer].self_attn, h * D_HEAD
    for axis, weight in query.items():
        attention.q_proj.weight[first + STILL, axis] = weight
    for axis, weight in key.items():
        attention.k_proj.weight[first + STILL, axis] = weight
    for i, (read, written) in enumerate(carries.items()):
        attention.v_proj.weight[first + i, read] = 1.0
        attention.o_proj.weight[written, first + i] = size


def prompts(harm: bool, n: int = 4) -> list[Prompt]:
    """Items of two words each, both orders of an item next to each other."""
    return [_prompt(harm, i, right_first) for i in range(n) for right_first in (True, False)]


def _prompt(harm: bool, item: int, right_first: bool) -> Prompt:
    front = [_START, _HARM] if harm else [_START, _ASK]
    words = [_WORDS + item % 8, _WORDS + (item + 3) % 8]
    options = [_RIGHT_A, _WRONG_B] if right_first else [_WRONG_A, _RIGHT_B]
    tokens = [*front, *words, *options, _SAY]
    first, second = (4,), (5,)
    right, wrong = (first, second) if right_first else (second, first)
    spans = {"question": (2, 3), "intent": (1,), "answer": (6,), "correct": right, "incorrect": wrong}
    for name in ("correct", "incorrect"):
        spans |= {f"{name}.{part}": spans[name] if part == "content" else () for part in PARTS}
    letters = (LETTER_A, LETTER_B) if right_first else (LETTER_B, LETTER_A)
    return Prompt("", tuple(tokens), spans, 0, tuple(range(7)), letters, "A" if right_first else "B")


def pressure() -> Direction:
    """What harm writes at the answer."""
    vector = torch.zeros(WIDTH)
    vector[PRESSURE] = 1.0
    return Direction(
        "pressure", {1: vector, 2: vector}, {1: PRESSED, 2: PRESSED}, lambda layer, stream: stream(layer)[..., PRESSURE]
    )
