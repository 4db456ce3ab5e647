"""Data files: what loads, and the line that names file, line and field where one does not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from item_files import MINIMAL, ROW, jsonl, other, refusal, table

import qklens.data
from qklens.data.items import DEFAULT_BENIGN_INTENT, Item, load_dataset
from qklens.data.sameness import same_form
from qklens.errors import QklensError


def test_a_jsonl_file_loads(tmp_path: Path) -> None:
    file = jsonl(tmp_path, ROW, other(2))
    dataset = load_dataset(str(file))
    assert dataset.items == (Item(**ROW), Item(**other(2)))
    assert dataset.describe() == {
        "name": "my",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "n_items": 2,
    }


def test_only_four_fields_are_required(tmp_path: Path) -> None:
    (item,) = load_dataset(str(jsonl(tmp_path, "", MINIMAL))).items
    assert item == Item(id="line-2", topic="unsorted", benign_intent=DEFAULT_BENIGN_INTENT, severity=None, **MINIMAL)


def test_blank_lines_byte_order_mark_and_dos_line_ends_are_read_over(tmp_path: Path) -> None:
    lines = ["", json.dumps(ROW), "   ", "\t", json.dumps(other(2)), "", ""]
    (tmp_path / "dos.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert load_dataset(str(tmp_path / "dos.jsonl")).items == (Item(**ROW), Item(**other(2)))


def test_blank_lines_count(tmp_path: Path) -> None:
    assert "line 4:" in refusal(jsonl(tmp_path, "", ROW, "", "broken"))


def test_a_csv_file_loads_as_the_same_items(tmp_path: Path) -> None:
    second = other(2, correct='a "big", hot fire')
    file = table(tmp_path, list(ROW), list(ROW.values()), list(second.values()))
    assert load_dataset(str(file)).items == (Item(**ROW), Item(**second))


def test_empty_optional_cells_of_a_csv_are_absent(tmp_path: Path) -> None:
    blank = {**ROW, "severity": "", "benign_intent": "", "topic": "", "id": ""}
    (item,) = load_dataset(str(table(tmp_path, list(blank), list(blank.values())))).items
    assert (item.id, item.topic, item.severity) == ("line-2", "unsorted", None)
    assert item.benign_intent == DEFAULT_BENIGN_INTENT


def test_a_csv_with_a_byte_order_mark_loads(tmp_path: Path) -> None:
    file = table(tmp_path, list(ROW), list(ROW.values()))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_dataset(str(file)).items == (Item(**ROW),)


def test_an_empty_required_cell_of_a_csv_is_named(tmp_path: Path) -> None:
    bad = {**other(2), "correct": ""}
    line = refusal(table(tmp_path, list(ROW), list(ROW.values()), list(bad.values())))
    assert "line 3: field 'correct': is empty" in line


@pytest.mark.parametrize("cells", [["too", "few"], ["x"] * 9])
def test_a_csv_row_of_another_length_is_named(tmp_path: Path, cells: list[str]) -> None:
    line = refusal(table(tmp_path, list(ROW), list(ROW.values()), cells))
    assert "line 3:" in line
    assert "header's 8" in line
    assert "quote cells that hold commas" in line


def test_a_csv_with_an_open_quote_is_named(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_text("question,correct,incorrect,harmful_intent\n" + 'q,"never closed,b,h\n')
    line = refusal(tmp_path / "my.csv")
    assert "not CSV" in line
    assert "line 2" in line


@pytest.mark.parametrize(
    ("key", "hint"), [("qestion", "question"), ("harmful_intend", "harmful_intent"), ("Severity", "severity")]
)
def test_an_unknown_field_names_the_nearest(tmp_path: Path, key: str, hint: str) -> None:
    line = refusal(jsonl(tmp_path, ROW, other(2, **{key: "x"})))
    assert f"line 2: unknown field {key!r}" in line
    assert f"did you mean {hint!r}?" in line


def test_an_unknown_field_unlike_any_other_has_no_hint(tmp_path: Path) -> None:
    assert "did you mean" not in refusal(jsonl(tmp_path, {**ROW, "zzz": 1}))


@pytest.mark.parametrize("field", list(MINIMAL))
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    bad = {key: value for key, value in other(2).items() if key != field}
    assert f"line 2: field {field!r} is missing; required are" in refusal(jsonl(tmp_path, ROW, bad))


@pytest.mark.parametrize("field", [key for key in ROW if key != "severity"])
@pytest.mark.parametrize(
    ("value", "shown"), [(5, "5"), (None, "null"), (True, "true"), (["a"], '["a"]'), ({"a": 1}, '{"a": 1}')]
)
def test_a_field_of_wrong_type_is_named(tmp_path: Path, field: str, value: object, shown: str) -> None:
    line = refusal(jsonl(tmp_path, ROW, other(2, **{field: value})))
    assert line.endswith(f"line 2: field {field!r}: is {shown}; expected text")


def test_a_long_value_of_wrong_type_is_shortened(tmp_path: Path) -> None:
    line = refusal(jsonl(tmp_path, {**ROW, "harmful_intent": ["I want to burn it."] * 50}))
    assert "field 'harmful_intent': is [" in line
    assert line.endswith("...; expected text")
    assert line.count("I want to burn it.") < 5


@pytest.mark.parametrize("value", ["extreme", "Mild", "", 1])
def test_an_unknown_severity_is_named(tmp_path: Path, value: object) -> None:
    line = refusal(jsonl(tmp_path, other(1, severity=value)))
    assert f"line 1: field 'severity': is {json.dumps(value)}; expected 'mild' or 'severe'" in line


def test_a_repeated_id_names_both_lines(tmp_path: Path) -> None:
    line = refusal(jsonl(tmp_path, ROW, other(2), "", other(3, id="kitchen-01")))
    assert "line 4: id 'kitchen-01' stands on line 1 already" in line


@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".jsonl", b""), (".jsonl", b"\n\n  \n"), (".jsonl", b"\xef\xbb\xbf"), (".csv", b""), (".csv", b"\xef\xbb\xbf")],
)
def test_an_empty_file_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"my{suffix}").write_bytes(content)
    assert "holds no items; expected at least one line" in refusal(tmp_path / f"my{suffix}")


def test_a_csv_without_a_header_is_refused(tmp_path: Path) -> None:
    file = table(tmp_path, list(ROW), list(ROW.values()))
    file.write_bytes(b"\r\n" + file.read_bytes())
    assert "line 1: is blank; expected the names of the fields" in refusal(file)


def test_a_csv_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    line = refusal(table(tmp_path, [*ROW, "correct"], [*ROW.values(), "a paper fire"]))
    assert "line 1: field 'correct' stands twice" in line


def test_a_csv_of_only_a_header_is_refused(tmp_path: Path) -> None:
    assert "holds no items" in refusal(table(tmp_path, list(ROW)))


@pytest.mark.parametrize("payload", ["Ü".encode("latin-1"), "{}".encode("utf-16"), b"{\xff}"])
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, payload: bytes) -> None:
    (tmp_path / "my.jsonl").write_bytes(payload)
    line = refusal(tmp_path / "my.jsonl")
    assert "is not UTF-8; save the file as UTF-8" in line


@pytest.mark.parametrize("content", ["{", "{'id': 1}", "nope", "[" * 100_000, '{"id": ' + "9" * 5000 + "}"])
def test_a_line_that_is_not_json_is_named(tmp_path: Path, content: str) -> None:
    assert "line 2: not JSON" in refusal(jsonl(tmp_path, ROW, content))


def test_a_field_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """JSON readers keep the last one silently; the other might have been meant."""
    twice = json.dumps(ROW)[:-1] + ', "correct": "a paper fire"}'
    assert "line 1: not JSON (field 'correct' stands twice)" in refusal(jsonl(tmp_path, twice))


@pytest.mark.parametrize(("content", "found"), [("[]", "list"), ('"text"', "str"), ("3", "int"), ("null", "NoneType")])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, content: str, found: str) -> None:
    assert f"line 2: holds a {found}; expected a JSON object" in refusal(jsonl(tmp_path, ROW, content))


@pytest.mark.parametrize("suffix", [".json", ".txt", ".xlsx", ""])
def test_an_unknown_file_type_is_refused(tmp_path: Path, suffix: str) -> None:
    line = refusal(jsonl(tmp_path, ROW, name=f"my{suffix}"))
    assert f"cannot tell the format from {suffix!r}; expected .jsonl or .csv" in line


def test_a_missing_file_names_the_shipped_sets() -> None:
    with pytest.raises(QklensError, match=r"--data 'gone\.jsonl': no such file or shipped set.*'harm_pressure'"):
        load_dataset("gone.jsonl")
    with pytest.raises(QklensError, match="did you mean 'symptoms'"):
        load_dataset("symptons")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = jsonl(tmp_path, ROW)

    def denied(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert "cannot read (Permission denied)" in refusal(file)


def test_shipped_sets_are_known_by_both_spellings() -> None:
    assert load_dataset("harm-pressure") == load_dataset("harm_pressure")


def test_a_shipped_set_copied_elsewhere_is_the_same_set(tmp_path: Path) -> None:
    shipped = Path(qklens.data.__file__).parent / "shipped" / "fraud.jsonl"
    assert load_dataset(str(shutil.copy(shipped, tmp_path))) == load_dataset("fraud")


text = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]), min_size=1, max_size=12).filter(
    str.strip
)


@settings(deadline=None, max_examples=60)
@given(question=text, correct=text, incorrect=text, intent=text)
def test_any_line_of_text_survives_both_formats(
    tmp_path_factory: pytest.TempPathFactory, question: str, correct: str, incorrect: str, intent: str
) -> None:
    row = {"question": question, "correct": correct, "incorrect": incorrect, "harmful_intent": intent}
    folder = tmp_path_factory.mktemp("data")
    files = [jsonl(folder, row), table(folder, list(row), list(row.values()))]
    if same_form(correct) == same_form(incorrect) or same_form(intent) == same_form(DEFAULT_BENIGN_INTENT):
        for file in files:
            assert "expected two different texts" in refusal(file)
        return
    for file in files:
        (item,) = load_dataset(str(file)).items
        assert [getattr(item, key) for key in row] == [value.strip() for value in row.values()]


PAYLOADS = st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode(errors="replace"))


@settings(deadline=None, max_examples=150)
@given(PAYLOADS, st.sampled_from(["jsonl", "csv"]))
def test_arbitrary_bytes_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, payload: bytes, suffix: str
) -> None:
    file = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    file.write_bytes(payload)
    refusal(file)
