"""The run directory: DONE marks, resume, refusals, and kills at every moment of a write."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qklens.errors import QklensError
from qklens.files import atomic_write
from qklens.studies.journal import Journal, StageOutput
from tiny_folders import tree

MANIFEST = {"schema": 1, "run": {"seed": 0, "model_sha256": "ab", "items": 129}, "command": "qklens study"}
OUTPUT = StageOutput(results={"behaviour": {"none": 0.98}}, state={"solved": True}, seconds=1.5)


def with_run(**changes: object) -> dict[str, object]:
    return {**MANIFEST, "run": {**MANIFEST["run"], **changes}}


def test_the_manifest_is_written_first(tmp_path: Path) -> None:
    Journal(tmp_path / "run", MANIFEST)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text()) == MANIFEST
    assert set(tree(tmp_path / "run")) == {"manifest.json"}


def test_a_finished_stage_is_loaded_by_the_next_run(tmp_path: Path) -> None:
    Journal(tmp_path, MANIFEST).save("behaviour", OUTPUT)
    assert set(tree(tmp_path)) == {"manifest.json", "stages/behaviour/result.json", "stages/behaviour/DONE"}
    again = Journal(tmp_path, MANIFEST)
    assert again.load("behaviour") == OUTPUT
    assert again.load("heads") is None


@settings(deadline=None, max_examples=30)
@given(
    state=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**53), 2**53)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    ),
    skipped=st.none() | st.text(max_size=5),
)
def test_outputs_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, object], skipped: str | None
) -> None:
    folder = tmp_path_factory.mktemp("run")
    output = StageOutput(state=state, skipped=skipped, seconds=0.1)
    Journal(folder, MANIFEST).save("heads", output)
    assert Journal(folder, MANIFEST).load("heads") == output


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_has_not_are_refused_before_anything_is_written(tmp_path: Path, value: float) -> None:
    journal = Journal(tmp_path, MANIFEST)
    before = tree(tmp_path)
    with pytest.raises((ValueError, QklensError)):
        journal.save("heads", StageOutput(state={"z": value}))
    assert tree(tmp_path) == before


def test_a_stage_without_done_is_run_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, MANIFEST)
    journal.save("behaviour", OUTPUT)
    (tmp_path / "stages" / "behaviour" / "DONE").unlink()
    assert Journal(tmp_path, MANIFEST).load("behaviour") is None
    journal.save("behaviour", OUTPUT.model_copy(update={"seconds": 9.0}))
    assert Journal(tmp_path, MANIFEST).load("behaviour").seconds == 9.0


def test_done_is_written_after_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    journal = Journal(tmp_path, MANIFEST)

    def noted(path: Path, data: str) -> None:
        written.append(path.name)
        atomic_write(path, data)

    monkeypatch.setattr("qklens.files.atomic_write", noted)
    monkeypatch.setattr("qklens.studies.journal.atomic_write", noted)
    journal.save("behaviour", OUTPUT)
    assert written == ["result.json", "DONE"]


def test_done_holds_the_hash_of_the_result(tmp_path: Path) -> None:
    Journal(tmp_path, MANIFEST).save("behaviour", OUTPUT)
    stage = tmp_path / "stages" / "behaviour"
    assert (stage / "DONE").read_text() == hashlib.sha256((stage / "result.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("model_sha256", "cd"), ("items", 16), ("new_option", "x")])
def test_another_configuration_is_refused_and_named(tmp_path: Path, key: str, value: object) -> None:
    Journal(tmp_path, MANIFEST).save("behaviour", OUTPUT)
    before = tree(tmp_path)
    with pytest.raises(QklensError) as caught:
        Journal(tmp_path, with_run(**{key: value}))
    line = str(caught.value)
    assert f"{key}={MANIFEST['run'].get(key)!r}, you asked for {value!r}" in line
    assert str(tmp_path / "manifest.json") in line
    assert "another --out" in line
    assert tree(tmp_path) == before


def test_what_does_not_identify_the_run_may_differ(tmp_path: Path) -> None:
    """Another command line or machine resumes; the manifest of the first one stays."""
    Journal(tmp_path, MANIFEST)
    journal = Journal(tmp_path, {**MANIFEST, "command": "other", "versions": {}})
    assert journal.manifest == MANIFEST
    assert json.loads((tmp_path / "manifest.json").read_text()) == MANIFEST


def test_a_folder_that_is_not_a_run_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(QklensError, match="exists and is not a run directory; choose another --out"):
        Journal(tmp_path, MANIFEST)
    assert tree(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_hidden_file_of_someone_else_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: elsewhere")
    with pytest.raises(QklensError, match="not a run directory"):
        Journal(tmp_path, MANIFEST)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    for path in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(QklensError, match=r"choose another (--out|folder)$"):
            Journal(path, MANIFEST)
    assert tree(tmp_path) == {"run": b"a file"}


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    Journal(tmp_path, MANIFEST)
    assert set(tree(tmp_path)) == {"manifest.json"}


@pytest.mark.parametrize("content", ["", '{"run": ', "[" * 100_000])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(QklensError, match=r"manifest\.json: not a JSON file"):
        Journal(tmp_path, MANIFEST)


@pytest.mark.parametrize("content", ["[]", "{}", '{"run": []}', '{"run": null}'])
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(QklensError, match=r"manifest\.json: holds no 'run' object"):
        Journal(tmp_path, MANIFEST)


CHANGED = [
    lambda text: "",
    lambda text: text[: len(text) // 2],
    lambda text: "[]",
    lambda text: '{"resluts": {}}',
    lambda text: text.replace('"solved": true', '"soldev": true'),
    lambda text: text.replace("0.98", "0.99"),
    lambda text: "\xff",
]


@pytest.mark.parametrize("change", CHANGED)
def test_a_result_that_is_not_what_the_stage_wrote_is_named(tmp_path: Path, change: Callable[[str], str]) -> None:
    """Also one that is well-formed: a later stage would stumble over a missing state, or carry a wrong number on."""
    journal = Journal(tmp_path, MANIFEST)
    journal.save("heads", OUTPUT)
    result = tmp_path / "stages" / "heads" / "result.json"
    whole = result.read_text()
    result.write_text(change(whole), encoding="latin-1")
    assert result.read_bytes() != whole.encode()
    with pytest.raises(QklensError) as caught:
        journal.load("heads")
    assert str(caught.value) == f"{result}: is not what the stage wrote; remove {result.parent} to run the stage again"


def test_a_result_of_another_form_under_its_own_hash_is_named(tmp_path: Path) -> None:
    """As another version of this package might have written it."""
    journal = Journal(tmp_path, MANIFEST)
    stage = tmp_path / "stages" / "heads"
    stage.mkdir(parents=True)
    (stage / "result.json").write_text('{"outcome": {}}')
    (stage / "DONE").write_text(hashlib.sha256(b'{"outcome": {}}').hexdigest())
    with pytest.raises(
        QklensError, match=r"heads/result\.json: not a stage's output \(.*\); remove .*heads to run"
    ) as caught:
        journal.load("heads")
    assert "\n" not in str(caught.value)


def test_done_without_a_result_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path, MANIFEST)
    journal.save("heads", OUTPUT)
    (tmp_path / "stages" / "heads" / "result.json").unlink()
    with pytest.raises(QklensError, match=r"result\.json: cannot read \(No such file or directory\); remove .*heads"):
        journal.load("heads")


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from qklens.studies.journal import Journal, StageOutput

name, moment, kills = sys.argv[2], sys.argv[3], int(sys.argv[4])
real = {"fsync": os.fsync, "replace": os.replace}
target = {}

def count(path):
    global kills
    if Path(path).name.lstrip(".").startswith(name):
        kills -= 1
        if kills < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def fsync(descriptor):
    if moment == "fsync":
        count(os.readlink(f"/proc/self/fd/{descriptor}"))
    return real["fsync"](descriptor)

def replace(source, to):
    if moment == "before_replace":
        count(to)
    real["replace"](source, to)
    if moment == "after_replace":
        count(to)

os.fsync, os.replace = fsync, replace
manifest = {"schema": 1, "run": {"seed": 0, "model_sha256": "ab", "items": 129}, "command": "qklens study"}
journal = Journal(Path(sys.argv[1]), manifest)
for version in ("first", "second"):
    journal.save("heads", StageOutput(state={"version": version, "filler": "x" * 100_000}))
"""


