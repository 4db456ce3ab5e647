"""Through what does harm cost the answer: some heads' patterns, their outputs, the options' belief, or later layers?

For a part of the model (the patterns of some heads, say), let m(s, p) be the mean margin with the part as it is in run
p and everything else as in run s, for p, s among the clean and the harmed run. The part's share of what was lost is

    restored  = [m(harm, clean) − m(harm, harm)] / lost        the part alone is given back
    caused    = [m(clean, clean) − m(clean, harm)] / lost      the part alone is taken away
    through   = (restored + caused) / 2                        lost = m(clean, clean) − m(harm, harm)

The mean is the Shapley value of a game with two players, the part and all the rest, so the rest has 1 − through. One
side alone misleads: where two things each cost the whole answer, giving one back restores nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.factorial import shared_tokens
from qklens.analyses.heads import clean_pattern_patch
from qklens.analyses.readings import AttentionReading
from qklens.analyses.statistics import Interval, bootstrap_ratio, item_means
from qklens.data.render import Prompt
from qklens.interventions.component import ComponentPatch
from qklens.interventions.engine import Workset, letter_margins
from qklens.interventions.patch import HeadAblation, PatternPatch
from qklens.interventions.points import Intervention
from qklens.interventions.shift import StreamShift
from qklens.interventions.steer import Head
from qklens.models.subject import Subject

OPTIONS = ("correct", "incorrect")


@dataclass(frozen=True)
class Share:
    """A part's share of the margin that was lost; see the module.

    Attributes:
        restored: by the part alone.
        caused: by the part alone.
        ci: of `through`, 95%, bootstrapped over items.
        accuracy: of the harmed run with the part given back.
    """

    restored: float
    caused: float
    ci: Interval
    accuracy: float

    @property
    def through(self) -> float:
        """The mean of both."""
        return (self.restored + self.caused) / 2


@dataclass(frozen=True, eq=False)
class Runs:
    """The clean and the harmed run of the same items and orders.

    Attributes:
        clean: the workset without harm.
        harm: with it.
        seed: of the bootstrap.
    """

    clean: Workset
    harm: Workset
    seed: int

    def share(self, back: Intervention, away: Intervention) -> Share:
        """A part's share.

        Args:
            back: gives the harmed run the clean part.
            away: gives the clean run the harmed part.
        """
        given = self.harm.margins_each([back], idle_ok=True)[0]
        taken = self.clean.margins_each([away], idle_ok=True)[0]
        return self.share_of(given, taken)

    def share_of(self, given: Float[Tensor, " prompt"], taken: Float[Tensor, " prompt"]) -> Share:
        """A part's share from the two mixed runs' margins."""
        harmed, clean = self.harm.margins(), self.clean.margins()
        lost = clean - harmed
        restored, caused = given - harmed, clean - taken
        whole, right = float(lost.mean()), float((given > 0).float().mean())
        if abs(whole) < 1e-6:
            return Share(0.0, 0.0, (0.0, 0.0), right)
        above = item_means(((restored + caused) / 2).double().numpy())
        interval = bootstrap_ratio(above, item_means(lost.double().numpy()), self.seed)
        return Share(float(restored.mean()) / whole, float(caused.mean()) / whole, interval, right)


def pattern_patches(
    runs: Runs, clean: Mapping[Head, Sequence[Tensor]], harm: Mapping[Head, Sequence[Tensor]], heads: Sequence[Head]
) -> tuple[PatternPatch, PatternPatch]:
    """Heads' answer rows of the clean run for the harmed one, and the other way round."""
    return (
        clean_pattern_patch(runs.clean.prompts, clean, runs.harm.prompts, heads),
        clean_pattern_patch(runs.harm.prompts, harm, runs.clean.prompts, heads),
    )


def output_patches(
    clean: AttentionReading, harm: AttentionReading, heads: Sequence[Head]
) -> tuple[HeadAblation, HeadAblation]:
    """Heads' whole outputs at the answer, likewise."""
    back, away = (HeadAblation({(at, h): r.outputs[:, at, h] for at, h in heads}) for r in (clean, harm))
    return back, away


def first_that_suffice(heads: Sequence[Head], restored: Mapping[int, float], enough: float) -> list[Head]:
    """The heads of the earliest layers whose patterns restore what all heads' do; those above only pass it on.

    Args:
        heads: the heads.
        restored: for each of their layers, the share restored by the heads up to it.
        enough: of what all restore.
    """
    last = max(restored)
    until = next((layer for layer in sorted(restored) if restored[layer] >= enough * restored[last]), last)
    return [head for head in heads if head[0] <= until]


def answer_direction(
    prompts: Sequence[Prompt], streams: Sequence[dict[int, Tensor]], layer: int
) -> Float[Tensor, " d_model"]:
    """Mean residual of correct less incorrect option tokens, without pressure: the layer's correct-answer direction."""
    rows = [
        s[layer][list(p.span("correct"))].mean(dim=0) - s[layer][list(p.span("incorrect"))].mean(dim=0)
        for p, s in zip(prompts, streams, strict=True)
    ]
    return torch.stack(rows).mean(dim=0)


