"""Every line of the gauge table, measured: the rewritten model says the same, and each quantity keeps or changes."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import jaxtyping
import pytest
import torch
from gauge_readings import FLOAT32, HEAD, log_probabilities, read_all, read_terms
from model_parts import shift_heads
from reparameterise import LAYER, REWRITES, Sparse, key_shift
from transformers import PreTrainedModel

from qklens.analyses import nulls
from qklens.analyses.gauge import GAUGES, QUANTITIES, Gauge, gauges_of
from qklens.analyses.lens import head_lens
from qklens.analyses.readings import read_streams
from qklens.analyses.written import write_prompts
from qklens.data.render import LetterForm, render
from qklens.interventions.engine import Workset
from qklens.models.families import FAMILIES, load_family
from qklens.models.subject import Subject, wrap_model
from tiny_families import CASES, WIDTH, tiny_model
from transformers_oracle import double_norms

FORM = LetterForm("", "")
N_FEATURES = 100
CASE = {family: next(case for case, (name, _) in CASES.items() if name == family) for family in FAMILIES}
LINES = [(gauge, family) for gauge in GAUGES for family in gauge.families or ("llama", "gpt2")]
LINE_IDS = [f"{gauge.name}-{family}" for gauge, family in LINES]
KEPT, KEPT_FLOAT32, CHANGED = 1e-8, 1e-5, 0.01


@pytest.fixture(scope="module")
def exact():
    """transformers' norms and softmax compute in float32 whatever the model's dtype; here they must not."""
    softmax = torch.nn.functional.softmax

    def in_full(x, dim=None, _stacklevel=3, dtype=None):
        return softmax(x, dim=dim, dtype=x.dtype if x.dtype == torch.float64 else dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", in_full)
        yield patch


@pytest.fixture(scope="module", autouse=True)
def _plain_closures():
    """A closure's shapes are checked by building the check each time it is made, a third of this file's time.

    Functions of modules and classes stay checked here, and closures wherever else they run.
    """
    checked = jaxtyping.jaxtyped

    def unless_closure(*, typechecker):
        return lambda made: made if "<locals>" in made.__qualname__ else checked(made, typechecker=typechecker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping, "jaxtyped", unless_closure)
        yield


@pytest.fixture(scope="module")
def prompts(items, word_tokenizer):
    return [render(word_tokenizer, items[0], "harm", order, FORM) for order in ("correct_first", "incorrect_first")]


@pytest.fixture(scope="module")
def make(exact, word_tokenizer):
    @cache
    def drawn(case: str) -> PreTrainedModel:
        model = tiny_model(case, len(word_tokenizer), torch.float64)
        double_norms(exact, model)
        return model

    def tiny(case: str) -> Subject:
        return wrap_model(deepcopy(drawn(case)), word_tokenizer, load_family(CASES[case][0]))

    return tiny


@pytest.fixture(scope="module")
def source() -> Sparse:
    """A random dictionary whose encoder does not read the stream's mean, so that it can be carried along with it."""
    draw = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    encoder = randn(WIDTH, N_FEATURES)
    return Sparse(
        encoder - encoder.mean(dim=0),
        randn(N_FEATURES).abs(),
        randn(N_FEATURES, WIDTH) * 0.1 * (1 + torch.arange(N_FEATURES)[:, None] % 7),
        randn(WIDTH),
    )


@pytest.fixture(scope="module", autouse=True)
def _small_cells():
    """A hundred features then part by frequency and by norm, as the thousands of a real dictionary do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nulls, "_CELL", 8)
        yield


@pytest.fixture(scope="module")
def baseline(make, prompts, source):
    """Every quantity of a family's model as it comes."""

    @cache
    def of(family: str):
        return read_all(make(CASE[family]), source, prompts)

    return of


def rewritten(gauge: Gauge, subject: Subject, source: Sparse) -> Sparse:
    with torch.no_grad():
        return REWRITES[gauge.name](subject, source, torch.Generator().manual_seed(9))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("gauge", "family"), LINES, ids=LINE_IDS)
def test_a_gauge_keeps_and_changes_what_the_table_says(gauge, family, baseline, make, prompts, source):
    before, subject = baseline(family), make(CASE[family])
    after = read_all(subject, rewritten(gauge, subject, source), prompts)
    said, says = (reading["logits"].log_softmax(dim=-1) for reading in (before, after))
    assert float((says - said).abs().max()) <= 1e-10
    assert set(after) == set(QUANTITIES)
    off = {name: distance(after[name], before[name]) for name in QUANTITIES}
    limit = {name: KEPT_FLOAT32 if name in FLOAT32 else KEPT for name in QUANTITIES}
    assert {name: off[name] for name in gauge.keeps if not off[name] <= limit[name]} == {}, "listed as kept"
    assert {name: off[name] for name in gauge.changes if not off[name] > CHANGED} == {}, "listed as changed"


