"""What does the organism's chat model have that its base has not? A crosscoder over both says: ``make model-diff``.

For two layers a crosscoder is trained on the resid_pre of ``base`` and ``chat`` over the text that trained them (held-
out items and intents excluded). The latent that best tells open questions after a harmful sentence from the same
questions after its benign twin, at the answer position of one half of the items, is called the refusal latent, whoever
it belongs to; everything else is measured on the other half, and on items and intents that nothing was trained on:

* whose it is: its relative decoder norm (1 is the chat model's alone) and the share of live latents with less; the
  cosine of its two directions; and latent scaling (Minder et al. 2025), which says whether a norm is an artefact: the
  least-squares amount of f d_chat in the base model's stream over that in the chat model's, 0 where base has nothing
  of it, in what all other latents leave (`error`: was it shrunk away?) and in the reconstruction (`reconstruction`: do
  other latents write it for base?). A latent is the chat model's own by all three numbers of `RULE`, which are theirs;
* without any crosscoder: the chat model's share of both models' mean harm − benign at the answer, by length;
* AUC of harm against benign, and against harm *taken back* before the answer, which the chat model does not refuse; the
  same for the best latent that both models share;
* cause: taking what it writes out of the chat model's stream at the answer, and writing its mean under harm into either
  model's, each beside ten random directions of that length: how often does the next token open a refusal?
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from organism import tokenizer as tok
from organism.corpus import REFUSALS, RETRACTIONS, Item, World, load
from organism.dictionary import sequences
from organism.model_diff_figure import draw
from organism.recipe import RECIPE
from organism.train import DATA, OUT
from qklens.dictionaries.config import SIDES
from qklens.dictionaries.model_diff import ModelDiff
from qklens.dictionaries.source import fraction_variance_unexplained
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.finish import as_model_diff
from qklens.dictionaries.training.harvest import rows_of
from qklens.dictionaries.training.rows import HeldRows
from qklens.dictionaries.training.trainer import Trainer
from qklens.files import atomic_write
from qklens.models.edits import VectorEdit
from qklens.models.loading import load_subject
from qklens.models.passes import run_pass
from qklens.models.sites import capture
from qklens.models.subject import Subject

HERE = Path(__file__).resolve().parent
LAYERS = (2, 3)
DOCUMENTS, CHECKED = 6000, 300
RULE = {"relative_norm_from": 0.9, "scaling_error_below": 0.2, "scaling_reconstruction_below": 0.5}
"""When a latent is the chat model's own; the numbers of Minder et al. 2025 (2504.02922), in the figure of norms."""
SHARED = (0.4, 0.6)
LIVE = 1e-4
"""Share of tokens on which a latent must be active to be counted."""
DRAWS = 10
KINDS = ("harm", "benign", "taken back")


def config(layer: int) -> TrainingConfig:
    """How each layer's crosscoder is trained."""
    return TrainingConfig(
        kind="model_diff",
        layers=(layer,),
        features=2048,
        activation="batch_topk",
        k=6,
        steps=4000,
        batch=1024,
        learning_rate=2e-3,
        warmup_steps=50,
        auxiliary_k=32,
        dead_after_steps=200,
        seed=0,
    )


@dataclass(frozen=True)
class Prompts:
    """Open requests of some items: `texts[kind]`, one an item, the same item in the same place."""

    texts: dict[str, list[str]]


def requests(items: Sequence[Item]) -> Prompts:
    """Each item's question after its harmful sentence, after its benign twin, and after harm that is taken back."""
    texts = {
        "harm": [f"{i.pressure} {i.question}" for i in items],
        "benign": [f"{i.benign} {i.question}" for i in items],
        "taken back": [f"{i.pressure} {RETRACTIONS[n % len(RETRACTIONS)]} {i.question}" for n, i in enumerate(items)],
    }
    return Prompts({kind: [tok.render(text, None) for text in rows] for kind, rows in texts.items()})


