"""Pairs that pull a head: every number against dense tables of all pairs, chosen on one half and measured on the other.

The source has few features and random weights, so that the whole table of pairs can be held.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from statsmodels.stats.multitest import multipletests

from pair_terms import pair_terms
from qklens.analyses.nulls import feature_pairs, null_tests
from qklens.analyses.weighting import CONTRASTIVE, REALISED, Weighting, weighting_named
from qklens.data.items import Dataset
from qklens.data.render import LetterForm
from qklens.errors import QklensError
from qklens.models.batch import left_padded
from qklens.models.scores import score_maps
from qklens.models.trace import trace
from qklens.studies.lab import Lab
from qklens.studies.populations import populations
from qklens.studies.tables.pair_table import PairReading, PairRequest, PairTable, pair_table
from sparse_source import SparseSource, sparse_source

HEADS, TOP, DRAWS, N = ((1, 0), (2, 3)), 3, 30, 60
READINGS = ("none", "harm", "harm-none", "harm-benign")
NAMED = {"need_answer": "f1", "correct_answer": "f2", "harm_detection": "f3", "refuse_redirect": "f4"}


class EarlyAndLate(SparseSource):
    """The last ten features do not write layer 1."""

    def writes(self, layer: int) -> torch.Tensor:
        return (torch.arange(N) < (N if layer > 1 else N - 10)).float()

    def directions(self, layer: int) -> torch.Tensor:
        return super().directions(layer) * self.writes(layer)[:, None]

    def encode(self, layer, stream) -> torch.Tensor:
        return super().encode(layer, stream) * self.writes(layer)


def lab_of(subject, items, *, threshold: float = 1.0) -> Lab:
    lab = Lab(subject, Dataset("few", tuple(items), "0"), LetterForm("", ""), 0)
    lab.source = EarlyAndLate(**vars(sparse_source(subject.d_model, N, (1, 2), threshold=threshold)))
    return lab


def table_of(lab: Lab, named: dict[str, str] | None = None, **request) -> PairTable:
    options = {"heads": HEADS, "readings": READINGS, "top": TOP, "draws": DRAWS}
    return pair_table(lab, PairRequest(**{**options, **request}), named or {}, tick=lambda _: lambda: None)


def dense(lab: Lab, head, reading, half, weighting=REALISED) -> torch.Tensor:
    """The mean term of every pair of sources, prompt by prompt."""
    lens, means = lab.lens(*head), []
    for condition in reading.split("-"):
        tables = []
        written = lab.written(condition, half, head[0])
        for prompt, parts in zip(lab.prompts(condition, half), written, strict=True):
            weights = weighting.weigh(lens, prompt, parts).weights
            tables.append(pair_terms(lens, parts, prompt.spans["answer"][0], weights).double())
        means.append(torch.stack(tables).mean(dim=0))
    return means[0] - means[1] if len(means) == 2 else means[0]


def reading_of(table: PairTable, head, reading) -> PairReading:
    return next(r for r in table.readings if (r.layer, r.head) == head and r.reading == reading)


@pytest.fixture(scope="module")
def lab(tiny_llama, items) -> Lab:
    return lab_of(tiny_llama(), items[:8])


@pytest.fixture(scope="module")
def table(lab) -> PairTable:
    return table_of(lab, nulls=("random_pairs", "matched", "fixed_query", "fixed_key"))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reading", READINGS)
def test_pairs_are_ranked_on_one_half_and_measured_on_the_other(lab, table, head, reading):
    names = lab.lens(*head).names
    chosen, measured = (dense(lab, head, reading, half) for half in ("discovery", "report"))
    order = chosen.flatten().argsort()
    ends = [*order[:TOP].tolist(), *order.flip(0)[:TOP].tolist()]
    expected = [(names[i // len(names)], names[i % len(names)]) for i in ends]
    found = reading_of(table, head, reading)
    inner = chosen[:N, :N]
    order = inner.flatten().argsort()
    features = [*order[:TOP].tolist(), *order.flip(0)[:TOP].tolist()]
    expected = list(dict.fromkeys([*expected, *((names[i // N], names[i % N]) for i in features)]))
    assert [(p.query, p.key) for p in found.pairs[: len(expected)]] == expected
    for pair in found.pairs:
        q, k = names.index(pair.query), names.index(pair.key)
        assert pair.value == pytest.approx(float(measured[q, k]), abs=1e-5)
        assert pair.value_when_chosen == pytest.approx(float(chosen[q, k]), abs=1e-5)
        assert pair.ci[0] <= pair.value <= pair.ci[1]
    assert any(abs(p.value - p.value_when_chosen) > 1e-3 for p in found.pairs)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reading", READINGS)
def test_sums_are_exact(lab, table, head, reading):
    names, measured = lab.lens(*head).names, dense(lab, head, reading, "report")
    found = reading_of(table, head, reading)
    assert found.score == pytest.approx(float(measured.sum()), abs=1e-4)
    assert sum(found.by_kind.values()) == pytest.approx(found.score, abs=1e-9)
    assert sum(found.absolute_by_kind.values()) == pytest.approx(1)
    kinds = {"feature": slice(0, N), "bias": slice(N, N + 1), "error": slice(N + 1, N + 2)}
    for name, value in found.by_kind.items():
        rows, columns = (kinds[kind] for kind in name.split(" x "))
        assert value == pytest.approx(float(measured[rows, columns].sum()), abs=1e-4)
        share = float(measured[rows, columns].abs().sum() / measured.abs().sum())
        assert found.absolute_by_kind[name] == pytest.approx(share, abs=1e-5)
    inner = float(measured[: N + 1, : N + 1].abs().sum() / measured.abs().sum())
    assert found.error_share == pytest.approx(1 - inner, abs=1e-5)
    for side, axis in (("query", 1), ("key", 0)):
        sums = measured.sum(dim=axis)
        marginals = {m.source: m.value for m in found.marginals[side]}
        assert {"bias", "error"} <= set(marginals)
        assert {names[int(sums.argmin())], names[int(sums.argmax())]} <= set(marginals)
        for source, value in marginals.items():
            assert value == pytest.approx(float(sums[names.index(source)]), abs=1e-4)


@pytest.mark.parametrize("weighting", [REALISED, CONTRASTIVE, Weighting("share")], ids=lambda w: w.kind)
def test_logsumexps_are_the_patterns_own_and_change_with_the_condition(lab, weighting):
    """From the model's own patterns and scores, which the table does not read."""
    layer, head = HEADS[0]

    def by_prompt(condition: str) -> list[float]:
        found = []
        for prompt in lab.prompts(condition, "report"):
            batch = left_padded([prompt.tokens], lab.subject.pad_id, lab.subject.device)
            got = trace(lab.subject, batch, [layer])
            pattern = got.pattern(layer, head, -1)[0]
            correct, incorrect = (pattern[list(prompt.span(name))].sum().log() for name in ("correct", "incorrect"))
            scores = torch.cat([got.score(layer, head, -1, token) for token in prompt.span("correct")])
            of_kind = {
                "realised": scores.logsumexp(0),
                "contrastive": correct - incorrect,
                "share": correct,
            }
            found.append(float(of_kind[weighting.kind]))
        return found

    table = table_of(lab, heads=HEADS[:1], weighting=weighting)
    none, harm = (np.array(by_prompt(condition)) for condition in ("none", "harm"))
    for reading, wanted in (("none", none), ("harm", harm), ("harm-none", harm - none)):
        found = reading_of(table, HEADS[0], reading)
        assert found.logsumexp == pytest.approx(float(wanted.mean()), abs=1e-4)
        assert found.logsumexp_ci[0] <= found.logsumexp <= found.logsumexp_ci[1]
        assert found.hidden == 0


