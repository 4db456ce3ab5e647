"""What an edit leaves alone, bit for bit, and that nothing of it stays on the model, whatever happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qklens.analyses.readings import read_patterns
from qklens.data.render import LetterForm, render
from qklens.interventions.direction import Direction
from qklens.interventions.engine import Workset
from qklens.interventions.patch import PatternPatch
from qklens.interventions.steer import Steer
from qklens.models.attention import ACTIVE_TAP, AttentionRead
from qklens.models.copies import Reads
from qklens.models.families import load_family
from qklens.models.subject import wrap_model
from tiny_families import tiny_model

LAYER = 2


@pytest.fixture(scope="module", params=["llama gqa", "qwen3", "gpt2", "gemma3", "phi3", "olmo2"])
def work(request, word_tokenizer, items) -> Workset:
    model = tiny_model(request.param, len(word_tokenizer), torch.float32)
    subject = wrap_model(model, word_tokenizer, load_family(model.config.model_type))
    prompts = [
        render(word_tokenizer, i, c, "correct_first", LetterForm("", "")) for i in items[:2] for c in ("harm", "none")
    ]
    return Workset(subject, prompts)


def steer(work: Workset, **options) -> Steer:
    vector = torch.randn(work.subject.d_model, generator=torch.Generator().manual_seed(0))
    layers = range(work.subject.n_layers)
    direction = Direction("d", dict.fromkeys(layers, vector), dict.fromkeys(layers, 2.0), lambda m, s: s(m)[..., 0])
    return Steer(direction, 1.5, **{"side": "query", "heads": ((LAYER, 1),), **options})


def everything(work: Workset, *interventions) -> dict[str, torch.Tensor]:
    """Streams, queries, keys, values and patterns of every layer, and head outputs."""
    kept: dict[str, torch.Tensor] = {}
    layers = range(work.subject.n_layers)

    def attention(read: AttentionRead) -> None:
        for name in ("query", "key", "pattern", "output"):
            kept[f"{name}.{read.layer}"] = getattr(read, name).clone()

    def eager(module, query, key, value, *args, **kwargs):
        kept[f"value.{module.layer_idx}"] = value.clone()
        return original(module, query, key, value, *args, **kwargs)

    family, original = work.subject.family, work.subject.family.eager
    streams = {m: (lambda x, m=m: kept.__setitem__(f"stream.{m}", x.clone())) for m in (*layers, len(layers))}
    object.__setattr__(family, "eager", eager)
    try:
        work.logits(interventions, reads=lambda index, batch: Reads(streams, dict.fromkeys(layers, attention)))
    finally:
        object.__setattr__(family, "eager", original)
    return kept


@pytest.mark.parametrize("tokens", [("answer",), ("question", "answer")])
def test_a_query_edit_leaves_every_stream_key_and_value_before_its_heads_output(work, tokens):
    clean, edited = everything(work), everything(work, steer(work, tokens=tokens))
    others = [h for h in range(work.subject.n_heads) if h != 1]
    for layer in range(LAYER + 1):
        for name in ("stream", "key", "value"):
            assert torch.equal(edited[f"{name}.{layer}"], clean[f"{name}.{layer}"]), (name, layer)
    for name, axis in (("query", 1), ("pattern", 1), ("output", 2)):
        was, now = clean[f"{name}.{LAYER}"], edited[f"{name}.{LAYER}"]
        at = torch.tensor(others)
        if work.subject.family.model_type != "olmo2":  # whose norm takes all heads' queries as one vector
            assert torch.equal(now.index_select(axis, at), was.index_select(axis, at)), name
        assert not torch.equal(now.select(axis, 1), was.select(axis, 1)), name
    if tokens == ("answer",):
        for layer in range(LAYER + 1, work.subject.n_layers):
            for name, axis in (("stream", 1), ("key", 2), ("value", 2)):
                was, now = clean[f"{name}.{layer}"], edited[f"{name}.{layer}"]
                assert torch.equal(now.narrow(axis, 0, now.shape[axis] - 1), was.narrow(axis, 0, was.shape[axis] - 1))


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_key_or_value_edit_leaves_the_other_two_projections(work, side):
    clean, edited = everything(work), everything(work, steer(work, side=side, tokens=("correct",)))
    for layer in range(LAYER + 1):
        for name in {"stream", "query", "key", "value"} - ({side} if layer == LAYER else set()):
            assert torch.equal(edited[f"{name}.{layer}"], clean[f"{name}.{layer}"]), (name, layer)
    was, now = clean[f"{side}.{LAYER}"], edited[f"{side}.{LAYER}"]
    assert not torch.equal(now, was)
    if work.subject.n_kv_heads == 2 and (side == "value" or work.subject.family.model_type != "olmo2"):
        assert torch.equal(now[:, 1], was[:, 1]), "the other group's"


def traces_of_edits(work: Workset) -> list[str]:
    return [
        name
        for name, module in work.subject.model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    ]


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("options", [{}, {"side": "residual", "heads": None, "layers": (1, 3)}, {"side": "key"}])
def test_an_exception_inside_a_sweep_leaves_the_model_clean(work, options, reuse):
    """The direction's activation cannot be read the third time that it is asked for, midway through the points."""
    mine = Workset(work.subject, work.prompts, reuse=reuse)
    clean, asked = mine.logits(), []

    def read(layer, stream):
        asked.append(layer)
        if len(asked) == 3:
            raise BrokenError
        return stream(layer)[..., 0]

    whole = steer(work, tokens=("correct", "answer"), **options)
    broken = replace(whole, mode="ablate", direction=replace(whole.direction, read=read))
    before = traces_of_edits(work)
    with pytest.raises(BrokenError):
        mine.margins_each([whole, broken, broken, broken, broken])
    assert len(asked) == 3
    assert traces_of_edits(work) == before == []
    assert ACTIVE_TAP.get() is None
    for again in (mine, Workset(work.subject, work.prompts, reuse=reuse)):
        assert torch.equal(again.logits(), clean)
    fresh = Workset(work.subject, work.prompts, reuse=reuse)
    assert torch.equal(mine.margins_each([whole]), fresh.margins_each([whole]))


def test_a_patch_that_does_not_fit_leaves_the_model_clean(work):
    """It is refused while the edits are made, between two batches."""
    clean = work.logits()
    rows = read_patterns(work, [(1, 0)])
    short = PatternPatch({(1, 0): rows[1, 0][:2]})
    with pytest.raises(Exception, match=r"row of L1H0 for prompt [23] has 0 entries"):
        work.margins_each([steer(work, tokens=("answer",)), short])
    assert traces_of_edits(work) == []
    assert torch.equal(Workset(work.subject, work.prompts).logits(), clean)
