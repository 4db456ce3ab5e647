"""The harm-pressure study from end to end: prepare, run the stages in order, decide, write."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from qklens.analyses.contrasts import ROLES
from qklens.data.items import SHIPPED, load_dataset
from qklens.dictionaries.config import Fidelity
from qklens.dictionaries.directions import Directions
from qklens.dictionaries.source import feature_index
from qklens.files import check_folder, sha256_files, write_json
from qklens.interventions.steer import Head
from qklens.models.loading import inspect_model, load_subject
from qklens.models.subject import Subject
from qklens.studies.choices import heads_to_read
from qklens.studies.config import StudyConfig
from qklens.studies.harm_pressure import (
    behaviour,
    belief,
    cards,
    causes,
    certainty,
    error_terms,
    heads,
    interactions,
    origin,
    partners,
    steering,
    transfer,
    verdict,
    zscores,
)
from qklens.studies.journal import Journal, StageOutput
from qklens.studies.lab import Lab
from qklens.studies.opening import load_source, open_lab, threads_for, use_source
from qklens.studies.progress import StageProgress
from qklens.studies.resources import Resources, resolve
from qklens.studies.results import BehaviourDetails, ConditionBehaviour, HeadsDetails, Results
from qklens.studies.roles import known_roles

_NARROW = 512


@dataclass(frozen=True)
class Stage:
    """One stage: its name, what it runs, and whether it only makes sense when the task is solved."""

    name: str
    run: Callable[[_Run], StageOutput]
    needs_solved: bool = False


@dataclass(eq=False)
class _Run:
    """A study under way: the lab, the dictionary's fidelity on its prompts, and what earlier stages left."""

    config: StudyConfig
    resources: Resources
    lab: Lab
    fidelity: Fidelity | None
    done: dict[str, StageOutput]

    @property
    def heads(self) -> list[Head]:
        """The heads that later stages look through: selected ones whose input the source writes, best first."""
        state = self.done["heads"].state
        selected, ranked = ([tuple(h) for h in state[name]] for name in ("selected", "ranked"))
        return heads_to_read(selected, ranked, self.lab.source.layers, self.lab.source.name)

    @property
    def pair_heads(self) -> list[Head]:
        """Of these the heads of layers to which every role's feature writes; pairs are looked at there."""
        source, roles = self.lab.source, self.roles
        features = [feature_index(source, label) for label in roles.values()]
        written = {layer for layer in source.layers if all(bool(source.directions(layer)[f].any()) for f in features)}
        return [head for head in self.heads if head[0] in written]

    @property
    def roles(self) -> dict[Any, str]:
        """The feature of each role."""
        return self.done["interactions"].state["roles"]


def _verdict(run: _Run) -> StageOutput:
    lab, done = run.lab, run.done
    details = done["heads"].results.get("heads_details")
    head_details = HeadsDetails.model_validate(details) if details else None
    solved = done["behaviour"].state["solved"]
    selected = [tuple(h) for h in done["heads"].state.get("selected", [])]
    measured = verdict.Measurements(
        behaviour={
            c: ConditionBehaviour.model_validate(row) for c, row in done["behaviour"].results["behaviour"].items()
        },
        details=BehaviourDetails.model_validate(done["behaviour"].results["behaviour_details"]),
        heads=head_details,
        causes=causes.measure_causes(lab, selected) if solved and selected else None,
    )
    found = certainty.qualified(verdict.decide(measured), measured.behaviour, head_details, len(lab.halves["report"]))
    return StageOutput(
        results={"verdict": found.model_dump()},
        state={"causes": measured.causes.model_dump(mode="json") if measured.causes else None},
    )


def _origin(run: _Run) -> StageOutput:
    if not run.resources.checkpoints:
        return StageOutput(skipped="no base model was given; add --base-model")

    checkpoints = [*_checkpoints(run.config, run.resources), (run.lab.subject.name, lambda: run.lab.subject)]
    return origin.run(run.lab, run.pair_heads, run.roles, checkpoints)


def _checkpoints(config: StudyConfig, resources: Resources) -> list[tuple[str, Callable[[], Subject]]]:
    load = partial(load_subject, device=config.device, dtype=config.dtype)
    return [(name, partial(load, path)) for name, path in resources.checkpoints]


STAGES: tuple[Stage, ...] = (
    Stage("behaviour", lambda r: behaviour.run(r.lab)),
    Stage("belief", lambda r: belief.run(r.lab)),
    Stage("heads", lambda r: heads.run(r.lab)),
    Stage(
        "interactions", lambda r: interactions.run(r.lab, r.heads, r.done["belief"].state["feature"], r.config.roles)
    ),
    Stage("cards", lambda r: cards.run(r.lab, r.done["interactions"].state["layer"], r.roles)),
    Stage("zscores", lambda r: zscores.run(r.lab, r.pair_heads, r.roles)),
    Stage("steer_all", lambda r: steering.steer_all(r.lab, r.pair_heads, r.roles), needs_solved=True),
    Stage("steer_query", lambda r: steering.steer_query(r.lab, r.pair_heads, r.roles), needs_solved=True),
    Stage("steer_key", lambda r: steering.steer_key(r.lab, r.pair_heads, r.roles), needs_solved=True),
    Stage(
        "error_terms",
        lambda r: error_terms.run(r.lab, r.pair_heads, r.roles, r.done["steer_query"].state.get("strength")),
    ),
    Stage("partners", lambda r: partners.run(r.lab, r.pair_heads, r.roles, r.config.items), needs_solved=True),
    Stage(
        "transfer",
        lambda r: transfer.run(r.lab, r.pair_heads, r.roles, r.done["steer_query"].state["strength"], r.config.items),
        needs_solved=True,
    ),
    Stage("origin", _origin, needs_solved=True),
    Stage("verdict", _verdict),
)


