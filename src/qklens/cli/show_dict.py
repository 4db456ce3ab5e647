"""Dictionaries on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qklens.cli.columns import MISSING, columns, write

if TYPE_CHECKING:
    from qklens.dictionaries.crosscoder import Crosscoder
    from qklens.studies.dictionary_check import DictionaryCheck


def check(found: DictionaryCheck, *, recorded_now: bool) -> None:
    """Fidelity a layer, measured beside recorded."""
    about, now, then = found.dictionary, found.measured, found.recorded
    what = f"{about['kind']}, {about['n_features']} features, {about['activation']['kind']}"
    lines = [f"{about['name']}: {what}; in {found.model}"]
    source = about["source"]
    if source is not None:
        model = f"for a model named {source['model']!r}" if source["model"] else "for a model that it does not name"
        lines.append(
            f"  from {source['format']}, {source['site']}, {model}; folded: {', '.join(source['folded']) or 'nothing'}"
        )
    header, rows = ["site", "L0", "recorded", "FVU", "recorded", "loss recovered", "recorded"], []
    for layer in now.l0:
        row = [f"resid_pre.{layer}"]
        for measured, recorded, digits in (
            (now.l0, then and then.l0, 1),
            (now.fraction_variance_unexplained, then and then.fraction_variance_unexplained, 4),
            (now.loss_recovered, then and then.loss_recovered, 4),
        ):
            row += [_number(measured.get(layer), digits), _number(recorded.get(layer) if recorded else None, digits)]
        rows.append(row)
    lines += [f"  {line}" for line in columns(header, rows)]
    lines.append(f"  on {found.tokens} tokens of {'the recorded batch' if then else found.measured_on}")
    if then:
        lines.append("  within the recorded tolerance")
    elif recorded_now:
        lines.append("  recorded, with the batch")
    else:
        lines.append("  nothing is recorded to hold this against; --record stores it in a qklens dictionary")
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