@dataclass(frozen=True)
class Pair:
    """Both checkpoints and the crosscoder between them."""

    base: Subject
    chat: Subject
    diff: ModelDiff

    @property
    def layer(self) -> int:
        """Whose resid_pre it reads."""
        return self.diff.config.layer

    def streams(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Both models' at the answer position, `prompt d_model`."""
        site = f"resid_pre.{self.layer}"
        base, chat = (capture(s, s.batch(texts), [site])[site][:, -1].float() for s in (self.base, self.chat))
        return base, chat

    def activations(self, texts: Sequence[str]) -> Tensor:
        """At the answer position, `prompt feature`."""
        return self.diff.encode(self.layer, lambda _: torch.cat(self.streams(texts), dim=1))

    def refuses(self, subject: Subject, texts: Sequence[str], change: Tensor | None = None) -> float:
        """Share of prompts whose next token opens a refusal, with a `prompt d_model` change added at the answer."""
        batch = subject.batch(texts)
        mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        mask[:, -1] = True
        edits = [] if change is None else [VectorEdit(self.layer, "residual", mask, lambda x, _: x + change.to(x))]
        top = run_pass(subject, batch, edits).logits.argmax(dim=-1)
        opening = torch.tensor(
            sorted({subject.tokenizer(r, add_special_tokens=False)["input_ids"][0] for r in REFUSALS})
        )
        return float(torch.isin(top, opening).float().mean())


def auc(high: Tensor, low: Tensor) -> Tensor:
    """Chance that a number of `high` exceeds one of `low`, ties half, by column."""
    greater = (high[:, None] > low[None]).float() + 0.5 * (high[:, None] == low[None]).float()
    return greater.mean(dim=(0, 1))


def trained(base: Subject, chat: Subject, rows: Tensor, held: Tensor, layer: int) -> tuple[ModelDiff, dict[str, Any]]:
    """A layer's crosscoder, and how good it is on documents that it was not trained on."""
    made = Trainer(HeldRows(list(rows.chunk(2, dim=1)), 8192), config(layer)).run()
    diff = as_model_diff(
        made.learner, made.scale, name="diff", base_sha256=base.sha256 or "", chat_sha256=chat.sha256 or ""
    )
    activations = diff.encode(layer, lambda _: held)
    errors = diff.error(layer, lambda _: held, activations).chunk(2, dim=1)
    unexplained = {
        side: fraction_variance_unexplained(x, error)
        for side, x, error in zip(SIDES, held.chunk(2, dim=1), errors, strict=True)
    }
    live = (activations > 0).float().mean(dim=0) > LIVE
    l0 = float((activations > 0).float().sum(dim=1).mean())
    found = {"l0": l0, "fraction_variance_unexplained": unexplained, "live": int(live.sum())}
    return diff, found | {"relative_norm": _short(diff.relative_norm()[live]), "mask": live}


def _short(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def separation(pair: Pair, feature: int, sets: dict[str, Prompts]) -> dict[str, Any]:
    """AUC and activations of a latent on sets of prompts."""
    found = {}
    for name, prompts in sets.items():
        at = {kind: pair.activations(texts)[:, feature : feature + 1] for kind, texts in prompts.texts.items()}
        found[name] = {
            "prompts": len(at["harm"]),
            "auc_harm_benign": float(auc(at["harm"], at["benign"])),
            "auc_harm_taken_back": float(auc(at["harm"], at["taken back"])),
            "activations": {kind: _short(values[:, 0]) for kind, values in at.items()},
        }
    return found


def scaling(diff: ModelDiff, feature: int, rows: Tensor) -> dict[str, float]:
    """Latent scaling: β of the base model over β of the chat model, β = argmin Σ ‖t − β f d_chat‖²; at mean square 1.

    `error`: t is x less what all other latents and the bias write. `reconstruction`: t is x̂.
    """
    layer = diff.config.layer
    activations = diff.encode(layer, lambda _: rows)
    errors = diff.error(layer, lambda _: rows, activations).chunk(2, dim=1)
    own = activations[:, feature]
    direction = diff.decoder[1, feature] * diff.scale[1]
    betas: dict[str, list[float]] = {"error": [], "reconstruction": []}
    for side, (x, error) in enumerate(zip(rows.chunk(2, dim=1), errors, strict=True)):
        left = error + own[:, None] * diff.decoder[side, feature]
        for name, target in (("error", left), ("reconstruction", x - error)):
            along = (target * diff.scale[side] @ direction) @ own
            betas[name].append(float(along / (own.pow(2).sum() * direction.pow(2).sum())))
    return {name: base / chat for name, (base, chat) in betas.items()}


def is_chats_own(relative_norm: float, scaled: dict[str, float]) -> bool:
    """Whether a latent passes every number of `RULE`."""
    return (
        relative_norm >= RULE["relative_norm_from"]
        and scaled["error"] < RULE["scaling_error_below"]
        and scaled["reconstruction"] < RULE["scaling_reconstruction_below"]
    )


def chat_share_of_means(pair: Pair, prompts: Prompts) -> float:
    """‖Δ_chat‖ / (‖Δ_base‖ + ‖Δ_chat‖), Δ the mean of harm less that of benign at the answer, at mean square 1."""
    means = {kind: [x.mean(dim=0) for x in pair.streams(prompts.texts[kind])] for kind in ("harm", "benign")}
    scales = pair.diff.scale
    base, chat = (float((means["harm"][i] - means["benign"][i]).norm() * scales[i]) for i in range(2))
    return chat / (base + chat)


def cause(pair: Pair, feature: int, prompts: Prompts, amount: float, draw: torch.Generator) -> dict[str, Any]:
    """Refusals with the latent taken out of the chat model, and with it written into the base model."""
    write = pair.diff.decoder[1, feature]
    write_in_base = write * pair.diff.scale[1] / pair.diff.scale[0]
    texts = prompts.texts

    def beside_random(subject: Subject, kind: str, amounts: Tensor, direction: Tensor) -> dict[str, Any]:
        def by(vector: Tensor) -> float:
            return pair.refuses(subject, texts[kind], amounts[:, None] * vector)

        drawn = torch.nn.functional.normalize(torch.randn(DRAWS, len(direction), generator=draw), dim=1)
        random = [by(row * direction.norm()) for row in drawn]
        return {"clean": pair.refuses(subject, texts[kind]), "edited": by(direction), "random": random}

    fires = pair.activations(texts["harm"])[:, feature]
    given = torch.full((len(texts["benign"]),), amount)
    return {
        "chat, taken out under harm": beside_random(pair.chat, "harm", -fires, write),
        "chat, written in under benign": beside_random(pair.chat, "benign", given, write),
        "base, written in under harm": beside_random(pair.base, "harm", given, write_in_base),
    }


def best(scores: Tensor, allowed: Tensor) -> int:
    """The allowed latent with the highest score."""
    return int(scores.masked_fill(~allowed, -1.0).argmax())


def of_layer(
    pair: Pair, quality: dict[str, Any], held: Tensor, halves: tuple[Prompts, Prompts], unseen: Prompts
) -> dict[str, Any]:
    """Everything that is said of one layer."""
    live = quality.pop("mask")
    norm = pair.diff.relative_norm()
    chosen_on = {kind: pair.activations(texts) for kind, texts in halves[0].texts.items()}
    scores = auc(chosen_on["harm"], chosen_on["benign"])
    sets = {"other half": halves[1], "never trained on": unseen}
    alone, shared = live & (norm >= RULE["relative_norm_from"]), live & (norm >= SHARED[0]) & (norm <= SHARED[1])
    found: dict[str, Any] = {"layer": pair.layer, **quality}
    found |= {"chat_alone": int(alone.sum()), "shared_latents": int(shared.sum())}
    found["chat_share_of_means"] = chat_share_of_means(pair, halves[1])
    for name, allowed in (("refusal", live), ("shared", shared)):
        feature = best(scores, allowed)
        scaled = scaling(pair.diff, feature, held)
        found[name] = {
            "feature": feature,
            "relative_norm": float(norm[feature]),
            "live_latents_with_less": float((norm[live] < norm[feature]).float().mean()),
            "cosine": float(torch.cosine_similarity(*pair.diff.decoder[:, feature], dim=0)),
            "scaling": scaled,
            "chats_own": is_chats_own(float(norm[feature]), scaled),
            "auc_on_the_choosing_half": float(scores[feature]),
            "on": separation(pair, feature, sets),
        }
    feature = found["refusal"]["feature"]
    amount = float(chosen_on["harm"][:, feature].mean())
    draw = torch.Generator().manual_seed(pair.layer)
    found["refusal"]["cause"] = cause(pair, feature, halves[1], amount, draw)
    return found


def items_of(world: World) -> tuple[list[Item], list[Item], list[Item]]:
    """Both halves of the items whose intents training saw, and the items whose intents it did not."""
    seen = [i for i in world.harm_items if i.pressure not in world.held_out_intents and world.trains_under_harm(i)]
    return seen[::2], seen[1::2], [i for i in world.harm_items if i.pressure in world.held_out_intents]


def _line(row: dict[str, Any]) -> str:
    """What the terminal says of a layer."""
    words = [f"layer {row['layer']}: {row['live']} live latents, {row['chat_alone']} with a chat model's norm"]
    words.append(f"the chat model's share of the means {row['chat_share_of_means']:.3f}")
    for name in ("refusal", "shared"):
        one = row[name]
        aucs = [f"{part['auc_harm_benign']:.3f} {part['auc_harm_taken_back']:.3f}" for part in one["on"].values()]
        whose = f"norm {one['relative_norm']:.3f}, cosine {one['cosine']:.3f}, scaling {one['scaling']}"
        words.append(f"{name} {one['feature']}, {whose}, AUC {', '.join(aucs)}")
        words += [f"{key}: {value}" for key, value in one.get("cause", {}).items()]
    return "\n  ".join([*words, str(row["fraction_variance_unexplained"])])


def main(say: Callable[[str], None] = print) -> None:
    """Train, measure, and write ``model_diff.json`` and ``model_diff.svg``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for model_diff.json and model_diff.svg")
    parser.add_argument("--draw", action="store_true", help="draw the figure again from the numbers that are there")
    options = parser.parse_args()
    file = options.out / "model_diff.json"
    if options.draw:
        draw(json.loads(file.read_text(encoding="utf-8")), options.out / "model_diff.svg")
        return
    torch.set_num_threads(1)
    world = load(DATA, RECIPE.seed)
    base, chat = (load_subject(OUT / name) for name in ("base", "chat"))
    text, held = sequences(world, chat, DOCUMENTS, seed=100), sequences(world, chat, CHECKED, seed=900)
    first, second, unseen = (requests(items) for items in items_of(world))
    layers = []
    for layer in LAYERS:
        rows, checked = (rows_of([base, chat], part, (layer,)).float() for part in (text, held))
        diff, quality = trained(base, chat, rows, checked, layer)
        layers.append(of_layer(Pair(base, chat, diff), quality, checked, (first, second), unseen))
        say(_line(layers[-1]))
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "training": config(0).model_dump(mode="json") | {"layers": list(LAYERS)},
        "rule": {**RULE, "shared": SHARED, "live": LIVE},
        "layers": layers,
    }
    atomic_write(file, json.dumps(found, indent=1) + "\n")
    draw(json.loads(file.read_text(encoding="utf-8")), options.out / "model_diff.svg")


if __name__ == "__main__":
    main()
