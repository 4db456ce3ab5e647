"""Is this model read correctly? Scores rebuilt from the residual stream against the model's own, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.errors import QklensError
from qklens.models.attention import AttentionRead
from qklens.models.edits import PatternEdit
from qklens.models.passes import run_pass
from qklens.models.scores import rotation, score_maps
from qklens.models.subject import Subject
from qklens.models.trace import trace


@dataclass(frozen=True)
class LayerCheck:
    """One layer's errors: of scores relative to the largest |score|, of the pattern absolute.

    Attributes:
        layer: the layer.
        score_error: of scores.
        pattern_error: of patterns.
        rounding: 32 ε c max‖q‖ max‖k‖, what a sum of products may be off by its rounding alone, relative to the largest
            |score|. It counts where queries and keys are long and nearly at right angles.
        pattern_rounding: the same in score units, by which a pattern may then be off.
    """

    layer: int
    score_error: float
    pattern_error: float
    rounding: float
    pattern_rounding: float


@dataclass(frozen=True)
class SelfCheck:
    """The whole check: per layer, and whether replacing a pattern reached the logits."""

    layers: tuple[LayerCheck, ...]
    pattern_reaches_logits: bool
    padding_error: float


def self_check(subject: Subject, n_tokens: int = 12) -> SelfCheck:
    """Rebuild every layer's scores from resid_pre and compare with the queries and keys the model used.

    Raises:
        QklensError: a rebuilt score is off by more than 1e-4 of the largest, or a rebuilt pattern by 1e-4, and by more
            than rounding; a replaced pattern did not reach the logits, or padding changes the logits.
    """
    tokens = random_tokens(subject, n_tokens)
    batch = subject.batch([tokens])
    clean = trace(subject, batch, range(subject.n_layers))
    rows = tuple(
        check_layer(subject, batch.position_ids, clean.streams[layer], read) for layer, read in clean.attention.items()
    )
    uniform = PatternEdit(subject.n_layers - 1, lambda pattern, _: torch.full_like(pattern, 1 / pattern.shape[-1]))
    moved = run_pass(subject, batch, [uniform]).logits
    padded = run_pass(subject, subject.batch([tokens, tokens + tokens])).logits[:1]
    padding_error = float((padded - clean.logits).abs().max() / clean.logits.abs().max().clamp(min=1e-6))
    check = SelfCheck(rows, not torch.equal(clean.logits, moved), padding_error)
    _refuse(subject, check)
    return check


def random_tokens(subject: Subject, n: int, seed: int = 0) -> list[int]:
    """Seeded tokens of the model's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, subject.model.config.vocab_size, (n,), generator=generator).tolist()


def tolerance_of(subject: Subject) -> float:
    """How far rebuilt scores may be off, relative to the largest.

    Models in half precision round their own; in float64 transformers' RMSNorms still round to float32.
    """
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(subject.dtype, 3e-2)


def check_layer(
    subject: Subject,
    positions: Int[Tensor, "batch pos"],
    stream: Float[Tensor, "batch pos d_model"],
    read: AttentionRead,
) -> LayerCheck:
    """Rebuild a layer's scores and patterns on the batch's first prompt, which has no padding."""
    maps = score_maps(subject, read.layer)
    turn, scales = rotation(subject, read.layer, positions[0]), maps.scales(stream[0])
    worst, largest, worst_pattern, longest = 0.0, 0.0, 0.0, 0.0
    products = read.products()[0]
    for head in range(subject.n_heads):
        query = turn(maps.whole_query(stream[0], head, scales))
        key = turn(maps.whole_key(stream[0], head, scales))
        rebuilt = maps.scale * query @ key.T
        own = products[head].to(rebuilt.dtype)
        worst = max(worst, float((rebuilt - own).abs().max()))
        largest = max(largest, float(own.abs().max()))
        longest = max(longest, float(query.norm(dim=-1).max() * key.norm(dim=-1).max()))
        capped = maps.capped(rebuilt)
        for position in range(len(capped)):
            first, end = maps.visible(position, len(capped))
            row = maps.pattern(capped[position, first:end], head)
            own_row = read.pattern[0, head, position].to(row.dtype)
            hidden = float(own_row[:first].sum() + own_row[end:].sum())
            worst_pattern = max(worst_pattern, float((row - own_row[first:end]).abs().max()), hidden)
    largest, rounding = max(largest, 1e-12), 32 * torch.finfo(products.dtype).eps * maps.scale * longest
    return LayerCheck(read.layer, worst / largest, worst_pattern, rounding / largest, rounding)


def _refuse(subject: Subject, check: SelfCheck) -> None:
    tolerance = tolerance_of(subject)
    for row in check.layers:
        if not row.score_error <= (allowed := tolerance + row.rounding):
            raise QklensError(
                f"{subject.name}: layer {row.layer}: rebuilt scores differ from the model's by {row.score_error:.1e} "
                f"of the largest, expected at most {allowed:.0e}; this config is not supported"
            )
        if not row.pattern_error <= (allowed := tolerance + row.pattern_rounding):
            raise QklensError(
                f"{subject.name}: layer {row.layer}: the rebuilt pattern differs from the model's by "
                f"{row.pattern_error:.1e}, expected at most {allowed:.0e}; this config is not supported"
            )
    if not check.pattern_reaches_logits:
        raise QklensError(
            f"{subject.name}: replacing the last layer's pattern does not change the logits; hooks do not reach it"
        )
    if not check.padding_error <= tolerance:
        raise QklensError(
            f"{subject.name}: left padding changes the logits by {check.padding_error:.1e}; not supported"
        )
