"""What a loaded model is identified by, and every dtype that the command line offers."""

from __future__ import annotations

import json

import pytest
import torch

from qklens.dictionaries.crosscoder import load_crosscoder
from qklens.dictionaries.directions import Directions
from qklens.files import sha256_files
from qklens.models.checkpoint import inspect_checkpoint
from qklens.models.loading import DTYPES, load_subject
from qklens.models.selfcheck import self_check
from qklens.studies.resources import organism_folder
from tiny_folders import edit_json, write_tiny_llama


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_exactly_enough(dtype):
    folder = organism_folder()
    check = self_check(load_subject(folder / "chat", dtype=dtype))
    bound = {"float64": 1e-6, "float32": 1e-5}.get(dtype, 3e-2)
    assert max(row.score_error for row in check.layers) <= bound
    assert check.padding_error <= max(bound, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sources_encode_streams_of_half_precision(dtype):
    stream = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    directions = Directions(("a", "b"), {1: torch.eye(128)[:2]}, {1: torch.zeros(128)})
    crosscoder = load_crosscoder(organism_folder() / "dictionary", torch.device("cpu"))
    for source in (directions, crosscoder):
        half = source.encode(1, lambda _: stream.to(dtype)).float()
        assert torch.allclose(half, source.encode(1, lambda _: stream.to(dtype).float()), atol=1e-6)


def test_config_tokenizer_and_weights_all_identify_a_model(tmp_path, word_tokenizer):
    folder = write_tiny_llama(tmp_path / "model", word_tokenizer)

    def identity() -> str:
        return sha256_files(list(inspect_checkpoint(folder).files))

    seen = [identity()]
    assert identity() == seen[0]
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    seen.append(identity())
    edit_json(folder / "tokenizer_config.json", note="other")
    seen.append(identity())
    assert len(set(seen)) == 3


def test_the_dictionary_belongs_to_the_chat_model_that_ships():
    folder = organism_folder()
    config = json.loads((folder / "dictionary" / "dictionary.json").read_text())
    assert config["model_sha256"] == load_subject(folder / "chat").sha256
