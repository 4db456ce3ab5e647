"""A spec from a YAML or JSON file: one mapping, each key once, read without running anything."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from qklens.errors import QklensError, reason
from qklens.studies.steer_spec import SteerSpec

_MOST_BYTES = 1 << 16
_SUFFIXES = (".json", ".yaml", ".yml")


def read_spec(path: Path) -> SteerSpec:
    """The sweep that a file holds.

    Raises:
        QklensError: as `read_mapping`; also a key that is unknown, a value of another kind, or a combination that
            cannot exist.
    """
    return SteerSpec.parse(read_mapping(path, "--spec"), str(path))


def read_mapping(path: Path, flag: str) -> dict[str, object]:
    """Keys and values of a YAML or JSON file.

    Args:
        path: the file.
        flag: the option that named it, for errors.

    Raises:
        QklensError: another kind of file, one that cannot be read, or a key that stands twice.
    """
    if path.suffix not in _SUFFIXES:
        raise QklensError(f"{flag} {path}: expected a name that ends in {', '.join(_SUFFIXES)}")
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise QklensError(f"{flag} {path}: cannot read ({error.strerror}); expected a YAML or JSON file") from error
    if len(data) > _MOST_BYTES:
        raise QklensError(f"{flag} {path}: is larger than {_MOST_BYTES} bytes; expected a spec of a few lines")
    try:
        text = data.decode("utf-8-sig")
        given = json.loads(text, object_pairs_hook=_distinct) if path.suffix == ".json" else _yaml(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise QklensError(f"{path}: not {kind} that holds a spec ({reason(error)}); repair the file") from error
    if not isinstance(given, dict):
        raise QklensError(f"{path}: holds a {type(given).__name__}; expected keys and values, as `side: query`")
    return given


def _yaml(text: str) -> object:
    """Plain YAML. A document may name a part and repeat it without end, so aliases are refused."""
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ValueError("it repeats a part by an alias; write it out")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(node, yaml.MappingNode):
        if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise ValueError("a key is a list or a mapping; expected names, as `side: query`")
        _distinct([(key.value, None) for key, _ in node.value])
    return yaml.safe_load(text)


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"key {name!r} stands twice")
    return dict(pairs)
