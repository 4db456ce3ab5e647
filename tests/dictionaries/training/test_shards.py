"""Cached activations: whole or refused, one damage at a time, and both sides named."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qklens.dictionaries.training.parallel import Ranks
from qklens.dictionaries.training.rows import HeldRows, finite_chunk
from qklens.dictionaries.training.shards import Manifest, ShardStore, write_shards
from qklens.errors import QklensError

SHARDS, ROWS, WIDTH = 3, 5, 4


def manifest(**changes: object) -> Manifest:
    given = {"models": ("ab",), "corpus": "cd", "layers": (1,), "dtype": "float32", "width": WIDTH, "shards": SHARDS}
    return Manifest.model_validate({**given, **changes})


def rows(index: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(index))


def written(folder: Path, made: Callable[[int], Tensor] = rows, **changes: object) -> ShardStore:
    return write_shards(folder, manifest(**changes), made, Ranks())


def shard(folder: Path, index: int = 1) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    store = written(tmp_path)
    assert (store.n_chunks, store.width, store.n_rows) == (SHARDS, WIDTH, SHARDS * ROWS)
    assert all(torch.equal(store.chunk(i), rows(i)) for i in range(SHARDS))
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".safetensors") == [
        "DONE", "manifest.json", "shard-00000.json", "shard-00001.json", "shard-00002.json"
    ]  # fmt: skip


def test_a_second_writer_makes_only_what_is_missing(tmp_path: Path) -> None:
    first = written(tmp_path).fingerprint
    shard(tmp_path, 2).unlink()
    made: list[int] = []
    store = written(tmp_path, lambda i: made.append(i) or rows(i))
    assert made == [2]
    assert store.fingerprint == first


class OneOfTwo(Ranks):
    """A process that does not wait for the other: here they run one after the other."""

    def wait(self) -> None:
        pass


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    expected = sorted(path.name for path in written(tmp_path).folder.iterdir())
    for name in ("manifest.json", "shard-00001.safetensors", "shard-00000.json", "DONE"):
        (tmp_path / f".{name}.abcdefgh").write_bytes(b"half")
    assert sorted(path.name for path in written(tmp_path).folder.iterdir()) == expected


def test_several_processes_write_different_shards(tmp_path: Path) -> None:
    made: list[int] = []

    def counted(index: int) -> Tensor:
        made.append(index)
        return rows(index)

    with pytest.raises(QklensError, match=r"shard-00001.json"):  # the other's is not there yet
        write_shards(tmp_path, manifest(), counted, OneOfTwo(0, 2))
    write_shards(tmp_path, manifest(), counted, OneOfTwo(1, 2))
    assert made == [0, 2, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corpus": "ef"}, 'corpus "cd", this command has "ef"'),
        ({"models": ("ba",)}, r'models \["ab"\], this command has \["ba"\]'),
        ({"layers": (2,)}, r"layers \[1\], this command has \[2\]"),
        ({"dtype": "bfloat16"}, 'dtype "float32", this command has "bfloat16"'),
        ({"width": 8}, "width 4, this command has 8"),
    ],
)
def test_other_activations_are_refused_with_both_sides(tmp_path: Path, change: dict[str, object], said: str) -> None:
    written(tmp_path)
    with pytest.raises(QklensError, match=f"was begun with {said}"):
        written(tmp_path, **change)


def truncate(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-7])


def alter(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[-1] ^= 1
    shard(folder).write_bytes(bytes(data))


def remark(folder: Path, tensor: Tensor, name: str = "rows") -> None:
    """Another tensor under a mark that fits the file."""
    save_file({name: tensor}, shard(folder))
    data = shard(folder).read_bytes()
    mark = {"rows": ROWS, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    shard(folder).with_suffix(".json").write_text(json.dumps(mark))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"is \d+ bytes, its mark says \d+; it is truncated: remove it"),
        (alter, r"its SHA-256 is \w{12}\.\.\., its mark says \w{12}\.\.\.; it was altered: remove it"),
        (lambda f: shard(f).unlink(), "cannot read"),
        (lambda f: remark(f, torch.zeros(ROWS, WIDTH + 1)), r"holds \(5, 5\) torch.float32.* say \(5, 4\)"),
        (lambda f: remark(f, torch.zeros(ROWS - 1, WIDTH)), r"holds \(4, 4\) torch.float32.* say \(5, 4\)"),
        (lambda f: remark(f, torch.zeros(ROWS, WIDTH).half()), r"holds \(5, 4\) torch.float16.* torch.float32"),
        (lambda f: remark(f, torch.zeros(ROWS, WIDTH), "other"), "not a shard"),
    ],
)  # fmt: skip
def test_a_damaged_shard_is_refused(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    store = written(tmp_path)
    damage(tmp_path)
    store = ShardStore(tmp_path)
    assert torch.equal(store.chunk(0), rows(0))
    with pytest.raises(QklensError, match=f"shard-00001.safetensors: {said}"):
        store.chunk(1)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("manifest.json", None, "manifest.json"),
        ("manifest.json", '{"format": "qklens-activations-1", "widht": 4}', "manifest.json: key"),
        ("manifest.json", "{", "manifest.json"),
        ("shard-00002.json", '{"rows": "many"}', "shard-00002.json: key 'rows'"),
        ("DONE", None, "activations are not complete; run the same command again"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    written(tmp_path)
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(QklensError, match=said):
        ShardStore(tmp_path)


def test_rows_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    bad = rows(1)
    bad[3, 2] = float("nan")
    with pytest.raises(QklensError, match=r"shard-00001.*not written: row 3 holds NaN or infinity"):
        written(tmp_path, lambda i: bad if i == 1 else rows(i))
    assert shard(tmp_path, 0).is_file()
    assert not shard(tmp_path, 1).exists()
    with pytest.raises(QklensError, match="rows 0 to 4: row 3 holds NaN or infinity; expected finite"):
        finite_chunk(HeldRows([bad]), 0)


def test_a_full_disk_leaves_the_shards_that_are_whole(tmp_path: Path) -> None:
    """A file may hold no more than the small shards do; the third is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(QklensError, match="shard-00002"):
            written(tmp_path, lambda i: rows(i) if i < 2 else rows(i).repeat(100, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "DONE").exists()
    assert not list(tmp_path.glob("*.tmp*"))
    made: list[int] = []
    store = written(tmp_path, lambda i: made.append(i) or rows(i))
    assert made == [2]
    assert torch.equal(store.chunk(0), rows(0))