def killed(folder: Path, name: str, moment: str, after: int) -> None:
    """Run the writer in `folder` until SIGKILL hits it at a moment of writing `name`, after so many whole ones."""
    command = [sys.executable, "-c", KILLED_WRITER, str(folder), name, moment, str(after)]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


MOMENTS = ("fsync", "before_replace", "after_replace")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_the_manifest_is_written_leaves_a_folder_that_starts_anew(tmp_path: Path, moment: str) -> None:
    killed(tmp_path / "run", "manifest.json", moment, 0)
    assert (tmp_path / "run" / "manifest.json").exists() == (moment == "after_replace")
    journal = Journal(tmp_path / "run", MANIFEST)
    assert journal.load("heads") is None
    journal.save("heads", OUTPUT)
    assert Journal(tmp_path / "run", MANIFEST).load("heads") == OUTPUT


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_the_first_result_is_written_leaves_the_stage_undone(tmp_path: Path, moment: str) -> None:
    killed(tmp_path, "result.json", moment, 0)
    journal = Journal(tmp_path, MANIFEST)
    assert journal.load("heads") is None
    journal.save("heads", OUTPUT)
    assert journal.load("heads") == OUTPUT


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_before_done_leaves_the_stage_undone(tmp_path: Path, moment: str) -> None:
    killed(tmp_path, "DONE", moment, 0)
    loaded = Journal(tmp_path, MANIFEST).load("heads")
    if moment == "after_replace":
        assert loaded.state["version"] == "first"
    else:
        assert loaded is None


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_a_result_is_replaced_leaves_the_stage_undone(tmp_path: Path, moment: str) -> None:
    """Never an old mark over a new result."""
    killed(tmp_path, "result.json", moment, 1)
    assert (tmp_path / "stages" / "heads" / "result.json").exists()
    assert Journal(tmp_path, MANIFEST).load("heads") is None
