"""Dictionaries on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qklens.cli.columns import MISSING, columns, write

if TYPE_CHECKING:
    from qklens.dictionaries.crosscoder import Crosscoder
    from qklens.studies.dictionary_check import DictionaryCheck

_DIGITS = {"l0": 1, "fraction_variance_unexplained": 4, "loss_recovered": 4}


def check(found: DictionaryCheck, *, recorded_now: bool) -> None:
    """Fidelity a layer, measured beside recorded."""
    about = found.dictionary
    what = f"{about['kind']}, {about['n_features']} features, {about['activation']['kind']}"
    models = found.model if found.base_model is None else f"{found.base_model} and {found.model}"
    lines = [f"{about['name']}: {what}; in {models}"]
    source = about["source"]
    if source is not None:
        model = f"for a model named {source['model']!r}" if source["model"] else "for a model that it does not name"
        lines.append(
            f"  from {source['format']}, {source['site']}, {model}; folded: {', '.join(source['folded']) or 'nothing'}"
        )
    same = found.tolerance is not None
    said = "recorded" if same else "stated"
    then = found.recorded.by_site() if found.recorded else {}
    rows = []
    for site, now in found.measured.by_site().items():
        pairs = [(now.get(name), then.get(site, {}).get(name), digits) for name, digits in _DIGITS.items()]
        rows.append([site, *(_number(value, digits) for now_, then_, digits in pairs for value in (now_, then_))])
    header = ["site", "L0", said, "FVU", said, "loss recovered", said]
    lines += [f"  {line}" for line in columns(header, rows)]
    lines.append(f"  on {found.tokens} tokens of {'the recorded batch' if same else found.measured_on}")
    if found.held_against is not None:
        near = "within the recorded tolerance" if same else "near enough, on other text than the card's"
        lines.append(f"  held against {found.held_against}: {near}")
    if recorded_now:
        lines.append("  recorded, with the batch")
    elif not same:
        lines.append("  no batch is recorded to hold this against; --record stores it in a qklens dictionary")
    write(lines)


def converted(dictionary: Crosscoder, out: Path) -> None:
    """What was written, and from what."""
    config, source = dictionary.config, dictionary.config.source
    layers = ", ".join(f"resid_pre.{layer}" for layer in config.layers)
    lines = [f"{out}: {len(dictionary.labels)} features of {config.activation.kind} at {layers}"]
    if source is not None:
        model = f"names its model {source.model!r}" if source.model else "does not name its model"
        lines.append(f"  from {source.format}, which {model}; folded: {', '.join(source.folded) or 'nothing'}")
    lines.append(f"  next: qklens dict check {out} --model M --record")
    write(lines)


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"
