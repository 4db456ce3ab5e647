"""A run that is killed and begun again gives the same bytes as one that was not; other runs are refused."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qklens.dictionaries.training.checkpoint import load_checkpoint, save_checkpoint
from qklens.errors import QklensError

SCRIPT = Path(__file__).parent / "training_process.py"


def run(folder: Path, kill_at: int = -1, activation: str = "batch_topk", launcher: tuple[str, ...] = ()) -> int:
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), str(kill_at), activation]
    source = str(Path(__file__).resolve().parents[3] / "src")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def test_killed_at_random_steps_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    assert run(tmp_path / "whole") == 0
    draw = random.Random(7)
    for kill_at in sorted(draw.sample(range(2, 58), 3)):
        assert run(tmp_path / "killed", kill_at) == -signal.SIGKILL
    assert run(tmp_path / "killed") == 0
    names = ["dictionary.safetensors", "dictionary.json", "metrics.jsonl", "checkpoints/LATEST"]
    names.append("checkpoints/step-00000060/state.safetensors")
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_two_processes_give_what_one_does(tmp_path: Path, activation: str) -> None:
    assert run(tmp_path / "one", activation=activation) == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert run(tmp_path / "two", activation=activation, launcher=launcher) == 0
    one, two = (load_file(tmp_path / name / "dictionary.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)


def test_a_failing_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, {"a": torch.ones(3)}, {"threshold": 0.5})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qklens.dictionaries.training.checkpoint.save_file", full)
    with pytest.raises(QklensError, match=r"step 2 .*step-00000001 is whole"):
        save_checkpoint(tmp_path, 2, {"a": torch.zeros(3)}, {"threshold": 0.6})
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found[0]["a"], torch.ones(3))
    assert found[1]["threshold"] == 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-00000001"]