@pytest.mark.parametrize("gauge", [g for g in GAUGES if g.of_dictionary], ids=lambda g: g.name)
def test_a_gauge_of_the_dictionary_writes_the_same_vectors(gauge, make, source):
    stream = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def written(by: Sparse) -> torch.Tensor:
        return by.encode(LAYER, lambda _: stream) @ by.directions(LAYER) + by.bias(LAYER)

    assert distance(written(rewritten(gauge, make("llama gqa"), source)), written(source)) <= 1e-10


def test_every_line_has_its_rewriting_and_known_families():
    assert [gauge.name for gauge in GAUGES] == list(REWRITES)
    for gauge in GAUGES:
        assert set(gauge.families) <= set(FAMILIES)
        assert set(gauge.changes) < set(QUANTITIES)
        assert gauge.changes
        assert set(gauge.keeps) == set(QUANTITIES) - set(gauge.changes)


def test_a_family_has_its_own_gauges_and_an_unknown_one_all():
    assert "stream_mean" not in [g.name for g in gauges_of("llama")]
    assert "projection_scale" in [g.name for g in gauges_of("olmo2")]
    for family in FAMILIES:
        assert {"decoder_scale", "bias_split", "feature_mix"} < {g.name for g in gauges_of(family)}
    assert gauges_of(None) == gauges_of("none of these") == GAUGES


def moved_by(rewrite, subject: Subject, prompts, source: Sparse) -> float:
    """The largest change of a log probability."""
    before = log_probabilities(Workset(subject, prompts))
    with torch.no_grad():
        rewrite(subject, source, torch.Generator().manual_seed(9))
    return float((log_probabilities(Workset(subject, prompts)) - before).abs().max())


@pytest.mark.parametrize(
    ("name", "case"),
    [("unembed_shift", "gemma2"), ("value_shift", "gpt_oss"), ("stream_mean", "llama mha"), ("stream_mean", "olmo2")],
)
def test_where_the_table_does_not_list_a_family_its_model_would_change(name, case, make, prompts, source):
    """A cap on the logits, a sink that takes attention, and a norm that keeps the mean each end a gauge."""
    assert CASES[case][0] not in next(gauge for gauge in GAUGES if gauge.name == name).families
    assert moved_by(REWRITES[name], make(case), prompts, source) > 1e-3


@pytest.mark.parametrize("case", ["llama biases", "gpt_neox", "gpt_oss"])
def test_a_key_bias_that_turns_with_its_position_is_no_gauge(case, make, prompts, source):
    def shift_all(subject, source, draw):
        for layer in range(subject.n_layers):
            subject.projection(layer, "key").module.bias.data[subject.projection(layer, "key").columns()] += 1.0

    assert moved_by(shift_all, make(case), prompts, source) > 1e-3
    assert moved_by(key_shift, make("gpt2"), prompts, source) <= 1e-10


@pytest.mark.parametrize("case", ["llama biases", "qwen3 mha biases"])
def test_a_checkpoint_with_biases_has_the_value_shift_too(case, make, prompts, source):
    assert moved_by(REWRITES["value_shift"], make(case), prompts, source) <= 1e-10


def test_a_key_shift_takes_the_realised_error_share_to_nothing_and_not_the_contrastive_one(make, prompts, source):
    """At identical logits: bias terms of any size, along a direction that the queries' error does not have."""
    subject, prompts = make("gpt2"), prompts[:1]
    lens = head_lens(subject, source, LAYER, HEAD)
    written = write_prompts(subject, source, lens.maps, read_streams(Workset(subject, prompts), [LAYER]))
    sides = [lens.query(w, p.spans["answer"][0]) for p, w in zip(prompts, written, strict=True)]
    bias, error = torch.stack([side.vectors[-2:] for side in sides]).mean(dim=0)
    away = bias - error * (bias @ error) / (error @ error)
    shift = torch.zeros(subject.n_kv_heads, subject.d_head, dtype=torch.float64)
    shift[HEAD] = 1e5 * away

    def shares() -> list[float]:
        found = read_terms(subject, source, prompts)
        return [float(found[f"{kind} error share"]) for kind in ("realised", "contrastive", "share-weighted")]

    before, said = shares(), log_probabilities(Workset(subject, prompts))
    with torch.no_grad():
        shift_heads(subject, LAYER, "key", shift)
    after = shares()
    assert float((log_probabilities(Workset(subject, prompts)) - said).abs().max()) <= 1e-9
    assert before[0] > 0.1
    assert after[0] < before[0] / 100
    assert after[1:] == pytest.approx(before[1:], rel=1e-6)
