"""Partners of a feature: the organism's dictionary and contrast directions against virtual_interaction and a sort."""

from __future__ import annotations

import json

import pytest
import torch

from qklens.dictionaries.crosscoder import load_crosscoder
from qklens.errors import QklensError
from qklens.models.scores import rotation, score_maps, virtual_interaction
from qklens.studies.choices import belief_candidates
from qklens.studies.config import LabConfig
from qklens.studies.lab import Lab
from qklens.studies.opening import open_lab
from qklens.studies.resources import organism_folder
from qklens.studies.roles import find_roles
from qklens.studies.tables import partner_table as partner_module
from qklens.studies.tables.partner_table import PartnerRequest, PartnerTable, partner_table

CONFIG = LabConfig(items=4)
DIRECTIONS = LabConfig(items=4, dictionary="directions")
FEATURE = "L2/271"


@pytest.fixture(scope="module")
def lab() -> Lab:
    lab = open_lab(CONFIG)
    lab.source = load_crosscoder(organism_folder() / "dictionary", "cpu")
    return lab


@pytest.fixture(autouse=True)
def _opened_once(lab, monkeypatch):
    """The organism is read once for all tables through its dictionary."""
    opened = {CONFIG.dictionary: lambda _: lab}
    monkeypatch.setattr(partner_module, "open_lab", lambda config: opened.get(config.dictionary, open_lab)(config))


def mean_rotation(lab: Lab, layer: int, offset: int | None):
    """Over the distances from answer to correct option, counted from the prompts; or one distance."""
    distances = [
        len(prompt.tokens) - 1 - j
        for condition in ("none", "harm")
        for prompt in lab.prompts(condition, "report")
        for j in prompt.spans["correct"]
    ]
    turn = rotation(lab.subject, layer, torch.tensor(distances if offset is None else [offset]))
    return type(turn)(turn.cos.mean(dim=0), turn.sin.mean(dim=0))


def brute(lab: Lab, source, feature: str, side: str, heads, offset: int | None) -> torch.Tensor:
    """`head feature`, NaN where a feature does not write the head's layer."""
    index, columns = source.labels.index(feature), []
    for layer, head in heads:
        directions, maps = source.directions(layer), score_maps(lab.subject, layer)
        held = directions[index][None].expand_as(directions)
        pair = (held, directions) if side == "query" else (directions, held)
        values = virtual_interaction(maps, head, mean_rotation(lab, layer, offset), *pair)
        columns.append(values.masked_fill(~directions.any(dim=-1), float("nan")))
    return torch.stack(columns)


def check(table: PartnerTable, source, values: torch.Tensor, heads, top: int) -> None:
    assert [c.head for c in table.columns] == [*(f"L{layer}H{head}" for layer, head in heads), "mean"]
    mean = values.nan_to_num().mean(dim=0).masked_fill(values.isnan().all(dim=0), float("nan"))
    for column, expected in zip(table.columns, [*values, mean], strict=True):
        there = expected[~expected.isnan()]
        assert column.n == len(there)
        assert column.mean == pytest.approx(float(there.mean()), abs=1e-6)
        assert column.sd == pytest.approx(float(there.std()), rel=1e-4)
        by_label = dict(zip(source.labels, expected.tolist(), strict=True))
        for rows, ordered in ((column.lowest, there.sort()[0]), (column.highest, there.sort(descending=True)[0])):
            assert [r.value for r in rows] == pytest.approx(ordered[:top].tolist(), abs=1e-6)
            for r in rows:
                assert r.value == pytest.approx(by_label[r.feature], abs=1e-6)
                assert r.z == pytest.approx((r.value - column.mean) / column.sd, abs=1e-4)
    json.dumps(table.model_dump(mode="json"), allow_nan=False)


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("offset", [None, 7])
def test_named_heads_are_ranked_as_brute_force_does(lab, side, offset):
    """Named from different layers and out of order; columns come by layer."""
    heads = ((3, 1), (2, 6), (2, 4))
    table = partner_table(CONFIG, PartnerRequest(FEATURE, side, heads, top=9, offset=offset))
    by_layer = [(2, 6), (2, 4), (3, 1)]
    check(table, lab.source, brute(lab, lab.source, FEATURE, side, by_layer, offset), by_layer, 9)
    assert (table.feature, table.side, table.n_features) == (FEATURE, side, 1152)
    assert table.offsets == ("answer to correct option, as in the data" if offset is None else "7")


