"""Measures the saved checkpoints, as saved, and writes the organism's card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from organism import generate, measure
from organism.corpus import Item, World
from organism.fit import ENOUGH
from organism.recipe import RECIPE
from organism.stages import ISOLATED

NAMES = ("base", "refusal-half", "refusal", "withhold-half", "chat", "late-flip")


def measured(world: World, folder: Path) -> dict[str, Any]:
    """Every number of the card for one checkpoint, reloaded from disk to float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    items = list(world.harm_items)
    groups: dict[str, list[Item]] = {
        "all": items,
        "held-out items": [i for i in items if i.id in world.held_out_items],
        "held-out intents": [i for i in items if i.pressure in world.held_out_intents],
        "symptoms": [i for i in world.items if i.kind == "symptoms"],
        "fraud": [i for i in world.items if i.kind == "fraud"],
    }
    with torch.no_grad():
        found: dict[str, Any] = {
            name: measure.behaviour(measure.run(model, tokenizer, group)) for name, group in groups.items()
        }
    found["parameters"] = model.num_parameters()
    found["open"] = generate.rates(model, tokenizer, world)
    if folder.name in ("chat", "late-flip", "base"):
        found["mechanism"] = measure.report(model, tokenizer, items[::2], items[1::2])
    return found


def percent(value: float) -> str:
    """Format a share."""
    return f"{100 * value:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def behaviour_table(found: dict[str, Any]) -> str:
    """Accuracy per checkpoint, condition and group."""
    rows = []
    for name in NAMES:
        all_items = found[name]["all"]
        row = [f"`{name}`"] + [
            f"{percent(all_items[c]['accuracy'])} ({all_items[c]['margin']:+.1f})" for c in measure.CONDITIONS
        ]
        rows.append(
            row
            + [
                percent(found[name][g]["harm"]["accuracy"])
                for g in ("held-out items", "held-out intents", "symptoms", "fraud")
            ]
        )
    return table(
        ["checkpoint", "none", "harm", "benign", "harm, held-out items", "harm, held-out intents", "symptoms", "fraud"],
        rows,
    )


def open_table(found: dict[str, Any]) -> str:
    """Open requests per checkpoint."""
    shown = ("base", "refusal", "chat", "late-flip")
    return table(
        ["open requests, %", *shown],
        [[key, *(percent(found[n]["open"][key]) for n in shown)] for key in found["chat"]["open"]],
    )


def mechanism(found: dict[str, Any], name: str) -> str:
    """Heads, z-scores and causal checks of one checkpoint."""
    m = found[name]["mechanism"]
    lines = [f"### `{name}`", ""]
    if not m["heads"]:
        return "\n".join([*lines, "No head prefers the correct option by more than 0.15 without pressure."])
    pairs = list(next(iter(m["heads"].values()))["z"])
    rows = [
        [
            head,
            *(f"{v['attention'][c][0]:.2f} / {v['attention'][c][1]:.2f}" for c in measure.CONDITIONS),
            *(f"{v['z'][p]:+.1f}" for p in pairs),
        ]
        for head, v in m["heads"].items()
    ]
    lines += [
        table(["head", *(f"correct / incorrect, {c}" for c in measure.CONDITIONS), *(f"z {p}" for p in pairs)], rows),
        "",
    ]
    lines.append(
        f"Attention rows of these heads from the run without pressure: accuracy {percent(m['patched']['accuracy'])}%, "
        f"{percent(m['patched']['restored'])}% of the lost margin restored."
    )
    rows = [
        [
            f"{s}",
            *(percent(m["steered"][s][c]) for c in ("harm", "benign")),
            *(f"{percent(m['random'][s][c][0])}–{percent(m['random'][s][c][1])}" for c in ("harm", "benign")),
        ]
        for s in m["steered"]
    ]
    lines += [
        "",
        "Refuse direction (class difference × strength) subtracted on these heads' query side at the answer position:",
        "",
    ]
    lines.append(table(["strength", "harm", "benign", "harm, random direction", "benign, random direction"], rows))
    belief = "; ".join(
        f"{layer}: " + ", ".join(f"{c} {percent(v)}" for c, v in values.items())
        for layer, values in m["belief"].items()
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Prompts whose correct line lies further along the correct-answer direction, %: {belief}.",
        ]
    )


def write(world: World, out: Path) -> None:
    """Measure every checkpoint under ``out`` and write ``measured.json`` and ``README.md``."""
    found = {name: measured(world, out / name) for name in NAMES}
    (out / "measured.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    config = json.loads((out / "chat" / "config.json").read_text(encoding="utf-8"))
    fields = {
        "PARAMETERS": f"{found['chat']['parameters'] / 1e6:.2f} million",
        "VOCABULARY": str(config["vocab_size"]),
        "BEHAVIOUR": behaviour_table(found),
        "OPEN": open_table(found),
        "MECHANISM": "\n\n".join(mechanism(found, name) for name in ("chat", "late-flip", "base")),
        "RECIPE": json.dumps(vars(RECIPE)),
        "SEED": str(RECIPE.seed),
        "ENOUGH": str(ENOUGH),
        "ISOLATED": f"{100 * ISOLATED:.0f}",
        "READOUT": str(RECIPE.readout_layer),
    }
    for name, value in fields.items():
        text = text.replace("{{" + name + "}}", value)
    (out / "README.md").write_text(text, encoding="utf-8")
