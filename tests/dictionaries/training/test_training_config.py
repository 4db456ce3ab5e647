"""Configurations of training: what is refused, and the schedules they stand for."""

from __future__ import annotations

import pytest

from qklens.dictionaries.training import schedule
from qklens.dictionaries.training.config import TrainingConfig
from qklens.errors import QklensError

TOPK: dict[str, object] = {
    "kind": "sae", "layers": (1,), "features": 64, "activation": "topk", "k": 4, "steps": 100, "batch": 8,
    "learning_rate": 1e-3,
}  # fmt: skip
NO_K = {name: value for name, value in TOPK.items() if name != "k"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({**TOPK, "learning_rat": 1}, "key 'learning_rat' is unknown; did you mean 'learning_rate'?"),
        ({**TOPK, "sparcity": 1}, "key 'sparcity' is unknown; did you mean 'sparsity'?"),
        (
            {("feetures" if name == "features" else name): value for name, value in TOPK.items()},
            "did you mean 'features'?",
        ),
        ({**TOPK, "zzzzzz": 1}, "key 'zzzzzz' is unknown; expected one of ['kind'"),
        ({name: value for name, value in TOPK.items() if name != "steps"}, "key 'steps' is missing; give it"),
        ({**TOPK, "kind": "autoencoder"}, "key 'kind'"),
        ({**TOPK, "layers": (2, 1)}, "is [2, 1]; expected distinct layers in rising order"),
        ({**TOPK, "layers": ()}, "is []; expected distinct layers"),
        ({**TOPK, "layers": (1, 2)}, "kind 'sae' has one layer, layers are [1, 2]; try kind 'crosscoder'"),
        ({**TOPK, "kind": "model_diff", "layers": (1, 2)}, "kind 'model_diff' has one layer"),
        (NO_K, "activation 'topk' needs 'k'"),
        ({**NO_K, "activation": "relu"}, "activation 'relu' needs 'sparsity'"),
        ({**TOPK, "activation": "relu", "sparsity": 1}, "activation 'relu' takes 'sparsity' alone; leave out 'k'"),
        ({**TOPK, "sparsity": 1}, "activation 'topk' takes no 'sparsity'"),
        ({**TOPK, "k": 65}, "k is 65, features are 64"),
        ({**TOPK, "first_k": 65}, "first_k is 65, features are 64"),
        ({**TOPK, "learning_rate": 0}, "key 'learning_rate'"),
        ({**TOPK, "learning_rate": float("nan")}, "key 'learning_rate'"),
        ({**TOPK, "learning_rate": float("inf")}, "key 'learning_rate'"),
        ({**TOPK, "batch": 2.5}, "key 'batch'"),
        ({**TOPK, "beta1": 1.0}, "key 'beta1'"),
        ({**TOPK, "seed": -1}, "key 'seed'"),
    ],
)
def test_what_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(QklensError) as caught:
        TrainingConfig.parse(given, "here")
    assert str(caught.value).startswith("here: ")
    assert said in str(caught.value)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    c = TrainingConfig.parse({**TOPK, "warmup_steps": 10, "decay": 0.2})
    rates = [schedule.learning_rate(c, step) / c.learning_rate for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == pytest.approx([1.0] * 71)
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    still = TrainingConfig.parse({**TOPK, "decay": 0.0})
    assert {schedule.learning_rate(still, step) for step in range(100)} == {1e-3}


def test_sparsity_rises_and_k_falls() -> None:
    c = TrainingConfig.parse({**TOPK, "first_k": 24, "sparsity_warmup_steps": 50})
    assert [schedule.active(c, step) for step in (0, 25, 50, 99)] == [24, 14, 4, 4]
    assert schedule.sparsity(c, 99) == 0
    jump = TrainingConfig.parse({**NO_K, "activation": "jumprelu", "sparsity": 2.0, "sparsity_warmup_steps": 50})
    assert [schedule.sparsity(jump, step) for step in (0, 25, 50, 99)] == [0, 1, 2, 2]
    assert schedule.active(jump, 99) == 0
