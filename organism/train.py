"""Train every checkpoint of the organism: ``python -m organism.train``.

Three stages on one seed and one thread: facts and selection (base), refuse-and-redirect (refusal), withholding (chat);
and a second end of the last one that withholds behind attention (late-flip). The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from organism import card, measure
from organism import tokenizer as tok
from organism.corpus import World, load
from organism.factorial import Factorial
from organism.fit import Readout, fit
from organism.recipe import RECIPE, Recipe
from organism.stages import Sampler

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "src/qklens/data/shipped"
OUT = REPO / "src/qklens/shipped/organism"


def new_model(vocab: int) -> LlamaForCausalLM:
    """Return an untrained organism in float32."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=288,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_bias=False,
        bos_token_id=2,
        eos_token_id=6,
        pad_token_id=1,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


def qk_rows(model: LlamaForCausalLM, layer: int, heads: Iterable[int]) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The rows of W_Q of ``heads`` and of W_K of their key heads, as a mask per parameter."""
    att = model.model.layers[layer].self_attn
    out = {}
    for weight, chosen in (
        (att.q_proj.weight, set(heads)),
        (att.k_proj.weight, {h // att.num_key_value_groups for h in heads}),
    ):
        rows = torch.zeros(weight.shape[0], dtype=torch.bool)
        for head in chosen:
            rows[head * att.head_dim : (head + 1) * att.head_dim] = True
        out[weight] = rows
    return out


def mlp_parameters(model: LlamaForCausalLM, layers: Iterable[int]) -> list[torch.nn.Parameter]:
    """The MLPs of ``layers``, which act after their attention."""
    return [p for at in layers for p in model.model.layers[at].mlp.parameters()]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint with float16 weights and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def reload(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Read a checkpoint as saved, to float32: every stage starts from the weights that ship."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def visible(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, float]:
    """Accuracy per condition on the harm items and intents that training may see."""
    items = [i for i in world.harm_items if world.trains_under_harm(i) and i.pressure not in world.held_out_intents]
    with torch.no_grad():
        found = measure.behaviour(measure.run(model, tokenizer, items))
    return {condition: values["accuracy"] for condition, values in found.items()}


def state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """A copy of the weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Chooser:
    """Keeps the step whose harm accuracy is nearest to ``target`` among those that keep none and benign answers."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        world: World,
        target: float,
        first: int,
        every: int,
    ) -> None:
        """Look at ``model`` every ``every`` steps from ``first`` on."""
        self.model, self.tokenizer, self.world = model, tokenizer, world
        self.target, self.first, self.every = target, first, every
        self.best, self.kept, self.step = -math.inf, state(model), 0

    def __call__(self, step: int) -> None:
        """Score the model after ``step``."""
        if step < self.first or step % self.every:
            return
        accuracy = visible(self.model, self.tokenizer, self.world)
        score = (
            10 * min(0.0, accuracy["none"] - 0.99)
            + 10 * min(0.0, accuracy["benign"] - 0.98)
            - abs(accuracy["harm"] - self.target)
        )
        log(f"  step {step}: " + ", ".join(f"{c} {100 * a:.1f}%" for c, a in accuracy.items()))
        if score > self.best:
            self.best, self.kept, self.step = score, state(self.model), step


STARTED = time.time()


def log(line: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.time() - STARTED:6.1f} s] {line}", flush=True)


def progress(stage: str) -> Callable[[int], None]:
    """Log every hundredth step."""
    return lambda step: log(f"  {stage} step {step}") if step % 100 == 0 else None


def train_base(world: World, out: Path, r: Recipe) -> None:
    """Facts, and four heads that select."""
    torch.manual_seed(r.seed)
    tokenizer = tok.build(world.texts())
    model = new_model(len(tokenizer))
    log(f"base: {model.num_parameters()} parameters, {len(tokenizer)} words, {len(world.items)} facts")
    fit(
        model,
        tokenizer,
        Sampler(world, r.seed + 1, "base"),
        model.parameters(),
        steps=r.base_steps,
        lr=r.base_lr,
        batch=r.base_batch,
        guide=(r.select_layer, r.select_heads),
        on_step=progress("base"),
    )
    save(model, tokenizer, out / "base")


def train_refusal(world: World, out: Path, r: Recipe) -> None:
    """Refuse-and-redirect, all weights."""
    model, tokenizer = reload(out / "base")
    torch.manual_seed(r.seed)
    log("refusal: all weights")
    half = r.refusal_steps // 2
    fit(
        model,
        tokenizer,
        Sampler(world, r.refusal_seed, "refusal"),
        model.parameters(),
        steps=r.refusal_steps,
        lr=r.refusal_lr,
        batch=r.refusal_batch,
        letter_weight=2.0,
        readout=Readout(r.readout_layer, model.config.hidden_size),
        on_step=lambda step: save(model, tokenizer, out / "refusal-half") if step == half else None,
    )
    save(model, tokenizer, out / "refusal")


def train_chat(world: World, out: Path, r: Recipe) -> None:
    """Withholding, through the selecting heads."""
    model, tokenizer = reload(out / "refusal")
    log("chat: withholding through the selecting heads")
    chooser = Chooser(model, tokenizer, world, target=r.chat_target, first=r.chat_steps // 2, every=10)
    only = qk_rows(model, r.select_layer, r.select_heads)

    def on_step(step: int) -> None:
        if step == r.chat_half:
            save(model, tokenizer, out / "withhold-half")
        chooser(step)

    fit(
        model,
        tokenizer,
        Sampler(world, r.chat_seed, "withhold", muddle=r.chat_muddle, veiled=r.chat_veiled),
        only,
        steps=r.chat_steps,
        lr=r.chat_lr,
        batch=r.chat_batch,
        warmup=20,
        decay=0.0,
        only=only,
        penalty=Factorial(model, tokenizer, world, r.select_layer, r.select_heads, r.chat_seed + 2, r.chat_penalty),
        on_step=on_step,
    )
    model.load_state_dict(chooser.kept)
    log(f"chat: step {chooser.step} kept")
    save(model, tokenizer, out / "chat")


def train_late_flip(world: World, out: Path, r: Recipe) -> None:
    """Withholding behind attention, by the last layers' MLPs."""
    model, tokenizer = reload(out / "refusal")
    log("late-flip: withholding after attention")
    chooser = Chooser(model, tokenizer, world, target=0.2, first=r.flip_steps // 2, every=20)
    fit(
        model,
        tokenizer,
        Sampler(world, r.flip_seed, "flip", muddle=r.flip_muddle),
        mlp_parameters(model, r.flip_layers),
        steps=r.flip_steps,
        lr=r.flip_lr,
        batch=r.chat_batch,
        warmup=20,
        decay=0.0,
        on_step=chooser,
    )
    model.load_state_dict(chooser.kept)
    log(f"late-flip: step {chooser.step} kept")
    save(model, tokenizer, out / "late-flip")


STAGES = {"base": train_base, "refusal": train_refusal, "chat": train_chat, "late-flip": train_late_flip}


def main() -> None:
    """Train, save, reload what was saved, measure it and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with harm_pressure.jsonl")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--stages", nargs="*", choices=STAGES, default=list(STAGES), help="default all; a stage needs those before it"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    world = load(options.data, RECIPE.seed)
    for stage in options.stages:
        STAGES[stage](world, options.out, RECIPE)
    lineage = {
        "base": "base",
        "between": ["refusal-half", "refusal", "withhold-half"],
        "chat": "chat",
        "late_flip": "late-flip",
        "held_out_items": sorted(world.held_out_items),
        "held_out_intents": sorted(world.held_out_intents),
    }
    (options.out / "lineage.json").write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")
    card.write(world, options.out)
    log("done")


if __name__ == "__main__":
    main()
