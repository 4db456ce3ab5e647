"""Everything qklens reads off one head of a tiny model, by the names of `qklens.analyses.gauge`, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from reparameterise import LAYER
from torch import Tensor

from qklens.analyses.gauge import Quantity
from qklens.analyses.interactions import mean_terms
from qklens.analyses.lens import HeadLens, head_lens
from qklens.analyses.nulls import MIN_PAIRS, Population, feature_pairs, null_tests
from qklens.analyses.readings import read_attention, read_streams
from qklens.analyses.weighting import CONTRASTIVE, REALISED, SHARE
from qklens.analyses.written import WrittenPrompt, write_prompts
from qklens.data.render import Prompt
from qklens.dictionaries.source import FeatureSource
from qklens.interventions.direction import feature_direction
from qklens.interventions.engine import Workset
from qklens.interventions.patch import HeadAblation, PatternPatch
from qklens.interventions.steer import Steer
from qklens.models.copies import Reads
from qklens.models.scores import offset_rotation, virtual_interaction
from qklens.models.subject import Subject

HEAD = 1
FEATURES = (0, 1, 4)
"""Some of the dictionary's features, of which `bias_split` rewrites some and keeps some."""
STEERED = (0, 4)
"""Features that `bias_split` rewrites; steered together, each also in a head of its own."""
FLOAT32: tuple[Quantity, ...] = ("attention difference", "direct letter attribution", "pattern patching")
"""What qklens computes or carries in float32 whatever the model's dtype."""


