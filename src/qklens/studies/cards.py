"""Cards of a lab's features: over a text, and over the prompts of every condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError

from qklens.analyses.card_values import Passages, ScaleMean, Values, read_values
from qklens.analyses.feature_card import CardText, FeatureCard
from qklens.analyses.feature_cards import feature_cards
from qklens.analyses.passages import Passage, prompt_passage, text_passages
from qklens.analyses.text_windows import text_windows
from qklens.data.render import CONDITIONS, ORDERS, Condition, Order
from qklens.dictionaries.source import feature_index
from qklens.errors import QklensError
from qklens.files import read_json, sha256_files
from qklens.models.subject import Subject
from qklens.strict import Strict
from qklens.studies.config import LabConfig
from qklens.studies.lab import Half, Lab
from qklens.studies.neutral import neutral_file
from qklens.studies.opening import ready_lab, threads_for
from qklens.studies.pair import Checkpoints, ready_pair
from qklens.studies.results import Results

WIDTH, WINDOWS = 128, 256


class ShownCard(Strict):
    """The whole of `qklens dict show --json`."""

    model: dict[str, Any]
    dictionary: dict[str, Any]
    data: dict[str, Any]
    text: CardText
    run: str | None = Field(description="the finished study that roles were read from")
    card: FeatureCard
    checkpoints: Checkpoints | None = Field(default=None, description="of a crosscoder over two checkpoints")


def make_cards(
    lab: Lab,
    layer: int,
    features: Sequence[int],
    *,
    text: Path | None = None,
    half: Half = "all",
    written: bool = False,
    base: Subject | None = None,
    roles: Mapping[str, Sequence[str]] | None = None,
    k: int = 8,
) -> tuple[list[FeatureCard], CardText]:
    """Cards of some features of a lab's source.

    Args:
        lab: the bench, with its source.
        layer: resid_pre.layer.
        features: indices of features.
        text: a UTF-8 text file; None is the neutral text that ships.
        half: whose prompts.
        written: take the prompts' activations from what the lab has written already, rather than run them.
        base: the base model, for a source over two checkpoints.
        roles: roles held in a study, by label.
        k: examples and list entries from each end.

    Raises:
        QklensError: a text that cannot be read, or a layer that the source or a feature does not write.
    """
    path, scale = text or neutral_file(), ScaleMean()
    windows = text_windows(lab.subject, path, WIDTH, WINDOWS)
    passages, chosen = text_passages(windows), torch.tensor(list(features))
    groups = [
        Passages(
            "text", passages, lambda: read_values(lab.subject, lab.source, layer, chosen, passages, scale, base=base)
        )
    ]
    groups += [_prompts(lab, condition, half, layer, chosen, written, base) for condition in CONDITIONS]
    cards = feature_cards(lab.subject, lab.source, layer, features, groups, scale, k=k, roles=roles, seed=lab.seed)
    n_tokens = sum(len(window.ranges) for window in windows)
    unknown = sum(window.unknown for window in windows) / n_tokens
    sha256 = sha256_files([path])
    return cards, CardText(name=path.name, sha256=sha256, windows=len(windows), tokens=n_tokens, unknown=unknown)


def show_card(
    config: LabConfig, feature: str, *, layer: int | None = None, text: Path | None = None, run: Path | None = None,
    k: int = 8, base_model: str | None = None,
) -> ShownCard:  # fmt: skip
    """One feature's card.

    Args:
        config: model, dictionary and items.
        feature: its label.
        layer: resid_pre.layer; None is the first that it writes.
        text: see `make_cards`.
        run: the folder of a finished study of the same dictionary, for the roles that the feature holds.
        k: examples and list entries from each end.
        base_model: the base model of a crosscoder over two checkpoints, whose chat model is the configuration's.

    Raises:
        QklensError: bad input of any kind.
    """
    found = None if run is None else read_results(run)
    lab, pair = (ready_lab(config), None) if base_model is None else ready_pair(config, base_model)
    about = lab.source.describe()
    roles: dict[str, list[str]] = {}
    if found is not None and run is not None:
        _same_source(found, about, run)
        roles = held_roles(found)
    index = feature_index(lab.source, feature)
    if layer is None:
        written = (m for m in lab.source.layers if bool(lab.source.directions(m)[index].any()))
        layer = next(written, lab.source.layers[0])
    with threads_for(lab.subject):
        base = None if pair is None else pair.base
        cards, of = make_cards(lab, layer, [index], text=text, roles=roles, k=k, base=base)
    return ShownCard(
        model=lab.subject.describe(),
        dictionary=about,
        data=lab.dataset.describe(),
        text=of,
        run=None if run is None else str(run),
        card=cards[0],
        checkpoints=None if pair is None else pair.checkpoints(index),
    )


def read_results(run: Path) -> Results:
    """The results of a finished study.

    Raises:
        QklensError: no results in the folder, or a file that is not what a study writes.
    """
    path = run / "results.json"
    if not path.is_file():
        raise QklensError(f"--run {run}: holds no results.json; expected the folder of a finished study")
    try:
        return Results.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise QklensError(f"{path}: key {where!r}: {first['msg']}; run the study again") from error


def held_roles(results: Results) -> dict[str, list[str]]:
    """The roles that features hold in a study, by label."""
    roles: dict[str, list[str]] = {}
    for row in results.roles:
        if row.chosen:
            roles.setdefault(row.feature, []).append(row.role)
    return roles


def _same_source(results: Results, about: Mapping[str, Any], run: Path) -> None:
    for key in ("name", "sha256"):
        had, have = results.dictionary.get(key), about.get(key)
        if had != have:
            raise QklensError(
                f"--run {run}: its study read the dictionary with {key} {had!r}, this one has {have!r}; give the run "
                "of this dictionary, or none"
            )


def _prompts(
    lab: Lab, condition: Condition, half: Half, layer: int, chosen: torch.Tensor, written: bool, base: Subject | None
) -> Passages:
    prompts = lab.prompts(condition, half)
    names: list[tuple[str, Order]] = [(item.id, order) for item in lab.halves[half] for order in ORDERS]
    passages: list[Passage] = [
        prompt_passage(prompt, condition, item, order) for prompt, (item, order) in zip(prompts, names, strict=True)
    ]

    def kept() -> Values:
        for i, prompt in enumerate(lab.written(condition, half, layer)):
            yield i, torch.stack([prompt.active.of(int(f)) for f in chosen], dim=1)

    def read() -> Values:
        return read_values(lab.subject, lab.source, layer, chosen, passages, base=base)

    return Passages(condition, passages, kept if written else read)
