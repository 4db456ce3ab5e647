"""A healthy model directory and a healthy dictionary, copied for each test to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qklens.dictionaries.activation import Threshold
from qklens.dictionaries.config import DictionaryConfig
from qklens.dictionaries.crosscoder import Crosscoder, save_crosscoder
from tiny_folders import write_tiny_llama


@pytest.fixture(scope="session")
def healthy_model(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("healthy") / "model", word_tokenizer)


@pytest.fixture
def model(tmp_path: Path, healthy_model: Path) -> Path:
    return Path(shutil.copytree(healthy_model, tmp_path / "model"))


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    layers, group, width = (1, 3), 4, 6
    crosscoder = Crosscoder(
        config=DictionaryConfig(
            format="qklens-dictionary-2",
            name="healthy",
            layers=layers,
            features_per_layer=group,
            d_model=width,
            activation=Threshold(threshold=0.5),
            site="resid_pre",
            model_sha256="00" * 32,
            training={},
            fidelity=None,
        ),
        encoder={layer: torch.ones(group, width) for layer in layers},
        encoder_bias={layer: torch.zeros(group) for layer in layers},
        decoder={layer: torch.ones(2 * group, width) for layer in layers},
        decoder_bias={layer: torch.zeros(width) for layer in layers},
    )
    save_crosscoder(crosscoder, tmp_path / "dictionary")
    return tmp_path / "dictionary"
