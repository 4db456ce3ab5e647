"""Everything qklens reads off one head of a tiny model, by the names of `qklens.analyses.gauge`, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from reparameterise import LAYER
from torch import Tensor

from qklens.analyses.gauge import Quantity
from qklens.analyses.interactions import HeadLens, PromptParts, head_lens, mean_terms, weights_of, write_prompts
from qklens.analyses.nulls import Population, null_test
from qklens.analyses.readings import read_attention, read_patterns, read_streams
from qklens.data.render import Prompt
from qklens.dictionaries.source import FeatureSource
from qklens.interventions.direction import feature_direction
from qklens.interventions.engine import Workset
from qklens.interventions.patch import HeadAblation, PatternPatch
from qklens.interventions.steer import Steer
from qklens.models.passes import Reads
from qklens.models.scores import offset_rotation, virtual_interaction
from qklens.models.subject import Subject

HEAD = 1
FEATURES = (0, 1, 4)
"""Some of the dictionary's features, of which `bias_split` rewrites some and keeps some."""
FLOAT32: tuple[Quantity, ...] = ("attention difference", "direct letter attribution", "pattern patching")
"""What qklens computes or carries in float32 whatever the model's dtype."""


def read_all(subject: Subject, source: FeatureSource, prompts: Sequence[Prompt]) -> dict[Quantity, Tensor]:
    """Every quantity, as one tensor each."""
    work = Workset(subject, prompts)
    streams = read_streams(work, [LAYER])
    lens = head_lens(subject, source, LAYER, HEAD)
    written = write_prompts(subject, source, lens.maps, streams)
    return {
        "residual stream": torch.cat([stream[LAYER] for stream in streams]),
        "activations": torch.cat([w.parts.activations for w in written]),
        **_sites(work),
        **_scores(lens, prompts, written),
        **_terms(lens, prompts, written),
        **_virtual(lens, written),
        **_causal(work, source, written),
    }


def read_terms(subject: Subject, source: FeatureSource, prompts: Sequence[Prompt]) -> dict[Quantity, Tensor]:
    """The pair terms alone."""
    lens = head_lens(subject, source, LAYER, HEAD)
    return _terms(
        lens, prompts, write_prompts(subject, source, lens.maps, read_streams(Workset(subject, prompts), [LAYER]))
    )


def log_probabilities(work: Workset) -> Tensor:
    return work.logits().log_softmax(dim=-1)