def test_all_heads_are_those_of_the_layers_that_the_feature_writes(lab):
    for feature, layers in ((FEATURE, (2, 3)), ("L3/5", (3,))):
        heads = [(layer, head) for layer in layers for head in range(lab.subject.n_heads)]
        table = partner_table(CONFIG, PartnerRequest(feature, every=True, top=5))
        check(table, lab.source, brute(lab, lab.source, feature, "query", heads, None), heads, 5)


def test_directions_are_ranked_from_memory(lab):
    source = lab.fit_directions()
    heads = [(1, 2), (2, 4)]
    for side in ("query", "key"):
        request = PartnerRequest("harm_detection", side, tuple(heads), top=50)
        table = partner_table(DIRECTIONS, request)
        check(table, source, brute(lab, source, "harm_detection", side, heads, None), heads, 50)
        assert {r.feature for r in table.columns[-1].lowest} == set(source.labels), "the feature itself included"


def test_a_role_is_the_feature_that_the_study_finds(lab):
    heads = ((2, 4),)
    belief = lab.source.labels[belief_candidates(lab)[0].feature]
    chosen = find_roles(lab, heads, belief)[0].chosen
    table = partner_table(CONFIG, PartnerRequest("harm_detection", heads=heads, top=1))
    assert table.feature == lab.source.labels[chosen["harm_detection"]]


def test_a_role_s_feature_may_be_named():
    """In memory and from disk; it is taken as it is."""
    for config, feature in ((CONFIG, "L2/9"), (DIRECTIONS, "correct_answer")):
        named = config.model_copy(update={"roles": {"need_answer": feature}})
        assert partner_table(named, PartnerRequest("need_answer", heads=((2, 4),), top=1)).feature == feature


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (PartnerRequest("L2/9999"), "feature 'L2/9999' is not in dictionary"),
        (PartnerRequest("refuse"), "feature 'refuse' is not in dictionary"),
        (PartnerRequest(FEATURE, heads=((2, 8),)), "head 8 does not exist"),
        (PartnerRequest(FEATURE, heads=((2, 4), (9, 0))), "layer 9 does not exist"),
        (PartnerRequest(FEATURE, heads=((0, 0),)), "does not write resid_pre.0, the input of head L0H0; it writes"),
        (PartnerRequest("L3/5", heads=((3, 0), (2, 4))), "feature 'L3/5' does not write resid_pre.2, the input of"),
    ],
)
def test_what_cannot_be_ranked_is_refused(asked, says):
    heads = asked.heads or ((2, 4),)
    with pytest.raises(QklensError, match=says):
        partner_table(CONFIG, PartnerRequest(asked.feature, heads=heads))


def test_a_direction_that_writes_nothing_is_refused(monkeypatch):
    """A direction of zeros at every layer."""
    fit = Lab.fit_directions

    def zeroed(lab, *, whitened):
        found = fit(lab, whitened=whitened)
        for vectors in found.vectors.values():
            vectors[found.labels.index("need_answer")] = 0
        return found

    monkeypatch.setattr(Lab, "fit_directions", zeroed)
    with pytest.raises(QklensError, match="feature 'need_answer' writes no layer; choose another"):
        partner_table(DIRECTIONS, PartnerRequest("need_answer", every=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"side": "both"}, "--side 'both': expected 'query' or 'key'"),
        ({"top": 0}, "--top 0: expected at least 1"),
        ({"offset": -1}, "--offset -1: a query sees keys at or before it"),
    ],
)
def test_a_askedthat_cannot_be_met(options, says):
    with pytest.raises(QklensError, match=says):
        PartnerRequest.parse(**{"feature": FEATURE, "side": "query", **options})


@pytest.mark.parametrize("roles", [{"refuse_redirect": "L2/1"}, {"refuse": "L2/1"}])
def test_a_role_that_is_not_asked_for_is_refused_before_anything_is_loaded(roles):
    config = LabConfig(model="/gone", dictionary="/gone", roles=roles)
    for feature in (FEATURE, "need_answer"):
        with pytest.raises(QklensError, match=f"--role {next(iter(roles))}: expected the role that --feature asks for"):
            partner_table(config, PartnerRequest(feature))
