"""What `--dictionary` names, the manifest's name for each, and controls in the place of a dictionary."""

from __future__ import annotations

from pathlib import Path

import pytest

from qklens.errors import QklensError
from qklens.studies.config import LabConfig
from qklens.studies.resources import SourceChoice, organism_folder, source_choice


def chosen(dictionary: str | None, model: str = "organism") -> SourceChoice:
    return source_choice(LabConfig(model=model, dictionary=dictionary))


SHIPPED = organism_folder() / "dictionary"
NAMES = {
    None: SourceChoice(SHIPPED),
    "organism": SourceChoice(SHIPPED),
    "directions": SourceChoice(None),
    "directions:whitened": SourceChoice(None, whitened=True),
    "random:organism": SourceChoice(SHIPPED, law="isotropic"),
    "random-covariance:organism": SourceChoice(SHIPPED, law="covariance"),
    "random:directions": SourceChoice(None, law="isotropic"),
    "random-covariance:directions:whitened": SourceChoice(None, whitened=True, law="covariance"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_as_documented(name: str | None) -> None:
    assert chosen(name) == NAMES[name]


def test_a_model_without_a_dictionary_has_directions() -> None:
    assert chosen(None, "some/model") == SourceChoice(None)


def test_a_directory_may_be_a_control_too(tmp_path: Path) -> None:
    assert chosen(f"random:{tmp_path}") == SourceChoice(tmp_path, law="isotropic")


def test_no_two_sources_pass_for_each_other_in_a_manifest() -> None:
    identities = [choice.identity("hash" if choice.folder else None) for choice in NAMES.values()]
    assert identities[0] == identities[1] == "hash"
    assert len(set(identities[1:])) == len(identities) - 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("direction", "did you mean 'directions'"),
        ("directions:white", "did you mean 'directions:whitened'"),
        ("random:nowhere", "no such directory"),
        ("random:random:directions", "no such directory"),
        ("randomly:directions", "no such directory"),
        ("", "no such directory"),
        ("random:", "no such directory"),
    ],
)
def test_anything_else_is_refused_with_what_is_known(name: str, says: str) -> None:
    with pytest.raises(QklensError, match=says) as caught:
        chosen(name)
    assert "\n" not in str(caught.value)