def test_a_difference_is_one_condition_less_the_other(lab):
    """Pairs of roles stand in every reading."""
    table = table_of(lab, NAMED, readings=("none", "harm", "harm-none"), nulls=("random_pairs",))
    for head in HEADS:
        none, harm, difference = (
            {(p.query, p.key): p for p in reading_of(table, head, reading).pairs if p.query_role and p.key_role}
            for reading in ("none", "harm", "harm-none")
        )
        assert set(none) == set(harm) == set(difference) == {(q, k) for q in ("f1", "f4") for k in ("f2", "f3")}
        for pair, found in difference.items():
            assert found.value == pytest.approx(harm[pair].value - none[pair].value, abs=1e-9)
        scores = [reading_of(table, head, r).score for r in ("none", "harm", "harm-none")]
        assert scores[2] == pytest.approx(scores[1] - scores[0], abs=1e-5)


def test_q_of_a_role_s_pair_is_over_such_pairs_and_of_another_over_all_that_were_searched(lab, table):
    """A pair that several readings list is one test a null; listed pairs are the extremes of a search."""
    p_of, q_of, roles = {}, {}, set()
    for reading in table.readings:
        for pair in reading.pairs:
            for test in pair.tests:
                key = (reading.layer, reading.head, pair.query, pair.key, test.null)
                assert p_of.setdefault(key, test.p) == test.p
                assert q_of.setdefault(key, test.q) == test.q
                roles |= {key} if pair.query_role and pair.key_role else set()
    listed = sum(len(pair.tests) for reading in table.readings for pair in reading.pairs)
    assert listed > len(p_of), "some pair is listed twice"
    searched = 0
    for head in HEADS:
        for reading in READINGS:
            there = [dense(lab, head, c, "discovery")[:N, :N] != 0 for c in reading.split("-")]
            sides = [torch.stack([t.any(dim=axis) for t in there]).any(dim=0).sum() for axis in (0, 1)]
            searched += 4 * int(sides[0] * sides[1])
    for family in (roles, set(p_of) - roles):
        keys = [key for key in p_of if key in family]
        padded = [p_of[key] for key in keys] + [1.0] * (searched - len(keys) if family is not roles else 0)
        expected = multipletests(padded, method="fdr_bh")[1][: len(keys)]
        assert [q_of[key] for key in keys] == pytest.approx(expected.tolist())
    assert len(roles) >= 4


