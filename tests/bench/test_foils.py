"""Forms outside the bench that look like a pulled-away attention: none of them may get an attention verdict.

Each but the last was once named `attention_answer_key` or `attention_harm_key` with a confidence of 0.93 to 0.99, the
last `belief_change`. Reviewers who knew the rules made them up, and checks were added for them, so they say nothing of
forms that nobody has thought of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from qklens.bench.planted import weights
from qklens.bench.planted.basis import draw_basis
from qklens.bench.planted.blueprint import Amounts, Blueprint, PlannedFlip, PlannedHead
from qklens.bench.planted.mechanisms import Draw, draw_numbers, from_verb, whole_model
from qklens.bench.planted.noise import LEVELS
from qklens.bench.planted.runs import GRADED_ITEMS, LEFT_OUT_GRADED
from qklens.bench.planted.words import items_file, planted_tokenizer, vocabulary
from qklens.files import atomic_write
from qklens.studies.config import StudyConfig
from qklens.studies.harm_pressure.study import run_study
from qklens.studies.results import Results

SINK: tuple[Amounts, Amounts] = ({"constant": 0.5}, {"start": 1.0})


def drawn(**changes: object) -> Draw:
    return replace(draw_numbers(4, 0, 0), **{"layout": "together", **changes})


def with_pair(plan: Blueprint, query: Amounts, key: Amounts) -> Blueprint:
    """Another product in the scores of the selecting heads."""
    return replace(
        plan,
        heads=tuple(replace(h, pairs=(*h.pairs, (query, key))) if h.part == "select" else h for h in plan.heads),
    )


def harm_written_at(plan: Blueprint, query: Amounts) -> Blueprint:
    pairs = ((query, {"harm_verb": 1.0}), SINK)
    return replace(plan, heads=tuple(replace(h, pairs=pairs) if h.part == "harm" else h for h in plan.heads))


def turned_before_the_relay() -> Blueprint:
    """Heads look where they should; an MLP turns the letter that they pick before a later head passes it on."""
    plan = whole_model("late_flip", drawn(layout="relay head"), "")
    picks = ("pick_A", "pick_B")
    return replace(plan, flips=(PlannedFlip(2, "refuse", picks, picks, -1.9),))


def drawn_to_a_letter() -> Blueprint:
    return with_pair(whole_model("mixed", drawn(), ""), {"refuse": 1.0}, {"option_A": 9.0})


def drawn_to_an_article() -> Blueprint:
    """`a` stands in both options."""
    return with_pair(whole_model("mixed", drawn(), ""), {"refuse": 1.0}, {"nothing": 14.0})


def drawn_to_harm_on_the_wrong_option() -> Blueprint:
    plan = harm_written_at(whole_model("mixed", drawn(), ""), {"thing": 10.0, "correct": -20.0})
    return with_pair(plan, {"refuse": 1.0}, {"harm": 8.0})


def drawn_to_harm_in_the_question() -> Blueprint:
    return with_pair(
        harm_written_at(whole_model("mixed", drawn(), ""), {"task": 10.0}), {"refuse": 1.0}, {"harm": 13.0}
    )


def late_letter_beside_a_weak_pair() -> Blueprint:
    """The margin's loss is attention's, the answers' a letter that is always said, which cancels over both orders."""
    plan = whole_model("mixed", drawn(sizes=(0.4, 0.6)), "", pressed=("correct", None))
    late = PlannedHead(
        "late", 4, (({"refuse": 10.0}, {"ask": 1.0}), SINK), (({"refuse": 1.0}, {"out_A": -0.95, "out_B": 0.95}),)
    )
    return replace(plan, heads=(*plan.heads, late))


def both_kinds_of_keys() -> Blueprint:
    return whole_model("mixed", drawn(sizes=(0.55, 0.45)), "", pressed=("correct", "harm"))


def repels_a_letter() -> Blueprint:
    return with_pair(whole_model("mixed", drawn(), ""), {"refuse": 1.0}, {"option_A": -12.0})


def repels_a_letter_before_a_relay() -> Blueprint:
    return with_pair(whole_model("mixed", drawn(layout="relay MLP"), ""), {"refuse": 1.0}, {"option_A": -12.0})


def repels_both_options() -> Blueprint:
    return with_pair(whole_model("mixed", drawn(layout="two layers"), ""), {"refuse": 1.0}, {"thing": -9.0})


def repels_harm_on_both_options() -> Blueprint:
    return harm_written_at(whole_model("mixed", drawn(), "", pressed=("harm", "harm")), {"thing": 10.0})


def repels_harm_that_sits_more_on_the_wrong_option() -> Blueprint:
    plan = whole_model("mixed", drawn(), "", pressed=("harm", "harm"))
    return harm_written_at(plan, {"thing": 10.0, "correct": -4.5})


def repels_both_options_and_correct_a_little() -> Blueprint:
    return with_pair(whole_model("mixed", drawn(), ""), {"refuse": 1.0}, {"thing": -9.0, "correct": -2.0})


