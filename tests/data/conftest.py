"""Three tokenizers: `word` (with a chat template), `bytes` and `llama3` (without one)."""

from __future__ import annotations

import pytest
from byte_tokenizers import LLAMA3, byte_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def llama3_like() -> PreTrainedTokenizerFast:
    """Cuts as Llama 3 does: punctuation takes the line breaks after it along."""
    return byte_tokenizer(LLAMA3)


@pytest.fixture(params=["word", "bytes", "llama3"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    name = {"word": "word_tokenizer", "bytes": "bpe", "llama3": "llama3_like"}[request.param]
    return request.getfixturevalue(name)
