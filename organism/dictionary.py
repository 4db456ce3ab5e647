"""Train the organism's dictionary: a weakly causal crosscoder over the streams that heads read.

    python -m organism.dictionary

Text comes from the same samplers that trained the model, so what was held out there is held out here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from organism import tokenizer as tok
from organism.corpus import World, load
from organism.recipe import RECIPE
from organism.stages import Sampler
from organism.train import DATA, OUT
from qklens.analyses.fidelity import measure_fidelity
from qklens.dictionaries.crosscoder import Crosscoder, save_crosscoder
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.finish import as_crosscoder
from qklens.dictionaries.training.harvest import stream_rows
from qklens.dictionaries.training.rows import HeldRows
from qklens.dictionaries.training.trainer import Trainer
from qklens.files import atomic_write
from qklens.models.loading import load_subject
from qklens.models.subject import Subject
from qklens.studies.fidelity_record import record_fidelity

LAYERS = (1, 2, 3)
DOCUMENTS, CHECKED = 6000, 300
CONFIG = TrainingConfig(
    kind="crosscoder",
    layers=LAYERS,
    features=384,
    activation="batch_topk",
    k=10,
    steps=700,
    batch=1024,
    learning_rate=2e-3,
    beta2=0.99,
    warmup_steps=50,
    auxiliary_weight=0.03,
    auxiliary_k=32,
    dead_after_steps=200,
    seed=0,
)


def sequences(world: World, subject: Subject, n: int, seed: int) -> list[list[int]]:
    """Token sequences of all stages' documents in equal parts."""
    samplers = [Sampler(world, seed + i, stage) for i, stage in enumerate(("base", "refusal", "withhold"))]
    documents = [document for sampler in samplers for document in sampler.batch(n // len(samplers))]
    return [subject.tokenizer(tok.render(d.user, d.answer), add_special_tokens=False)["input_ids"] for d in documents]


def card(crosscoder: Crosscoder) -> str:
    """The dictionary's card, from its measured fidelity."""
    config, fidelity = crosscoder.config, crosscoder.config.fidelity
    if fidelity is None:
        raise ValueError("measure the dictionary before writing its card")
    threshold = config.activation.threshold
    rows = "\n".join(
        f"| resid_pre.{m} | {fidelity.l0[m]:.1f} | {fidelity.fraction_variance_unexplained[m]:.3f} | "
        f"{fidelity.loss_recovered[m]:.3f} |"
        for m in config.layers
    )
    return f"""# Dictionary of the organism (chat)

A weakly causal crosscoder: {config.features_per_layer} features read each of resid_pre.{config.layers[0]} to
resid_pre.{config.layers[-1]} and write that layer and every later one. Trained on the chat checkpoint's own training
text (held-out items and intents excluded) with BatchTopK, {config.training["k"]} active features a token
and layer on average; a fixed threshold ({threshold:.4f}) at inference.

Measured on {CHECKED} documents not used for training, on the stored float16 weights:

| site | L0 | fraction of variance unexplained | loss recovered |
|---|---|---|---|
{rows}

L0 at a layer counts the features that read it or an earlier layer. Loss recovered compares with replacing the stream by
its mean. Hyper-parameters: `{json.dumps(config.training)}`.

Remade by `make organism`. Limits: one seed; features are not labelled; in other checkpoints the dictionary measures how
far their stream goes along this checkpoint's directions.
"""


def main() -> None:
    """Train, measure, save, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--organism", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    lineage = json.loads((options.organism / "lineage.json").read_text(encoding="utf-8"))
    subject = load_subject(options.organism / lineage["chat"])
    world = load(options.data, RECIPE.seed)
    held = {"held_out_items": sorted(world.held_out_items), "held_out_intents": sorted(world.held_out_intents)}
    if held != {name: lineage[name] for name in held}:
        raise ValueError("the corpus holds out other items or intents than the organism's training did")
    rows = stream_rows(subject, sequences(world, subject, DOCUMENTS, seed=100), LAYERS)
    print(f"{len(rows[LAYERS[0]])} tokens", flush=True)
    trained = Trainer(HeldRows([rows[m] for m in LAYERS]), CONFIG).run(
        lambda step, m: print(step, {k: round(v, 4) for k, v in m.items()}, flush=True)
    )
    made = as_crosscoder(trained.learner, trained.scale, name="organism-crosscoder", model_sha256=subject.sha256 or "")
    stored = _through_float16(made)
    checked = sequences(world, subject, CHECKED, seed=900)
    fidelity = measure_fidelity(subject, stored, checked)
    folder = options.organism / "dictionary"
    save_crosscoder(stored, folder)
    final = record_fidelity([subject], stored, folder, fidelity, checked)
    atomic_write(folder / "README.md", card(final))
    print(fidelity, flush=True)


def _through_float16(crosscoder: Crosscoder) -> Crosscoder:
    """The weights as they will be read back."""

    def stored(tensors: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        return {layer: tensor.half().float() for layer, tensor in tensors.items()}

    return Crosscoder(
        crosscoder.config,
        stored(crosscoder.encoder),
        stored(crosscoder.encoder_bias),
        stored(crosscoder.decoder),
        stored(crosscoder.decoder_bias),
    )


if __name__ == "__main__":
    main()
