"""Shared by all tests: shapes and types of every public function are checked, and tiny models are made in memory."""

from __future__ import annotations

from jaxtyping import install_import_hook

install_import_hook(
    ["qklens.models", "qklens.dictionaries", "qklens.interventions", "qklens.analyses"], "beartype.beartype"
)

from collections.abc import Callable  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from qklens.data.items import SHIPPED, Item, load_dataset  # noqa: E402
from qklens.data.render import INSTRUCTION  # noqa: E402
from qklens.models.families import load_family  # noqa: E402
from qklens.models.subject import Subject, wrap_model  # noqa: E402
from word_level import make_word_tokenizer  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run in as many processes as there are cores to count on; a second thread each only makes them wait."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def items() -> tuple[Item, ...]:
    return load_dataset("harm_pressure").items


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    texts = [INSTRUCTION]
    for name in SHIPPED:
        for item in load_dataset(name).items:
            texts += [item.question, item.correct, item.incorrect, item.harmful_intent, item.benign_intent]
    return make_word_tokenizer(texts)


@pytest.fixture(scope="session")
def tiny_llama(word_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Subject]:
    """A random Llama over the word tokenizer; keyword arguments override its config, `dtype` its precision."""

    def make(*, dtype: torch.dtype = torch.float32, seed: int = 0, **config: object) -> Subject:
        options = {
            "vocab_size": len(word_tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "initializer_range": 0.3,
            "pad_token_id": word_tokenizer.pad_token_id,
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**options, **config})).to(dtype)
        return wrap_model(model, word_tokenizer, load_family("llama"))

    return make
