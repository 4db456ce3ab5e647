"""Cards of a source on a tiny model: every number is what the stream, read plainly, says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qklens.analyses.card_values import Passages, ScaleMean, read_values
from qklens.analyses.feature_cards import feature_cards
from qklens.analyses.passages import PLACES, prompt_passage
from qklens.data.items import Item
from qklens.data.render import LETTER_FORMS, ORDERS, render
from qklens.errors import QklensError
from qklens.models.sites import capture
from qklens.models.subject import Subject
from sparse_source import sparse_source

LAYER, FEATURES = 1, (3, 11, 20)


@pytest.fixture(scope="module")
def subject(tiny_llama: Callable[..., Subject]) -> Subject:
    return tiny_llama()


def test_a_card_says_what_the_stream_says(
    subject: Subject, items: tuple[Item, ...], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = sparse_source(subject.d_model, 40, (LAYER,), threshold=0.8)
    prompts = {
        condition: [
            (render(word_tokenizer, item, condition, order, LETTER_FORMS[0]), item.id, order)
            for item in items[:5]
            for order in ORDERS
        ]
        for condition in ("none", "harm")
    }
    passages = {c: [prompt_passage(p, c, name, order) for p, name, order in rows] for c, rows in prompts.items()}
    assert passages["harm"][0].texts == tuple(
        prompts["harm"][0][0].text[a:b]
        for a, b in zip(
            prompts["harm"][0][0].starts,
            (*prompts["harm"][0][0].starts[1:], len(prompts["harm"][0][0].text)),
            strict=True,
        )
    )
    scale, chosen = ScaleMean(), torch.tensor(FEATURES)
    groups = [
        Passages(c, some, lambda some=some: read_values(subject, source, LAYER, chosen, some, scale))
        for c, some in passages.items()
    ]
    cards = feature_cards(subject, source, LAYER, FEATURES, groups, scale, k=4, roles={"f11": ["harm_detection"]})
    assert [c.roles for c in cards] == [[], ["harm_detection"], []]
    scales = []
    for condition, some in passages.items():
        plain = []
        for passage in some:
            kept = capture(subject, subject.batch([passage.tokens]), [f"resid_pre.{LAYER}", "resid_post.2"])
            plain.append(source.encode(LAYER, lambda _, kept=kept: kept[f"resid_pre.{LAYER}"][0]))
            scales.append(subject.final_norm(torch.float32).scale(kept["resid_post.2"][0, 1:]))
        for card, feature in zip(cards, FEATURES, strict=True):
            values = torch.cat([v[1:, feature] for v in plain])
            (density,) = [d for d in card.density if d.group == condition]
            assert (density.tokens, density.active) == (len(values), int((values != 0).sum()))
            assert density.largest == pytest.approx(max(float(values.max()), 0.0), abs=1e-5)
            shown = [e for e in card.prompts if e.group == condition]
            assert len({e.item for e in shown}) == len(shown)
            if float(values.max()) > 0:
                assert shown[0].activation == pytest.approx(float(values.max()), abs=1e-5)
            for e in shown:
                assert e.tokens[e.at].activation == e.activation
                assert e.place is None or e.place in PLACES
            for row in (p for p in card.places if p.condition == condition):
                at = [
                    plain[i][j, feature]
                    for i, passage in enumerate(some)
                    for j, place in enumerate(passage.places)
                    if place == row.place and j > 0
                ]
                assert row.tokens == len(at)
                assert row.mean == pytest.approx(float(torch.stack(at).mean()), abs=1e-5)
    assert cards[0].logit_scale == pytest.approx(float(torch.cat(scales).mean()), rel=1e-5)


def test_features_that_write_nothing_and_layers_that_are_not_written_are_refused(subject: Subject) -> None:
    source = sparse_source(subject.d_model, 40, (LAYER,))
    source.decoder[4] = 0
    with pytest.raises(QklensError, match=r"'f4' writes nothing to resid_pre\.1"):
        feature_cards(subject, source, LAYER, [4], [], ScaleMean())
    with pytest.raises(QklensError, match=r"does not write resid_pre\.2"):
        feature_cards(subject, source, 2, [1], [], ScaleMean())
    with pytest.raises(QklensError, match="at least one passage"):
        feature_cards(subject, source, LAYER, [1], [], ScaleMean())
