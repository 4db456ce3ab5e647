"""The spec of a sweep: what is left out is filled in, what a file says is what keys say, and nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qklens.errors import QklensError
from qklens.studies.spec_file import read_spec
from qklens.studies.steer_spec import SteerSpec, heads_of

FULL: dict[str, Any] = {
    "direction": "L2/271",
    "strengths": [-2, 0.5],
    "mode": "clamp",
    "unit": "raw",
    "sides": ["key", "query"],
    "layers": ["0-2", 3, [1, 3]],
    "heads": ["chosen", ["L2H4", "2.6"], "all"],
    "tokens": ["correct", -2, 0],
    "norm": "frozen",
    "conditions": ["none", "benign"],
    "controls": False,
    "draws": 3,
}


def test_what_is_left_out_is_filled_in() -> None:
    by_side = {
        "query": (("answer",), (("chosen",),)),
        "key": (("correct", "incorrect"), (("chosen",),)),
        "residual": (("all",), (("all",),)),
    }
    for side, (tokens, heads) in by_side.items():
        spec = SteerSpec.parse({"sides": side, "layers": [2]})
        assert (spec.tokens, spec.heads, spec.sides, spec.layers) == (tokens, heads, (side,), ((2,),))
    assert SteerSpec().direction == "refuse_redirect"
    assert 1.0 in SteerSpec(mode="scale").strengths
    assert SteerSpec(mode="ablate").strengths == (1.0,)


def test_lists_are_spelt_in_one_way() -> None:
    spec = SteerSpec.parse(FULL)
    assert spec.layers == ((0, 1, 2), (3,), (1, 3))
    assert spec.heads == (("chosen",), ("L2H4", "L2H6"), ("all",))
    assert heads_of(spec.heads[1]) == [(2, 4), (2, 6)]
    assert spec.strengths == (-2.0, 0.5)
    assert spec.tokens == ("correct", -2, 0)
    assert SteerSpec.parse({"strengths": [1, 1.0, 2], "heads": ["2.4", "L2H4"]}).heads == (("L2H4",),)


@pytest.mark.parametrize("given", [{}, FULL])
def test_yaml_json_and_keys_are_the_same_and_so_is_the_echo(tmp_path: Path, given: dict[str, Any]) -> None:
    spec = SteerSpec.parse(given)
    for content in (given, spec.model_dump(mode="json")):
        (tmp_path / "s.json").write_text(json.dumps(content))
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
        assert read_spec(tmp_path / "s.json") == read_spec(tmp_path / "s.yaml") == spec


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stregths": [1]}, "unknown key 'stregths'; expected some of ['direction', 'strengths'"),
        ({"stregths": [1]}, "did you mean 'strengths'?"),
        (
            {"sides": "querry"},
            "sides[0]: is \"querry\"; expected 'residual', 'query', 'key' or 'value'; did you mean 'query'",
        ),
        ({"strengths": [1, float("nan")]}, "strengths[1]: is NaN; expected a finite number"),
        ({"strengths": [float("inf")]}, "strengths[0]: is Infinity; expected a finite number"),
        ({"strengths": "2"}, 'strengths[0]: is "2"; expected a valid number'),
        ({"strengths": True}, "strengths[0]: is true; expected a valid number"),
        ({"strengths": []}, "strengths: is empty; expected at least one"),
        ({"heads": ["two"]}, "heads: is 'two'; expected 'chosen', 'all', or a head as L2H4"),
        ({"heads": [["all", "L1H0"]]}, "heads: 'all' stands beside 1 others"),
        ({"layers": "2-1"}, "layers: is '2-1'; expected the lower layer first"),
        ({"layers": "0-99999999"}, "layers: is '0-99999999'"),
        ({"layers": -1}, "layers[0][0]: is -1; expected greater than or equal to 0"),
        ({"tokens": 1.5}, "tokens[0]: is 1.5"),
        ({"controls": "no"}, 'controls: is "no"; expected a valid boolean'),
        ({"draws": 0}, "draws: is 0; expected greater than or equal to 1"),
        ({"sides": ["query", "key"]}, "act on different tokens; say which with tokens"),
        ({"sides": "residual", "layers": 1, "heads": "chosen"}, "side 'residual' edits the stream for all heads"),
        ({"sides": "residual", "layers": 1, "norm": "frozen"}, "side 'residual' has its norms recomputed"),
        ({"sides": "residual"}, "layers are missing"),
        ({"heads": "all"}, "layers are missing"),
        ({"key_scope": "head"}, "key_scope 'head' needs side 'key' alone"),
        ({"key_scope": "head", "sides": "key", "heads": "all", "layers": 1}, "key_scope 'head' needs"),
        ({"mode": "ablate", "strengths": 5}, "mode 'ablate' has no strength"),
        ({"mode": "scale", "unit": "raw"}, "mode 'scale' has no unit"),
        ({"mode": "ablate", "strengths": [1, 2]}, "mode 'ablate' has no strength; drop strengths"),
    ],
)
def test_a_bad_spec_is_one_line_that_names_the_file(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(given))
    with pytest.raises(QklensError) as caught:
        read_spec(file)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    with pytest.raises(QklensError):
        SteerSpec.parse(given)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("s.txt", "{}", "expected a name that ends in .json, .yaml, .yml"),
        ("s.json", "{", "not JSON that holds a spec"),
        ("s.json", '{"mode": "add", "mode": "scale"}', "key 'mode' stands twice"),
        ("s.json", "[1]", "holds a list; expected keys and values"),
        ("s.json", "[" * 60_000, "not JSON that holds a spec"),
        ("s.json", " " * 70_000, "is larger than 65536 bytes"),
        ("s.yaml", "", "holds a NoneType; expected keys and values"),
        ("s.yaml", "a: [", "not YAML that holds a spec"),
        ("s.yaml", "mode: add\nmode: scale", "key 'mode' stands twice"),
        ("s.yaml", "sides: &a [query]\nheads: [*a, *a]", "it repeats a part by an alias"),
        ("s.yaml", "mode: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("s.yaml", "3: 4", "unknown key 3"),
        ("s.yml", "mode: ~", "mode: is null; expected 'add'"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(QklensError, match=r"s\.(txt|json|ya?ml)") as caught:
        read_spec(tmp_path / name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(b"\xff\xfe{")
    for name, says in (("s.json", "not JSON"), ("gone.yaml", "cannot read (No such file or directory)")):
        with pytest.raises(QklensError) as caught:
            read_spec(tmp_path / name)
        assert says in str(caught.value)
