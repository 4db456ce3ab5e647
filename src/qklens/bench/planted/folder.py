"""A planted model on disk: a directory as any model's, and beside it a file with the truth that no study reads."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save

from qklens.bench.planted.basis import Basis, draw_basis
from qklens.bench.planted.blueprint import Blueprint, Graded, Mechanism, Verdict
from qklens.bench.planted.graded import EVERY, graded_blueprint, right_verdict
from qklens.bench.planted.mechanisms import MECHANISMS, blueprint
from qklens.bench.planted.noise import LEVELS
from qklens.bench.planted.provenance import writer_hash
from qklens.bench.planted.weights import ARCHITECTURES, Architecture, Written, write_model
from qklens.bench.planted.words import planted_tokenizer
from qklens.errors import QklensError
from qklens.files import atomic_write, read_json, write_json
from qklens.strict import Strict

TRUTH_FILE, BASIS_FILE = "planted.json", "planted.safetensors"


class Spec(Strict):
    """Which planted model; a graded one has a strength, see `graded`."""

    mechanism: Mechanism | Graded
    architecture: Architecture
    noise: int
    seed: int
    strength: float | None = None

    @property
    def name(self) -> str:
        """The directory's name."""
        strength = "" if self.strength is None else f"-{self.strength:g}"
        return f"{self.mechanism}{strength}-{self.architecture}-noise{self.noise}-seed{self.seed}"


class PlantedSign(Strict):
    """A pair of roles that is planted at a head."""

    layer: int
    head: int
    query_role: str
    key_role: str
    sign: int


class Truth(Strict):
    """What is planted.

    Attributes:
        written_by: hash of the code that writes planted models.
        spec: what was asked for.
        expected: the verdict that is right.
        share: of a graded model, the first cause's share of the margin lost, as its weights have it.
        variant: the mechanism's form and the layout.
        heads: every planted head's part, by (layer, head).
        selecting: the answer-selection heads: they look at the correct option without pressure, and their output
            reaches the letter.
        signs: planted pairs, a decoy's among them; none where nothing tells which option is correct.
        files: SHA-256 of every other file of the folder, as written.
    """

    written_by: str
    spec: Spec
    expected: Verdict
    share: float | None = None
    variant: str
    heads: list[tuple[int, int, str]]
    selecting: list[tuple[int, int]]
    signs: list[PlantedSign]
    files: dict[str, str]


@dataclass(frozen=True, eq=False)
class Planted:
    """A planted model's directory, its truth and its basis."""

    folder: Path
    truth: Truth
    basis: Basis


def planted_model(spec: Spec, models: Path) -> Planted:
    """The model of a spec, written into `models` unless it lies there already, whole.

    Raises:
        QklensError: a level of noise that does not exist, a strength where there is none or none where there is one, or
            a folder that cannot be written.
    """
    if (spec.mechanism in MECHANISMS) is (spec.strength is not None):
        needs = "no strength" if spec.mechanism in MECHANISMS else "a strength between 0 and 1"
        raise QklensError(f"{spec.mechanism} with strength {spec.strength}: expected {needs}")
    if not 0 <= spec.noise < len(LEVELS):
        raise QklensError(f"noise level {spec.noise} does not exist; expected 0 to {len(LEVELS) - 1}")
    folder = models / spec.name
    try:
        return _kept(folder, spec) or _write(spec, folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise QklensError(f"{folder}: cannot be written ({reason}); free space or choose another --out") from error


def _kept(folder: Path, spec: Spec) -> Planted | None:
    """The model in a folder, if this code wrote it for this spec and every file is as it was written."""
    if not (folder / TRUTH_FILE).is_file():
        return None
    try:
        truth = Truth.model_validate(read_json(folder / TRUTH_FILE))
    except (ValidationError, QklensError):
        return None
    if (truth.written_by, truth.spec) != (writer_hash(), spec) or _hashes(folder) != truth.files:
        return None
    tensors = load_file(folder / BASIS_FILE)
    return Planted(folder, truth, Basis(tensors["vectors"], tensors["words"]))


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != TRUTH_FILE
    }


def _write(spec: Spec, folder: Path) -> Planted:
    """Write into a temporary directory and rename; the truth is part of what is renamed."""
    place = ARCHITECTURES.index(spec.architecture)
    seed = int.from_bytes(hashlib.sha256(spec.model_dump_json(exclude_none=True).encode()).digest()[:6], "big")
    noise = LEVELS[spec.noise]
    basis = draw_basis(noise.superposition, torch.Generator().manual_seed(seed))

    def write(plan: Blueprint) -> Written:
        return write_model(plan, spec.architecture, noise, basis, seed % 2**32)

    if spec.strength is None:
        plan = blueprint(cast("Mechanism", spec.mechanism), spec.seed, place)
        expected, share = plan.expected, None
    else:
        mechanism = cast("Graded", spec.mechanism)
        plans = {on: graded_blueprint(mechanism, spec.strength, spec.seed, place, on) for on in EVERY}
        expected, share = right_verdict(mechanism, {on: write(plan).model for on, plan in plans.items()})
        plan = plans[True, True]
    written = write(plan)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    temporary = scratch / folder.name  # made as any folder is, while the one around it is for its maker alone
    temporary.mkdir()
    try:
        written.model.config.save_pretrained(temporary)
        weights = {name: tensor.contiguous() for name, tensor in written.model.state_dict().items()}
        atomic_write(temporary / "model.safetensors", save(weights, {"format": "pt"}))
        planted_tokenizer().save_pretrained(temporary)
        atomic_write(
            temporary / BASIS_FILE, save({"vectors": basis.vectors.contiguous(), "words": basis.words.contiguous()})
        )
        heads = sorted((layer, h, head.part) for (layer, h), head in written.placed.items())
        truth = Truth(
            written_by=writer_hash(),
            spec=spec,
            expected=expected,
            share=share,
            variant=plan.variant,
            heads=heads,
            selecting=[(layer, h) for layer, h, part in heads if part in ("select", "relay")],
            signs=[
                PlantedSign(layer=layer, head=h, query_role=query, key_role=key, sign=sign)
                for (layer, h), head in sorted(written.placed.items())
                if head.part in ("select", "decoy")
                for (query, key), sign in head.signs.items()
                if spec.mechanism != "task_not_solved"
            ],
            files=_hashes(temporary),
        )
        write_json(temporary / TRUTH_FILE, truth.model_dump(mode="json"))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Planted(folder, truth, basis)


__all__ = ["ARCHITECTURES", "MECHANISMS", "Planted", "Spec", "Truth", "planted_model"]
