"""`qklens dict check` and `dict show` of a crosscoder over two checkpoints, with known features: a coordinate each.

Features 0 to 31 read and write a coordinate of base's stream with one sign, 32 to 63 of chat's. So the cards of either
half are those of a dictionary of that model alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qklens.dictionaries.activation import Relu
from qklens.dictionaries.crosscoder import save_crosscoder
from qklens.dictionaries.model_diff import ModelDiff, ModelDiffConfig, save_model_diff
from qklens.models.loading import load_subject
from qklens.studies.cards import ShownCard
from terminal import parsed
from tests.cli.test_dict import WIDTH, mirror
from tiny_folders import edit_json, edit_tensors, tree

OWN = 2 * WIDTH
TEXT = "Which gas do plants take in? Plants take in the gas. Which animal is the largest?\n\n" * 6


@pytest.fixture
def base(model: Path, tmp_path: Path) -> Path:
    """Another checkpoint of the same model."""
    folder = Path(shutil.copytree(model, tmp_path / "base"))
    edit_tensors(folder / "model.safetensors", lambda t: t["model.layers.0.mlp.down_proj.weight"].mul_(-2.0))
    return folder


@pytest.fixture
def diff(model: Path, base: Path, tmp_path: Path) -> Path:
    """The crosscoder, for these two models."""
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    sides = torch.zeros(2, 2 * OWN, WIDTH)
    sides[0, :OWN], sides[1, OWN:] = both, both
    shas = [load_subject(folder).sha256 or "" for folder in (base, model)]
    config = ModelDiffConfig(
        name="diff", layer=1, features=2 * OWN, d_model=WIDTH, activation=Relu(), site="resid_pre",
        base_sha256=shas[0], chat_sha256=shas[1], training={}, fidelity=None,
    )  # fmt: skip
    zeros = torch.zeros(2 * OWN), torch.zeros(2, WIDTH)
    folder = tmp_path / "diff"
    save_model_diff(ModelDiff(config, sides, zeros[0], sides.clone(), zeros[1], torch.full((2,), 0.4)), folder)
    return folder


@pytest.fixture
def asked(model: Path, data: Path, tmp_path: Path) -> tuple[object, ...]:
    (tmp_path / "text.txt").write_text(TEXT)
    return ("--data", data, "--text", tmp_path / "text.txt")


def card_of(qklens: Callable[..., Any], *words: object) -> ShownCard:
    ended = qklens("dict", "show", *words, "--json")
    assert ended.status == 0, ended
    return ShownCard.model_validate(parsed(ended.out))


def test_it_is_measured_in_both_models_recorded_and_held_to_the_record(
    qklens: Callable[..., Any], model: Path, base: Path, diff: Path
) -> None:
    check = ("dict", "check", diff, "--model", model, "--base-model", base)
    assert "no batch is recorded" in qklens(*check).out
    assert "recorded, with the batch" in qklens(*check, "--record").out
    found = json.loads(qklens(*check, "--json").out)
    assert (found["measured_on"], found["held_against"]) == ("recorded batch", "the record of the same batch")
    assert found["measured"]["l0"] == pytest.approx(2 * WIDTH, abs=0.1)
    for side in ("base", "chat"):
        assert found["measured"]["fraction_variance_unexplained"][side] < 1e-6
        share = found["measured"]["loss_recovered"][side]
        assert share is None or share == pytest.approx(1, abs=1e-3)
    assert "resid_pre of base" in qklens(*check).out

    edit_tensors(diff / "dictionary.safetensors", lambda t: t["scale"][1].mul_(1.01))
    assert "the scaled stream's mean square at resid_pre of chat is" in qklens(*check).refused()
    edit_tensors(diff / "dictionary.safetensors", lambda t: t["scale"][1].fill_(40))
    edit_json(diff / "dictionary.json", batch=None, fidelity=None)
    for asked in (check, ("dict", "show", diff, "L1/3", *check[3:])):
        assert "resid_pre of chat has mean square" in qklens(*asked).refused()


def test_weights_that_are_off_are_refused(
    qklens: Callable[..., Any], model: Path, base: Path, diff: Path, asked: tuple[object, ...]
) -> None:
    check = ("dict", "check", diff, "--model", model, "--base-model", base)
    assert "recorded, with the batch" in qklens(*check, "--record").out
    edit_tensors(diff / "dictionary.safetensors", lambda t: t["decoder"][0].mul_(1.05))
    assert "the fraction of variance unexplained at resid_pre of base is" in qklens(*check).refused()
    edit_tensors(diff / "dictionary.safetensors", lambda t: t["decoder"][0].div_(1.05))
    edit_tensors(diff / "dictionary.safetensors", lambda t: t["encoder"].mul_(1.02))
    assert "on its recorded batch the dictionary does not do what it did" in qklens(*check).refused()
    edit_json(diff / "dictionary.json", batch=None, fidelity=None)
    edit_tensors(diff / "dictionary.safetensors", lambda t: t["decoder"].mul_(-5))
    show = ("dict", "show", diff, "L1/3", *check[3:], *asked)
    assert "of the variance of resid_pre of base unexplained" in qklens(*show).refused()


def test_a_feature_s_card_is_that_of_its_own_model(
    qklens: Callable[..., Any], model: Path, base: Path, diff: Path, asked: tuple[object, ...], tmp_path: Path
) -> None:
    """What chat's half says of a coordinate is what a dictionary of the chat model alone says; likewise base's half."""
    save_crosscoder(mirror(), tmp_path / "alone", torch.float32)
    pair = (diff, "--model", model, "--base-model", base)
    for own_model, first, whose in ((model, OWN, 1.0), (base, 0, 0.0)):
        ours = card_of(qklens, pair[0], f"L1/{first + 3}", *pair[1:], *asked)
        alone = card_of(qklens, tmp_path / "alone", "L1/3", "--model", own_model, *asked)
        assert ours.checkpoints is not None
        assert ours.checkpoints.relative_norm == whose
        assert (ours.checkpoints.norm_base, ours.checkpoints.norm_chat) == (1 - whose, whose)
        assert [d.counts for d in ours.card.density] == [d.counts for d in alone.card.density]
        assert [d.largest for d in ours.card.density] == pytest.approx([d.largest for d in alone.card.density])
        for one, other in zip(ours.card.top, alone.card.top, strict=True):
            assert one.activation == pytest.approx(other.activation)
            assert [t.text for t in one.tokens] == [t.text for t in other.tokens]
        written = [(p.token_id, round(p.logit, 4)) for p in ours.card.promoted]
        wanted = [(p.token_id, round(p.logit, 4)) for p in alone.card.promoted]
        assert written == (wanted if whose else written)
    assert any(p.logit != 0 for p in alone.card.promoted)
    assert all(p.logit == 0 for p in ours.card.promoted), "it writes nothing in the chat model"
    page = qklens("dict", "show", pair[0], f"L1/{OWN + 3}", *pair[1:], *asked)
    assert "0% is base's and 100% chat's" in page.out


@pytest.mark.parametrize("law", ["random", "random-covariance"])
def test_its_control_reads_both_streams(
    qklens: Callable[..., Any], model: Path, base: Path, diff: Path, asked: tuple[object, ...], law: str
) -> None:
    pair = (f"L1/{OWN + 3}", "--model", model, "--base-model", base, *asked)
    control, own = card_of(qklens, f"{law}:{diff}", *pair), card_of(qklens, diff, *pair)
    assert control.dictionary["control_of"]["name"] == "diff"
    assert (control.checkpoints, own.checkpoints) != (None, None)
    assert control.card.norm == pytest.approx(own.card.norm)
    assert control.card.density[0].active > 0
    assert [p.token_id for p in control.card.promoted] != [p.token_id for p in own.card.promoted]


def test_it_is_refused_without_its_two_models_and_so_is_another_with_two(
    qklens: Callable[..., Any], model: Path, base: Path, diff: Path, tmp_path: Path
) -> None:
    before = tree(diff)
    for command in (("check", diff), ("show", diff, "L1/3"), ("show", f"random:{diff}", "L1/3")):
        assert "read it with --base-model B" in qklens("dict", *command, "--model", model).refused()
    swapped = qklens("dict", "check", diff, "--model", base, "--base-model", model).refused()
    assert "the two are swapped" in swapped
    assert "--base-model (" in swapped
    edit_json(diff / "dictionary.json", base_sha256="ab" * 32)
    line = qklens("dict", "show", diff, "L1/3", "--model", model, "--base-model", base).refused()
    assert "its base model has model_sha256 abababababab, that of --base-model" in line
    save_crosscoder(mirror(), tmp_path / "alone", torch.float32)
    for command in (("check", tmp_path / "alone"), ("show", tmp_path / "alone", "L1/3"), ("show", "directions", "x")):
        line = qklens("dict", *command, "--model", model, "--base-model", base).refused()
        assert "leave it out" in line
    assert set(tree(diff)) == set(before)
