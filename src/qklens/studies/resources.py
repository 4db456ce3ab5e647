"""What a configuration names, found: the model's directory, its base, checkpoints between, and its dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qklens.dictionaries.random_control import RandomLaw
from qklens.errors import QklensError, nearest
from qklens.files import read_json
from qklens.models.locate import locate_model
from qklens.studies.config import SHIPPED_ORGANISM, LabConfig, StudyConfig

DIRECTIONS, WHITENED = "directions", "directions:whitened"
ORGANISM_FOLDER = "shipped/organism"
_CONTROLS: dict[str, RandomLaw] = {"random:": "isotropic", "random-covariance:": "covariance"}


@dataclass(frozen=True)
class SourceChoice:
    """Which source of features was asked for.

    Attributes:
        folder: a dictionary directory, or None for contrast directions.
        whitened: whether the directions are whitened.
        law: how directions are drawn of its frozen-random control, or None for the source itself.
    """

    folder: Path | None
    whitened: bool = False
    law: RandomLaw | None = None

    def identity(self, sha256: str | None) -> str | None:
        """What a manifest compares: the dictionary's hash or the directions' kind, and the control's law."""
        of = sha256 if self.folder else WHITENED if self.whitened else DIRECTIONS
        return of if self.law is None else f"random-{self.law}:{of}"


@dataclass(frozen=True)
class Resources:
    """Directories to load from.

    Attributes:
        model: the model under study.
        checkpoints: (name, directory) in the order of training, without the model itself.
        source: the source of features.
    """

    model: Path
    checkpoints: tuple[tuple[str, Path], ...]
    source: SourceChoice


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
    return Resources(model, tuple(checkpoints), source_choice(config))


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


def source_choice(config: LabConfig) -> SourceChoice:
    """What `--dictionary` names.

        [random:|random-covariance:](a dictionary directory | organism | directions | directions:whitened)

    Nothing is the model's own dictionary where one ships, else contrast directions.

    Raises:
        QklensError: no such directory.
    """
    name, law = config.dictionary, None
    for prefix, its_law in _CONTROLS.items():
        if name is not None and name.startswith(prefix):
            name, law = name.removeprefix(prefix), its_law
            break
    shipped = organism_folder() / "dictionary"
    if name is None:
        return SourceChoice(shipped if config.model == SHIPPED_ORGANISM else None)
    if name in (DIRECTIONS, WHITENED):
        return SourceChoice(None, name == WHITENED, law)
    folder = shipped if name == SHIPPED_ORGANISM else Path(name).expanduser()
    if not folder.is_dir():
        known = [*_CONTROLS, DIRECTIONS, WHITENED, SHIPPED_ORGANISM]
        raise QklensError(
            f"--dictionary {config.dictionary}: no such directory; expected one, {DIRECTIONS!r} or {WHITENED!r}, each "
            f"with 'random:' or 'random-covariance:' before it for its control{nearest(config.dictionary or '', known)}"
        )
    return SourceChoice(folder, False, law)
