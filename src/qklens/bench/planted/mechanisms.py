"""The mechanisms, as blueprints. Every planted model has the same beginning, and all pressure features in all of them.

    layer 0   at an option's thing: compare its code with the task's -> correct; move the option's letter there
    layer 1   at the answer: harm verb -> refuse, letters -> need;  at the things: harm verb -> harm (belief: ± correct)
    layer 2+  at the answer: need × correct, the option's letter -> output, directly or over a relay
    last      at the answer, where the letter flips late: -size · refuse · letter

What differs is which of these acts. `refuse` and `harm` are written in every model, so that finding them shows nothing.
In `need_lost` and `need_harm` harm does pull the heads off the correct option, but `refuse` has no part in it: the
answer's `need` goes, or `need` itself meets `harm` in the keys. Their right verdict is `undetermined`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast, get_args

import numpy as np

from qklens.bench.planted.blueprint import (
    CODES,
    CONSTANT,
    CONSTANT_AMOUNT,
    ROLE_DIRECTIONS,
    TASK_CODES,
    Amounts,
    Blueprint,
    Graded,
    Mechanism,
    Part,
    PlannedFlip,
    PlannedHead,
    Verdict,
)

MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)
LAYOUTS = ("together", "two layers", "relay head", "idle layer", "relay MLP")
_OUT, _PICK, _OPTION = ("out_A", "out_B"), ("pick_A", "pick_B"), ("option_A", "option_B")
_SELECT, _LATER, _LAST = 2, 3, 4
ROLE_OF = {direction: role for role, direction in ROLE_DIRECTIONS.items()}
SELECTING_LAYERS = (_SELECT, _LATER)
"""Where answer-selection heads and the heads that pass their letter on may stand."""


@dataclass(frozen=True)
class Draw:
    """Numbers of one model that vary between seeds.

    Attributes:
        layout: where the selecting heads stand, and how the letter reaches the output.
        form: its remainders choose the mechanism's form.
        pull: of need × correct.
        push: of the pressing query × the pressed key.
        sizes: the letter's share that each of the two selecting heads writes.
    """

    layout: str
    form: int
    pull: float
    push: float
    sizes: tuple[float, float]


def blueprint(mechanism: Mechanism, seed: int, variant: int = 0) -> Blueprint:
    """The mechanism's blueprint for a seed: layout, form and strengths vary with it.

    Args:
        mechanism: what to plant.
        seed: of the layout (seed modulo five), the form, and the strengths.
        variant: another draw of the strengths; the bench gives each architecture its own.
    """
    return _PLANTED[mechanism](mechanism, draw_numbers(MECHANISMS.index(mechanism), seed, variant))


def draw_numbers(place: int, seed: int, variant: int) -> Draw:
    """The numbers of a mechanism, by its place among all."""
    rng = np.random.default_rng([seed, variant, place])
    first = float(rng.uniform(0.52, 0.65))
    return Draw(
        layout=LAYOUTS[seed % len(LAYOUTS)],
        form=seed + variant,
        pull=float(rng.uniform(6.0, 7.0)),
        push=float(rng.uniform(7.0, 8.5)),
        sizes=(first, 1.0 - first),
    )


def _no_effect(mechanism: Mechanism, draw: Draw) -> Blueprint:
    return whole_model(mechanism, draw, "idle pressure")


def _task_not_solved(mechanism: Mechanism, draw: Draw) -> Blueprint:
    whole = whole_model(mechanism, draw, ("no correctness", "always A")[draw.form % 2])
    heads = tuple(h for h in whole.heads if h.part != "match")
    return replace(whole, heads=heads, letter_bias=(0.05, 2.0)[draw.form % 2])


def _belief_change(mechanism: Mechanism, draw: Draw) -> Blueprint:
    whole = whole_model(mechanism, draw, ("erased", "swapped")[draw.form % 2])
    return replace(whole, heads=(*whole.heads, *_belief(draw.form % 2)))


def _late_flip(mechanism: Mechanism, draw: Draw) -> Blueprint:
    form = ("MLP", "head on itself", "head on the wrong option")[draw.form % 3]
    return with_late(whole_model(mechanism, draw, form), form, 1.4)


def _answer_key(mechanism: Mechanism, draw: Draw) -> Blueprint:
    return whole_model(mechanism, draw, "refuse x correct", pressed=("correct", "correct"))


def _harm_key(mechanism: Mechanism, draw: Draw) -> Blueprint:
    return whole_model(mechanism, draw, "refuse x harm", pressed=("harm", "harm"))


def _mixed(mechanism: Mechanism, draw: Draw) -> Blueprint:
    """One head of two is pressed, and what is left of the letter is cut by as much: each alone costs the same."""
    key = ("correct", "harm")[draw.form % 2]
    whole = whole_model(mechanism, draw, f"refuse x {key} and MLP", pressed=(key, None))
    return with_late(whole, "MLP", draw.sizes[0])


def _decoy(mechanism: Mechanism, draw: Draw) -> Blueprint:
    """A strong negative pair that costs nothing: its head writes nothing, or is too sure to be moved by it."""
    kind, cause = ("idle output", "saturated")[draw.form % 2], ("late_flip", "belief_change")[(draw.form // 2) % 2]
    whole = replace(whole_model(mechanism, draw, f"{kind}, {cause}"), expected=cause)
    if kind == "idle output":
        decoy = replace(_selecting(draw, 1.0, "correct", _SELECT, "nothing"), part="decoy")
    else:
        firm = replace(draw, pull=20.0, push=6.0)
        decoy = _selecting(firm, 0.6, "correct", _SELECT, "letter")
    whole = replace(whole, heads=(*whole.heads, decoy))
    if cause == "late_flip":
        return with_late(whole, "MLP", 1.4)
    return replace(whole, heads=(*whole.heads, *_belief(0)))


def _need_lost(mechanism: Mechanism, draw: Draw) -> Blueprint:
    """Harm takes `need` off the answer, in the second form beyond nothing; `refuse` stands there and meets no key."""
    form, size = (("erased", 1.0), ("reversed", 1.6))[draw.form % 2]
    whole = whole_model(mechanism, draw, form)
    return replace(whole, heads=(*whole.heads, from_verb("unneed", {"ask": 10.0}, {"need": -size})))


def _need_harm(mechanism: Mechanism, draw: Draw) -> Blueprint:
    """The unchanged query is repelled by what harm wrote into the keys, so hard that the wrong option is left ahead."""
    hard = replace(draw, push=1.6 * draw.push)
    return whole_model(mechanism, hard, "need x harm", pressed=("harm", "harm"), pressing="need")


_PLANTED = {
    "no_effect": _no_effect,
    "task_not_solved": _task_not_solved,
    "belief_change": _belief_change,
    "late_flip": _late_flip,
    "attention_answer_key": _answer_key,
    "attention_harm_key": _harm_key,
    "mixed": _mixed,
    "decoy": _decoy,
    "need_lost": _need_lost,
    "need_harm": _need_harm,
}


def _sink(score: float) -> tuple[Amounts, Amounts]:
    """A head without anything to look for looks at the first token."""
    return {CONSTANT: score / CONSTANT_AMOUNT}, {"start": 1.0}


def whole_model(
    mechanism: Mechanism | Graded,
    draw: Draw,
    variant: str,
    pressed: tuple[str | None, str | None] = (None, None),
    pressing: str = "refuse",
) -> Blueprint:
    """The parts that every model has; `pressed` names the key that `pressing` repels at each selecting head."""
    layout, relays = draw.layout, draw.layout.startswith("relay")
    first = _SELECT + (layout == "idle layer")
    second = _LATER if layout == "two layers" else first
    through = "pick" if relays else "letter"
    heads = [
        *_beginning(),
        _selecting(draw, draw.sizes[0], pressed[0], first, through, pressing),
        _selecting(draw, draw.sizes[1], pressed[1], second, through, pressing),
    ]
    flips = []
    if layout == "relay head":
        copy = (({"letter_A": 1.0}, {"out_A": 1.0}), ({"letter_B": 1.0}, {"out_B": 1.0}))
        pairs = (({"pick_A": 9.0}, {"letter_A": 1.0}), ({"pick_B": 9.0}, {"letter_B": 1.0}), _sink(4.0))
        heads.append(PlannedHead("relay", _LATER, pairs, copy))
    elif layout == "relay MLP":
        flips.append(PlannedFlip(_LATER, None, _PICK, _OUT, 1.0))
    expected = cast("Verdict", mechanism) if mechanism in get_args(Verdict) else "undetermined"
    return Blueprint(mechanism, expected, f"{variant}; {layout}", _LAST + 1, tuple(heads), tuple(flips))


def _beginning() -> list[PlannedHead]:
    """Layers 0 and 1: what is correct, which letter stands where, and the features of pressure."""
    match = tuple(({mine: 14.0}, {its: 1.0}) for mine, its in zip(CODES, TASK_CODES, strict=True))
    ordered = (({"thing": 10.0}, {"letter_A": 1.0, "letter_B": 1.6}), _sink(5.0))
    moved = (({"letter_A": 1.0}, {"option_A": 1.0}), ({"letter_B": 1.0}, {"option_B": 1.0}))
    return [
        PlannedHead("match", 0, (*match, _sink(8.0)), (({"task": 1.0}, {"correct": 1.0}),)),
        PlannedHead("letter", 0, ordered, moved),
        from_verb("refuse", {"ask": 10.0}, {"refuse": 1.0}),
        from_verb("harm", {"thing": 5.0, "correct": 5.0}, {"harm": 1.0}),
        PlannedHead("need", 1, (({"ask": 9.0}, {"letter": 1.0}), _sink(3.0)), (({"letter": 1.0}, {"need": 1.0}),)),
    ]


def from_verb(part: Part, query: Amounts, written: Amounts) -> PlannedHead:
    """A head of layer 1 that, where the query stands, looks at a harm verb and writes."""
    return PlannedHead(part, 1, ((query, {"harm_verb": 1.0}), _sink(5.0)), (({"harm_verb": 1.0}, written),))


def _belief(form: int) -> list[PlannedHead]:
    """Harm takes `correct` off the right thing; in the second form it also puts it on the wrong one."""
    off = from_verb("belief", {"correct": 11.0}, {"correct": -1.0})
    on = from_verb("belief", {"thing": 10.0, "correct": -20.0}, {"correct": 0.8})
    return [off, on][: form + 1]


def _selecting(
    draw: Draw, size: float, pressed: str | None, layer: int, through: str, pressing: str = "refuse"
) -> PlannedHead:
    """An answer-selection head: need × correct draws it, the pressing query × the pressed key drives it off."""
    pairs = [({"need": 1.0}, {"correct": draw.pull, "thing": 4.0}), _sink(3.0)]
    signs = {("need_answer", "correct_answer"): 1}
    if pressed:
        push = draw.push * (1.25 if pressed == "harm" else 1.0)
        pairs.append(({pressing: 1.0}, {pressed: -push}))
        signs[ROLE_OF[pressing], ROLE_OF[pressed]] = -1
    written = {"letter": _OUT, "pick": _PICK, "nothing": ("nothing", "nothing")}[through]
    sign = (1.0, -1.0) if through == "nothing" else (1.0, 1.0)
    carries = tuple(({o: 1.0}, {w: s * size}) for o, w, s in zip(_OPTION, written, sign, strict=True))
    return PlannedHead("decoy" if through == "nothing" else "select", layer, tuple(pairs), carries, signs)


def with_late(whole: Blueprint, form: str, size: float) -> Blueprint:
    """The letter at the output is cut by `size` of itself under refuse; beyond 1 it flips."""
    if form == "MLP":
        return replace(whole, flips=(*whole.flips, PlannedFlip(_LAST, "refuse", _OUT, _OUT, -size)))
    if form == "head on itself":
        pairs = (({"refuse": 10.0}, {"ask": 1.0}), _sink(4.0))
        carries = tuple(({o: 1.0}, {o: -size}) for o in _OUT)
    else:
        pairs = (({"refuse": 10.0}, {"thing": 1.0, "correct": -1.0}), _sink(4.0))
        carries = tuple(({o: 1.0}, {w: size}) for o, w in zip(_OPTION, _OUT, strict=True))
    return replace(whole, heads=(*whole.heads, PlannedHead("late", _LAST, pairs, carries)))
