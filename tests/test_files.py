"""Files are whole or absent: full disks, failing calls and interrupts at every step of a write."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qklens.errors import QklensError
from qklens.files import atomic_write, check_folder, read_json, remove_left_over, sha256_files, write_json
from tiny_folders import tree

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
CALLS = ("os.fsync", "os.replace", "os.chmod", "tempfile.mkstemp")


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, old: bytes | None
) -> None:
    file = tmp_path / "results.json"
    if old is not None:
        file.write_bytes(old)
    before = tree(tmp_path)
    monkeypatch.setattr(call, failing(FULL))
    with pytest.raises(QklensError) as caught:
        atomic_write(file, b"new" * 100)
    monkeypatch.undo()
    assert str(caught.value) == (
        f"{file}: cannot write 300 bytes (No space left on device); free space or choose another folder"
    )
    assert tree(tmp_path) == before
    atomic_write(file, b"new")
    assert tree(tmp_path) == {"results.json": b"new"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device /dev/full is Linux's own")
def test_a_write_to_a_device_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own ENOSPC, from the write itself, when the buffer is flushed."""
    real = os.fdopen

    def onto_full(descriptor: int, mode: str) -> Any:
        os.close(descriptor)
        return real(os.open("/dev/full", os.O_WRONLY), mode)

    monkeypatch.setattr(os, "fdopen", onto_full)
    with pytest.raises(QklensError, match="No space left on device"):
        atomic_write(tmp_path / "a.json", b"x" * 100_000)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    (tmp_path / "a.json").write_bytes(b"old")
    monkeypatch.setattr(call, failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a.json", b"new")
    assert tree(tmp_path) == {"a.json": b"old"}


def test_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (done.append(name), real(*a))[1])
    atomic_write(tmp_path / "a", "text")
    assert done == ["fsync", "replace", "fsync"], "the file, its name, then the folder"


def test_text_is_utf8_and_folders_are_made(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a" / "b" / "c.txt", "σ −")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "σ −".encode()
    assert (tmp_path / "a" / "b" / "c.txt").stat().st_mode & 0o777 == 0o644


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QklensError, match=r"file/below/a\.json: cannot write"):
        atomic_write(tmp_path / "file" / "below" / "a.json", b"")


def test_json_round_trip_and_refusal_of_what_json_has_not(tmp_path: Path) -> None:
    value = {"σ": [1, 2.5, None, True], "nested": {"a": "b\n"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    for bad in (float("nan"), float("inf")):
        with pytest.raises((ValueError, QklensError), match="Out of range float"):
            write_json(tmp_path / "a.json", {"z": bad})
    assert read_json(tmp_path / "a.json") == value
    assert set(tree(tmp_path)) == {"a.json"}


def test_the_hash_sees_names_contents_and_borders(tmp_path: Path) -> None:
    def of(**files: str) -> str:
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        return sha256_files([tmp_path / name for name in files])

    hashes = [of(a="1", b="2"), of(a="2", b="1"), of(a="12", b=""), of(a="1"), of(c="1")]
    assert len(set(hashes)) == len(hashes)
    assert of(a="1", b="2") == of(b="2", a="1") == hashes[0]


def test_a_folder_that_can_be_made_is_left_unmade(tmp_path: Path) -> None:
    check_folder(tmp_path / "runs" / "one", "--out")
    check_folder(tmp_path, "--out")
    check_folder(Path("relative") / "run", "--out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a file")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "file" / "deep" / "run"):
        with pytest.raises(QklensError, match=re.escape(f"--out {folder}: {tmp_path / 'file'} is a file")):
            check_folder(folder, "--out")
    with pytest.raises(QklensError, match="cannot be written \\(File name too long\\); choose another --out"):
        check_folder(tmp_path / ("long" * 100), "--out")

    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(QklensError, match="run: cannot be written \\(Permission denied\\); choose another --out"):
        check_folder(tmp_path / "run", "--out")


def test_what_killed_writes_left_goes_and_what_is_being_written_or_anothers_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sync stands in for the moment in which another process looks."""
    others = [".a.json.tmp", ".b.json.abcdefgh", "a.json.abcdefgh", ".axjson.abcdefgh", ".a.json.abcdefgh.x"]
    for name in (*others, ".a.json.abcd_fg1", ".c.abcdefgh"):
        (tmp_path / name).write_bytes(b"half")

    def sync(_: int) -> None:
        remove_left_over(tmp_path, ["a.json", "c"])

    monkeypatch.setattr(os, "fsync", sync)
    atomic_write(tmp_path / "a.json", b"whole")
    assert tree(tmp_path) == {**dict.fromkeys(sorted(others), b"half"), "a.json": b"whole"}
    remove_left_over(tmp_path / "missing", ["a.json"])
