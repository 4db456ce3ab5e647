"""Bad input: exit status 2, one line on stderr, nothing on stdout, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qklens.studies.resources import organism_folder
from tiny_folders import WEIGHTS, edit_tensors, tree

STUDY = ("study", "harm-pressure")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "/gone/model"), "/gone/model: no such model directory"),
        (("--model", "organism:gone"), "no such checkpoint of the organism; expected one of ['base'"),
        (("--model", "."), "no config.json; expected a Hugging Face model directory"),
        (("--data", "gone.jsonl"), "--data 'gone.jsonl': no such file or shipped set"),
        (("--data", "harm_presure"), "did you mean 'harm_pressure'"),
        (("--items", "1"), "--items 1: expected at least 4"),
        (("--items", "0"), "--items 0: expected at least"),
        (("--items", "-3"), "--items -3: expected at least"),
        (("--items", "many"), "Invalid value for '--items'"),
        (("--seed", "-1"), "Invalid value for '--seed'"),
        (("--seed", str(2**70)), "Invalid value for '--seed'"),
        (("--engine", "ray"), "--engine 'ray' is not available; expected 'local'"),
        (("--dictionary", "/gone/dictionary"), "--dictionary /gone/dictionary: no such directory"),
        (("--checkpoint", "organism:base"), "--checkpoint needs --base-model"),
        (("--base-model", "/gone/base"), "/gone/base: no such model directory"),
        (("--base-model", "organism"), "checkpoint organism: has 4 layers"),
        (("--dtype", "floot32"), "did you mean 'float32'"),
        (("--device", "toaster"), "--device 'toaster' cannot be used here"),
        (("--device", "meta"), "--device 'meta' cannot be used here"),
        (("--modle", "organism"), "No such option: --modle"),
        (("--out",), "'--out' requires an argument"),
        (("extra",), "unexpected extra argument"),
    ],
)
def test_a_bad_option_of_the_study(
    qklens: Callable[..., Any], model: Path, data: Path, arguments: tuple[str, ...], says: str
) -> None:
    healthy = {"--model": str(model), "--data": str(data), "--dictionary": "directions"}
    given = [part for option, value in healthy.items() if option not in arguments for part in (option, value)]
    assert says in qklens(*STUDY, *given, *arguments).refused()
    assert tree(Path()) == {}


def test_an_unknown_study_names_those_that_are(qklens: Callable[..., Any]) -> None:
    line = qklens("study", "harm_pressure").refused()
    assert "study 'harm_pressure' is unknown; expected one of ['harm-pressure']; did you mean 'harm-pressure'?" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("stuudy",), "No such command 'stuudy'"),
        (("data", "chek"), "No such command 'chek'"),
        (("data", "check"), "Missing argument 'file'"),
        (("model", "check"), "Missing argument 'model'"),
        (("model", "check", "/gone"), "/gone: no such model directory"),
    ],
)
def test_a_wrong_command(qklens: Callable[..., Any], arguments: tuple[str, ...], says: str) -> None:
    line = qklens(*arguments).refused()
    assert says.casefold() in line.casefold()


def test_a_bare_command_shows_its_help(qklens: Callable[..., Any]) -> None:
    for arguments in ((), ("data",), ("model",)):
        ended = qklens(*arguments)
        assert ended.status == 2
        assert "Usage: qklens" in ended.out + ended.err
        assert "qklens: " not in ended.err


@pytest.mark.parametrize("same", [False, True])
def test_an_out_of_another_configuration(
    qklens: Callable[..., Any], model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    """Also when only the seed differs from a run that this very command began; and not when nothing does."""
    study = (*STUDY, "--model", model, "--data", data, "--dictionary", "directions", "--out", "run")
    if same:
        stop_at_the_first_stage(monkeypatch)
        assert qklens(*study).status == 130
        assert qklens(*study).status == 130, "the same command resumes"
        says = "manifest.json: this run has seed=0, you asked for 7; choose another --out or remove the folder"
    else:
        Path("run").mkdir()
        Path("run/manifest.json").write_text(json.dumps({"run": {"study": "another"}}))
        says = "manifest.json: this run has"
    before = tree(Path())
    assert says in qklens(*study, "--seed", 7).refused()
    assert tree(Path()) == before


def stop_at_the_first_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qklens.studies.harm_pressure.behaviour.run", interrupt)


def test_an_interrupt_says_that_the_same_command_resumes(
    qklens: Callable[..., Any], model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_the_first_stage(monkeypatch)
    ended = qklens(*STUDY, "--model", model, "--data", data, "--dictionary", "directions", "--out", "run")
    assert ended.status == 130
    assert ended.err.splitlines()[-1] == "qklens: stopped; the same command resumes"
    assert set(tree(Path("run"))) == {"manifest.json"}


def test_an_out_that_holds_something_else(qklens: Callable[..., Any], model: Path, data: Path) -> None:
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("years of work")
    ended = qklens(*STUDY, "--model", model, "--data", data, "--dictionary", "directions", "--out", "run")
    assert ended.refused() == "qklens: run: exists and is not a run directory; choose another --out"
    assert tree(Path()) == {"run/thesis.tex": b"years of work"}


def test_an_out_that_cannot_be_made(qklens: Callable[..., Any], model: Path, data: Path) -> None:
    """Refused before the model is loaded: this one would be refused too."""
    Path("file").write_text("mine")
    (model / WEIGHTS).unlink()
    for out in ("file", "file/run", "file/deep/run"):
        ended = qklens(*STUDY, "--model", model, "--data", data, "--dictionary", "directions", "--out", out)
        assert ended.refused().startswith(f"qklens: --out {out}: ")
        assert "file is a file; choose another --out" in ended.err
    assert tree(Path()) == {"file": b"mine"}


@pytest.mark.parametrize("content", ["", "{", "{}", '{"results": {}, "state": {}, "seconds": 0.0, "skipped": null}'])
def test_a_damaged_stage_of_a_run(
    qklens: Callable[..., Any], model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qklens.studies.harm_pressure.belief.run", interrupt)
    study = (*STUDY, "--model", model, "--data", data, "--dictionary", "directions", "--out", "run")
    assert qklens(*study).status == 130
    result = Path("run/stages/behaviour/result.json")
    result.write_text(content)
    line = qklens(*study).refused()
    assert line == f"qklens: {result}: is not what the stage wrote; remove {result.parent} to run the stage again"


def test_a_dictionary_of_another_model(qklens: Callable[..., Any], model: Path, data: Path) -> None:
    shipped = organism_folder() / "dictionary"
    line = qklens(*STUDY, "--model", model, "--data", data, "--dictionary", shipped, "--out", "run").refused()
    assert f"{shipped / 'dictionary.json'}: its vectors have 128 dimensions, model's stream has 16" in line
    line = qklens(*STUDY, "--model", "organism:base", "--data", data, "--dictionary", shipped, "--out", "run").refused()
    assert f"{shipped / 'dictionary.json'}: was trained on weights with model_sha256" in line
    assert tree(Path()) == {}


def test_a_full_disk(qklens: Callable[..., Any], model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    ended = qklens(*STUDY, "--model", model, "--data", data, "--dictionary", "directions", "--out", "run")
    assert "run/manifest.json: cannot write" in ended.refused()
    assert "No space left on device" in ended.err
    assert tree(Path()) == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"question": 1}', "line 1: field 'correct' is missing"),
        ('{"qestion": "q"}', "line 1: unknown field 'qestion'"),
        ("nonsense", "line 1: not JSON"),
        ("", "holds no items"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_bad_data_file(qklens: Callable[..., Any], content: str, says: str, flags: tuple[str, ...]) -> None:
    Path("my.jsonl").write_text(content)
    line = qklens("data", "check", "my.jsonl", *flags).refused()
    assert "my.jsonl" in line
    assert says in line


def test_a_good_data_file_as_json(qklens: Callable[..., Any], data: Path) -> None:
    ended = qklens("data", "check", data, "--json")
    assert (ended.status, ended.err) == (0, "")
    report = json.loads(ended.out)
    assert (report["name"], report["n_items"], report["n_topics"]) == ("six", 6, 1)
    assert 0 <= report["guesser_bag_of_words"] <= 1
    assert len(report["sha256"]) == 64


def test_a_good_data_file_in_words(qklens: Callable[..., Any], data: Path) -> None:
    ended = qklens("data", "check", data)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("six: 6 items, 1 topics, no errors\n")
    assert "guesser length" in ended.out


def test_a_good_model(qklens: Callable[..., Any], model: Path) -> None:
    before = tree(model)
    report = json.loads(qklens("model", "check", model, "--json").out)
    assert (report["model_type"], report["n_layers"], report["failures"]) == ("llama", 2, [])
    assert all(layer["score_error"] < 1e-4 for layer in report["layers"])
    ended = qklens("model", "check", model)
    assert (ended.status, ended.err) == (0, "")
    assert "read exactly: every error is within 1e-04" in ended.out
    assert tree(model) == before


def test_a_pickled_model(qklens: Callable[..., Any], model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    for command in (("model", "check", model), (*STUDY, "--model", model)):
        assert "pytorch_model.bin: weights are pickled" in qklens(*command).refused()


def test_transformers_own_reports_do_not_surround_the_line(model: Path, tmp_path: Path) -> None:
    """In a process of its own, where transformers has its own handler on stderr."""
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(model / WEIGHTS, lambda tensors: tensors.__setitem__(name, torch.zeros(16, 8)))
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    ended = subprocess.run(
        [sys.executable, "-m", "qklens.cli.main", "model", "check", str(model)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith(f"qklens: {model}")


def test_an_output_that_cannot_be_written_is_one_line(data: Path) -> None:
    command = [sys.executable, "-m", "qklens.cli.main", "data", "check", str(data)]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("qklens: cannot write the output (")
    assert ended.stderr.count("\n") == 1
