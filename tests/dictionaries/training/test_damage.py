"""What a run finds on disk and cannot use is refused with one line, whatever is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qklens.dictionaries.training.checkpoint import Facts, load_checkpoint, save_checkpoint
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.parallel import Ranks
from qklens.dictionaries.training.rows import HeldRows
from qklens.dictionaries.training.shards import Manifest, write_shards
from qklens.dictionaries.training.trainer import Keeping, Trainer
from qklens.errors import QklensError
from tiny_folders import tree

WIDTH = 4
ROWS = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(0))
CONFIG = TrainingConfig.parse({
    "kind": "sae", "layers": (1,), "features": 8, "activation": "topk", "k": 2, "steps": 3, "batch": 6,
    "learning_rate": 1e-2,
})  # fmt: skip
FACTS = Facts(step=3, threshold=0.5, metrics=('{"step": 0}',))


def trainer(folder: Path, rows: Tensor = ROWS) -> Trainer:
    return Trainer(HeldRows([rows]), CONFIG, keeping=Keeping(folder, {"corpus": "noise"}))


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(QklensError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def mutants(value: Any) -> Iterator[Any]:
    """The value with one part after the other removed, or another thing in its place."""
    places: list[tuple[Any, ...]] = []

    def walk(part: Any, place: tuple[Any, ...]) -> None:
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((*place, key))
            walk(part[key], (*place, key))

    walk(value, ())
    for *above, last in places:
        for other in (..., None, "x", -1, 1.5, float("inf"), float("nan"), {}, [], [1], 10**30):
            copy = json.loads(json.dumps(value))
            part = copy
            for key in above:
                part = part[key]
            if other is ...:
                del part[last]
            else:
                part[last] = other
            yield copy


def test_every_mutant_of_a_checkpoints_numbers_is_refused(tmp_path: Path) -> None:
    """Also those that are well formed: the hash covers the numbers as it covers the tensors."""
    save_checkpoint(tmp_path, {"a": torch.ones(3)}, FACTS)
    path = tmp_path / "step-00000003/state.json"
    whole = path.read_text()
    texts = [json.dumps(mutant) for mutant in mutants(json.loads(whole))]
    for text in (*texts, "[1]", "null", "3", '"x"', "", "{", "[" * 9999):
        path.write_text(text)
        assert str(path.parent) in refused(lambda: load_checkpoint(tmp_path))
    path.write_text(whole)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1] == FACTS


def test_numbers_that_were_altered_are_told_from_those_that_are_missing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": torch.ones(3)}, FACTS)
    path = tmp_path / "step-00000003/state.json"
    written = json.loads(path.read_text())
    del written["facts"]["threshold"]
    path.write_text(json.dumps(written))
    said = refused(lambda: load_checkpoint(tmp_path))
    assert said == f"{path}: key 'facts.threshold' is missing; remove {tmp_path} to begin anew"
    path.write_text(json.dumps({**written, "facts": {**written["facts"], "threshold": 0.25}}))
    assert "one of them was altered" in refused(lambda: load_checkpoint(tmp_path))


@pytest.mark.parametrize(
    "text",
    [b"", b"step-00000004", b"..", b"/etc", b"../elsewhere", b"\xff", b"a\nb", b"\0", b"step-" + b"9" * 300],
)
def test_a_pointer_to_no_checkpoint_is_refused(tmp_path: Path, text: bytes) -> None:
    save_checkpoint(tmp_path / "c", {"a": torch.ones(3)}, FACTS)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c/LATEST").write_bytes(text)
    said = refused(lambda: load_checkpoint(tmp_path / "c"))
    assert said.startswith(f"{tmp_path / 'c/LATEST'}: ")
    assert said.endswith(f"remove {tmp_path / 'c'} to begin anew")
    assert text == b"\xff" or "write one of ['step-00000003'] there" in said


@pytest.mark.parametrize("text", ["[1]", "null", "3", '"x"'])
def test_a_run_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    trainer(tmp_path).run()
    (tmp_path / "run.json").write_text(text)
    before = tree(tmp_path)
    assert f"{tmp_path / 'run.json'}: holds a " in refused(lambda: trainer(tmp_path))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("weights.0.encoder", lambda t: t[:-1], r"tensor 'weights.0.encoder' is (7, 4) torch.float32; expected (8, 4)"),
        ("mean.bias", lambda t: t[:1], "tensor 'mean.bias' is (1,) torch.float32; expected (4,)"),
        ("square.0.decoder", lambda t: t.double(), "is (8, 4) torch.float64; expected (8, 4) torch.float32"),
        ("last_fired.0", None, "tensor 'last_fired.0' is missing; expected (8,) torch.int64"),
        ("scale", None, "tensor 'scale' is missing"),
        ("buffer.pool", lambda t: t[:, 1:], "the buffer's tensors do not fit rows of 4 columns"),
        ("buffer.place", None, "the buffer's tensors do not fit"),
        ("buffer.generator", lambda t: t[:-1], "the buffer's tensors do not fit"),
    ],
)
def test_tensors_of_another_run_are_refused(
    tmp_path: Path, name: str, change: Callable[[Tensor], Tensor] | None, says: str
) -> None:
    """A whole checkpoint, but not this run's: its hash is right."""
    trainer(tmp_path).run()
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    tensors, facts = found
    other = {name: change(tensors[name])} if change else {}
    kept = {key: tensor for key, tensor in tensors.items() if key != name}
    save_checkpoint(tmp_path / "checkpoints", kept | other, facts)
    assert says in refused(lambda: trainer(tmp_path))


def test_activations_are_not_cached_beside_what_is_anothers(tmp_path: Path) -> None:
    manifest = Manifest(models=("ab",), corpus="cd", layers=(1,), dtype="float32", width=WIDTH, shards=1)

    def write() -> object:
        return write_shards(tmp_path, manifest, lambda _: ROWS, Ranks())

    for name in ("thesis.txt", ".git", "shard-00000.safetensors"):
        (tmp_path / name).write_text("mine")
        assert f"--cache {tmp_path}: holds {name!r} and no manifest.json; expected a new" in refused(write)
        assert tree(tmp_path) == {name: b"mine"}
        (tmp_path / name).unlink()
    (tmp_path / ".manifest.json.k2j3").write_text("{")  # a crash in the very first write
    write()
    assert (tmp_path / "DONE").is_file()
