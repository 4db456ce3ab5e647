"""What the analyses look at, read in whole-prompt passes: attention by span, head outputs, residual streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qklens.data.render import PARTS, Part
from qklens.interventions.engine import Workset, letter_margins
from qklens.interventions.points import Intervention
from qklens.interventions.steer import Head
from qklens.models.attention import AttentionRead
from qklens.models.batch import Batch
from qklens.models.copies import Reads
from qklens.models.scores import soft_capped
from qklens.models.subject import Subject

OPTION_PARTS: dict[str, tuple[Part, ...]] = {"all": PARTS, **{part: (part,) for part in PARTS}}
SPANS = ("correct", "incorrect", "intent", "question", "other")


@dataclass(frozen=True, eq=False)
class AttentionReading:
    """Attention from the answer position, of every head of every layer.

    Attributes:
        margins: logit(correct) − logit(incorrect) of each prompt.
        logits: all logits at the answer position.
        mass: attention on each of `SPANS`; sums to 1 over spans.
        part_difference: attention on each of `OPTION_PARTS` of the correct minus that of the incorrect option; NaN for
            a part that has no token of its own.
        score_difference: the QK-score of the same, logsumexp of the scores as they meet the softmax, correct minus
            incorrect; NaN where the head sees neither.
        letter_logit: direct logit attribution of each head to the margin, through W_O and the final norm at its
            observed scale.
        outputs: head outputs before W_O.
        final: the stream before the final norm.
    """

    margins: Float[Tensor, " prompt"]
    logits: Float[Tensor, "prompt vocab"]
    mass: Float[Tensor, "prompt layer head span"]
    part_difference: Float[Tensor, "prompt layer head part"]
    score_difference: Float[Tensor, "prompt layer head part"]
    letter_logit: Float[Tensor, "prompt layer head"]
    outputs: Float[Tensor, "prompt layer head d_head"]
    final: Float[Tensor, "prompt d_model"]

    @property
    def difference(self) -> Float[Tensor, "prompt layer head"]:
        """Attention on the correct minus attention on the incorrect option."""
        return self.mass[..., 0] - self.mass[..., 1]


def read_attention(work: Workset, interventions: Sequence[Intervention] = ()) -> AttentionReading:
    """One pass over a workset, under interventions if any, that reads every head at the answer position.

    Raises:
        NothingChangedError: an intervention changed no value.
    """
    subject, n = work.subject, len(work)
    mass = torch.zeros(n, subject.n_layers, subject.n_heads, len(SPANS))
    by_part = torch.zeros(2, n, subject.n_layers, subject.n_heads, len(OPTION_PARTS))
    outputs = torch.zeros(n, subject.n_layers, subject.n_heads, subject.d_head)
    final = torch.zeros(n, subject.d_model)

    caps = [subject.family.score_cap(subject.attention(layer)) for layer in range(subject.n_layers)]

    def reads(index: Sequence[int], batch: Batch) -> Reads:
        indicator = _span_indicator(work, index, batch)
        options = _option_indicator(work, index, batch)
        last = torch.full((len(index), 1), batch.width - 1, device=batch.input_ids.device)
        rows = torch.tensor(index)

        def attention(read: AttentionRead) -> None:
            at_answer = read.pattern[:, :, -1].float()
            mass[rows, read.layer] = torch.einsum("bhk,bsk->bhs", at_answer, indicator.to(at_answer.device)).cpu()
            outputs[rows, read.layer] = read.output[:, -1].float().cpu()
            scores = soft_capped(read.score(columns=last)[:, :, 0], caps[read.layer])
            for kind, values in enumerate(_option_differences(at_answer, scores, options.to(at_answer.device))):
                by_part[kind, rows, read.layer] = values.float().cpu()

        def stream(residual: Tensor) -> None:
            final[rows] = residual[:, -1].float().cpu()

        return Reads({subject.n_layers: stream}, dict.fromkeys(range(subject.n_layers), attention))

    logits = work.logits(interventions, reads=reads).float().cpu()
    return AttentionReading(
        margins=letter_margins(logits, work.prompts),
        logits=logits,
        mass=mass,
        part_difference=by_part[0],
        score_difference=by_part[1],
        letter_logit=letter_attribution(work, outputs, outputs, final),
        outputs=outputs,
        final=final,
    )


def read_patterns(work: Workset, heads: Sequence[Head]) -> dict[Head, list[Float[Tensor, "_k_pos"]]]:
    """The answer row of some heads' patterns, one row a prompt over its own tokens."""
    rows: dict[Head, list[Tensor]] = {head: [torch.empty(0)] * len(work) for head in heads}

    def reads(index: Sequence[int], batch: Batch) -> Reads:
        def attention(read: AttentionRead) -> None:
            for layer, head in heads:
                if layer == read.layer:
                    for row, i in enumerate(index):
                        padding = batch.width - len(work.prompts[i].tokens)
                        rows[layer, head][i] = read.pattern[row, head, -1, padding:].float().cpu()

        return Reads({}, {layer: attention for layer, _ in heads})

    work.logits(reads=reads)
    return rows


