"""The console script in this process, with what it prints and how it exits."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from qklens.cli.main import main
from qklens.data.items import load_dataset
from tiny_folders import write_tiny_llama


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    def refused(self) -> str:
        """The one line of a command that was given bad input."""
        assert self.status == 2, self
        assert self.out == ""
        assert self.err.endswith("\n"), self
        assert self.err.count("\n") == 1, self
        assert self.err.startswith("qklens: ")
        assert "Traceback" not in self.err
        return self.err.strip()


@pytest.fixture
def qklens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `qklens ARGUMENTS` in an empty folder, which stays the test's to look at."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["qklens", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capfd.readouterr()
        return Ended(int(caught.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def healthy_model(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("healthy") / "model", word_tokenizer)


@pytest.fixture
def model(tmp_path: Path, healthy_model: Path) -> Path:
    return Path(shutil.copytree(healthy_model, tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six items of the shipped set as a user's own file."""
    rows = [json.dumps(item.model_dump()) for item in load_dataset("harm_pressure").items[:6]]
    (tmp_path / "six.jsonl").write_text("\n".join(rows))
    return tmp_path / "six.jsonl"
