"""What steering refuses, in one line, before the model runs wherever it can be known; and positions as tokens."""

from __future__ import annotations

import pytest
import torch

from qklens.data.render import LetterForm, render
from qklens.errors import QklensError
from qklens.interventions.direction import Direction
from qklens.interventions.engine import Workset
from qklens.interventions.steer import Steer
from qklens.models.batch import left_padded


@pytest.fixture(scope="module")
def prompts(word_tokenizer, items):
    return [
        render(word_tokenizer, item, condition, "correct_first", LetterForm("", ""))
        for item in items[:2]
        for condition in ("harm", "none")
    ]


def direction(width: int = 32, size: float = 1.0, typical: float = 2.0) -> Direction:
    vector = size * torch.randn(width, generator=torch.Generator().manual_seed(0))
    return Direction("d", {1: vector}, {1: typical}, lambda layer, stream: stream(layer)[..., 0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"mode": "adds"},
            r"mode is 'adds'; expected one of \['add', 'scale', 'clamp', 'ablate'\]; did you mean 'add'",
        ),
        ({"unit": "max"}, "unit is 'max'; expected one of"),
        ({"side": "keys"}, "side is 'keys'; expected one of .*did you mean 'key'"),
        ({"norm": "held"}, "norm is 'held'; expected one of"),
        ({"key_scope": "heads"}, "key_scope is 'heads'; expected one of"),
        ({"strength": float("nan")}, "strength is nan; expected a finite number"),
        ({"layers": (1, 1)}, "layer 1 is named twice; name each layer once"),
        ({"layers": (), "side": "query", "heads": ((1, 0), (1, 0))}, r"head \(1, 0\) is named twice"),
        ({"tokens": ()}, "needs tokens; expected span names, positions, or 'all'"),
        ({"tokens": ("all", -1)}, r"tokens \['all', -1\]: 'all' stands alone"),
        ({"layers": (2,)}, r"'d' has no vector at layer 2; it has \[1\]"),
        ({"layers": (), "side": "key", "heads": ()}, "needs layers or heads"),
        ({"side": "key", "key_scope": "head"}, "key_scope 'head' needs side 'key' and a list of heads"),
    ],
)
def test_a_contradiction_is_refused_when_the_value_is_made(options, says):
    steer = Steer(direction(), 1.0, layers=(1,))
    for name, value in options.items():  # the tests' own check of types would be first to speak
        object.__setattr__(steer, name, value)
    with pytest.raises(QklensError, match=says) as caught:
        steer.__post_init__()
    assert "\n" not in str(caught.value)


def test_a_unit_needs_its_typical_activation():
    untold = Direction("d", direction().vectors, {}, lambda layer, stream: stream(layer)[..., 0])
    for mode in ("add", "clamp"):
        with pytest.raises(QklensError, match=r"no typical activation at layer 1.*choose unit 'raw' or 'resid_norm'"):
            Steer(untold, 1.0, mode=mode, layers=(1,))
        Steer(untold, 1.0, mode=mode, unit="raw", layers=(1,))
    Steer(untold, 1.0, mode="ablate", layers=(1,))


@pytest.mark.parametrize(
    ("steer", "says"),
    [
        ({"side": "query", "heads": ((1, 4),)}, "head 4 does not exist in llama; expected 0 to 3"),
        ({"side": "query", "heads": ((1, -1),)}, "head -1 does not exist in llama; expected 0 to 3"),
        ({"layers": (1,), "tokens": ("intent",)}, "span 'intent' is not in this prompt; it has"),
        (
            {"layers": (1,), "tokens": ("answer", 400)},
            r"position 400 is not in a prompt of (\d+) tokens; expected -\1 to",
        ),
        ({"layers": (1,), "tokens": (-400,)}, "position -400 is not in a prompt of"),
        ({"layers": (1,), "strength": 1e38}, r"strength 1e\+38 of 'd' overflows at layer 1 \(mode add, .*float32\)"),
        ({"layers": (1,), "strength": -1e30, "unit": "raw"}, r"strength -1e\+30 of 'd' overflows at layer 1"),
        ({"layers": (1,), "strength": 1e308, "mode": "clamp"}, r"strength 1e\+308 of 'd' overflows"),
    ],
)
@pytest.mark.parametrize("reuse", [True, False])
def test_what_the_model_or_a_prompt_lacks_is_refused_before_it_runs(tiny_llama, prompts, steer, says, reuse):
    subject = tiny_llama()
    given = Steer(direction(), **{"strength": 1.0, **steer})
    with pytest.raises(QklensError, match=says):
        given.check(subject, prompts)
    work = Workset(subject, prompts, reuse=reuse)
    with pytest.raises(QklensError, match=says):
        work.margins_each([given])
    assert work.ran.columns == 0


def test_a_direction_of_another_model_is_refused(tiny_llama, prompts):
    with pytest.raises(QklensError, match="'d' has 48 dimensions, the residual stream of llama has 32"):
        Steer(direction(48), 1.0, layers=(1,)).check(tiny_llama(), prompts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_is_held_against_the_model_s_own_dtype(tiny_llama, prompts, dtype):
    """Half precision ends at 65504, bfloat16 does not."""
    steer = Steer(direction(), 1e5, unit="raw", layers=(1,))
    subject = tiny_llama(dtype=dtype)
    if dtype == torch.bfloat16:
        steer.check(subject, prompts)
        return
    with pytest.raises(QklensError, match=r"strength 100000 of 'd' overflows at layer 1 \(.*float16\)"):
        steer.check(subject, prompts)


@pytest.mark.parametrize("options", [{"unit": "resid_norm"}, {"mode": "scale"}])
def test_a_step_that_only_the_stream_tells_is_refused_in_the_pass(tiny_llama, prompts, options):
    steer = Steer(direction(), 1e30, layers=(1,), **options)
    work = Workset(tiny_llama(), prompts)
    clean = work.margins()
    with pytest.raises(QklensError, match=r"strength 1e\+30 of 'd' overflows at layer 1"):
        work.margins([steer])
    assert torch.equal(work.margins(), clean)


def test_positions_count_from_either_end_beside_span_names(tiny_llama, prompts):
    subject = tiny_llama()
    batch = left_padded([p.tokens for p in prompts], subject.pad_id, subject.device)
    steer = Steer(direction(), 1.0, layers=(1,), tokens=(0, -2, "correct", 5, "answer"))
    (edit,) = steer.edits(subject, prompts, batch, range(len(prompts)))
    for row, prompt in enumerate(prompts):
        n = len(prompt.tokens)
        wanted = {0, n - 2, 5, n - 1, *prompt.span("correct")}
        assert {int(c) - batch.padding(row) for c in edit.mask[row].nonzero()} == wanted
    assert steer.describe()["tokens"] == [0, -2, "correct", 5, "answer"]
    by_name = Steer(direction(), 1.0, layers=(1,), tokens=("answer",))
    work = Workset(subject, prompts)
    assert torch.equal(work.margins([Steer(direction(), 1.0, layers=(1,), tokens=(-1,))]), work.margins([by_name]))
