"""A run directory that survives a crash at any moment and resumes where it stopped.

manifest.json          written first: config, hashes, versions, seeds
stages/<stage>/        result.json, then DONE with its hash: a stage without DONE is run again
results.json           written when all stages are done
report.html, figures/  written last
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from qklens.errors import QklensError
from qklens.files import atomic_write, foreign_entry, read_json, write_json
from qklens.strict import Strict


class StageOutput(Strict):
    """What a stage leaves: fields of the results, and state for later stages."""

    results: dict[str, Any] = Field(default_factory=dict)
    state: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    skipped: str | None = None


class Journal:
    """The run directory."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Open a new run directory or one of the same configuration.

        Args:
            folder: the run directory.
            manifest: what identifies the run; its `run` part must agree with an existing one's.

        Raises:
            QklensError: the folder holds another run, or something that is not a run.
        """
        self.folder = folder
        path = folder / "manifest.json"
        if path.is_file():
            have = read_json(path)
            old, new = have.get("run") if isinstance(have, dict) else None, manifest["run"]
            if not isinstance(old, dict):
                raise QklensError(f"{path}: holds no 'run' object; the file is damaged, choose another --out")
            different = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            if different:
                key = different[0]
                raise QklensError(
                    f"{path}: this run has {key}={old.get(key)!r}, you asked for {new.get(key)!r}; choose another "
                    "--out or remove the folder"
                )
            self.manifest: dict[str, Any] = have
        else:
            # A crash in the very first write leaves its temporary file behind; that is still an empty run directory.
            if folder.exists() and (not folder.is_dir() or foreign_entry(folder, path.name)):
                raise QklensError(f"{folder}: exists and is not a run directory; choose another --out")
            self.manifest = manifest
            write_json(path, manifest)

    def load(self, stage: str) -> StageOutput | None:
        """A finished stage's output, or None."""
        folder = self.folder / "stages" / stage
        done, path = folder / "DONE", folder / "result.json"
        if not done.is_file():
            return None
        try:
            content, mark = path.read_bytes(), done.read_text(encoding="utf-8", errors="replace")
            if hashlib.sha256(content).hexdigest() != mark:
                raise QklensError(f"{path}: is not what the stage wrote; {_again(folder)}")
            return StageOutput.model_validate_json(content)
        except OSError as error:
            raise QklensError(f"{path}: cannot read ({error.strerror}); {_again(folder)}") from error
        except ValidationError as error:
            raise QklensError(f"{path}: not a stage's output ({error.errors()[0]['msg']}); {_again(folder)}") from error

    def save(self, stage: str, output: StageOutput) -> None:
        """Write a stage's output, then its DONE mark, which holds the output's SHA-256."""
        folder = self.folder / "stages" / stage
        (folder / "DONE").unlink(missing_ok=True)
        write_json(folder / "result.json", output.model_dump())
        atomic_write(folder / "DONE", hashlib.sha256((folder / "result.json").read_bytes()).hexdigest())


def _again(folder: Path) -> str:
    return f"remove {folder} to run the stage again"
