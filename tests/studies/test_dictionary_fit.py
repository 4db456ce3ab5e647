"""A dictionary that belongs to another model, or that fits the run's prompts badly, is refused with both numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qklens.data.items import Dataset, Item
from qklens.data.render import CONDITIONS, LetterForm
from qklens.dictionaries.config import DictionaryConfig, Fidelity
from qklens.dictionaries.crosscoder import Crosscoder, load_crosscoder
from qklens.dictionaries.source import fraction_variance_unexplained
from qklens.errors import QklensError
from qklens.models.loading import load_subject
from qklens.models.subject import Subject
from qklens.studies.dictionary_fit import CARD_FACTOR, CARD_SLACK, FVU_LIMIT, check_belongs, measure
from qklens.studies.lab import Lab
from qklens.studies.resources import organism_folder

FOLDER = Path("my-dictionary")
LAYERS = (1, 2)


def mirror(width: int, shrink: float = 0.0, **config: Any) -> Crosscoder:
    """Two features a coordinate, one for each sign: it writes x as (1 - shrink) x, with `width` features active."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    nothing = torch.zeros(2 * width, width)
    decoder = (1 - shrink) * both
    return Crosscoder(
        config=DictionaryConfig.model_validate(
            {
                "format": "qklens-dictionary-2",
                "name": "mirror",
                "layers": LAYERS,
                "features_per_layer": 2 * width,
                "d_model": width,
                "activation": {"kind": "threshold", "threshold": 0.0},
                "site": "resid_pre",
                "model_sha256": "",
                "training": {},
                "fidelity": None,
                **config,
            }
        ),
        encoder=dict.fromkeys(LAYERS, both),
        encoder_bias={layer: torch.zeros(2 * width) for layer in LAYERS},
        decoder={1: torch.cat([decoder, nothing]), 2: torch.cat([nothing, decoder])},
        decoder_bias={layer: torch.zeros(width) for layer in LAYERS},
    )


def card(fvu: float, l0: float = 32.0) -> Fidelity:
    return Fidelity(
        l0={layer: l0 * (i + 1) for i, layer in enumerate(LAYERS)},
        fraction_variance_unexplained=dict.fromkeys(LAYERS, fvu),
        loss_recovered=dict.fromkeys(LAYERS, 1.0),
    )


@pytest.fixture(scope="module")
def lab(tiny_llama: Callable[..., Subject], items: tuple[Item, ...]) -> Lab:
    return Lab(tiny_llama(), Dataset("few", items[:6], "00"), LetterForm("", ""), 0)


def fvu_of(lab: Lab, shrink: float) -> float:
    """The worse layer's FVU of a mirror, from the streams themselves: what is left of x is shrink x."""
    values = []
    for layer in LAYERS:
        rows = torch.cat([s[layer][1:] for c in CONDITIONS for s in lab.streams(c, "discovery", [layer])])
        values.append(fraction_variance_unexplained(rows, shrink * rows))
    return max(values)


def test_an_exact_dictionary_leaves_nothing_and_recovers_the_loss(items: tuple[Item, ...]) -> None:
    chat = Lab(load_subject(organism_folder() / "chat"), Dataset("few", items[:6], "00"), LetterForm("", ""), 0)
    found = measure(chat, mirror(chat.subject.d_model), FOLDER)
    for layer in LAYERS:
        assert found.fraction_variance_unexplained[layer] < 1e-9
        assert found.loss_recovered[layer] == pytest.approx(1.0, abs=1e-4)
        assert found.l0[layer] == chat.subject.d_model * len(mirror(chat.subject.d_model).reads(layer))


def test_a_model_that_predicts_no_better_than_the_mean_has_no_loss_to_recover(
    tiny_llama: Callable[..., Subject], items: tuple[Item, ...]
) -> None:
    """One that gives every token the same chance, whatever it reads: a share of nothing would be any number."""
    subject = tiny_llama()
    with torch.no_grad():
        subject.unembedding.weight.zero_()
    found = measure(
        Lab(subject, Dataset("few", items[:6], "00"), LetterForm("", ""), 0), mirror(subject.d_model), FOLDER
    )
    assert set(found.loss_recovered.values()) == {None}