def option_amounts(
    prompts: Sequence[Prompt], streams: Sequence[dict[int, Tensor]], layer: int, w: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """The amount of a direction summed over the tokens of the correct and of the incorrect option."""
    scale = w.pow(2).sum()
    sums = [
        [(s[layer][list(p.span(name))] @ w).sum() / scale for p, s in zip(prompts, streams, strict=True)]
        for name in OPTIONS
    ]
    return torch.stack(sums[0]), torch.stack(sums[1])


def component_patch(
    vectors: Mapping[int, Float[Tensor, " d_model"]],
    receivers: Sequence[Prompt],
    donors: Sequence[Prompt],
    streams: Sequence[dict[int, Tensor]],
) -> ComponentPatch:
    """Give receivers' option tokens the donors' amount of a direction at each layer; `streams` are the donors'."""
    positions: list[list[int]] = []
    targets: dict[int, list[Tensor]] = {layer: [] for layer in vectors}
    for receiver, donor, stream in zip(receivers, donors, streams, strict=True):
        options = {p for name in OPTIONS for p in receiver.span(name)}
        pairs = [(mine, its) for mine, its in shared_tokens(receiver, donor).tolist() if mine in options]
        positions.append([mine for mine, _ in pairs])
        for layer, w in vectors.items():
            rows = stream[layer][[its for _, its in pairs]]
            targets[layer].append(rows @ w / w.pow(2).sum())
    return ComponentPatch("correct answer", vectors, positions, targets)


def query_shifts(
    subject: Subject,
    heads: Sequence[Head],
    need: Mapping[int, Float[Tensor, " d_model"]],
    harm: tuple[Sequence[Prompt], Sequence[dict[int, Tensor]]],
    calm: tuple[Sequence[Prompt], Sequence[dict[int, Tensor]]],
) -> tuple[StreamShift, StreamShift]:
    """Give heads' queries at the answer what they had without harm: along the call for an answer, and across it.

        δ = C (x_calm − x_harm) at the answer, in resid_pre of the heads' layers
        along     (⟨δ, w⟩ / ⟨w, w⟩) w
        across    (⟨δ, m⟩ / ⟨m, m⟩) m,   m = mean of δ over prompts, less its part along w

    Each prompt has its own amounts of directions that all share. A feature that harm adds is common to all items and
    orders, if not equally strong in each; a letter that was turned before these heads read it cancels in m.

    Args:
        subject: the model, whose norms say what C is: centring under LayerNorm.
        heads: whose queries read it; their keys and all else stay as they are.
        need: per layer, the need-answer direction w, as the norm lets it through.
        harm: the prompts under harm and their streams.
        calm: the same items and orders without, and theirs.

    Returns:
        The shift along w, and the shift across it.
    """
    shifts: tuple[dict[int, list[Tensor]], ...] = ({}, {})
    for layer, w in need.items():
        change = torch.stack(
            [
                clean[layer][other.spans["answer"][0]] - pressed[layer][prompt.spans["answer"][0]]
                for prompt, pressed, other, clean in zip(*harm, *calm, strict=True)
            ]
        )
        change = subject.input_norm(layer, change.dtype).centre(change)
        mean = change.mean(dim=0)
        for mine, along in zip(shifts, (w, mean - (mean @ w) / w.pow(2).sum() * w), strict=True):
            amounts = change @ along / along.pow(2).sum().clamp(min=1e-12)
            mine[layer] = []
            for prompt, pressed, amount in zip(*harm, amounts, strict=True):
                rows = torch.zeros_like(pressed[layer])
                rows[prompt.spans["answer"][0]] = amount * along
                mine[layer].append(rows)
    first, second = (
        StreamShift(label, mine, tuple(heads), "query", ("answer",))
        for label, mine in zip(("need answer given back", "what harm adds taken out"), shifts, strict=True)
    )
    return first, second


def late_restored(
    subject: Subject,
    runs: Runs,
    last_layer: int,
    streams: tuple[Sequence[dict[int, Tensor]], Sequence[dict[int, Tensor]]],
    readings: tuple[AttentionReading, AttentionReading],
) -> float:
    """The share of the lost margin that comes back when all that is written after the heads is the clean run's.

    x = x_mid(harm) + x_final(clean) − x_mid(clean) at the answer, with x_mid behind the attention of the last layer
    that holds one of the heads, then the final norm and the letters.

    Args:
        subject: the model.
        runs: both runs.
        last_layer: that layer.
        streams: resid_pre of that layer, clean and harmed.
        readings: attention of both runs.
    """
    middle = []
    for work, stream, reading in zip((runs.clean, runs.harm), streams, readings, strict=True):
        before = torch.stack([s[last_layer][p.spans["answer"][0]] for p, s in zip(work.prompts, stream, strict=True)])
        middle.append(before.cpu() + attention_output(subject, last_layer, reading.outputs[:, last_layer]).cpu())
    clean, harmed = readings
    mixed = middle[1] + clean.final - middle[0]
    margins = [_written_margin(subject, runs.harm.prompts, x) for x in (mixed, harmed.final, clean.final)]
    lost = margins[2] - margins[1]
    return (margins[0] - margins[1]) / lost if abs(lost) > 1e-6 else 0.0


def _written_margin(subject: Subject, prompts: Sequence[Prompt], final: Float[Tensor, "prompt d_model"]) -> float:
    """The mean margin of a stream before the final norm, without a cap on the logits."""
    weight: Tensor = subject.unembedding.weight  # pyright: ignore[reportAssignmentType]
    norm = subject.final_norm(torch.float32)
    x = final.to(weight.device).float()
    normed = norm.linear(x) / norm.scale(x)[:, None] + (0.0 if norm.beta is None else norm.beta)
    return float(letter_margins(normed @ weight.float().T, prompts).mean())


def attention_output(
    subject: Subject, layer: int, outputs: Float[Tensor, "prompt head d_head"]
) -> Float[Tensor, "prompt d_model"]:
    """What a layer's attention adds to the stream, from its heads' outputs before W_O."""
    weight = subject.output_weight(layer).float()
    whole, bias = torch.einsum("dhe,phe->pd", weight, outputs.to(weight)), subject.output_bias(layer)
    whole = whole if bias is None else whole + bias.float()
    norm = subject.output_norm(layer, torch.float32)
    return norm.linear(whole) / norm.scale(whole)[:, None]
