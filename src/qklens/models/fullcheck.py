"""Everything qklens relies on in a model, tried on it layer by layer: what `qklens model check` prints.

Errors of scores are relative to the layer's largest |score|, errors of logits to the largest |logit|, errors of
patterns absolute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.models.batch import Batch
from qklens.models.edits import PatternEdit, VectorEdit
from qklens.models.passes import run_pass
from qklens.models.projections import ProjectionSide
from qklens.models.scores import Rotation, ScoreMaps, rotation, score_maps
from qklens.models.selfcheck import check_layer, random_tokens, tolerance_of
from qklens.models.subject import Subject
from qklens.models.trace import Trace, trace

_TOKENS = 16
_EDITED_KEY = 3
_LAYER_ERRORS = ("score_error", "pattern_error", "row_sum_error", "query_edit_error", "key_edit_error")
_LOGIT_ERRORS = ("eager_error", "left_padding_error", "right_padding_error", "batch_error")


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        layer: the layer.
        score_error: scores rebuilt from resid_pre against the model's own.
        pattern_error: the pattern rebuilt from those scores (cap, window, sink) against the model's own.
        row_sum_error: how far rows of the pattern, with the sink's share, are from summing to 1.
        query_edit_error: scores under an edit of what W_Q reads at the last token against their closed form.
        key_edit_error: the same for W_K at one earlier token.
        pattern_effect: how much a uniform pattern at the last token moves the logits.
        rounding: what rounding alone may be of the score errors, see `LayerCheck`.
        pattern_rounding: the same of the pattern's.
    """

    layer: int
    score_error: float
    pattern_error: float
    row_sum_error: float
    query_edit_error: float
    key_edit_error: float
    pattern_effect: float
    rounding: float
    pattern_rounding: float


@dataclass(frozen=True)
class FullCheck:
    """The whole model.

    Attributes:
        layers: one report a layer.
        eager_error: logits against transformers' own eager attention, without qklens.
        left_padding_error: logits of a prompt padded on the left against those of the prompt alone.
        right_padding_error: the same, padded on the right.
        batch_error: logits of a prompt among others of its length against those of the prompt alone.
        clean_after_edits: whether a pass after all edits is bit-identical to the first.
        tolerance: what errors of this dtype may be.
    """

    layers: tuple[LayerReport, ...]
    eager_error: float
    left_padding_error: float
    right_padding_error: float
    batch_error: float
    clean_after_edits: bool
    tolerance: float

    def failures(self) -> list[str]:
        """What is off, one line each; empty when the model is read exactly."""
        found = []
        for row in self.layers:
            errors = {name: getattr(row, name) for name in _LAYER_ERRORS}
            where = f"layer {row.layer}: "
            rounding = {"pattern_error": row.pattern_rounding, "row_sum_error": 0.0}
            found += [
                f"{where}{_said(name)} {e:.1e}"
                for name, e in errors.items()
                if not e <= self.tolerance + rounding.get(name, row.rounding)
            ]
            if not row.pattern_effect > 0:
                found.append(f"{where}a replaced pattern does not change the logits")
        logits = {name: getattr(self, name) for name in _LOGIT_ERRORS}
        found += [f"{_said(name)} {e:.1e}" for name, e in logits.items() if not e <= self.tolerance]
        if not self.clean_after_edits:
            found.append("a clean pass after edits differs from the one before")
        return found


def _said(name: str) -> str:
    return name.replace("_", " ")


def full_check(subject: Subject) -> FullCheck:
    """Try everything on random tokens; `failures()` of the result says what is off.

    Raises:
        QklensError: a hook never fired.
    """
    tokens = random_tokens(subject, _TOKENS)
    batch = subject.batch([tokens])
    clean = trace(subject, batch, range(subject.n_layers))
    layers = tuple(_check(clean, layer) for layer in range(subject.n_layers))
    longer = random_tokens(subject, 2 * _TOKENS, seed=1)
    same = [random_tokens(subject, _TOKENS, seed=seed) for seed in (2, 3)]
    return FullCheck(
        layers,
        eager_error=_apart(_eager_logits(subject, batch), clean.logits),
        left_padding_error=_apart(run_pass(subject, subject.batch([longer, tokens])).logits[1:], clean.logits),
        right_padding_error=_apart(_right_padded_logits(subject, tokens, longer), clean.logits),
        batch_error=_apart(run_pass(subject, subject.batch([same[0], tokens, same[1]])).logits[1:2], clean.logits),
        clean_after_edits=bool(torch.equal(run_pass(subject, batch).logits, clean.logits)),
        tolerance=tolerance_of(subject),
    )


