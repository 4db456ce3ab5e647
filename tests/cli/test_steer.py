"""`qklens steer` as a user runs it: flags and files say the same, JSON is strict, and bad input is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qklens.cli import show_steer
from qklens.studies.tables.head_set_table import HeadSetTable
from qklens.studies.tables.steer_rows import SteerTable
from terminal import HOSTILE, lines_of, parsed
from tiny_folders import edit_tensors, tree

FLAGS = ("--direction", "harm_detection", "--heads", "L1H0,1.1", "--heads", "L1H0", "--strengths", "-2,0", "--draws", 2)
SPEC: dict[str, Any] = {
    "direction": "harm_detection",
    "heads": [["L1H0", "L1H1"], ["L1H0"]],
    "strengths": [-2, 0],
    "draws": 2,
}


@pytest.fixture
def asked(healthy_model: Path, data: Path) -> tuple[object, ...]:
    return ("--model", healthy_model, "--data", data, "--dictionary", "directions")


def test_flags_yaml_and_json_give_the_same_strict_json(qklens: Callable[..., Any], asked: tuple[object, ...]) -> None:
    Path("s.yaml").write_text(yaml.safe_dump(SPEC))
    Path("s.json").write_text(json.dumps(SPEC))
    ended = qklens("steer", *FLAGS, *asked, "--json")
    assert (ended.status, ended.err) == (0, "steer ...\n")
    found = parsed(ended.out)
    assert SteerTable.model_validate_json(ended.out).model_dump(mode="json") == found
    for file in ("s.yaml", "s.json"):
        assert parsed(qklens("steer", "--spec", file, *asked, "--json").out) == found
    Path("echo.json").write_text(json.dumps(found["spec"]))
    qklens("steer", "--spec", "echo.json", "--out", "again.json", *asked)
    assert parsed(Path("again.json").read_text()) == found


def test_the_table_on_the_terminal(qklens: Callable[..., Any], asked: tuple[object, ...]) -> None:
    table = SteerTable.model_validate_json(qklens("steer", *FLAGS, *asked, "--json").out)
    lines = lines_of(qklens("steer", *FLAGS, "--figure", "dose.svg", *asked).out)
    assert lines[0] == "model, half of 6 items: add harm_detection, unit activation_max, at answer"
    begin = lines.index("query side of L1H0, L1H1; harm")
    assert "query side of L1H0; harm" in lines
    header = lines[begin + 1].split()
    assert " ".join(header) == "strength accuracy 95% margin 95% attends KL random of draws unrelated benign"
    for line, row in zip(lines[begin + 2 : begin + 4], table.rows, strict=False):
        assert line.split()[:2] == [f"{row.strength:g}", f"{100 * row.accuracy:.1f}%"]
        assert row.controls is not None
        assert line.split()[-2:] == [
            f"{100 * row.controls.unrelated.accuracy:.1f}%",
            f"{100 * row.controls.benign.accuracy:.1f}%",
        ]
    assert lines[-1] == "written: dose.svg"
    assert Path("dose.svg").read_text().startswith("<svg")
    bare = lines_of(qklens("steer", *FLAGS, "--no-controls", *asked).out)
    assert not any("unrelated" in line for line in bare)


def test_no_name_reaches_the_terminal_raw(
    qklens: Callable[..., Any], asked: tuple[object, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    table = SteerTable.model_validate_json(qklens("steer", *FLAGS, *asked, "--json").out)
    names = {"feature": HOSTILE, "unrelated": HOSTILE, "model": {**table.model, "name": HOSTILE}}
    show_steer.sweep(table.model_copy(update=names), [Path(HOSTILE)])
    out = capfd.readouterr().out
    lines_of(out)
    assert "x\ufffd[2J" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "/gone/model"), "/gone/model: no such model directory"),
        (("--items", "2"), "--items 2: expected at least 4"),
        (("--strenghts", "1"), "No such option: --strenghts"),
        (("--strengths", "one"), "--strengths 'one': expected numbers joined by commas"),
        (("--strengths", "nan"), "--strengths: is NaN; expected a finite number"),
        (("--strengths", "1e60"), "strength 1e+60 (query side of L1H0, L1H1): what it adds to resid_pre.1 overflows"),
        (("--strengths", ""), "--strengths: is empty; expected at least one"),
        (("--mode", "adds"), "--mode: is \"adds\"; expected 'add'"),
        (("--unit", "sd"), "--unit: is"),
        (("--sides", "querry"), "did you mean 'query'?"),
        (("--sides", "residual"), "side 'residual' edits the stream for all heads"),
        (("--sides", "query,key"), "act on different tokens; say which with tokens"),
        (("--key-scope", "head"), "key_scope 'head' needs side 'key' alone"),
        (("--norm", "none"), "--norm: is"),
        (("--layers", "5-1"), "--layers: is '5-1'"),
        (("--layers", "0"), "no head of ['L1H0', 'L1H1'] lies in layers [0]"),
        (("--layers", "9"), "layer 9 does not exist in model; expected 0 to 1"),
        (("--heads", "L9H0"), "layer 9 does not exist in model"),
        (("--heads", "two"), "--heads: is 'two'"),
        (("--tokens", "corect"), "span 'corect' is not in this prompt"),
        (("--tokens", "-900"), "position -900 is not in a prompt of"),
        (("--conditions", "harmful"), '--conditions: is "harmful"'),
        (("--draws", "0"), "--draws: is 0"),
        (("--direction", "gone"), "direction 'gone' is no role"),
        (("--role", "need_answer=need_answer"), "--role need_answer: expected the role that the direction names"),
        (("--role", "harm_detection=gone"), "feature 'gone' is not in dictionary 'directions'"),
        (("--spec", "s.yaml"), "--spec s.yaml and --direction contradict each other; say it in the file"),
        (("--figure", "a.png"), "--figure a.png: expected a name that ends in .svg"),
        (("--out", "a.txt"), "--out a.txt: expected a name that ends in .json"),
        (("--out", "gone/a.json"), "--out gone/a.json: expected a file in a folder that exists"),
    ],
)
def test_a_bad_option(
    qklens: Callable[..., Any], asked: tuple[object, ...], arguments: tuple[str, ...], says: str
) -> None:
    usual = ("--direction", "harm_detection", "--heads", "L1H0,L1H1", "--strengths", "1", *asked)
    given = [
        part for option, value in zip(usual[::2], usual[1::2], strict=True) if option not in arguments
        for part in (option, value)
    ]  # fmt: skip
    assert says in qklens("steer", *given, *arguments).refused()
    assert tree(Path()) == {}


def test_a_bad_file(qklens: Callable[..., Any], asked: tuple[object, ...]) -> None:
    for name, content, says in (
        ("s.yaml", "side: query", "s.yaml: unknown key 'side'; expected some of"),
        ("s.yaml", "strengths: [.nan]", "s.yaml: strengths[0]: is NaN; expected a finite number"),
        ("s.json", "{", "s.json: not JSON"),
        ("s.toml", "", "--spec s.toml: expected a name that ends in .json"),
    ):
        Path(name).write_text(content)
        assert says in qklens("steer", "--spec", name, *asked).refused()
    assert "gone.yaml: cannot read" in qklens("steer", "--spec", "gone.yaml", *asked).refused()


def test_a_model_with_nan_is_refused(qklens: Callable[..., Any], model: Path, data: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(model / "model.safetensors", lambda tensors: tensors[name].fill_(torch.nan))
    qklens("steer", "--model", model, "--data", data).refused()


def test_the_fewest_heads(qklens: Callable[..., Any], asked: tuple[object, ...]) -> None:
    one = ("steer", "--direction", "harm_detection", "--strengths", -2, "--draws", 2, *asked)
    ended = qklens(*one, "--fewest", "greedy", "--json")
    if ended.status == 2:  # a random model need not lose anything under harm
        assert "the margin does not fall under harm" in ended.err
    else:
        assert HeadSetTable.model_validate_json(ended.out).model_dump(mode="json") == parsed(ended.out)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--fewest", "gredy", "--strengths", -2), "did you mean 'greedy'?"),
        (("--fewest", "greedy"), "searched at one strength under harm"),
        (("--fewest", "greedy", "--strengths", -2, "--heads", "L1H0,L1H1", "--heads", "L1H0"), "at one place, not at"),
        (("--fewest", "greedy", "--strengths", -2, "--heads", "L1H0"), "1 head to choose among"),
        (("--fewest", "greedy", "--strengths", -2, "--conditions", "none"), "searched at one strength under harm"),
        (("--fewest", "greedy", "--strengths", -2, "--figure", "a.svg"), "steers at one strength; give one"),
    ],
)
def test_a_search_that_cannot_be(
    qklens: Callable[..., Any], asked: tuple[object, ...], options: tuple[object, ...], says: str
) -> None:
    ended = qklens("steer", *options, "--direction", "harm_detection", *asked)
    assert (ended.status, ended.out) == (2, "")
    assert says in ended.err.splitlines()[-1]
