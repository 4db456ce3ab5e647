"""Which process takes which GPU under torchrun, told by the environment alone; no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest

from qklens.dictionaries.training import parallel
from qklens.dictionaries.training.parallel import Ranks, join_ranks, own_gpu
from qklens.errors import QklensError


def place(rank: int, local: int, world: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(world)}


@pytest.mark.parametrize(
    ("device", "environment", "gpus", "gpu"),
    [
        ("cpu", place(3, 3, 4), 0, None),
        ("mps", place(0, 0, 1), 0, None),
        ("cuda", place(0, 0, 4), 4, 0),
        ("cuda", place(3, 3, 4), 4, 3),
        ("cuda", place(5, 1, 8), 4, 1),  # the second process of the second machine
        ("cuda", {"RANK": "0"}, 1, 0),
        ("cuda:1", place(0, 0, 1), 2, 1),
    ],
)
def test_each_process_takes_a_gpu_of_its_own(
    device: str, environment: dict[str, str], gpus: int, gpu: int | None
) -> None:
    assert own_gpu(device, environment, gpus) == gpu


@pytest.mark.parametrize(
    ("device", "environment", "gpus", "says"),
    [
        ("cuda", place(2, 2, 3), 2, "process 2 of this machine wants GPU 2, the machine has 2"),
        ("cuda", place(0, 0, 1), 0, "wants GPU 0, the machine has 0"),
        ("cuda", {"RANK": "0", "LOCAL_RANK": "x"}, 2, "wants GPU x"),
        ("cuda:0", place(1, 1, 2), 2, "take a GPU each; give --device cuda"),
        ("cuda:7", place(0, 0, 1), 2, "wants GPU 7, the machine has 2"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(device: str, environment: dict[str, str], gpus: int, says: str) -> None:
    with pytest.raises(QklensError) as caught:
        own_gpu(device, environment, gpus)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("device", "backend", "set_to"), [("cuda", "nccl", [3]), ("cpu", "gloo", [])])
def test_a_process_joins_after_it_has_taken_its_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str, set_to: list[int]
) -> None:
    done: list[Any] = []
    for name, value in place(7, 3, 8).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(parallel.torch.cuda, "set_device", done.append)
    monkeypatch.setattr(parallel.distributed, "init_process_group", done.append)
    monkeypatch.setattr(parallel.distributed, "get_rank", lambda: 7)
    monkeypatch.setattr(parallel.distributed, "get_world_size", lambda: 8)
    assert join_ranks(device) == Ranks(7, 8)
    assert done == [*set_to, backend]


def test_a_process_alone_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel.distributed, "init_process_group", lambda _: pytest.fail("joined"))
    assert join_ranks("cuda") == Ranks()