def read_all(subject: Subject, source: FeatureSource, prompts: Sequence[Prompt]) -> dict[Quantity, Tensor]:
    """Every quantity, as one tensor each."""
    work = Workset(subject, prompts)
    sites, seen = _sites(work)
    lens = head_lens(subject, source, LAYER, HEAD)
    written = write_prompts(subject, source, lens.maps, [{LAYER: rows} for rows in seen.streams])
    return {
        **sites,
        "activations": torch.cat([w.active.dense() for w in written]),
        **_scores(lens, prompts, written),
        **_terms(lens, prompts, written),
        **_virtual(lens, written),
        **_causal(work, source, written, seen),
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


@dataclass
class Seen:
    """What one clean pass saw of each prompt, for what is computed from it."""

    streams: list[Tensor] = field(default_factory=list)
    patterns: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def _sites(work: Workset) -> tuple[dict[Quantity, Tensor], Seen]:
    """What a clean pass reads; the prompts are as long as each other, so they run in one batch, in their order."""
    found: dict[Quantity, list[Tensor]] = {
        "residual stream": [], "normed input": [], "query and key vectors": [], "pattern": [], "head output": []
    }  # fmt: skip
    seen = Seen()

    def reads(index, batch) -> Reads:
        assert list(index) == list(range(len(work)))
        assert not any(batch.padding(row) for row in index)

        def attention(read) -> None:
            found["query and key vectors"] += [read.query.flatten(), read.key.flatten()]
            found["pattern"].append(read.pattern.flatten())
            found["head output"].append(read.output.flatten())
            seen.patterns += list(read.pattern[:, HEAD, -1].clone())
            seen.outputs += list(read.output[:, -1, HEAD].clone())

        def stream(rows: Tensor) -> None:
            found["residual stream"].append(rows.flatten())
            seen.streams += list(rows.clone())

        def normed(rows: Tensor) -> None:
            found["normed input"].append(rows.flatten())

        return Reads({LAYER: stream}, {LAYER: attention}, {}, {(LAYER, "query"): normed, (LAYER, "key"): normed})

    logits = work.logits(reads=reads)
    reading = read_attention(work)
    return {
        **{name: torch.cat(rows) for name, rows in found.items()},
        "logits": logits,
        "margin": _margins(logits, work.prompts),
        "attention difference": reading.difference,
        "direct letter attribution": reading.letter_logit,
    }, seen


def _scores(lens: HeadLens, prompts: Sequence[Prompt], written: Sequence[WrittenPrompt]) -> dict[Quantity, Tensor]:
    scores = [lens.scores(w, p.spans["answer"][0]) for p, w in zip(prompts, written, strict=True)]
    assert all(bool(row.isfinite().all()) for row in scores)
    weighed = [CONTRASTIVE.weigh(lens, p, w).weights for p, w in zip(prompts, written, strict=True)]
    contrasts = [weights @ row for weights, row in zip(weighed, scores, strict=True)]
    return {"score": torch.cat(scores), "contrastive score": torch.stack(contrasts)}


def _terms(lens: HeadLens, prompts: Sequence[Prompt], written: Sequence[WrittenPrompt]) -> dict[Quantity, Tensor]:
    found: dict[Quantity, Tensor] = {}
    rows = (*FEATURES, lens.names.index("bias"))
    for label, weighting in {"realised": REALISED, "contrastive": CONTRASTIVE, "share-weighted": SHARE}.items():
        means = mean_terms(lens, prompts, written, weighting)
        by_query = torch.stack([means.against("key", source) for source in rows])
        by_key = torch.stack([means.against("query", source) for source in rows])
        marginals = [means.marginal(side)[list(rows)] for side in ("query", "key")]
        found |= {
            f"{label} feature pairs": by_query[:-1, list(FEATURES)],
            f"{label} bias terms": torch.cat([by_query[-1], by_key[-1]]),
            f"{label} marginals": torch.cat(marginals),
            f"{label} error share": torch.tensor(means.error_share()),
        }
    return found


def _virtual(lens: HeadLens, written: Sequence[WrittenPrompt]) -> dict[Quantity, Tensor]:
    turn = offset_rotation(lens.subject, LAYER, torch.tensor([4, 9]))
    vectors = lens.source.directions(LAYER)
    activations = torch.cat([w.active.dense() for w in written])
    residual = torch.cat([w.residual for w in written])
    active = activations.abs() > 1e-9
    # As `nulls.population`, which is in float32.
    everyone = Population(
        vectors, active.double().mean(dim=0), active.any(dim=0), (residual - residual.mean(dim=0)).T / len(residual)
    )
    pairs = feature_pairs(everyone, everyone, [(i, k) for i in FEATURES for k in FEATURES])

    tested = feature_pairs(everyone, everyone, list(zip(FEATURES, FEATURES[1:] + FEATURES[:1], strict=True)))

    # Which cell of `matched` a feature is in may stay as it is for a few.
    many = feature_pairs(everyone, everyone, [(i, i + 1) for i in range(30)])

    def z(null) -> Tensor:
        pairs = many if null == "matched" else tested
        tests = null_tests(null, lens.maps, HEAD, turn, everyone, everyone, pairs, n=MIN_PAIRS)
        assert all(test.note is None for test in tests)
        return torch.tensor([test.z for test in tests]).double()

    return {
        "virtual interaction": virtual_interaction(lens.maps, HEAD, turn, pairs.query, pairs.key),
        "z against random_pairs": z("random_pairs"),
        "z against matched": z("matched"),
    }


def _causal(
    work: Workset, source: FeatureSource, written: Sequence[WrittenPrompt], seen: Seen
) -> dict[Quantity, Tensor]:
    clean = _margins(work.logits(), work.prompts)

    def effect(*interventions) -> Tensor:
        return _margins(work.logits(interventions), work.prompts) - clean

    def steered(unit: str) -> Tensor:
        steers = []
        for head, feature in enumerate(STEERED, HEAD):
            largest = max(float(w.active.of(feature).max()) for w in written)
            along = feature_direction(source, feature, {LAYER: largest})
            steers.append(Steer(along, 0.3, unit=unit, layers=(LAYER,), tokens=("correct",)))
            steers.append(Steer(along, 0.3, unit=unit, side="query", heads=((LAYER, head),), tokens=("answer",)))
        return effect(*steers)

    mean = torch.stack(seen.outputs).mean(dim=0)
    # Both orders of an item have as many tokens, so each prompt can take the other's row.
    other = PatternPatch({(LAYER, HEAD): [seen.patterns[i ^ 1] for i in range(len(work))]})
    return {
        "steering in raw units": steered("raw"),
        "steering in activation_max units": steered("activation_max"),
        "steering in resid_norm units": steered("resid_norm"),
        "pattern patching": effect(other),
        "mean ablation": effect(HeadAblation({(LAYER, HEAD): mean})),
        "zero ablation": effect(HeadAblation({(LAYER, HEAD): torch.zeros_like(mean)})),
    }
