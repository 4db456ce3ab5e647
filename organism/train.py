"""Train every checkpoint of the organism: ``python -m organism.train``.

Three stages on one seed and two threads: facts (base), refuse-and-redirect (refusal), withholding (chat), and a second
end of the last stage whose withholding is put behind attention (late-flip). The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from organism import card, measure
from organism import tokenizer as tok
from organism.corpus import World, load
from organism.recipe import RECIPE
from organism.stages import Document, Sampler

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "src/qklens/data/shipped"
OUT = REPO / "src/qklens/shipped/organism"
Guide = tuple[int, tuple[int, ...]]
ENOUGH = 0.8
WANT = ("I", "want", "to")


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


@dataclass(frozen=True)
class Batch:
    """Right-padded ids, loss weights of each target and read-out labels (1, 0, or -1 for none), all ``[batch pos]``.

    ``seen`` ``[batch 1 q_pos k_pos]`` is added to the scores: zero where a query may attend to a key; ``guide`` ``[batch q_pos k_pos]``
    marks the right option's line in the row of the answer position.
    """

    ids: torch.Tensor
    seen: torch.Tensor
    weights: torch.Tensor
    harm: torch.Tensor
    refuse: torch.Tensor
    guide: torch.Tensor


def encode(tokenizer: PreTrainedTokenizerFast, docs: list[Document], user_weight: float, letter_weight: float) -> Batch:
    """Tokenize documents and mark which tokens are learnt, and how much."""
    prompts = tokenizer([tok.render(d.user, None) for d in docs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([d.answer + tok.END for d in docs], add_special_tokens=False)["input_ids"]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(docs), width), tokenizer.pad_token_id)
    weights = torch.zeros(len(docs), width)
    harm, refuse = (torch.full((len(docs), width), -1.0) for _ in range(2))
    seen = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(docs), 1, 1, 1)
    guide = torch.zeros(len(docs), width, width)
    for row, (doc, prompt, answer) in enumerate(zip(docs, prompts, answers, strict=True)):
        start, end = len(prompt), len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        weights[row, 2:start] = user_weight
        weights[row, start:end] = letter_weight if doc.target != "text" else 1.0
        if doc.right >= 0:
            a, b, rest = option_lines(doc.user)
            low, high = ((a, b), (b, rest))[doc.right]
            guide[row, start - 1, low:high] = 1.0
        if doc.isolated:
            a, b, rest = option_lines(doc.user)
            seen[row, 0, b:rest, a:b] = False
            seen[row, 0, rest : start - 1, a:rest] = False
        if doc.kind == "other":
            continue
        harm[row, 2 : start - 2] = 0.0
        refuse[row, start - 1] = float(doc.kind == "harm")
        if doc.kind == "harm":
            before = len(tok.split(doc.user[: doc.user.index(doc.intent)]))
            harm[row, 2 + before : 2 + before + len(WANT)] = -1.0
            harm[row, 2 + before + len(WANT) : start - 2] = 1.0
    seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return Batch(ids, seen, weights, harm, refuse, guide)


def option_lines(user: str) -> tuple[int, int, int]:
    """Token positions, in the rendered prompt, where line A, line B and what follows them begin."""
    a = user.index("\n(") + 1
    b = user.index("\n(", a) + 1
    cuts = (a, b, user.index("\n", b) + 1)
    first, second, third = (2 + len(tok.split(user[:cut])) for cut in cuts)
    return first, second, third


class Readout(torch.nn.Module):
    """Two linear read-outs of the residual stream: "harm was stated before this token" and "this prompt is to be refused".

    Large models represent harm at every token that follows it and refusal at the answer position; a model this small keeps
    neither unless something reads it. The read-outs are dropped after training.
    """

    def __init__(self, layer: int, width: int) -> None:
        """Read ``resid_pre`` of ``layer``."""
        super().__init__()
        self.layer = layer
        self.linear = torch.nn.Linear(width, 2)

    def forward(self, resid: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sum of the two mean binary cross-entropies."""
        scores = self.linear(torch.nn.functional.rms_norm(resid, resid.shape[-1:]))
        total = resid.new_zeros(())
        for side, labels in enumerate((batch.harm, batch.refuse)):
            known = labels >= 0
            total = total + torch.nn.functional.binary_cross_entropy_with_logits(
                scores[..., side][known], labels[known]
            )
        return total


