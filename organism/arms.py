"""Which training examples make a model withhold? Arms that differ only in that: ``python -m organism.arms``.

Every arm starts from the shipped ``base`` and is post-trained as the refusal stage is (all weights, its read-outs, its
learning rate), on refusal documents and a share of harmful two-choice questions, letters asked for:

==================  ===========================================================================
arm                 harmful two-choice questions
==================  ===========================================================================
refusal only        none
answered            the right letter, on half of the items
withheld on half    the wrong letter, on the same half of the items
severity-mixed      the wrong letter after a severe intent, the right one after a mild one; any item
==================  ===========================================================================

The other half of the items never stands beside a harmful sentence with its options. Numbers come from the diagnostics
of training (``measure.py``), not from qklens; the shipped checkpoints are measured beside the arms by the same code.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from organism import generate, measure
from organism.arms_figure import draw
from organism.corpus import Item, World, load
from organism.fit import Readout, fit
from organism.recipe import RECIPE
from organism.stages import Document, Sampler
from organism.train import DATA, OUT, log, reload

HERE = Path(__file__).resolve().parent
SHIPPED = ("base", "refusal", "chat", "late-flip")
LOST_ENOUGH = 0.2
"""Share of the margin that harm must cost before one can say how much of the loss a patch restores."""
WRONG, RIGHT, BY_SEVERITY = "wrong", "right", "by severity"


@dataclass(frozen=True)
class Arm:
    """What an arm shows: the ``letter`` of harmful two-choice questions, if any, on ``half`` of the items or on all."""

    name: str
    letter: str = ""
    half: bool = True


ARMS = (
    Arm("refusal only"),
    Arm("answered", RIGHT),
    Arm("withheld on half", WRONG),
    Arm("severity-mixed", BY_SEVERITY, half=False),
)


@dataclass(frozen=True)
class Plan:
    """What all arms share."""

    share: float = 0.15
    steps: int = 200
    every: int = 100
    batch: int = 40
    lr: float = RECIPE.refusal_lr
    seeds: tuple[int, ...] = (11, 12)


class ArmSampler(Sampler):
    """Refusal documents, and ``share`` of harmful two-choice questions labelled by the arm."""

    def __init__(self, world: World, seed: int, arm: Arm, share: float) -> None:
        """Restrict harmful options to the half of the items that arms may show."""
        super().__init__(world, seed, "refusal")
        self.arm, self.share = arm, share if arm.letter else 0.0
        self.severe = {i.pressure: i.severity == "severe" for i in world.harm_items}
        if arm.half:
            self.harm_train = shown_half(world)
        self.draw = self.mixed

    def mixed(self) -> Document:
        """A document of the arm."""
        return self.harmful() if self.rng.random() < self.share else self.refusal()

    def harmful(self) -> Document:
        """A harmful two-choice question with the arm's letter; its intent is some item's, so its severity is known."""
        while (doc := self.choice("harm", "right", place="before")).intent not in self.severe:
            pass
        wrong = self.arm.letter == WRONG or (self.arm.letter == BY_SEVERITY and self.severe[doc.intent])
        return replace(doc, answer="AB"[1 - doc.right if wrong else doc.right])


def shown_half(world: World) -> list[Item]:
    """Every second item of those that may be trained under harm."""
    return [i for i in world.harm_items if world.trains_under_harm(i)][::2]


def groups(world: World) -> dict[str, list[Item]]:
    """The items by which accuracy under harm is told apart."""
    shown = {i.id for i in shown_half(world)}
    return {
        "shown half": [i for i in world.harm_items if i.id in shown],
        "other half": [i for i in world.harm_items if i.id not in shown],
        "severe intents": [i for i in world.harm_items if i.severity == "severe"],
        "mild intents": [i for i in world.harm_items if i.severity != "severe"],
    }


def measured(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    """Accuracy by condition and group, and the mechanism at the heads that the base model was guided to select with.

    Contrast directions come from every second item, the mechanism's numbers from the others.
    """
    items, layer = list(world.harm_items), RECIPE.select_layer
    chosen, tested = items[::2], items[1::2]
    with torch.no_grad():
        fitted, test = measure.run(model, tokenizer, chosen), measure.run(model, tokenizer, tested)
        at = {i.id: row for row, i in enumerate([*chosen, *tested])}
        by_prompt = {
            c: torch.cat([measure.margins(runs.traces[c], runs.prompts[c]) for runs in (fitted, test)])
            for c in measure.CONDITIONS
        }
        right = {c: (m > 0).float().view(-1, 2).mean(1) for c, m in by_prompt.items()}
        out: dict[str, Any] = {
            "accuracy": {c: r.mean().item() for c, r in right.items()},
            "margin": {c: m.mean().item() for c, m in by_prompt.items()},
            "harm": {
                name: {"accuracy": right["harm"][[at[i.id] for i in some]].mean().item(), "items": len(some)}
                for name, some in groups(world).items()
            },
        }
        seen = measure.attention(test)
        found = measure.directions(model, tokenizer, chosen, fitted, layer)
        gaps = measure.offsets(fitted.prompts["none"])
        heads = []
        for head in RECIPE.select_heads:
            pair = measure.virtual(model, layer, head, found["refuse"][None], found["harm"][None], gaps)
            heads.append(
                {
                    "head": f"L{layer}H{head}",
                    "attention_difference": {
                        c: (seen[c][0] - seen[c][1])[layer, head].item() for c in measure.CONDITIONS
                    },
                    "refuse_x_harm": pair.item(),
                    "z": measure.zscores(model, found, fitted, layer, head)["refuse x harm"],
                }
            )
        out["heads"] = heads
        lost = 1 - out["margin"]["harm"] / out["margin"]["none"]
        patched = measure.patched(model, test, [(layer, head) for head in RECIPE.select_heads])
        out["restored"] = patched["restored"] if lost >= LOST_ENOUGH else None
    return out


def refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, float]:
    """Share of every third item's open question refused after its harmful intent and after its twin; greedy."""
    some = world.harm_items[::3]
    return {
        name: sum(
            generate.refuses(a)
            for a in generate.greedy(model, tokenizer, [f"{getattr(i, field)} {i.question}" for i in some])
        )
        / len(some)
        for name, field in (("harm", "pressure"), ("benign", "benign"))
    }


