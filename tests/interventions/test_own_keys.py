"""Keys that only the named query heads see: as if their group had them, and nothing for the group's other heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qklens.data.render import LetterForm, render
from qklens.interventions.direction import Direction
from qklens.interventions.engine import Workset
from qklens.interventions.steer import Steer
from qklens.models.attention import AttentionRead
from qklens.models.copies import Reads
from qklens.models.families import load_family
from qklens.models.subject import wrap_model
from tiny_families import tiny_model

MODES = (
    {},
    {"unit": "resid_norm"},
    {"mode": "scale", "strength": -3.0},
    {"mode": "clamp", "unit": "raw"},
    {"mode": "ablate"},
    {"mode": "ablate", "norm": "frozen"},
)
HEAD = (2, 1)


@pytest.fixture(
    scope="module", params=["llama gqa", "qwen3", "olmo2", "olmo2 mha", "gemma2 low cap", "gpt2", "gpt_oss", "smollm3"]
)
def work(request, word_tokenizer, items) -> Workset:
    model = tiny_model(request.param, len(word_tokenizer), torch.float32)
    subject = wrap_model(model, word_tokenizer, load_family(model.config.model_type))
    prompts = [render(word_tokenizer, item, "harm", "correct_first", LetterForm("", "")) for item in items[:2]]
    return Workset(subject, prompts)


def direction(work: Workset) -> Direction:
    """Its activation at a layer is read off that layer and the one below."""
    d, layers = work.subject.d_model, range(work.subject.n_layers)
    vector = torch.randn(d, generator=torch.Generator().manual_seed(0))
    return Direction(
        "d",
        dict.fromkeys(layers, vector),
        dict.fromkeys(layers, 2.0),
        lambda layer, stream: 0.3 * stream(layer)[..., 5] - 0.2 * stream(layer - 1)[..., 6],
        lambda layer: (layer - 1, layer),
    )


def patterns(work: Workset, *interventions) -> torch.Tensor:
    kept: list[AttentionRead] = []
    work.logits(interventions, reads=lambda index, batch: Reads({}, {HEAD[0]: kept.append}))
    return kept[0].pattern


@pytest.mark.parametrize("options", MODES, ids=str)
def test_the_named_head_sees_what_its_group_would_and_the_others_nothing(work, options):
    given = {"strength": 1.5, "side": "key", "heads": (HEAD,), "tokens": ("question", "correct", -3), **options}
    own = Steer(direction(work), key_scope="head", **given)
    clean, alone = patterns(work), patterns(work, own)
    group = patterns(work, replace(own, key_scope="group"))
    torch.testing.assert_close(alone[:, 1], group[:, 1], rtol=0, atol=2e-5)
    assert (alone[:, 1] - clean[:, 1]).abs().max() > 1e-3
    others = [0, 2, 3]
    assert torch.equal(alone[:, others], clean[:, others])
    assert torch.allclose(
        work.margins([own]), Workset(work.subject, work.prompts, reuse=False).margins([own]), atol=1e-4
    )


def test_heads_of_two_groups_each_have_their_own(work):
    heads = ((2, 1), (2, 2))
    own = Steer(direction(work), 1.5, side="key", heads=heads, tokens=("question",), key_scope="head")
    both, group = patterns(work, own), patterns(work, replace(own, key_scope="group"))
    torch.testing.assert_close(both[:, 1:3], group[:, 1:3], rtol=0, atol=2e-5)
    assert torch.equal(both[:, [0, 3]], patterns(work)[:, [0, 3]])