def _check(clean: Trace, layer: int) -> LayerReport:
    subject, read = clean.subject, clean.attention[layer]
    rebuilt = check_layer(subject, clean.batch.position_ids, clean.streams[layer], read)
    shares = read.pattern[0].sum(dim=-1)
    maps = score_maps(subject, layer)
    if maps.sinks is not None:
        seen = maps.capped(read.score()[0]).logsumexp(dim=-1)
        shares = shares + (maps.sinks[:, None] - torch.logaddexp(seen, maps.sinks[:, None])).exp()
    uniform = PatternEdit(layer, _uniform_at_the_end)
    moved = run_pass(subject, clean.batch, [uniform]).logits
    return LayerReport(
        layer,
        rebuilt.score_error,
        rebuilt.pattern_error,
        float((shares - 1).abs().max()),
        _edit_error(clean, layer, "query", _TOKENS - 1),
        _edit_error(clean, layer, "key", _EDITED_KEY),
        _apart(moved, clean.logits),
        rebuilt.rounding,
        rebuilt.pattern_rounding,
    )


def _uniform_at_the_end(pattern: Tensor, _: int) -> Tensor:
    new = pattern.clone()
    new[:, :, -1] = 1 / pattern.shape[-1]
    return new


def _edit_error(clean: Trace, layer: int, side: ProjectionSide, position: int) -> float:
    """Edit what one projection reads at one token, in all its heads, and compare all scores with the closed form."""
    subject = clean.subject
    stream = clean.streams[layer]
    generator = torch.Generator().manual_seed(layer)
    shift = torch.randn(subject.d_model, generator=generator).to(stream)
    shift = shift * stream[0, position].norm() / shift.norm()
    mask = torch.zeros(clean.batch.input_ids.shape, dtype=torch.bool)
    mask[0, position] = True
    edit = VectorEdit(layer, side, mask, lambda rows, _: rows + shift)
    read = trace(subject, clean.batch, [layer], edits=[edit]).attention[layer]
    maps, turn = score_maps(subject, layer), rotation(subject, layer, clean.batch.position_ids[0])
    edited = stream[0].clone()
    edited[position] += shift
    query_stream, key_stream = (edited, stream[0]) if side == "query" else (stream[0], edited)
    expected = torch.stack([_scores(maps, turn, query_stream, key_stream, head) for head in range(subject.n_heads)])
    got = read.score()[0].to(expected)
    seen = got.isfinite()
    unmoved = torch.equal(read.score()[seen[None]], clean.attention[layer].score()[seen[None]])
    worst = float((got - expected)[seen].abs().max() / expected[seen].abs().max().clamp(min=1e-12))
    return float("inf") if unmoved else worst


def _scores(maps: ScoreMaps, turn: Rotation, query: Tensor, key: Tensor, head: int) -> Float[Tensor, "q_pos k_pos"]:
    return maps.scale * turn(maps.whole_query(query, head)) @ turn(maps.whole_key(key, head)).T


def _apart(logits: Tensor, reference: Tensor) -> float:
    return float((logits - reference).abs().max() / reference.abs().max().clamp(min=1e-6))


@torch.no_grad()
def _eager_logits(subject: Subject, batch: Batch) -> Float[Tensor, "batch vocab"]:
    """The model by itself, with the eager attention of transformers."""
    ours: str = subject.model.config._attn_implementation  # pyright: ignore[reportAssignmentType]
    subject.model.set_attn_implementation("eager")
    try:
        return subject.model(input_ids=batch.input_ids, use_cache=False).logits[:, -1]
    finally:
        subject.model.set_attn_implementation(ours)


@torch.no_grad()
def _right_padded_logits(subject: Subject, tokens: list[int], longer: list[int]) -> Float[Tensor, "one vocab"]:
    """The logits at a prompt's last token when padding follows it."""
    ids = torch.tensor([longer, tokens + [subject.pad_id] * (len(longer) - len(tokens))], device=subject.device)
    mask = torch.ones_like(ids)
    mask[1, len(tokens) :] = 0
    logits = subject.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[1:, len(tokens) - 1]