def _margins(logits: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return logits.gather(1, torch.tensor([p.letter_ids for p in prompts])) @ torch.tensor([1.0, -1.0]).double()


def _sites(work: Workset) -> dict[Quantity, Tensor]:
    seen: dict[Quantity, list[Tensor]] = {
        "normed input": [], "query and key vectors": [], "pattern": [], "head output": []
    }  # fmt: skip

    def reads(index, batch) -> Reads:
        def attention(read) -> None:
            for row in range(len(index)):
                own = slice(batch.padding(row), None)
                seen["query and key vectors"] += [read.query[row, :, own].flatten(), read.key[row, :, own].flatten()]
                seen["pattern"].append(read.pattern[row, :, own, own].flatten())
                seen["head output"].append(read.output[row, own].flatten())

        def normed(rows: Tensor) -> None:
            seen["normed input"] += [rows[row, batch.padding(row) :].flatten() for row in range(len(index))]

        return Reads({}, {LAYER: attention}, {}, {(LAYER, "query"): normed, (LAYER, "key"): normed})

    logits = work.logits(reads=reads)
    reading = read_attention(work)
    return {
        **{name: torch.cat(rows) for name, rows in seen.items()},
        "logits": logits,
        "margin": _margins(logits, work.prompts),
        "attention difference": reading.difference,
        "direct letter attribution": reading.letter_logit,
    }


def _scores(lens: HeadLens, prompts: Sequence[Prompt], written: Sequence[PromptParts]) -> dict[Quantity, Tensor]:
    scores = [lens.scores(w, p.spans["answer"][0]) for p, w in zip(prompts, written, strict=True)]
    assert all(bool(row.isfinite().all()) for row in scores)
    contrasts = [
        weights_of(lens, p, w, "contrastive") @ row for p, w, row in zip(prompts, written, scores, strict=True)
    ]
    return {"score": torch.cat(scores), "contrastive score": torch.stack(contrasts)}


def _terms(lens: HeadLens, prompts: Sequence[Prompt], written: Sequence[PromptParts]) -> dict[Quantity, Tensor]:
    found: dict[Quantity, Tensor] = {}
    everyone, bias = range(len(lens.names)), lens.names.index("bias")
    named = {"realised": "realised", "contrastive": "contrastive", "share": "share-weighted"}
    for weighting, label in named.items():
        means = mean_terms(lens, prompts, written, weighting)
        sides = [[means.between(i, k) for k in everyone] for i in (*FEATURES, bias)]
        keys = [[means.between(i, k) for i in everyone] for k in (*FEATURES, bias)]
        by_query, by_key = torch.tensor(sides).double(), torch.tensor(keys).double()
        found |= {
            f"{label} feature pairs": by_query[:-1, list(FEATURES)],
            f"{label} bias terms": torch.cat([by_query[-1], by_key[-1]]),
            f"{label} marginals": torch.cat([by_query.sum(dim=1), by_key.sum(dim=1)]),
            f"{label} error share": torch.tensor(means.error_share()),
        }
    return found


def _virtual(lens: HeadLens, written: Sequence[PromptParts]) -> dict[Quantity, Tensor]:
    turn = offset_rotation(lens.subject, LAYER, torch.tensor([4, 9]))
    vectors = lens.source.directions(LAYER)
    activations = torch.cat([w.parts.activations for w in written])
    residual = torch.cat([w.residual for w in written])
    active = activations.abs() > 1e-9
    # As `nulls.population`, which is in float32.
    everyone = Population(
        vectors, active.double().mean(dim=0), active.any(dim=0), (residual - residual.mean(dim=0)).T / len(residual)
    )
    pairs = [(i, k) for i in FEATURES for k in FEATURES]
    values = [virtual_interaction(lens.maps, HEAD, turn, vectors[i][None], vectors[k][None]) for i, k in pairs]

    def z(null) -> Tensor:
        tests = [
            null_test(
                null, lens.maps, HEAD, turn, everyone, everyone, (vectors[i], vectors[k]),
                (float(everyone.frequency[i]), float(everyone.frequency[k])), n=100,
            )
            for i, k in pairs
        ]  # fmt: skip
        assert all(test.note is None for test in tests)
        return torch.tensor([test.z for test in tests]).double()

    return {
        "virtual interaction": torch.cat(values),
        "z against random_pairs": z("random_pairs"),
        "z against matched": z("matched"),
    }


def _causal(work: Workset, source: FeatureSource, written: Sequence[PromptParts]) -> dict[Quantity, Tensor]:
    clean = _margins(work.logits(), work.prompts)

    def effect(*interventions) -> Tensor:
        return _margins(work.logits(interventions), work.prompts) - clean

    def steered(unit: str) -> Tensor:
        effects = []
        for feature in FEATURES[:2]:
            largest = max(float(w.parts.activations[:, feature].max()) for w in written)
            along = feature_direction(source, feature, {LAYER: largest})
            stream = Steer(along, 0.3, unit=unit, layers=(LAYER,), tokens=("correct",))
            query = Steer(along, 0.3, unit=unit, side="query", heads=((LAYER, HEAD),), tokens=("answer",))
            effects.append(effect(stream, query))
        return torch.cat(effects)

    # Both orders of an item have as many tokens, so each prompt can take the other's row.
    rows = read_patterns(work, [(LAYER, HEAD)])[LAYER, HEAD]
    other = PatternPatch({(LAYER, HEAD): [rows[i ^ 1] for i in range(len(rows))]})
    outputs: list[Tensor] = []
    at_answer = Reads({}, {LAYER: lambda read: outputs.append(read.output[:, -1, HEAD])})
    work.logits(reads=lambda index, batch: at_answer)
    mean = torch.cat(outputs).mean(dim=0)  # as `heads.mean_ablation`, which is in float32
    return {
        "steering in raw units": steered("raw"),
        "steering in activation_max units": steered("activation_max"),
        "steering in resid_norm units": steered("resid_norm"),
        "pattern patching": effect(other),
        "mean ablation": effect(HeadAblation({(LAYER, HEAD): mean})),
        "zero ablation": effect(HeadAblation({(LAYER, HEAD): torch.zeros_like(mean)})),
    }