def test_a_recorded_seed_gives_the_test_again(lab, table):
    checked = set()
    for reading in table.readings:
        head = (reading.layer, reading.head)
        queries, keys = populations(lab, reading.layer)
        for pair in reading.pairs:
            if "bias" in (pair.query, pair.key) or "error" in (pair.query, pair.key):
                assert (pair.virtual, pair.tests) == (None, [])
                continue
            index = [tuple(lab.source.labels.index(name) for name in (pair.query, pair.key))]
            for test in pair.tests:
                maps, turn = score_maps(lab.subject, head[0]), lab.mean_turn(head[0])
                pairs = feature_pairs(queries, keys, index)
                again = null_tests(
                    test.null, maps, head[1], turn, queries, keys, pairs, n=test.n_draws, seed=test.seed
                )[0]
                assert (test.z, test.p) == (pytest.approx(again.z, abs=1e-4), again.p)
                assert pair.virtual == pytest.approx(again.value, abs=1e-6)
                checked.add((head, test.null, test.seed))
    assert len({seed for *_, seed in checked}) == len(checked) == len(HEADS) * 4


def test_calling_the_other_option_correct_turns_the_sign(tiny_llama, items):
    swapped = [i.model_copy(update={"correct": i.incorrect, "incorrect": i.correct}) for i in items[:6]]
    tables = [
        table_of(lab_of(tiny_llama(), some), NAMED, weighting=CONTRASTIVE, readings=("none",), nulls=("random_pairs",))
        for some in (items[:6], swapped)
    ]
    for head in HEADS:
        first, second = (reading_of(table, head, "none") for table in tables)
        values = {(p.query, p.key): p.value for p in first.pairs}
        turned = {(p.query, p.key): -p.value for p in second.pairs}
        assert len(values) > 2 * TOP
        assert turned == pytest.approx(values, abs=1e-5)
        assert second.score == pytest.approx(-first.score, abs=1e-5)
        assert max(map(abs, values.values())) > 1e-3


