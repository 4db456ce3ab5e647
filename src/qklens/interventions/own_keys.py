"""A key edit that only the named query heads see, where several of them share one key head.

The shared key stays as it is. A named head h gets what its scores would gain from the edited key k' in place of k:

    Δu(p, j) = c ⟨q_p, R_j (k'_j − k_j)⟩

With norms recomputed, k' is what the model would make of the edited stream. Where the norm on keys takes all key heads
as one vector, the key heads of the named query heads are edited in it and the others are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxtyping import Bool, Float
from torch import Tensor

from qklens.models.batch import Batch
from qklens.models.edits import ScoreEdit, ScoreView
from qklens.models.scores import Scales, ScoreMaps, rotation, score_maps
from qklens.models.subject import Subject


def own_key_edit(
    subject: Subject,
    batch: Batch,
    layer: int,
    heads: Sequence[int],
    mask: Bool[Tensor, "batch pos"],
    change: Callable[[Tensor, Callable[[int], Tensor]], Tensor],
    sees: tuple[int, ...],
    *,
    frozen_norm: bool,
) -> ScoreEdit:
    """The score edit that gives some query heads of a layer their own copy of an edited key.

    Args:
        subject: the model.
        batch: the prompts of the pass.
        layer: the layer.
        heads: its query heads.
        mask: tokens whose keys are edited.
        change: as that of a `VectorEdit`.
        sees: other layers whose stream `change` asks for.
        frozen_norm: hold the scales of the input norm and of a norm on keys at their unedited values.
    """

    def bias(view: ScoreView) -> Tensor:
        maps = score_maps(subject, layer)
        here = mask[:, view.start :].to(view.query.device)
        dtype = maps.key_side.weight.dtype
        rows = view.rows(layer).to(dtype)
        edited = change(rows, lambda other: view.rows(other).to(dtype))
        scales = maps.scales(rows)
        held = scales if frozen_norm else _edited_scales(maps, heads, rows, edited, scales)
        turn = rotation(subject, layer, batch.position_ids[:, view.start :][here])
        total = view.query.new_zeros((*view.query.shape[:3], view.key.shape[2]))
        for head in heads:
            change_of_key = view.query.new_zeros((*here.shape, subject.d_head))
            moved = maps.whole_key(edited, head, held) - maps.whole_key(rows, head, scales)
            change_of_key[here] = turn(moved).to(change_of_key)
            total[:, head, :, view.start :] = view.scale * view.query[:, head] @ change_of_key.transpose(1, 2)
        return total

    return ScoreEdit(layer, bias, mask, sees, tuple(heads))


def _edited_scales(
    maps: ScoreMaps,
    heads: Sequence[int],
    rows: Float[Tensor, "row d_model"],
    edited: Float[Tensor, "row d_model"],
    clean: Scales,
) -> Scales:
    """σ and ρ with only the named heads' keys edited."""
    after = maps.scales(edited)
    if not maps.key_side.pooled:
        return after
    apart = replace(maps.key_side, pooled=False, epsilon=0.0)
    square = apart.rms(rows, clean.sigma).pow(2)
    named = sorted({maps.kv_head(head) for head in heads})
    square[:, named] = apart.rms(edited, after.sigma).pow(2)[:, named]
    rho = (square.mean(dim=-1, keepdim=True) + maps.key_side.epsilon).sqrt()
    return Scales(after.sigma, after.query_rms, rho.expand(square.shape))
