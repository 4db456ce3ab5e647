"""Stage `interactions`: which signed pairs make up the chosen heads' scores, and do all terms sum to it?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qklens.analyses.interactions import mean_terms, write_prompt
from qklens.data.render import CONDITIONS, Condition
from qklens.dictionaries.directions import Directions
from qklens.dictionaries.source import FeatureSource
from qklens.errors import QklensError
from qklens.interventions.engine import Workset
from qklens.interventions.steer import Head
from qklens.models.batch import Batch
from qklens.models.passes import AttentionRead, Reads
from qklens.models.scores import score_maps
from qklens.studies.harm_pressure.lab import Lab
from qklens.studies.harm_pressure.roles import find_roles
from qklens.studies.journal import StageOutput
from qklens.studies.results import Completeness, InteractionRow, InteractionShare

TOP_PAIRS = 12
_CHECKED_PROMPTS = 4


def run(lab: Lab, heads: Sequence[Head]) -> StageOutput:
    """Decompose the chosen heads' scores on the report half; check completeness on every head of the model."""
    roles, candidates = find_roles(lab, heads)
    role_of = {lab.source.labels[feature]: role for role, feature in roles.chosen.items()}
    rows: list[InteractionRow] = []
    shares: list[InteractionShare] = []
    error_shares = []
    for layer, head in heads:
        lens = lab.lens(layer, head)
        for condition in CONDITIONS:
            written = lab.written(condition, "report", layer)
            for kind in ("realised", "contrastive"):
                means = mean_terms(lens, lab.prompts(condition, "report"), written, kind)
                error_shares.append(means.error_share())
                pairs = means.top(TOP_PAIRS)
                named = {(q, k) for q, k, _ in pairs}
                for q in roles.chosen.values():
                    for k in roles.chosen.values():
                        labels = lab.source.labels[q], lab.source.labels[k]
                        if labels not in named:
                            pairs.append((*labels, means.between(q, k)))
                rows += [
                    InteractionRow(
                        layer=layer,
                        head=head,
                        query=q,
                        key=k,
                        condition=condition,
                        value=value,
                        kind=kind,
                        query_role=role_of.get(q),
                        key_role=role_of.get(k),
                    )
                    for q, k, value in pairs
                ]
                shares.append(
                    InteractionShare(
                        layer=layer, head=head, condition=condition, kind=kind, score=means.total, shares=means.shares()
                    )
                )
    completeness = check_completeness(lab, sum(error_shares) / len(error_shares))
    return StageOutput(
        results={
            "roles": [c.model_dump() for c in candidates],
            "interactions": [row.model_dump() for row in rows],
            "interaction_shares": [share.model_dump() for share in shares],
            "completeness": completeness.model_dump(),
        },
        state={"roles": {role: lab.source.labels[f] for role, f in roles.chosen.items()}, "layer": roles.layer},
    )


def check_completeness(lab: Lab, error_share: float) -> Completeness:
    """Σ of all pair terms against the model's own scores: every head, answer to every token, a few prompts each.

    A layer that the source does not write is decomposed with an empty source: all of it is bias and error.
    """
    subject = lab.subject
    worst = torch.zeros(subject.n_layers, subject.n_heads)
    largest = torch.zeros(subject.n_layers, subject.n_heads)
    count = 0
    for condition in CONDITIONS:
        prompts = lab.prompts(condition, "report")[:_CHECKED_PROMPTS]
        for layer in range(subject.n_layers):
            errors, sizes, n = _layer_errors(lab, prompts, condition, layer)
            worst[layer] = torch.maximum(worst[layer], errors)
            largest[layer] = torch.maximum(largest[layer], sizes)
            count += n
    relative = worst / largest.clamp(min=1e-12)
    return Completeness(
        max_relative_error=float(relative.max()),
        error_share=error_share,
        max_relative_error_by_head=relative.tolist(),
        n_scores=count,
    )


def _layer_errors(
    lab: Lab, prompts: Sequence, condition: Condition, layer: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    subject = lab.subject
    source: FeatureSource = lab.source
    if layer not in source.layers:
        nothing = torch.zeros(1, subject.d_model)
        source = Directions(("nothing",), {layer: nothing}, {layer: torch.zeros(subject.d_model)}, name="empty")
    needs = sorted({m for m in source.layers if m <= layer} | {layer})
    work = Workset(subject, prompts)
    own: dict[int, torch.Tensor] = {}
    streams: list[dict[int, torch.Tensor]] = [{} for _ in prompts]

    def reads(index: Sequence[int], batch: Batch) -> Reads:
        def keep(m: int):  # noqa: ANN202
            def sink(residual: torch.Tensor) -> None:
                for row, i in enumerate(index):
                    streams[i][m] = residual[row, batch.padding(row) :].clone()

            return sink

        def attention(read: AttentionRead) -> None:
            keys = read.key.repeat_interleave(subject.n_heads // subject.n_kv_heads, dim=1)
            scores = read.scale * torch.einsum("bhd,bhkd->bhk", read.query[:, :, -1], keys)
            for row, i in enumerate(index):
                own[i] = scores[row, :, batch.padding(row) :]

        return Reads({m: keep(m) for m in needs}, {layer: attention})

    work.logits(reads=reads)
    maps = score_maps(subject, layer)
    errors, sizes, n = torch.zeros(subject.n_heads), torch.zeros(subject.n_heads), 0
    written = [write_prompt(subject, source, maps, s) for s in streams]
    for head in range(subject.n_heads):
        lens = lab.lens_on(source, layer, head)
        for i, (prompt, parts) in enumerate(zip(prompts, written, strict=True)):
            total = lens.terms_by_token(parts, prompt.spans["answer"][0]).sum(dim=(1, 2))
            model_scores = own[i][head].to(total)
            errors[head] = max(float(errors[head]), float((total - model_scores).abs().max()))
            sizes[head] = max(float(sizes[head]), float(model_scores.abs().max()))
            n += len(total)
    if not n:
        raise QklensError("no prompt to check completeness on")
    return errors, sizes, n
