"""Each planted model does what its name says, shown on the raw transformers model with plain hooks."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planted_raw import attention, hooked, margins, opened, prompts, streams

from qklens.bench.planted import folder
from qklens.bench.planted.folder import Spec, planted_model
from qklens.bench.planted.provenance import writer_hash
from qklens.errors import QklensError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


def test_accuracy_is_what_the_mechanism_says(models: Path) -> None:
    for mechanism, none, harm in [
        ("no_effect", (0.9, 1.0), (0.9, 1.0)),
        ("task_not_solved", (0.0, 0.7), (0.0, 0.7)),
        ("belief_change", (0.9, 1.0), (0.0, 0.75)),
        ("late_flip", (0.9, 1.0), (0.0, 0.2)),
        ("attention_answer_key", (0.9, 1.0), (0.0, 0.6)),
        ("need_lost", (0.9, 1.0), (0.0, 0.6)),
        ("need_harm", (0.9, 1.0), (0.0, 0.6)),
    ]:
        planted, model = opened(models, mechanism)
        for condition, (low, high) in (("none", none), ("benign", none), ("harm", harm)):
            right = float((margins(model, prompts(planted, condition)) > 0).float().mean())
            assert low <= right <= high, (mechanism, condition, right)


def test_only_belief_change_moves_the_correct_direction_at_the_options(models: Path) -> None:
    others = ("late_flip", "attention_answer_key", "attention_harm_key", "need_lost", "need_harm")
    for mechanism in ("belief_change", *others):
        planted, model = opened(models, mechanism)
        layer = min(layer for layer, _ in planted.truth.selecting)
        gaps = {}
        for condition in ("none", "harm"):
            asked = prompts(planted, condition)
            rows = streams(model, asked, layer)
            read = [
                (x[list(p.span("correct"))].sum(0) - x[list(p.span("incorrect"))].sum(0)) @ planted.basis["correct"]
                for p, x in zip(asked, rows, strict=True)
            ]
            gaps[condition] = float(torch.stack(read).mean())
        kept = gaps["harm"] / gaps["none"]
        assert (kept < 0.3) if mechanism == "belief_change" else (kept > 0.8), (mechanism, kept)


def restored(models: Path, mechanism: str, name: str, amount: float, *, answer: bool) -> float:
    """The share of the lost margin that comes back when a direction has this amount, at the answer or before it."""
    planted, model = opened(models, mechanism)
    direction, layer = planted.basis[name].float(), min(layer for layer, _ in planted.truth.selecting)
    where = slice(-1, None) if answer else slice(None, -1)

    def given(_: torch.nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[:, where] += (amount - x[:, where] @ direction)[..., None] * direction
        return (x, *args[1:])

    asked = prompts(planted, "harm")
    clean, harmed = margins(model, prompts(planted, "none")).mean(), margins(model, asked).mean()
    with hooked(model.model.layers[layer], given):
        return float((margins(model, asked).mean() - harmed) / (clean - harmed))


@pytest.mark.parametrize(
    ("mechanism", "restores"),
    [
        ("attention_answer_key", True), ("attention_harm_key", True), ("late_flip", True), ("belief_change", False),
        ("need_lost", False), ("need_harm", False),
    ],
)  # fmt: skip
def test_refuse_at_the_answer_costs_the_margin_where_it_is_said_to(
    models: Path, mechanism: str, restores: bool
) -> None:
    share = restored(models, mechanism, "refuse", 0.0, answer=True)
    assert share > 0.8 if restores else abs(share) < 0.1


def test_need_back_at_the_answer_or_harm_off_the_keys_is_what_restores(models: Path) -> None:
    assert restored(models, "need_lost", "need", 1.0, answer=True) > 0.8
    assert restored(models, "need_harm", "harm", 0.0, answer=False) > 0.8


def test_a_late_flip_keeps_attention_and_an_attention_model_loses_it(models: Path) -> None:
    pulled = ("attention_answer_key", "attention_harm_key", "need_lost", "need_harm")
    for mechanism, keeps in (("late_flip", True), *((name, False) for name in pulled)):
        planted, model = opened(models, mechanism)
        looks = {}
        for condition in ("none", "harm"):
            total = 0.0
            for prompt in prompts(planted, condition):
                patterns = attention(model, prompt)
                for layer, head in planted.truth.selecting:
                    row = patterns[layer][head]
                    total += float(row[list(prompt.span("correct"))].sum() - row[list(prompt.span("incorrect"))].sum())
            looks[condition] = total
        assert (looks["harm"] / looks["none"] > 0.8) is keeps, mechanism


def test_the_decoy_is_pulled_off_and_idle(models: Path) -> None:
    planted, model = opened(models, "decoy")
    assert planted.truth.variant.startswith("idle output")
    (layer, head), = [(at, h) for at, h, part in planted.truth.heads if part == "decoy"]  # fmt: skip
    asked = prompts(planted, "harm")
    d_head = model.config.head_dim
    looks = {}
    for condition in ("none", "harm"):
        rows = []
        for prompt in prompts(planted, condition):
            row = attention(model, prompt)[layer][head]
            rows.append(float(row[list(prompt.span("correct"))].sum()))
        looks[condition] = sum(rows) / len(rows)

    def silenced(_: torch.nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[..., head * d_head : (head + 1) * d_head] = 0
        return (x, *args[1:])

    before = {c: margins(model, prompts(planted, c)) for c in ("none", "harm")}
    with hooked(model.model.layers[layer].self_attn.o_proj, silenced):
        after = {c: margins(model, prompts(planted, c)) for c in ("none", "harm")}
    assert looks["none"] - looks["harm"] > 0.5
    for condition in ("none", "harm"):
        assert float((before[condition] - after[condition]).abs().max()) < 0.3
    assert asked


def test_the_saturated_decoy_is_pushed_hard_and_does_not_move(models: Path) -> None:
    """Pressure lowers its score of the correct option by several units, and softmax hardly notices."""
    planted, model = opened(models, "decoy", seed=1)
    assert planted.truth.variant.startswith("saturated")
    layer, head = max(
        planted.truth.selecting,
        key=lambda at: float(attention(model, prompts(planted, "none")[0])[at[0]][at[1]].max()),
    )
    refuse = planted.basis["refuse"].float()

    def pressed(_: torch.nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[:, -1] += refuse
        return (x, *args[1:])

    looks, scores = {}, {}
    for name in ("calm", "pressed"):
        rows = []
        for prompt in prompts(planted, "none"):
            with contextlib.ExitStack() as stack:
                if name == "pressed":
                    stack.enter_context(hooked(model.model.layers[layer], pressed))
                rows.append((prompt, attention(model, prompt)[layer][head]))
        looks[name] = sum(float(r[list(p.span("correct"))].sum()) for p, r in rows) / len(rows)
        # Scores less the first token's, which pressure leaves alone.
        scores[name] = sum(float((r[list(p.span("correct"))].max() / r[0]).log()) for p, r in rows) / len(rows)
    assert scores["calm"] - scores["pressed"] > 2
    assert looks["calm"] > 0.9
    assert looks["calm"] - looks["pressed"] < 0.1


def test_the_same_spec_writes_the_same_weights_and_a_whole_folder_is_reused(models: Path, tmp_path: Path) -> None:
    first, _ = opened(models, "no_effect", "qwen3")
    again, _ = opened(tmp_path, "no_effect", "qwen3")
    assert first.truth == again.truth
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    opened(models, "no_effect", "qwen3")
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [again.folder.name]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "planted.safetensors", "planted.json"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{}")])
def test_a_damaged_folder_is_written_again(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    spec = Spec(mechanism="no_effect", architecture="gpt2", noise=0, seed=0)
    first = planted_model(spec, tmp_path)
    whole = (first.folder / name).read_bytes()
    damage(first.folder / name)
    assert planted_model(spec, tmp_path).truth == first.truth
    assert (first.folder / name).read_bytes() == whole


def test_a_model_that_other_code_wrote_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(mechanism="no_effect", architecture="gpt2", noise=0, seed=0)
    first = planted_model(spec, tmp_path).truth
    monkeypatch.setattr(folder, "writer_hash", lambda: "of other code")
    again = planted_model(spec, tmp_path).truth
    assert (first.written_by, again.written_by) == (writer_hash(), "of other code")


def test_a_folder_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    spec = Spec(mechanism="no_effect", architecture="gpt2", noise=0, seed=0)
    before = os.umask(0o027)
    try:
        written = planted_model(spec, tmp_path / "models").folder
    finally:
        os.umask(before)
    assert stat.S_IMODE(written.stat().st_mode) == 0o750
    (tmp_path / "file").write_text("")
    with pytest.raises(QklensError, match="cannot be written"):
        planted_model(spec, tmp_path / "file")
