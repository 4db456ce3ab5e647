"""What the terminal shows."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qklens.models.fullcheck import FullCheck
    from qklens.studies.results import Results, Steering


def as_json(value: Any) -> None:  # noqa: ANN401
    """One JSON document on stdout; a number that is not finite is null, because JSON has none."""
    sys.stdout.write(json.dumps(_defined(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _defined(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _defined(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def study(results: Results, folder: Path) -> None:
    """The verdict in five lines, and where the report is."""
    b = results.behaviour
    percent = {c: f"{100 * row.accuracy:.1f}%" for c, row in b.items()}
    heads = [f"L{h.layer}H{h.head}" for h in results.heads if h.selected]
    lines = [
        f"verdict    {results.verdict.mechanism} (confidence {results.verdict.confidence:.2f}): {results.verdict.rule}",
        f"behaviour  accuracy none {percent['none']}, benign {percent['benign']}, harm {percent['harm']}",
    ]
    solved = results.verdict.mechanism not in ("task_not_solved", "no_effect")
    if results.heads_details and solved:
        lines.append(
            f"heads      {', '.join(heads) or 'none'}; their clean pattern restores "
            f"{100 * results.heads_details.restored:.0f}% of the lost margin"
        )
    query = [s for s in results.steering if s.stage == "steer_query"]
    main = next((s for s in query if s.chosen), None)
    if main:
        controls = [s for s in query if s.control and s.strength == main.strength]
        others = ", ".join(f"{s.control} {_control(s)}" for s in controls)
        lines.append(
            f"steering   query side at strength {main.strength:g}: harm {100 * main.accuracy:.1f}% (controls: {others})"
            if main.strength
            else f"steering   query side: no strength helped; harm {100 * main.accuracy:.1f}% without the edit"
        )
    elif results.skipped:
        stages = ", ".join(results.skipped)
        lines.append(f"skipped    {stages}: {next(iter(results.skipped.values()))}")
    lines += [f"caveat     {caveat}" for caveat in results.verdict.caveats]
    lines.append(f"report     {folder / 'report.html'}")
    sys.stdout.write("\n".join(lines) + "\n")


def _control(row: Steering) -> str:
    best = f" (best of {row.draws[2]} draws {100 * row.draws[1]:.1f}%)" if row.draws else ""
    return f"{100 * row.accuracy:.1f}%{best}"


def data_check(report: dict[str, Any]) -> None:
    """A data file's contents and audit."""
    lines = [f"{report['name']}: {report['n_items']} items, {report['n_topics']} topics, no errors"]
    lines += [f"  {key.replace('_', ' '):28} {report[key]:.3f}" for key in report if key.startswith("guesser_")]
    lines += [f"  note: {note}" for note in report["notes"]]
    sys.stdout.write("\n".join(lines) + "\n")


def model_check(described: dict[str, Any], check: FullCheck) -> None:
    """A table of the check's errors, one row a layer."""
    heads = f"{described['n_heads']} heads of queries over {described['n_kv_heads']} of keys"
    lines = [
        f"{described['name']}: {described['model_type']}, {described['n_layers']} layers, {heads}; "
        f"{described['dtype']}",
        "  layer  score    pattern  row sum  q edit   k edit   pattern's effect",
    ]
    for r in check.layers:
        errors = (r.score_error, r.pattern_error, r.row_sum_error, r.query_edit_error, r.key_edit_error)
        lines.append(f"  {r.layer:5d}  " + "  ".join(f"{e:.1e}" for e in errors) + f"  {r.pattern_effect:.1e}")
    lines += [
        f"  logits against transformers' eager attention {check.eager_error:.1e}",
        f"  logits under padding: left {check.left_padding_error:.1e}, right {check.right_padding_error:.1e}; "
        f"in a batch {check.batch_error:.1e}",
        f"  a clean pass after all edits is {'bit-identical' if check.clean_after_edits else 'not the same'}",
    ]
    if not check.failures():
        lines.append(f"  read exactly: every error is within {check.tolerance:.0e}")
    sys.stdout.write("\n".join(lines) + "\n")