def test_roles_are_taken_as_a_person_names_them(lab):
    table = table_of(lab, {"refuse_redirect": "f3"}, readings=("harm",), nulls=("random_pairs",))
    chosen = {c.role: c for c in table.roles if c.chosen}
    assert chosen["refuse_redirect"].feature == "f3"
    assert [c.named for c in chosen.values()].count(True) == 1
    assert sum(p.query == "f3" and p.query_role == "refuse_redirect" for p in table.readings[0].pairs) >= 2


def test_a_role_s_pair_is_not_listed_where_its_feature_writes_nothing(lab):
    """f55 writes layer 2 alone: at layer 1 its direction is zero and no null could be drawn for it."""
    table = table_of(
        lab, {**NAMED, "refuse_redirect": "f55"}, heads=((2, 3), (1, 0)), readings=("harm",), nulls=("fixed_query",)
    )
    roles = {(r.layer, p.query_role) for r in table.readings for p in r.pairs if p.query_role and p.key_role}
    assert roles == {(2, "need_answer"), (2, "refuse_redirect"), (1, "need_answer")}
    assert all(p.query != "f55" for p in reading_of(table, (1, 0), "harm").pairs)


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"refuse": "f1"}, "role 'refuse' is unknown; expected one of"),
        ({"need_answer": "g1"}, "feature 'g1' is not in dictionary 'sparse'"),
        ({"need_answer": "f55"}, "role need_answer: feature 'f55' writes nothing to resid_pre.1"),
    ],
)
def test_a_role_that_cannot_be_is_refused(lab, named, says):
    with pytest.raises(QklensError, match=says):
        table_of(lab, named)


@pytest.mark.parametrize(
    ("heads", "says"),
    [
        (((0, 1),), "does not write resid_pre.0"),
        (((1, 9),), "head 9 does not exist"),
        (((1, 0), (7, 0)), "layer 7 does not exist"),
    ],
)
def test_a_head_that_cannot_be_read_is_refused(lab, heads, says):
    with pytest.raises(QklensError, match=says):
        table_of(lab, heads=heads)


def test_silence_is_refused(tiny_llama, items):
    silent = lab_of(tiny_llama(), items[:4], threshold=1e9)
    with pytest.raises(QklensError, match="no feature of dictionary 'sparse' is active at the answer position"):
        table_of(silent, readings=("none",))


def test_a_span_that_is_not_there_is_refused(lab):
    with pytest.raises(QklensError, match="span 'corect' is not in this prompt; it has"):
        table_of(lab, weighting=weighting_named("realised", "corect", ["letter", "content", "boundary"]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"readings": ["nine"]}, "--reading 'nine': expected some of .* did you mean 'none'"),
        ({"readings": []}, "--reading '': expected some of"),
        ({"nulls": ["random"]}, "--nulls 'random': expected some of"),
        ({"top": 0}, "--top 0: expected at least 1"),
        ({"draws": 29}, "--draws 29: a null needs at least 30 pairs"),
        (
            {
                "weighting": weighting_named("share", "intent", ["letter", "content", "boundary"]),
                "readings": ["harm-none"],
            },
            "span 'intent' is not in the bare question",
        ),
    ],
)
def test_a_request_that_cannot_be_met(options, says):
    with pytest.raises(QklensError, match=says):
        PairRequest.parse(**{"readings": ["none"], "nulls": ["all"], **options})


def test_four_items_are_enough_and_the_table_is_json(tiny_llama, items):
    table = table_of(lab_of(tiny_llama(), items[:4]), readings=("none",), nulls=("random_pairs",))
    text = json.dumps(table.model_dump(mode="json"), allow_nan=False)
    assert PairTable.model_validate_json(text) == table
    assert table.data["n_items"] == 4
