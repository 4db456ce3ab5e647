"""Stage `interactions`: which signed pairs make up the chosen heads' scores, and do all terms sum to it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from qklens.analyses.contrasts import QUERY_ROLES
from qklens.analyses.interactions import mean_terms
from qklens.analyses.weighting import CONTRASTIVE, REALISED
from qklens.analyses.written import write_prompts
from qklens.data.render import CONDITIONS, Prompt
from qklens.dictionaries.directions import Directions
from qklens.interventions.engine import Workset
from qklens.interventions.steer import Head
from qklens.models.attention import AttentionRead
from qklens.models.batch import Batch
from qklens.models.copies import Reads
from qklens.models.scores import score_maps
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Lab
from qklens.studies.results import Completeness, InteractionRow, InteractionShare
from qklens.studies.roles import find_roles

TOP_PAIRS = 12
_CHECKED_PROMPTS = 4


def run(lab: Lab, heads: Sequence[Head], belief: str | None, named: Mapping[str, str]) -> StageOutput:
    """Decompose the chosen heads' scores on the report half; check completeness on every head of the model."""
    roles, candidates = find_roles(lab, heads, belief, named)
    query_roles = {lab.source.labels[f]: role for role, f in roles.chosen.items() if role in QUERY_ROLES}
    key_roles = {lab.source.labels[f]: role for role, f in roles.chosen.items() if role not in QUERY_ROLES}
    rows: list[InteractionRow] = []
    shares: list[InteractionShare] = []
    error_shares = []
    for layer, head in heads:
        lens = lab.lens(layer, head)
        calm = lab.prompts("none", "report"), lab.written("none", "report", layer)
        for condition in CONDITIONS:
            prompts, written = lab.prompts(condition, "report"), lab.written(condition, "report", layer)
            for weighting in (REALISED, CONTRASTIVE):
                means = mean_terms(lens, prompts, written, weighting)
                if weighting is CONTRASTIVE:
                    error_shares.append(means.error_share())
                pairs = means.top(TOP_PAIRS)
                shown = {(q, k) for q, k, _ in pairs}
                features = list(dict.fromkeys(roles.chosen.values()))
                between = [(q, k) for q in features for k in features]
                names = [(lab.source.labels[q], lab.source.labels[k]) for q, k in between]
                pairs += [
                    (*name, value)
                    for name, value in zip(names, means.of_pairs(between), strict=True)
                    if name not in shown
                ]
                weighed = dict[tuple[str, str], float]()
                if all(weighting.fits(of, to) for of, to in zip(calm[0], prompts, strict=True)):
                    calmly = mean_terms(lens, prompts, written, weighting, calm)
                    weighed = dict(zip(names, calmly.of_pairs(between), strict=True))
                rows += [
                    InteractionRow(
                        layer=layer,
                        head=head,
                        query=q,
                        key=k,
                        condition=condition,
                        value=value,
                        kind=weighting.kind,
                        query_role=query_roles.get(q),
                        key_role=key_roles.get(k),
                        weighed_as_none=weighed.get((q, k)),
                    )
                    for q, k, value in pairs
                ]
                shares.append(
                    InteractionShare(
                        layer=layer,
                        head=head,
                        condition=condition,
                        kind=weighting.kind,
                        score=means.total,
                        shares=means.shares(),
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
    shape = (subject.n_layers, subject.n_heads)
    worst, largest, count = torch.zeros(shape), torch.zeros(shape), 0
    for condition in CONDITIONS:
        prompts = lab.prompts(condition, "report")[:_CHECKED_PROMPTS]
        streams, own = _read_scores(lab, prompts)
        for layer in range(subject.n_layers):
            source = lab.source if layer in lab.source.layers else _nothing(subject.d_model, layer)
            maps = score_maps(subject, layer)
            written = write_prompts(subject, source, maps, streams)
            for head in range(subject.n_heads):
                lens = lab.lens_on(source, layer, head)
                for prompt, parts, scores in zip(prompts, written, own, strict=True):
                    total = lens.terms_by_token(parts, prompt.spans["answer"][0]).scores(len(prompt.tokens)).cpu()
                    model = scores[layer][head].to(total)
                    worst[layer, head] = max(float(worst[layer, head]), float((total - model).abs().max()))
                    largest[layer, head] = max(float(largest[layer, head]), float(model.abs().max()))
                    count += len(total)
    relative = worst / largest.clamp(min=1e-12)
    return Completeness(
        max_relative_error=float(relative.max()),
        error_share=error_share,
        max_relative_error_by_head=relative.tolist(),
        n_scores=count,
    )


def _nothing(d_model: int, layer: int) -> Directions:
    """A source that names nothing."""
    return Directions(("nothing",), {layer: torch.zeros(1, d_model)}, {layer: torch.zeros(d_model)}, name="empty")


def _read_scores(
    lab: Lab, prompts: Sequence[Prompt]
) -> tuple[list[dict[int, torch.Tensor]], list[dict[int, torch.Tensor]]]:
    """One pass: each prompt's streams at every layer, and the model's own scores from the answer, `head k_pos`."""
    subject, layers = lab.subject, range(lab.subject.n_layers)
    streams: list[dict[int, torch.Tensor]] = [{} for _ in prompts]
    own: list[dict[int, torch.Tensor]] = [{} for _ in prompts]

    def reads(index: Sequence[int], batch: Batch) -> Reads:
        def keep(layer: int) -> Callable[[torch.Tensor], None]:
            def sink(residual: torch.Tensor) -> None:
                for row, i in enumerate(index):
                    streams[i][layer] = residual[row, batch.padding(row) :].clone()

            return sink

        def attention(read: AttentionRead) -> None:
            last = torch.full((len(index), 1), batch.width - 1, device=read.query.device)
            scores = read.products(columns=last)[:, :, 0]
            for row, i in enumerate(index):
                own[i][read.layer] = scores[row, :, batch.padding(row) :].cpu()

        return Reads({layer: keep(layer) for layer in layers}, dict.fromkeys(layers, attention))

    Workset(subject, prompts).logits(reads=reads)
    return streams, own