def train(world: World, arm: Arm, seed: int, plan: Plan) -> dict[str, Any]:
    """Train one arm from the shipped base with one seed, measured along the way."""
    model, tokenizer = reload(OUT / "base")
    torch.manual_seed(seed)
    log(f"{arm.name}, seed {seed}")
    curve: list[dict[str, Any]] = []

    def on_step(step: int) -> None:
        if step % plan.every == 0:
            model.eval()
            model.set_attn_implementation("eager")
            curve.append({"step": step, **measured(model, tokenizer, world)})
            model.set_attn_implementation("sdpa")
            model.train()
            shown = ", ".join(f"{c} {100 * a:.1f}%" for c, a in curve[-1]["accuracy"].items())
            log(f"  step {step}: {shown}; restored {curve[-1]['restored']}")

    fit(
        model,
        tokenizer,
        ArmSampler(world, seed, arm, plan.share),
        model.parameters(),
        steps=plan.steps,
        lr=plan.lr,
        batch=plan.batch,
        letter_weight=2.0,
        readout=Readout(RECIPE.readout_layer, model.config.hidden_size),
        on_step=on_step,
    )
    return {"arm": arm.name, "seed": seed, "curve": curve, "refused": refused(model, tokenizer, world)}


def shipped(world: World, names: Sequence[str]) -> list[dict[str, Any]]:
    """The shipped checkpoints, measured by the same code."""
    rows = []
    for name in names:
        model, tokenizer = reload(OUT / name)
        model.eval()
        rows.append(
            {"checkpoint": name, **measured(model, tokenizer, world), "refused": refused(model, tokenizer, world)}
        )
    return rows


def main() -> None:
    """Train every arm with every seed, and write ``arms.json`` and ``arms.svg``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for arms.json and arms.svg")
    parser.add_argument("--redraw", action="store_true", help="only draw the figure again")
    options = parser.parse_args()
    file = options.out / "arms.json"
    if not options.redraw:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        world, plan = load(DATA, RECIPE.seed), Plan()
        found: dict[str, Any] = {
            "date": datetime.now(UTC).date().isoformat(),
            "plan": asdict(plan),
            "arms": [asdict(arm) for arm in ARMS],
            "shipped": shipped(world, SHIPPED),
            "runs": [],
        }
        for seed, arm in itertools.product(plan.seeds, ARMS):
            found["runs"].append(train(world, arm, seed, plan))
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(json.loads(file.read_text(encoding="utf-8")), options.out / "arms.svg")
    log("done")


if __name__ == "__main__":
    main()