def read_streams(work: Workset, layers: Sequence[int]) -> list[dict[int, Float[Tensor, "_pos d_model"]]]:
    """resid_pre at some layers for every token, one dictionary a prompt, in float32 on the CPU."""
    streams: list[dict[int, Tensor]] = [{} for _ in range(len(work))]

    def reads(index: Sequence[int], batch: Batch) -> Reads:
        def sink(layer: int):  # noqa: ANN202
            def keep(residual: Tensor) -> None:
                for row, i in enumerate(index):
                    padding = batch.width - len(work.prompts[i].tokens)
                    kept = residual[row, padding:]
                    streams[i][layer] = (kept if kept.dtype == torch.float64 else kept.float()).cpu().clone()

            return keep

        return Reads({layer: sink(layer) for layer in layers}, {})

    work.logits(reads=reads)
    return streams


def letter_attribution(
    work: Workset,
    parts: Float[Tensor, "prompt layer head d_head"],
    outputs: Float[Tensor, "prompt layer head d_head"],
    final: Float[Tensor, "prompt d_model"],
) -> Float[Tensor, "prompt layer head"]:
    """⟨γ/σ C W_O z_h, U[correct] − U[incorrect]⟩ with the final norm's σ at its observed value; linear in z.

    Where the attention's output has a norm of its own, that norm is held at its observed scale too. A cap on the
    logits comes after, and is not part of it.

    Args:
        work: the prompts.
        parts: z, the heads' outputs before W_O, or a change of them.
        outputs: the outputs at which the norms are observed.
        final: the stream before the final norm, likewise.
    """
    subject: Subject = work.subject
    norm = subject.final_norm(torch.float32)
    unembedding: Tensor = subject.unembedding.weight  # pyright: ignore[reportAssignmentType]
    ids = torch.tensor([p.letter_ids for p in work.prompts], device=unembedding.device)
    toward = norm.fold((unembedding[ids[:, 0]] - unembedding[ids[:, 1]]).float()).cpu()
    toward = toward / norm.scale(final.to(unembedding.device)).cpu()[:, None]
    result = torch.zeros(parts.shape[:3])
    for layer in range(subject.n_layers):
        weight = subject.output_weight(layer).float()
        after = subject.output_norm(layer, torch.float32)
        heads = outputs[:, layer].to(weight)
        whole, bias = torch.einsum("dhe,phe->pd", weight, heads), subject.output_bias(layer)
        whole = whole if bias is None else whole + bias.float()
        here = after.fold(toward.to(weight)) / after.scale(whole)[:, None]
        result[:, layer] = torch.einsum("pd,dhe,phe->ph", here, weight, parts[:, layer].to(weight)).cpu()
    return result


def _span_indicator(work: Workset, index: Sequence[int], batch: Batch) -> Float[Tensor, "batch span k_pos"]:
    indicator = torch.zeros(len(index), len(SPANS), batch.width)
    for row, i in enumerate(index):
        prompt = work.prompts[i]
        padding = batch.width - len(prompt.tokens)
        indicator[row, -1, padding:] = 1.0
        for column, name in enumerate(SPANS[:-1]):
            for position in prompt.spans.get(name, ()):
                indicator[row, column, padding + position] = 1.0
                indicator[row, -1, padding + position] = 0.0
    return indicator.to(batch.input_ids.device)


def _option_indicator(work: Workset, index: Sequence[int], batch: Batch) -> Bool[Tensor, "batch option part k_pos"]:
    """Which columns are each part of the correct and of the incorrect option."""
    indicator = torch.zeros(len(index), 2, len(OPTION_PARTS), batch.width, dtype=torch.bool)
    for row, i in enumerate(index):
        padding = batch.padding(row)
        for option, name in enumerate(("correct", "incorrect")):
            for column, parts in enumerate(OPTION_PARTS.values()):
                positions = [padding + p for part in parts for p in work.prompts[i].spans[f"{name}.{part}"]]
                indicator[row, option, column, positions] = True
    return indicator.to(batch.input_ids.device)


def _option_differences(
    pattern: Float[Tensor, "batch head k_pos"],
    scores: Float[Tensor, "batch head k_pos"],
    options: Bool[Tensor, "batch option part k_pos"],
) -> tuple[Float[Tensor, "batch head part"], Float[Tensor, "batch head part"]]:
    """Correct minus incorrect, by part: attention, and logsumexp of the scores."""
    absent = ~options.any(dim=-1).all(dim=1)[:, None]
    mass = torch.einsum("bhk,bopk->bohp", pattern, options.to(pattern))
    hidden = scores[:, None, :, None].masked_fill(~options[:, :, None], float("-inf")).logsumexp(dim=-1)
    attention, score = mass[:, 0] - mass[:, 1], hidden[:, 0] - hidden[:, 1]
    nothing = float("nan")
    return attention.masked_fill(absent, nothing), score.masked_fill(absent | ~score.isfinite(), nothing)