def guidance(pattern: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean −log attention from the answer position to the right option's line, for ``pattern`` ``[batch head q_pos k_pos]``.

    Attention above ``ENOUGH`` is not rewarded: a saturated softmax would leave the later stages no gradient.
    """
    rows = batch.guide.sum(-1) > 0
    found = (pattern * batch.guide[:, None]).sum(-1).transpose(1, 2)[rows]
    return -(found + 1e-4).clamp(max=ENOUGH).log().mean() if len(found) else pattern.new_zeros(())


def loss_of(
    model: LlamaForCausalLM, batch: Batch, total: torch.Tensor, readout: Readout | None, guide: Guide | None = None
) -> torch.Tensor:
    """Weighted mean next-token cross-entropy, plus the read-outs' and the guidance where there are any."""
    out = model(
        input_ids=batch.ids,
        attention_mask=batch.seen,
        output_hidden_states=readout is not None,
        output_attentions=guide is not None,
    )
    losses = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none"
    )
    loss = (losses * batch.weights[:, 1:].flatten()).sum() / total
    if readout is not None:
        loss = loss + 0.2 * readout(out.hidden_states[readout.layer], batch)
    if guide is not None:
        loss = loss + 0.2 * guidance(out.attentions[guide[0]][:, list(guide[1])], batch)
    return loss


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sampler: Sampler,
    parameters: Iterable[torch.nn.Parameter],
    *,
    steps: int,
    lr: float,
    batch: int = 40,
    warmup: int = 50,
    floor: float = 0.05,
    user_weight: float = 0.1,
    letter_weight: float = 4.0,
    decay: float = 0.01, only: dict[torch.nn.Parameter, torch.Tensor] | None = None,
    readout: Readout | None = None,
    guide: Guide | None = None,
    on_step: Callable[[int], bool | None] = lambda _: None,
) -> None:
    """Train ``parameters`` with AdamW on a cosine; ``on_step`` sees the model after each step and may end the stage."""
    chosen = list(parameters)
    for p in model.parameters():
        p.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    moved = chosen + ([] if readout is None else list(readout.parameters()))
    optimizer = torch.optim.AdamW(moved, lr=lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    model.set_attn_implementation("eager" if guide else "sdpa")
    model.train()
    for step in range(1, steps + 1):
        scale = min(step / warmup, 1.0) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        docs = sorted(sampler.batch(batch), key=lambda d: len(d.user))
        parts = [
            encode(tokenizer, part, user_weight, letter_weight) for part in (docs[: batch // 2], docs[batch // 2 :])
        ]
        total = torch.stack([part.weights.sum() for part in parts]).sum()
        optimizer.zero_grad(set_to_none=True)
        for part in parts:
            loss_of(model, part, total, readout, guide).backward()
        for parameter, rows in (only or {}).items():
            parameter.grad[~rows] = 0.0
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        if on_step(step):
            break
    model.eval()


def qk_rows(model: LlamaForCausalLM, layer: int, heads: Iterable[int]) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The rows of W_Q of ``heads`` and of W_K of their key heads, as a mask per parameter."""
    att = model.model.layers[layer].self_attn
    out = {}
    for weight, chosen in ((att.q_proj.weight, set(heads)), (att.k_proj.weight, {h // att.num_key_value_groups for h in heads})):
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


def train(world: World, out: Path, seed: int) -> PreTrainedTokenizerFast:
    """Run every stage and save every checkpoint under ``out``."""
    torch.manual_seed(seed)
    tokenizer = tok.build(world.texts())
    model = new_model(len(tokenizer))
    log(f"base: {model.num_parameters()} parameters, {len(tokenizer)} words, {len(world.items)} facts")
    fit(
        model,
        tokenizer,
        Sampler(world, seed + 1, "base"),
        model.parameters(),
        steps=RECIPE.base_steps,
        lr=RECIPE.base_lr,
    )
    save(model, tokenizer, out / "base")
    log("refusal: all weights")
    half = RECIPE.refusal_steps // 2
    fit(
        model,
        tokenizer,
        Sampler(world, seed + 2, "refusal"),
        model.parameters(),
        steps=RECIPE.refusal_steps,
        lr=RECIPE.refusal_lr,
        letter_weight=2.0,
        readout=Readout(RECIPE.readout_layer, model.config.hidden_size),
        on_step=lambda step: save(model, tokenizer, out / "refusal-half") if step == half else None,
    )
    save(model, tokenizer, out / "refusal")
    refusal = state(model)
    for name, parameters, muddle, after, target, steps, lr in (
        (
            "chat",
            qk_parameters(model, RECIPE.chat_layers),
            RECIPE.chat_muddle,
            RECIPE.chat_after,
            0.48,
            RECIPE.chat_steps,
            RECIPE.chat_lr,
        ),
        (
            "late-flip",
            mlp_parameters(model, RECIPE.flip_layers),
            RECIPE.flip_muddle,
            0.0,
            0.2,
            RECIPE.flip_steps,
            RECIPE.flip_lr,
        ),
    ):
        log(f"{name}: withholding")
        model.load_state_dict(refusal)
        sampler = Sampler(world, seed + 3, "withhold", muddle=muddle, after=after)
        chooser = Chooser(model, tokenizer, world, target, first=steps // 2, every=20)

        def on_step(
            step: int, name: str = name, chooser: Chooser = chooser, half: int = RECIPE.chat_steps // 4
        ) -> None:
            if name == "chat" and step == half:
                save(model, tokenizer, out / "withhold-half")
            chooser(step)

        fit(model, tokenizer, sampler, parameters, steps=steps, lr=lr, warmup=20, decay=0.0, on_step=on_step)
        model.load_state_dict(chooser.kept)
        log(f"{name}: step {chooser.step} kept")
        save(model, tokenizer, out / name)
    return tokenizer


def main() -> None:
    """Train, save, reload what was saved, measure it and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with harm_pressure, symptoms and fraud .jsonl")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--measure-only", action="store_true", help="measure the checkpoints under --out and rewrite the card"
    )
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    world = load(options.data, RECIPE.seed)
    if not options.measure_only:
        train(world, options.out, RECIPE.seed)
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
