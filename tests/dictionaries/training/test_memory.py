"""What does not fit into memory is refused before it is allocated, with the bytes of both sides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qklens.dictionaries.training import memory
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.finish import as_crosscoder, as_model_diff
from qklens.dictionaries.training.layout import layout_of
from qklens.dictionaries.training.learner import Learner
from qklens.dictionaries.training.rows import HeldRows
from qklens.dictionaries.training.trainer import Trainer
from qklens.errors import QklensError

KINDS = {"sae": (0,), "crosscoder": (0, 2, 5), "model_diff": (4,)}


def config(kind: str = "sae", activation: str = "topk", **changes: object) -> TrainingConfig:
    number = {"k": 3} if "topk" in activation else {"sparsity": 0.3}
    given = {"kind": kind, "layers": KINDS[kind], "features": 40, "activation": activation, "steps": 5, "batch": 8,
             "learning_rate": 1e-2}  # fmt: skip
    return TrainingConfig.parse({**given, **number, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_what_is_learnt_takes_what_was_reckoned(kind: str, activation: str) -> None:
    """All but the one bias of a row."""
    c = config(kind, activation)
    layout = layout_of(c, 6)
    learner = Learner(c, layout, torch.zeros(layout.width))
    tensors = [t for name, t in learner.weights.tensors().items() if name != "bias"]
    moments = [t for name, m in learner.moments.items() if name != "bias" for t in (m.mean, m.square)]
    assert memory.needed_bytes(c, layout)[0] == sum(t.nbytes for t in (*tensors, *moments))


def test_it_is_refused_from_the_first_byte_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(features=50, batch=99)
    need = 3 * 4 * 50 * (6 + 6 + 1) + 4 * 99 * (50 + 3 * 6)
    monkeypatch.setattr(memory.blocks, "ENTRIES_AT_ONCE", 1)  # or a block would be most of what is needed
    assert sum(memory.needed_bytes(c, layout_of(c, 6))[:2]) == need
    rows = HeldRows([torch.randn(20, 6)])
    monkeypatch.setattr(memory, "available_bytes", lambda _: need)
    Trainer(rows, c)
    monkeypatch.setattr(memory, "available_bytes", lambda _: need - 1)
    with pytest.raises(
        QklensError, match=r"needs at least 34,728 bytes on cpu .* 34,727 are free; give fewer --features"
    ):
        Trainer(rows, c)


def test_the_end_is_refused_from_the_first_byte_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few features and rows, whose training needs little: the dictionary, and four blocks of activations."""
    c = config("crosscoder", features=50)
    dictionary = 4 * 50 * 3 * (6 + 3 * 6 + 1)
    for entries, beside in (((1 << 24), 4 * (64 << 20)), (1, 3 * 4 * 50 * (9 * 6 + 3))):
        monkeypatch.setattr(memory.blocks, "ENTRIES_AT_ONCE", entries)
        assert memory.needed_bytes(c, layout_of(c, 6))[2] == dictionary + beside
    monkeypatch.setattr(memory, "available_bytes", lambda _: dictionary + beside)
    memory.refuse_too_large(c, layout_of(c, 6), 1, torch.device("cpu"))
    monkeypatch.setattr(memory, "available_bytes", lambda _: dictionary + beside - 1)
    with pytest.raises(QklensError, match=r"^measuring and saving .* 50 need at least 49,200 bytes on cpu, 49,199 are"):
        memory.refuse_too_large(c, layout_of(c, 6), 1, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_dictionary_takes_what_was_reckoned(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but its biases of a row and, over two checkpoints, the scale."""
    c = config(kind)
    layout = layout_of(c, 6)
    monkeypatch.setattr(memory.blocks, "ENTRIES_AT_ONCE", 0)
    learnt, _, end = memory.needed_bytes(c, layout)
    learner, scale = Learner(c, layout, torch.zeros(layout.width)), torch.ones(layout.n_streams)
    if kind == "model_diff":
        diff = as_model_diff(learner, scale, name="x", base_sha256="", chat_sha256="")
        made = [diff.encoder, diff.encoder_bias, diff.decoder]
    else:
        one = as_crosscoder(learner, scale, name="x", model_sha256="")
        made = [t for part in (one.encoder, one.encoder_bias, one.decoder) for t in part.values()]
    assert sum(t.nbytes for t in made) == end - max(learnt, 16 * c.features * len(layout.groups))


@pytest.mark.parametrize("changes", [{"features": 10**12}, {"features": 10**30}, {"batch": 10**15}])
def test_no_machine_has_this(changes: dict[str, object]) -> None:
    with pytest.raises(QklensError, match=r"^training needs at least [\d,]+ bytes on cpu .* [\d,]+ are free"):
        Trainer(HeldRows([torch.randn(20, 6)]), config(**changes))


def test_processes_share_a_batch_and_not_the_weights() -> None:
    c = config(batch=8)
    alone, shared = (memory.needed_bytes(c, layout_of(c, 6), world) for world in (1, 4))
    assert (shared[0], 4 * shared[1], shared[2]) == alone


def test_what_is_free_is_the_lesser_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert memory.available_bytes(cpu) == 5000 * 1024
    for name, text in (
        ("max", "4000000\n"),
        ("current", "3000000\n"),
        ("stat", "anon 7\nactive_file 2000\ninactive_file 30\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.available_bytes(cpu) == 1_002_030
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(cpu) == 5000 * 1024
    assert memory.available_bytes(torch.device("meta")) is None
