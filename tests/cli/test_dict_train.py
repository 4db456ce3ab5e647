"""`qklens dict train` on a tiny model: what it makes of each kind, how it resumes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qklens.data.items import load_dataset
from qklens.dictionaries.formats.detect import load_dictionary
from qklens.dictionaries.model_diff import load_model_diff
from qklens.studies.training_progress import training_progress
from tiny_folders import edit_tensors, tree

NUMBERS = ("--features", "24", "--k", "3", "--steps", "12", "--batch", "16", "--context", "32")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Questions of the shipped items, as texts and as chats."""
    path = tmp_path / "corpus.jsonl"
    rows: list[dict[str, object]] = []
    for i, item in enumerate(load_dataset("harm_pressure").items[:30]):
        chat = {"messages": [{"role": "user", "content": item.question}]}
        rows.append({"text": item.question} if i % 2 else chat)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def train(qklens: Callable[..., Any], model: Path, corpus: Path) -> Callable[..., Any]:
    def run(*more: object) -> Any:
        return qklens("dict", "train", "--corpus", corpus, "--model", model, *more)

    return run


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        (("--activation", "topk", "--steps", "60"), "1"),
        (("--activation", "batch_topk", "--kind", "crosscoder", "--steps", "120"), "0,1"),
    ],
)
def test_a_dictionary_is_trained_measured_and_ready_to_be_checked(
    train: Callable[..., Any], qklens: Callable[..., Any], model: Path, kind: tuple[str, ...], layers: str
) -> None:
    ended = train(*NUMBERS, *kind, "--layers", layers, "--out", "made", "--json")
    assert ended.status == 0, ended
    described = json.loads(ended.out)
    assert described["layers"] == [int(layer) for layer in layers.split(",")]
    assert described["n_features"] == 24 * len(described["layers"])
    assert described["fidelity"]["loss_recovered"]
    loaded = load_dictionary(Path("made"))
    assert loaded.describe() == described
    steps = [json.loads(line) for line in Path("made/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == ([0, 50, 100, 119] if "120" in kind else [0, 50, 59])
    assert set(steps[0]) == {"step", "loss", "fvu", "l0", "dead"}
    assert "L0" in ended.err
    checked = qklens("dict", "check", "made", "--model", model)
    assert checked.status == 0, checked


def test_cached_and_streamed_activations_give_the_same_bytes_and_a_second_run_changes_nothing(
    train: Callable[..., Any],
) -> None:
    assert train(*NUMBERS, "--layers", "1", "--out", "one").status == 0
    assert train(*NUMBERS, "--layers", "1", "--out", "two/one", "--cache", "cache").status == 0
    weights = [Path(folder, "dictionary.safetensors") for folder in ("one", "two/one")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    before = tree(Path("one"))
    assert train(*NUMBERS, "--layers", "1", "--out", "one").status == 0
    assert tree(Path("one")) == before


def test_a_crosscoder_over_two_checkpoints(
    train: Callable[..., Any], qklens: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(model, tmp_path / "base"))
    edit_tensors(base / "model.safetensors", lambda t: next(iter(t.values())).mul_(1.5))
    numbers = (*NUMBERS, "--steps", "120", "--activation", "batch_topk")
    ended = train(*numbers, "--kind", "model_diff", "--base-model", base, "--layers", "1", "--out", "diff")
    assert ended.status == 0, ended
    assert "crosscoder over two checkpoints diff, 24 features" in ended.out
    diff = load_model_diff(Path("diff"))
    assert diff.config.fidelity is not None
    assert set(diff.config.fidelity.fraction_variance_unexplained) == {"base", "chat"}
    assert diff.config.base_sha256 != diff.config.chat_sha256
    checked = qklens("dict", "check", "diff", "--model", model, "--base-model", base)
    assert checked.status == 0, checked
    assert "held against the record of the same batch: within the recorded tolerance" in checked.out
    for command in (("dict", "check", "diff", "--model", model), ("dict", "show", "diff", "L1/3", "--model", model)):
        line = qklens(*command).refused()
        assert "is a crosscoder over two checkpoints" in line
        assert "--base-model" in line


def test_the_same_keys_from_a_file(qklens: Callable[..., Any], model: Path, corpus: Path) -> None:
    training = {"kind": "sae", "layers": [1], "features": 24, "activation": "relu", "sparsity": 0.5, "steps": 6,
                "batch": 16, "learning_rate": 1e-3}  # fmt: skip
    given = {"model": str(model), "corpus": str(corpus), "out": "made", "training": training}
    Path("train.json").write_text(json.dumps(given))
    assert qklens("dict", "train", "--config", "train.json").status == 0
    assert (
        "--config train.json and --layers contradict each other"
        in qklens("dict", "train", "--config", "train.json", "--layers", "2").refused()
    )
    Path("wrong.json").write_text(json.dumps({**given, "training": {**training, "sparsty": 1}}))
    assert (
        "key 'training.sparsty' is unknown; did you mean 'sparsity'?"
        in qklens("dict", "train", "--config", "wrong.json").refused()
    )
    Path("wrong.json").write_text(json.dumps({**given, "modle": 1}))
    assert (
        "key 'modle' is unknown; did you mean 'model'?" in qklens("dict", "train", "--config", "wrong.json").refused()
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--layers", "one"), "--layers 'one': expected numbers joined by commas"),
        (("--layers", "9"), "--layers 9: model 'model' has layers 0 to 1"),
        (("--layers", "1,0"), "is [1, 0]; expected distinct layers in rising order"),
        (("--layers", "0,1"), "kind 'sae' has one layer"),
        (("--steps", "9", "--tokens", "9"), "needs --steps or --tokens, and one of them alone"),
        (("--activation", "topp"), "key 'training.activation'"),
        (("--kind", "model_diff"), "kind 'model_diff' needs a base model"),
        (("--base-model", "x"), "no other kind takes one"),
        (("--sparsity", "1"), "activation 'topk' takes no 'sparsity'"),
        (("--k", "25"), "k is 25, features are 24"),
        (("--corpus", "gone.txt"), "--corpus gone.txt: cannot read"),
        (("--corpus", "gone.csv"), "expected a name that ends in"),
        (("--dtype", "floot32"), "did you mean 'float32'"),
        (("--layers", "9" * 5000), "expected numbers joined by commas"),
        (("--device", "auto"), "a dictionary is trained on one device; name it, as cuda"),
        (("--features", "1" + 12 * "0"), "bytes on cpu"),
        (("--features", "1" + 12 * "0", "--cache", "cache"), "are free; give fewer --features"),
        (("--out", "../six.jsonl"), "six.jsonl is a file; choose another --out"),
        (("--out", "../six.jsonl/made"), "six.jsonl is a file; choose another --out"),
        (("--cache", "../six.jsonl"), "six.jsonl is a file; choose another --cache"),
        (("--cache", "../model"), "and no manifest.json; expected a new or empty folder"),
        (("--out", "../model"), "and no run.json; expected a new or empty folder"),
        (("--cache", "made", "--model", "gone"), "--cache made and --out made are one folder; give two"),
        (("--cache", "made/cache", "--model", "gone"), "--cache made/cache and --out made lie one in the other"),
        (("--cache", "x", "--out", "x/../x/made"), "--cache x and --out x/../x/made lie one in the other"),
        (("--tensorboard", "../six.jsonl"), "six.jsonl is a file; choose another --tensorboard"),
        (("--tensorboard", "../six.jsonl/board"), "six.jsonl is a file; choose another --tensorboard"),
        (("--tensorboard", "x" * 300), "cannot be written (File name too long); choose another --tensorboard"),
        (("--activation", "relu"), "dict train: activation 'relu' needs 'sparsity'; give a number"),
    ],
)
@pytest.mark.usefixtures("data")
def test_what_is_refused_leaves_nothing_behind(
    train: Callable[..., Any], model: Path, arguments: tuple[str, ...], says: str
) -> None:
    before = tree(model)
    given = [*NUMBERS] if "--tokens" not in arguments else [n for n in NUMBERS if n not in ("--steps", "12")]
    layers = () if "--layers" in arguments else ("--layers", "1")
    if "--tokens" in arguments:
        given += ["--steps", "12"]
    assert says in train(*given, *layers, "--out", "made", *arguments).refused()
    assert tree(Path()) == {}
    assert tree(model) == before


def test_held_out_text_that_does_not_vary_is_refused_before_anything_is_written(
    train: Callable[..., Any], corpus: Path
) -> None:
    corpus.write_text('{"text": "Which way"}\n' * 50)
    line = train(*NUMBERS, "--layers", "1", "--out", "made", "--cache", "cache").refused()
    assert "resid_pre.1 is the same at all 2 held-out tokens, so there is no variance to explain; give more" in line
    assert tree(Path()) == {}


def test_other_models_corpora_and_numbers_are_refused_with_both_sides(
    train: Callable[..., Any], model: Path, corpus: Path
) -> None:
    common = (*NUMBERS, "--layers", "1", "--out", "made")
    assert train(*common, "--cache", "cache").status == 0
    before = tree(Path())
    line = train(*common, "--cache", "cache", "--seed", "5").refused()
    assert "--out made: was begun with training.seed 0, this command has 5" in line
    line = train(*NUMBERS, "--layers", "0", "--out", "other", "--cache", "cache").refused()
    assert "--cache cache: was begun with layers [1], this command has [0]" in line
    corpus.write_text(corpus.read_text() + '\n{"text": "Which way?"}')
    assert "--cache cache: was begun with corpus" in train(*common, "--cache", "cache").refused()
    assert "--out made: was begun with corpus" in train(*common).refused()
    edit_tensors(model / "model.safetensors", lambda t: next(iter(t.values())).mul_(1.5))
    assert "--cache cache: was begun with models" in train(*common, "--cache", "cache").refused()
    assert tree(Path()) == before


def test_a_truncated_shard_is_refused(train: Callable[..., Any]) -> None:
    common = (*NUMBERS, "--layers", "1", "--cache", "cache")
    assert train(*common, "--out", "made").status == 0
    shard = Path("cache/shard-00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-5])
    assert "its mark says" in train(*common, "--out", "again").refused()
    assert not Path("again/checkpoints").exists()


def test_metrics_for_tensorboard(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert train(*NUMBERS, "--layers", "1", "--out", "made", "--tensorboard", "board").status == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("board")
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "fvu", "l0", "dead"}
    steps = [json.loads(line) for line in Path("made/metrics.jsonl").read_text().splitlines()]
    assert [e.value for e in events.Scalars("fvu")] == pytest.approx([row["fvu"] for row in steps])
    assert [e.step for e in events.Scalars("fvu")] == [row["step"] for row in steps]


def test_without_tensorboard_the_extra_is_named(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    line = train(*NUMBERS, "--layers", "1", "--out", "made", "--tensorboard", "board").refused()
    assert "needs the package 'tensorboard': pip install 'qklens[tensorboard]'" in line
    assert tree(Path()) == {}


def test_only_the_first_of_several_processes_speaks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the number that `torchrun` gives a process."""
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with training_progress(3) as (report, caching):
            report(0, {"loss": 1.0, "fvu": 1.0, "l0": 1.0, "dead": 0.0})
            caching(2)()
        said.append(capfd.readouterr().err)
    assert "step 0" in said[0]
    assert said[1] == ""


def test_training_leaves_the_global_generator_alone(train: Callable[..., Any]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert train(*NUMBERS, "--layers", "1", "--out", "made").status == 0
    assert torch.equal(torch.rand(2), expected)
