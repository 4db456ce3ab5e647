"""Train a dictionary from a model and a corpus: activations, training, fidelity, and the dictionary on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, PositiveInt, ValidationError

from qklens.dictionaries.crosscoder import Crosscoder, load_crosscoder, save_crosscoder
from qklens.dictionaries.model_diff import ModelDiff, load_model_diff, save_model_diff
from qklens.dictionaries.training.config import TrainingConfig, explained
from qklens.dictionaries.training.corpus import read_corpus
from qklens.dictionaries.training.finish import as_crosscoder, as_model_diff
from qklens.dictionaries.training.harvest import ModelRows, side_by_side
from qklens.dictionaries.training.layout import layout_of
from qklens.dictionaries.training.memory import refuse_too_large
from qklens.dictionaries.training.parallel import Ranks, join_ranks, leave_ranks
from qklens.dictionaries.training.rows import RowSource
from qklens.dictionaries.training.shards import write_shards
from qklens.dictionaries.training.trainer import Keeping, Report, Trained, Trainer
from qklens.errors import QklensError
from qklens.files import check_folder
from qklens.models.loading import load_subject
from qklens.models.subject import Subject
from qklens.strict import Strict
from qklens.studies.fidelity_record import fidelity_of, record_fidelity
from qklens.studies.resources import model_folder

Tick = Callable[[], None]
_CONSTANT = 1e-9
"""Share of a stream's square below which its variance is rounding."""


class TrainRequest(Strict):
    """What `qklens dict train` is asked for; `--config` holds the same keys.

    Attributes:
        model: as `--model` elsewhere.
        base_model: the checkpoint beside it, for kind `model_diff` alone.
        corpus: a .txt, .jsonl or .parquet file.
        out: folder of the run and of the dictionary.
        cache: folder of activations; without it the model runs as rows are wanted.
        device: of model and training.
        dtype: of the model and of cached activations; training is in float32.
        context: most tokens of a sequence.
        checkpoint_every: steps.
        metrics_every: steps.
        training: every number of the training itself.
    """

    model: str = "organism"
    base_model: str | None = None
    corpus: str
    out: str
    cache: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    context: Annotated[int, Field(ge=2)] = 256
    checkpoint_every: PositiveInt = 500
    metrics_every: PositiveInt = 50
    training: TrainingConfig

    @classmethod
    def parse(cls, given: dict[str, object], where: str) -> TrainRequest:
        """A request from keys and values.

        Raises:
            QklensError: a key that is unknown (names the nearest), missing or wrong, or a combination that cannot be.
        """
        try:
            request = cls.model_validate(given)
        except ValidationError as error:
            raise explained(error, where, [*cls.model_fields, *TrainingConfig.model_fields]) from error
        if (request.training.kind == "model_diff") != (request.base_model is not None):
            raise QklensError(
                f"{where}: kind is {request.training.kind!r}, base_model is {request.base_model!r}; kind 'model_diff' "
                "needs a base model, and no other kind takes one"
            )
        return request


def train_dictionary(
    request: TrainRequest,
    report: Report = lambda _, __: None,
    caching: Callable[[int], Tick] = lambda _: lambda: None,
) -> Crosscoder | ModelDiff:
    """Train, measure and save; the same request on the same folder goes on where it was stopped.

    Args:
        request: what is trained, on what.
        report: called with step and metrics now and then.
        caching: called with the number of shards, gives what to call after each.

    Raises:
        QklensError: a request, model, corpus, cache or run folder that does not fit, NaN, or a full disk.
    """
    ranks = join_ranks(request.device)
    try:
        return _train(request, ranks, report, caching)
    finally:
        leave_ranks()


def _train(
    request: TrainRequest, ranks: Ranks, report: Report, caching: Callable[[int], Tick]
) -> Crosscoder | ModelDiff:
    if ranks.world > 1 and request.cache is None:
        raise QklensError("several processes share cached activations; give --cache DIR")
    if request.device == "auto":
        raise QklensError("--device auto spreads a model, and a dictionary is trained on one device; name it, as cuda")
    folder = Path(request.out)
    check_folder(folder, "--out")
    if request.cache is not None:
        check_folder(Path(request.cache), "--cache")
        _refuse_nested(folder, Path(request.cache))
    names = [name for name in (request.base_model, request.model) if name is not None]
    subjects = [load_subject(model_folder(name), device=request.device, dtype=request.dtype) for name in names]
    corpus = read_corpus(Path(request.corpus), subjects[-1].tokenizer, request.context)
    rows = ModelRows(subjects, corpus, request.training.layers)
    _refuse_constant(subjects, corpus.held_out, request)
    layout = layout_of(request.training, subjects[-1].d_model)
    refuse_too_large(request.training, layout, ranks.world, torch.device(request.device))  # before hours of caching
    source: RowSource = rows
    if request.cache is not None:
        source = write_shards(Path(request.cache), rows.manifest, rows.chunk, ranks, caching(rows.n_chunks))
    identity = {"models": [subject.sha256 for subject in subjects], "corpus": corpus.sha256, "dtype": request.dtype}
    keeping = Keeping(folder, identity, request.checkpoint_every, request.metrics_every)
    trained = Trainer(source, request.training, keeping=keeping, ranks=ranks, device=request.device).run(report)
    trained.learner.moments.clear()  # two thirds of what is learnt, and of no use to a dictionary
    made = _as_dictionary(trained, [subject.sha256 or "" for subject in subjects], folder.resolve().name)
    del trained
    fidelity = fidelity_of(subjects, made, corpus.held_out)
    if not ranks.first:
        return made
    if isinstance(made, ModelDiff):
        save_model_diff(made, folder)
    else:
        save_crosscoder(made, folder, dtype=torch.float32)
    record_fidelity(subjects, made, folder, fidelity, corpus.held_out)
    return load_model_diff(folder) if isinstance(made, ModelDiff) else load_crosscoder(folder)


def _refuse_nested(out: Path, cache: Path) -> None:
    """Refuse folders of which one would take the other's files for a stranger's, after the caching."""
    one, other = out.resolve(), cache.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        how = "are one folder" if one == other else "lie one in the other"
        raise QklensError(f"--cache {cache} and --out {out} {how}; give two folders side by side")


def _refuse_constant(subjects: Sequence[Subject], held_out: Sequence[Sequence[int]], request: TrainRequest) -> None:
    """Refuse, before hours of training, text on which the share of variance left would say nothing."""
    for layer, rows in side_by_side(subjects, held_out, request.training.layers).items():
        for x in rows.double().chunk(len(subjects), dim=1):
            if float((x - x.mean(dim=0)).pow(2).sum()) <= _CONSTANT * float(x.pow(2).sum()):
                raise QklensError(
                    f"--corpus {request.corpus}: resid_pre.{layer} is the same at all {len(x)} held-out tokens, so "
                    "there is no variance to explain; give more and longer documents"
                )


def _as_dictionary(trained: Trained, models: list[str], name: str) -> Crosscoder | ModelDiff:
    """What was trained, by the hashes of its models, base first."""
    if len(models) == 2:
        return as_model_diff(trained.learner, trained.scale, name=name, base_sha256=models[0], chat_sha256=models[1])
    return as_crosscoder(trained.learner, trained.scale, name=name, model_sha256=models[0])