def test_what_is_measured_is_the_run_s_own(lab: Lab) -> None:
    found = measure(lab, mirror(lab.subject.d_model, shrink=0.3), FOLDER)
    worst = max(found.fraction_variance_unexplained.values())
    assert worst == pytest.approx(fvu_of(lab, 0.3), rel=1e-3)
    assert worst > 0.05


def test_a_dictionary_that_writes_nothing_is_refused(lab: Lab) -> None:
    with pytest.raises(QklensError) as caught:
        measure(lab, mirror(lab.subject.d_model, shrink=1.0), FOLDER)
    assert "my-dictionary: leaves 1." in str(caught.value)
    assert f"its card gives no figure; expected at most {FVU_LIMIT:.2f}" in str(caught.value)


def test_a_dictionary_far_from_its_card_is_refused_with_both_numbers(lab: Lab) -> None:
    width, fvu = lab.subject.d_model, fvu_of(lab, 0.3)
    promised = (fvu - CARD_SLACK) / CARD_FACTOR
    assert promised > 0
    near = mirror(width, shrink=0.3, fidelity=card(1.05 * promised))
    assert measure(lab, near, FOLDER) == measure(lab, mirror(width, shrink=0.3), FOLDER)
    far = mirror(width, shrink=0.3, fidelity=card(0.9 * promised))
    with pytest.raises(QklensError, match=rf"resid_pre\.\d unexplained on this run's prompts, .* {0.9 * promised:.2f}"):
        measure(lab, far, FOLDER)


@pytest.mark.parametrize(("l0", "far"), [(17.0, False), (63.0, False), (15.0, True), (65.0, True)])
def test_an_l0_far_from_the_card_s_is_refused_with_both_numbers(lab: Lab, l0: float, far: bool) -> None:
    width = lab.subject.d_model
    assert width == 32, "each mirror's L0"
    stated = mirror(width, fidelity=card(0.01, l0))
    if not far:
        assert measure(lab, stated, FOLDER) == measure(lab, mirror(width), FOLDER)
        return
    with pytest.raises(QklensError, match=rf"has 32 active features a token at resid_pre\.1 .* its card says {l0:g}"):
        measure(lab, stated, FOLDER)


def test_no_card_excuses_a_dictionary_that_writes_nothing(lab: Lab) -> None:
    with pytest.raises(QklensError, match=re.escape(f"its card says 0.95; expected at most {FVU_LIMIT:.2f}")):
        measure(lab, mirror(lab.subject.d_model, shrink=1.0, fidelity=card(0.95)), FOLDER)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"d_model": 64}, "its vectors have 64 dimensions, llama's stream has 32"),
        ({"layers": (1, 3)}, "writes resid_pre.3, llama has layers 0 to 2"),
        ({"layers": (-1, 1)}, "writes resid_pre.-1, llama has layers 0 to 2"),
        (
            {"model_sha256": "ab" * 32},
            "was trained on weights with model_sha256 abababababab, llama's are cdcd",
        ),
    ],
)
def test_a_dictionary_of_another_model_is_refused(lab: Lab, changes: dict[str, Any], says: str) -> None:
    subject = replace(lab.subject, sha256="cd" * 32)
    healthy = mirror(subject.d_model, model_sha256="cd" * 32)
    check_belongs(healthy.config, subject, FOLDER)
    other = replace(healthy, config=healthy.config.model_copy(update=changes))
    with pytest.raises(QklensError) as caught:
        check_belongs(other.config, subject, FOLDER)
    assert str(caught.value).startswith(f"{FOLDER / 'dictionary.json'}: {says}")


def test_an_unrecorded_model_may_be_any(lab: Lab) -> None:
    check_belongs(mirror(lab.subject.d_model).config, replace(lab.subject, sha256="cd" * 32), FOLDER)


def test_the_shipped_dictionary_is_the_chat_model_s_and_no_other_checkpoint_s() -> None:
    folder = organism_folder() / "dictionary"
    dictionary = load_crosscoder(folder)
    check_belongs(dictionary.config, load_subject(organism_folder() / "chat"), folder)
    with pytest.raises(QklensError, match="was trained on weights with model_sha256"):
        check_belongs(dictionary.config, load_subject(organism_folder() / "base"), folder)