def run_study(
    config: StudyConfig, *, command: str = "", quiet: bool = False, leave_out: Collection[str] = ()
) -> tuple[Results, dict[str, Any]]:
    """Run the study, or resume it, and write `results.json` into `config.out`; returns results and manifest.

    Args:
        config: what to study.
        command: kept in the manifest.
        quiet: show no progress.
        leave_out: stages that are skipped by name, of those that the verdict does not read; `fidelity` leaves out the
            dictionary's loss recovered.

    Raises:
        QklensError: bad input of any kind; nothing is half-written.
    """
    check_folder(config.out, "--out")
    resources = resolve(config)
    lab = open_lab(config)
    subject = lab.subject
    source, fidelity = load_source(lab, resources.source.folder, losses="fidelity" not in leave_out)
    known_roles(source or Directions(tuple(ROLES), {}, {}), config.roles)
    origin.check(lab, _checkpoints(config, resources))
    files = {name: inspect_model(path).files for name, path in resources.checkpoints}
    hashes = {name: sha256_files(list(paths)) for name, paths in files.items()}
    hashes[subject.name] = sha256_files(list(inspect_model(resources.model).files))
    identity = resources.source.identity(source.sha256 if source else None)
    journal = Journal(config.out, _manifest(config, lab, identity, hashes, command))
    kept = {stage.name: journal.load(stage.name) for stage in STAGES}
    fidelity = use_source(lab, resources.source, source, fidelity)
    run = _Run(config, resources, lab, fidelity, {})
    progress = StageProgress(len(STAGES), quiet=quiet)
    with threads_for(subject), progress.running():
        for stage in STAGES:
            before = kept[stage.name]
            run.done[stage.name] = before or _run_stage(stage, run, journal, progress, stage.name in leave_out)
            progress.end(stage.name, run.done[stage.name].seconds, _note(run.done[stage.name], before))
    results = _collect(run)
    write_json(config.out / "results.json", results.model_dump(mode="json", by_alias=True))
    return results, journal.manifest


def _run_stage(stage: Stage, run: _Run, journal: Journal, progress: StageProgress, left_out: bool) -> StageOutput:
    progress.begin(stage.name)
    started = time.perf_counter()
    if left_out:
        output = StageOutput(skipped="left out by the caller")
    elif stage.needs_solved and not run.done["behaviour"].state["solved"]:
        output = StageOutput(skipped="the task is not solved without pressure, so there is no answer to restore")
    else:
        output = stage.run(run)
    output = output.model_copy(update={"seconds": time.perf_counter() - started})
    journal.save(stage.name, output)
    return output


def _note(output: StageOutput, before: StageOutput | None) -> str:
    return "done before" if before else f"skipped: {output.skipped}" if output.skipped else ""


def _manifest(
    config: StudyConfig, lab: Lab, dictionary: str | None, checkpoints: dict[str, str], command: str
) -> dict[str, Any]:
    subject = lab.subject
    packages = ("qklens", "torch", "transformers", "numpy", "safetensors")
    return {
        "schema": 1,
        "run": {
            "study": "harm_pressure",
            "model_sha256": subject.sha256,
            "dictionary_sha256": dictionary,
            "data_sha256": lab.dataset.sha256,
            "transfer_sha256": {name: load_dataset(name).sha256 for name in SHIPPED},
            "checkpoint_files_sha256": checkpoints,
            "base_model": config.base_model,
            "checkpoints": list(config.checkpoints),
            "items": len(lab.dataset.items),
            "roles": config.roles,
            "seed": config.seed,
            "device": config.device,
            "dtype": config.dtype,
            "letter_form": lab.form.name,
            **{f"{name}_version": version(name) for name in ("qklens", "torch", "transformers")},
        },
        "config": config.model_dump(mode="json"),
        "command": command,
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }


def _collect(run: _Run) -> Results:
    lab, merged = run.lab, dict[str, Any]()
    for output in run.done.values():
        for key, value in output.results.items():
            merged[key] = merged[key] + value if key == "steering" and key in merged else value
    empty = {
        key: []
        for key in ("heads", "roles", "interactions", "interaction_shares", "zscores", "null_histograms", "steering")
    }
    empty |= {"error_terms": [], "partners": [], "transfer": [], "origin": []}
    nothing = {"belief": None, "heads_details": None, "completeness": None}
    return Results.model_validate(
        {
            **empty,
            **nothing,
            **merged,
            "schema": 1,
            "model": lab.subject.describe(),
            "dictionary": {
                **lab.source.describe(),
                "fidelity_on_this_run": run.fidelity.model_dump(mode="json") if run.fidelity else None,
            },
            "data": {
                **lab.dataset.describe(),
                "n_discovery": len(lab.halves["discovery"]),
                "n_report": len(lab.halves["report"]),
                "letter_form": lab.form.name,
            },
            "skipped": {name: output.skipped for name, output in run.done.items() if output.skipped},
            "seconds": {name: output.seconds for name, output in run.done.items()},
        }
    )
