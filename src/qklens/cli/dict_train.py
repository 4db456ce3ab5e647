"""`qklens dict train`: a dictionary from any model and corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qklens.cli import show
from qklens.cli.options import Json
from qklens.errors import QklensError

_Text = str | None
_Number = int | None
_Real = float | None
_LONGEST_NUMBER = 9


def train(
    corpus: Annotated[_Text, typer.Option(help="A .txt, .jsonl (chats or texts) or .parquet file.")] = None,
    out: Annotated[_Text, typer.Option(help="Folder of the run; the same command on it resumes.")] = None,
    model: Annotated[_Text, typer.Option(help="As for study; default organism.")] = None,
    base_model: Annotated[_Text, typer.Option(help="The checkpoint beside it, for kind model_diff.")] = None,
    kind: Annotated[_Text, typer.Option(help="sae, crosscoder or model_diff; default sae.")] = None,
    activation: Annotated[_Text, typer.Option(help="topk, batch_topk, relu or jumprelu; default topk.")] = None,
    layers: Annotated[_Text, typer.Option(help="Layers of resid_pre, as 2 or 1,2,3.")] = None,
    features: Annotated[_Number, typer.Option(help="Features of each reading layer.")] = None,
    k: Annotated[_Number, typer.Option(help="Active features, for topk and batch_topk.")] = None,
    sparsity: Annotated[_Real, typer.Option(help="Weight of L1 (relu) or L0 (jumprelu).")] = None,
    steps: Annotated[_Number, typer.Option(help="Updates.")] = None,
    tokens: Annotated[_Number, typer.Option(help="Instead of steps: tokens, each counted when it is used.")] = None,
    batch: Annotated[_Number, typer.Option(help="Tokens of an update; default 2048.")] = None,
    lr: Annotated[_Real, typer.Option(help="Adam's learning rate; default 2e-4 / sqrt(features / 16384).")] = None,
    seed: Annotated[_Number, typer.Option(help="Of first weights and order.")] = None,
    context: Annotated[_Number, typer.Option(help="Most tokens of a sequence; default 256.")] = None,
    cache: Annotated[_Text, typer.Option(help="Keep activations in this folder, and use what it holds.")] = None,
    device: Annotated[_Text, typer.Option(help="Torch device; default cpu.")] = None,
    dtype: Annotated[_Text, typer.Option(help="The model's dtype; training is in float32.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML or JSON file with all of the above, and more.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Also write metrics for TensorBoard here.")] = None,
    as_json: Json = False,
) -> None:
    """Train a dictionary: SAE, weakly causal crosscoder, or a crosscoder over two checkpoints.

    Killed at any moment, the same command goes on from the last checkpoint and gives the same bytes. Under torchrun
    processes share each batch.
    """
    from qklens.dictionaries.training.parallel import is_first
    from qklens.studies.train_dictionary import TrainRequest, train_dictionary
    from qklens.studies.training_progress import training_progress

    run = {
        "corpus": corpus, "out": out, "model": model, "base_model": base_model, "context": context, "cache": cache,
        "device": device, "dtype": dtype,
    }  # fmt: skip
    training = {
        "kind": kind, "activation": activation, "layers": layers, "features": features, "k": k, "sparsity": sparsity,
        "steps": steps, "tokens": tokens, "batch": batch, "lr": lr, "seed": seed,
    }  # fmt: skip
    given = [name for name, value in {**run, **training}.items() if value is not None]
    if config is not None:
        from qklens.studies.spec_file import read_mapping

        if given:
            flag = given[0].replace("_", "-")
            raise QklensError(f"--config {config} and --{flag} contradict each other; say it in the file, or leave it")
        request = TrainRequest.parse(read_mapping(config, "--config"), str(config))
    else:
        kept = {name: value for name, value in run.items() if value is not None}
        request = TrainRequest.parse({**kept, "training": _training(training)}, "dict train")
    with training_progress(request.training.steps, tensorboard) as (report, caching):
        made = train_dictionary(request, report, caching)
    if not is_first():
        return
    described = made.describe()
    if as_json:
        show.as_json(described)
    else:
        typer.echo(f"{described['kind']} {described['name']}, {described['n_features']} features, layers "
                   f"{described['layers']}: {request.out}")  # fmt: skip
        for line in _fidelity_lines(described["fidelity"]):
            typer.echo(line)


def _training(given: dict[str, object]) -> dict[str, object]:
    """Flags as keys of the training's configuration.

    Raises:
        QklensError: layers that are no numbers, both or neither of steps and tokens, or no number of features.
    """
    found: dict[str, object] = {"kind": "sae", "activation": "topk", "batch": 2048}
    found |= {name: value for name, value in given.items() if value is not None}
    if "layers" in found:
        parts = str(found["layers"]).split(",")
        if not all(part.strip().isdecimal() and len(part) <= _LONGEST_NUMBER for part in parts):
            raise QklensError(f"--layers {str(found['layers'])[:40]!r}: expected numbers joined by commas, as 1,2,3")
        found["layers"] = tuple(int(part) for part in parts)
    if ("steps" in found) == ("tokens" in found):
        raise QklensError("dict train needs --steps or --tokens, and one of them alone")
    batch = found["batch"]
    if (tokens := found.pop("tokens", None)) is not None:
        if not (isinstance(tokens, int) and isinstance(batch, int) and batch > 0):
            raise QklensError(f"--tokens {tokens}, --batch {batch}: expected numbers above 0")
        found["steps"] = -(-tokens // batch)
    rate, features = found.pop("lr", None), found.get("features")
    if rate is None and isinstance(features, int) and features > 0:
        rate = 2e-4 * (2**14 / features) ** 0.5  # Gao et al. 2024: the best rate falls with the root of the features
    return found if rate is None else {**found, "learning_rate": rate}


def _fidelity_lines(fidelity: dict[str, object] | None) -> list[str]:
    return [f"  {name.replace('_', ' ')}: {value}" for name, value in (fidelity or {}).items()]
