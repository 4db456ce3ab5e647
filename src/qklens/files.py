"""Files that are either whole or absent: write to a temporary file, fsync, rename."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qklens.errors import QklensError


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a crash at any moment, sees the old file or the new one.

    Raises:
        QklensError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            _claimed(descriptor)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise QklensError(
            f"{path}: cannot write {len(payload)} bytes ({reason}); free space or choose another folder"
        ) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path`, which is new or empty, only when it is complete.

    Raises:
        QklensError: the disk is full, or `path` cannot be made.
    """
    scratch = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
        yield Path(scratch)
        Path(scratch).chmod(0o755)
        Path(scratch).replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise QklensError(f"{path}: cannot be written ({reason}); free space or choose another folder") from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def check_folder(folder: Path, flag: str) -> None:
    """Refuse, before any work, a folder to write into that cannot be written.

    Args:
        folder: it need not exist yet.
        flag: the option that named it, for errors.

    Raises:
        QklensError: the folder, or one that it lies in, is a file, or may not be written.
    """
    if "\0" in str(folder):
        raise QklensError(f"{flag}: the name holds a NUL character, which no folder has; choose another {flag}")
    try:
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not existing.is_dir():
            raise QklensError(f"{flag} {folder}: {existing} is a file; choose another {flag}")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise QklensError(f"{flag} {folder}: cannot be written ({error.strerror}); choose another {flag}") from error


def foreign_entry(folder: Path, first: str) -> Path | None:
    """What makes a folder another's: an entry beside what a crash leaves in the write of its `first` file."""
    if not folder.is_dir():
        return None
    return min((entry for entry in folder.iterdir() if not entry.name.startswith(f".{first}.")), default=None)


def remove_left_over(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files that killed processes left of `atomic_write`; those still being written stay.

    Args:
        folder: it need not exist.
        names: of the files that were to be written.
    """
    if not folder.is_dir():
        return
    ours = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[a-z0-9_]{{8}}")  # the end is `mkstemp`'s
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.is_file():
            with suppress(OSError), path.open("rb") as file:
                if _claimed(file.fileno()):
                    path.unlink()


def _claimed(descriptor: int) -> bool:
    """Whether a file is now this process's own; the system takes a claim back when the process ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another's, or a file system without locks
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401
    """Write JSON atomically; NaN and infinity are refused, because JSON has none."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise QklensError(f"{path}: not written, a value is not a finite number ({error})") from error
    atomic_write(path, text + "\n")


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Read a JSON file.

    Raises:
        QklensError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise QklensError(f"{path}: cannot read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise QklensError(f"{path}: not a JSON file ({error}); the file may be damaged, write it again") from error


def sha256_files(paths: list[Path]) -> str:
    """One SHA-256 over names and contents, in the order of the names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