def shrinks_the_whole_query() -> Blueprint:
    """Much of a direction that nobody reads, at the answer, before a norm; a later head takes it away again."""
    plan = whole_model("mixed", drawn(), "")
    much = from_verb("unneed", {"ask": 10.0}, {"nothing": 30.0})
    back = PlannedHead(
        "idle", 3, (({"ask": 50.0}, {"harm_verb": 1.0}), ({"constant": 25 / 6}, {"start": 1.0})),
        (({"harm_verb": 1.0}, {"nothing": -30.0}),),
    )  # fmt: skip
    return replace(plan, heads=(*plan.heads, much, back))


def belief_shrinks_and_a_late_letter_is_said() -> Blueprint:
    plan = whole_model("mixed", drawn(), "")
    less = from_verb("belief", {"correct": 11.0}, {"correct": -0.8})
    late = PlannedHead(
        "late", 4, (({"refuse": 10.0}, {"ask": 1.0}), SINK), (({"refuse": 1.0}, {"out_A": 0.9, "out_B": -0.9}),)
    )
    return replace(plan, heads=(*plan.heads, less, late))


def chosen_before_the_answer() -> Blueprint:
    """Heads select at the token that has `nothing`, in the template or at an option's end, and are pulled off there.

    A relay reads the letter at the answer, where a weak head looks at the right option whatever is said.
    """
    plan = whole_model("mixed", drawn(layout="relay head"), "", pressed=("correct", "correct"))
    there = {"need": 9.0, "refuse": 10.0}
    heads = [
        replace(h, pairs=(({"nothing": there[h.part]}, h.pairs[0][1]), *h.pairs[1:])) if h.part in there else h
        for h in plan.heads
        if h.part != "relay"
    ]
    size = 0.1
    relay = PlannedHead(
        "relay", 3, (({"ask": 10.0}, {"nothing": 1.0}), SINK),
        (({"pick_A": 1.0}, {"out_A": 1.0}), ({"pick_B": 1.0}, {"out_B": 1.0})),
    )  # fmt: skip
    weak = PlannedHead(
        "idle", 2, (({"ask": 1.0}, {"correct": 7.0, "thing": 4.0}), SINK),
        (({"option_A": 1.0}, {"out_A": size}), ({"option_B": 1.0}, {"out_B": size})),
    )  # fmt: skip
    return replace(plan, heads=(*heads, relay, weak))


FOILS: tuple[Callable[[], Blueprint], ...] = (
    turned_before_the_relay,
    drawn_to_a_letter,
    drawn_to_an_article,
    drawn_to_harm_on_the_wrong_option,
    drawn_to_harm_in_the_question,
    late_letter_beside_a_weak_pair,
    both_kinds_of_keys,
    repels_a_letter,
    repels_a_letter_before_a_relay,
    repels_both_options,
    repels_harm_on_both_options,
    repels_harm_that_sits_more_on_the_wrong_option,
    repels_both_options_and_correct_a_little,
    shrinks_the_whole_query,
    belief_shrinks_and_a_late_letter_is_said,
)


def studied(plan: Blueprint, folder: Path, monkeypatch: pytest.MonkeyPatch, idle: str = "a") -> Results:
    """The study of a model; `idle` is the token that has the direction `nothing`, where a head looks for it."""
    basis = draw_basis(LEVELS[0].superposition, torch.Generator().manual_seed(1))
    if "nothing" in {name for h in plan.heads for _, key in h.pairs for name in key}:
        embedding = weights._embedding

        def with_idle(*given: object) -> torch.Tensor:
            rows = embedding(*given).clone()
            rows[vocabulary()[idle]] += basis["nothing"].to(rows)
            return rows

        monkeypatch.setattr(weights, "_embedding", with_idle)
    model = weights.write_model(plan, "llama", LEVELS[0], basis, 1).model
    folder.mkdir()
    model.config.save_pretrained(folder)
    atomic_write(folder / "model.safetensors", save({n: t.contiguous() for n, t in model.state_dict().items()}))
    planted_tokenizer().save_pretrained(folder)
    data = folder.parent / "items.jsonl"
    atomic_write(data, items_file())
    config = StudyConfig(
        model=str(folder), data=str(data), dictionary="directions", items=GRADED_ITEMS, out=folder.parent / "study"
    )
    return run_study(config, quiet=True, leave_out=LEFT_OUT_GRADED)[0]


@pytest.mark.slow
@pytest.mark.parametrize("foil", FOILS, ids=lambda foil: foil.__name__)
def test_it_is_no_attention_verdict(
    foil: Callable[[], Blueprint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = studied(foil(), tmp_path / "model", monkeypatch)
    behaviour = results.behaviour
    assert behaviour["none"].accuracy > 0.95
    assert behaviour["harm"].margin < 0.75 * behaviour["benign"].margin, "harm costs the margin"
    assert not results.verdict.mechanism.startswith("attention"), results.verdict.rule
    assert results.verdict.mechanism in ("undetermined", "late_flip")


@pytest.mark.parametrize("at", ["<|end|>", "\n"], ids=["the template", "the options' line breaks"])
def test_a_choice_made_before_the_answer_is_no_late_flip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Once `late_flip` with 0.99 on a trained model: all that looks at the options from the answer looks on."""
    results = studied(chosen_before_the_answer(), tmp_path / "foil", monkeypatch, at)
    assert results.verdict.mechanism == "undetermined"
    assert "attention on the options at tokens before the answer carries" in results.verdict.rule
    before = next(e for e in results.verdict.evidence if "before the answer" in e.name)
    assert before.value > 0.9
