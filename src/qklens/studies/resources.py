"""What a configuration names, found: the model's directory, its base, checkpoints between, and its dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qklens.errors import QklensError
from qklens.files import read_json
from qklens.models.locate import locate_model
from qklens.studies.config import SHIPPED_ORGANISM, LabConfig, StudyConfig

DIRECTIONS = "directions"
ORGANISM_FOLDER = "shipped/organism"


@dataclass(frozen=True)
class Resources:
    """Directories to load from.

    Attributes:
        model: the model under study.
        checkpoints: (name, directory) in the order of training, without the model itself.
        dictionary: a dictionary directory, or None for contrast directions.
    """

    model: Path
    checkpoints: tuple[tuple[str, Path], ...]
    dictionary: Path | None


def organism_folder() -> Path:
    """Where the shipped organism lies."""
    return Path(str(files("qklens"))) / ORGANISM_FOLDER


def resolve(config: StudyConfig) -> Resources:
    """Find what a configuration names; `organism` and `organism:<checkpoint>` are the shipped models.

    Raises:
        QklensError: a name that is neither a shipped model nor a directory.
    """
    if config.engine != "local":
        raise QklensError(f"--engine {config.engine!r} is not available; expected 'local'")
    model = model_folder(config.model)
    checkpoints: list[tuple[str, Path]] = []
    if config.base_model is not None:
        checkpoints.append((Path(config.base_model).name, model_folder(config.base_model)))
        checkpoints += [(Path(name).name, model_folder(name)) for name in config.checkpoints]
    elif config.checkpoints:
        raise QklensError("--checkpoint needs --base-model: checkpoints lie between the base and the model")
    elif config.model.startswith(SHIPPED_ORGANISM) and model.parent == organism_folder():
        lineage = read_json(organism_folder() / "lineage.json")
        between = lineage["between"] if config.model == SHIPPED_ORGANISM else []
        names = (lineage["base"], *between) if model.name != lineage["base"] else ()
        checkpoints = [(name, organism_folder() / name) for name in names]
    return Resources(model, tuple(checkpoints), dictionary_folder(config))


def model_folder(name: str) -> Path:
    """The directory or GGUF file of a model given by shipped name, path or hub id."""
    if name == SHIPPED_ORGANISM:
        return organism_folder() / read_json(organism_folder() / "lineage.json")["chat"]
    if name.startswith(f"{SHIPPED_ORGANISM}:"):
        folder = organism_folder() / Path(name.partition(":")[2]).name
        if not folder.is_dir():
            have = sorted(p.parent.name for p in organism_folder().glob("*/config.json"))
            raise QklensError(f"--model {name!r}: no such checkpoint of the organism; expected one of {have}")
        return folder
    return locate_model(name)


def dictionary_folder(config: LabConfig) -> Path | None:
    """The directory of a configuration's dictionary; None for contrast directions.

    Raises:
        QklensError: no such directory.
    """
    if config.dictionary == DIRECTIONS:
        return None
    if config.dictionary is not None:
        folder = Path(config.dictionary).expanduser()
        if not folder.is_dir():
            raise QklensError(f"--dictionary {config.dictionary}: no such directory; expected one, or {DIRECTIONS!r}")
        return folder
    return organism_folder() / "dictionary" if config.model == SHIPPED_ORGANISM else None
