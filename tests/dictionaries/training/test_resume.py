"""A run that is killed and begun again gives the same bytes as one that was not; other runs are refused."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qklens.dictionaries.training.checkpoint import Facts, load_checkpoint, save_checkpoint
from qklens.errors import QklensError
from tests.dictionaries.training import training_process
from tests.dictionaries.training.training_process import EVERY, STEPS
from tiny_folders import tree

ROOT = Path(__file__).resolve().parents[3]
FILES = [
    "dictionary.safetensors", "dictionary.json", "metrics.jsonl", "run.json", "checkpoints/LATEST",
    f"checkpoints/step-{STEPS:08d}/state.safetensors", f"checkpoints/step-{STEPS:08d}/state.json",
]  # fmt: skip

Run = Callable[..., int]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    """Forks processes in which everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.set_forkserver_preload([training_process.__name__])
        yield context


@pytest.fixture(scope="module")
def run(server: ForkServerContext) -> Run:
    """Train in a process of its own; gives its exit status, which is negative for a signal."""

    def start(folder: Path, **options: object) -> int:
        process = server.Process(target=training_process.train, args=(folder,), kwargs=options)
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    return start


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder) == 0
    return folder


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def same_bytes(one: Path, other: Path) -> None:
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_killed_at_random_steps_and_resumed_gives_the_same_bytes(run: Run, whole: Path, tmp_path: Path) -> None:
    for step in sorted(random.Random(7).sample(range(2, STEPS - 2), 3)):
        assert run(tmp_path / "run", kill_at_step=step) == -signal.SIGKILL
    assert run(tmp_path / "run") == 0
    same_bytes(whole, tmp_path / "run")


def test_killed_in_the_middle_of_writes_and_resumed_gives_the_same_bytes(run: Run, whole: Path, tmp_path: Path) -> None:
    """The first write of the run, and others drawn at random: tensors, their mark, the pointer, metrics."""
    for write in (1, *random.Random(8).choices(range(2, 12), k=6)):
        assert run(tmp_path / "run", kill_at_write=write) == -signal.SIGKILL
    assert run(tmp_path / "run") == 0
    same_bytes(whole, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.is_dir()] == [f"step-{STEPS:08d}"]


def test_killed_at_every_sync_and_resumed_gives_the_same_files_and_no_others(run: Run, tmp_path: Path) -> None:
    """Of a run with two checkpoints; the last kills come after the last of them, in what follows it."""
    assert run(tmp_path / "whole/run", checkpoints=2) == 0
    expected = tree(tmp_path / "whole")
    for write in range(1, 100):
        root = tmp_path / str(write)
        status = run(root / "run", kill_at_write=write, checkpoints=2)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert run(root / "run", checkpoints=2) == 0
        assert names(root) == names(tmp_path / "whole"), write
        assert tree(root) == expected, write
    assert 15 < write < 99


def test_a_full_disk_leaves_the_last_checkpoint(run: Run, whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "run", kill_at_step=3 * EVERY + 1) == -signal.SIGKILL
    assert run(tmp_path / "run", most_bytes=20_000) == 3
    said = (tmp_path / "error.txt").read_text()
    assert f"cannot write the checkpoint of step {4 * EVERY}" in said
    assert f"step-{3 * EVERY:08d} is whole: free space, and the same command goes on from it" in said
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.is_dir()] == [f"step-{3 * EVERY:08d}"]
    assert run(tmp_path / "run") == 0
    same_bytes(whole, tmp_path / "run")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def close(one: Path, other: Path) -> None:
    """Sums of other orders differ in their last bits; Adam makes that about 1e-4 in these steps."""
    first, second = (load_file(folder / "dictionary.safetensors") for folder in (one, other))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)


def test_two_processes_give_what_one_does(server: ForkServerContext, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    port = str(free_port())
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(server.Process(target=_ranked, args=(folder, place)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    close(whole, folder)


def _ranked(folder: Path, place: dict[str, str]) -> None:
    os.environ.update(place)
    training_process.train(folder)


@pytest.mark.slow
def test_torchrun_gives_what_one_process_does(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "one", activation="topk") == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    command = [sys.executable, *launcher, training_process.__name__, str(tmp_path / "two"), "topk"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    subprocess.run(command, env=environment, capture_output=True, check=True, cwd=ROOT)
    close(tmp_path / "one", tmp_path / "two")


def test_another_run_in_the_folder_is_refused_with_both_sides(run: Run, whole: Path, tmp_path: Path) -> None:
    before = sorted(p.relative_to(whole) for p in whole.rglob("*"))
    assert run(whole, activation="topk") == 3
    said = (whole.parent / "error.txt").read_text()
    assert 'was begun with training.activation "batch_topk", this command has "topk"' in said
    assert sorted(p.relative_to(whole) for p in whole.rglob("*")) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    assert run(tmp_path / "full") == 3
    assert "full: holds 'thesis.txt' and no run.json; expected" in (tmp_path / "error.txt").read_text()


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": torch.ones(300)}, Facts(step=1, threshold=0.5, metrics=()))
    state = tmp_path / "step-00000001/state.safetensors"
    data = state.read_bytes()
    for broken in (data[:-5], data[:-1] + b"x"):
        state.write_bytes(broken)
        with pytest.raises(QklensError, match=r"its SHA-256, .*, state.json says .*; one of them was altered: remove"):
            load_checkpoint(tmp_path)
    state.unlink()
    with pytest.raises(QklensError, match=r"state.safetensors: "):
        load_checkpoint(tmp_path)


def test_a_failing_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, {"a": torch.ones(3)}, Facts(step=1, threshold=0.5, metrics=()))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qklens.dictionaries.training.checkpoint.save_file", full)
    with pytest.raises(QklensError, match=r"step 2 .*step-00000001 is whole"):
        save_checkpoint(tmp_path, {"a": torch.zeros(3)}, Facts(step=2, threshold=0.6, metrics=()))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found[0]["a"], torch.ones(3))
    assert found[1].threshold == 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-00000001"]
